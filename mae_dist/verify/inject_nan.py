"""`python -m mae_dist.verify.inject_nan VERB ...`: like `python -m mae_dist VERB ...`, with NaN injected into the loss.

The file named in the environment variable MAE_DIST_NAN_SAMPLES lists [epoch, sample id] pairs, as JSON; it may be
replaced at any time. The loss of each listed sample, and with it the gradient, becomes NaN once: injected pairs are
recorded in a second file beside it, so that they are not injected again, in this process or after a restart. Only
`mae-dist chaos` starts its ranks this way; they also meet the faults of `inject_io`.
"""

import json
import os
import runpy
from pathlib import Path

import torch

from mae_dist.batch import Batch
from mae_dist.objectives import Output, mae
from mae_dist.verify import inject_io

VARIABLE = "MAE_DIST_NAN_SAMPLES"
Pair = tuple[int, int]
"""(epoch, sample id)."""


def pending(file: Path) -> set[Pair]:
    """The pairs listed in `file` that have not been injected yet."""
    listed = {(epoch, sample) for epoch, sample in json.loads(file.read_text())} if file.is_file() else set()
    return listed - injected(file)


def injected(file: Path) -> set[Pair]:
    """The pairs that have been injected, from the record beside `file`."""
    record = file.with_suffix(".injected")
    lines = record.read_text().splitlines() if record.is_file() else []
    return {(int(epoch), int(sample)) for epoch, sample in map(str.split, lines)}


def inject(output: Output, batch: Batch, file: Path) -> Output:
    """`output` with NaN for the losses of pending pairs, which are recorded as injected."""
    wanted = pending(file)
    if not wanted:
        return output
    pairs = list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True))
    factor = torch.ones_like(output.loss)
    for row, pair in enumerate(pairs):
        if pair in wanted:
            factor[row] = torch.nan
            with file.with_suffix(".injected").open("a") as stream:
                stream.write("{} {}\n".format(*pair))
    return output._replace(loss=output.loss * factor)


class NanInjector(mae.MAE):
    """MAE with NaN injected into its training losses."""

    def forward(self, batch: Batch) -> Output:
        """The losses of MAE; in training, NaN for pending pairs."""
        output = super().forward(batch)
        return inject(output, batch, Path(os.environ[VARIABLE])) if self.training else output


if __name__ == "__main__":
    inject_io.install(Path(os.environ[inject_io.VARIABLE]))
    mae.MAE = NanInjector  # before any other module imports it
    runpy.run_module("mae_dist", run_name="__main__", alter_sys=True)
