"""`python -m mae_dist.verify.inject_nan VERB ...` is `python -m mae_dist VERB ...` on hardware that fails now and then.

The file named in the environment variable MAE_DIST_POISON lists [epoch, sample id] pairs, as JSON; it may be replaced
at any time. The loss of such a sample, and with it the gradient, is NaN, once: pairs that have struck are noted in a
second file beside it, so that they do not strike again, in this process or after a restart. `mae-dist chaos` starts its
ranks through this; nothing else does.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import torch

from mae_dist.batch import Batch
from mae_dist.objectives import Output, mae

POISON = "MAE_DIST_POISON"
Pair = tuple[int, int]


def write(file: Path, pairs: list[Pair]) -> None:
    """Let these pairs strike; whole or not at all, as ranks read while it is written."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(pairs))
    os.replace(temporary, file)


def waiting(file: Path) -> set[Pair]:
    """Pairs that have not struck yet."""
    wanted = {(epoch, sample) for epoch, sample in json.loads(file.read_text())} if file.is_file() else set()
    return wanted - struck(file)


def struck(file: Path) -> set[Pair]:
    """Pairs that have struck."""
    noted = file.with_suffix(".struck")
    lines = noted.read_text().splitlines() if noted.is_file() else []
    return {(int(epoch), int(sample)) for epoch, sample in map(str.split, lines)}


def inject(output: Output, batch: Batch, file: Path) -> Output:
    """`output` with NaN for the losses of waiting pairs, which are noted as struck."""
    wanted = waiting(file)
    if not wanted:
        return output
    pairs = list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True))
    factor = torch.ones_like(output.loss)
    for place, pair in enumerate(pairs):
        if pair in wanted:
            factor[place] = torch.nan
            with file.with_suffix(".struck").open("a") as stream:
                stream.write("{} {}\n".format(*pair))
    return output._replace(loss=output.loss * factor)


class NanInjector(mae.MAE):
    """MAE whose training losses may be struck."""

    def forward(self, batch: Batch) -> Output:
        """As healthy hardware computes it, but for waiting pairs."""
        output = super().forward(batch)
        return inject(output, batch, Path(os.environ[POISON])) if self.training else output


if __name__ == "__main__":
    mae.MAE = NanInjector  # before anyone else imports it
    runpy.run_module("mae_dist", run_name="__main__", alter_sys=True)
