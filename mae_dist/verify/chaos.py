"""`mae-dist chaos`: inject faults into a run under torchrun by a seeded plan, and compare it with an undisturbed run.

The settings run twice: once undisturbed, and once with ranks killed and hung, power lost, tars truncated, checkpoints
damaged, disks full, NaN in the loss, and calls of the file system refused. In the end both must have trained on the
same samples in the same order, with the same losses and to the same weights, bit for bit.
"""

import argparse
import dataclasses
import json
import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from mae_dist import config as configuration
from mae_dist import errors
from mae_dist.cli import Parser
from mae_dist.data.index import Dataset
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.verify import chaos_table, compare, inject_io, inject_nan
from mae_dist.verify.chaos_table import FaultRow, Totals
from mae_dist.verify.faults import ELASTIC, KINDS, Fault, Target
from mae_dist.verify.torchrun import RECOVERY_TIME, NotRecovered, TorchrunRun

log = logging.getLogger(__name__)

NUM_TRAIN, NUM_TEST, SHARD_SIZE = 256, 32, 32
SLOT = 40
"""Steps of the run for each fault, which is injected in the first half of them."""
MODEL = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "mae.decoder_dim=32", "mae.decoder_depth=1",
    "mae.decoder_heads=4", "train.global_batch=16", "train.precision=fp32", "train.clip_grad=1", "optim.base_lr=1e-2",
]  # fmt: skip
"""Settings without a CONFIG.yaml."""
PACE = [
    "checkpoint.every=5", "checkpoint.rewind_after=3", "machine.timeout=10", "machine.workers=1",
]  # fmt: skip
"""Settings that make faults and recoveries quick; settings of the command line overrule them."""
SET_BY_CHAOS = ("out", "data.path", "data.split", "train.steps", "track.every", "track.ids")
"""Settings that a user cannot give."""
TAIL_LINES = 40


def main(argv: list[str]) -> int:
    """Run the plan; exit status DONE if every promise was kept, else FAILED. Raises ValueError for a user's mistake."""
    options = parse(argv)
    began, out = time.perf_counter(), Path(os.path.abspath(options.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {options.out}: exists and is not an empty folder; choose another or remove it")
    kinds = kinds_of(options)
    faults = plan(options.seed, options.faults, kinds)
    overrides = [*settings(options), f"train.steps={(len(faults) + 1) * SLOT}", f"data.path={out / 'data'}"]
    files = [options.config] if options.config else []
    config = configuration.load("pretrain", options.config, [*overrides, f"out={out / 'run'}"])
    configuration.check_world(config, options.processes + (ELASTIC in kinds))

    make_data(out / "data")
    (out / "plan.json").write_text(json.dumps([dataclasses.asdict(fault) for fault in faults], indent=1) + "\n")
    log.info("planned faults: %d, in %s", len(faults), out / "plan.json")

    nan_samples, io_faults = out / "nan_samples.json", out / "io_faults"

    def job(name: str, module: str) -> TorchrunRun:
        command = ["pretrain", *files, *overrides, f"out={out / name}"]
        environment = {inject_nan.VARIABLE: str(nan_samples), inject_io.VARIABLE: str(io_faults)}
        environment |= on_cpus(options.processes)
        return TorchrunRun(out / name, module, command, options.processes, out / f"{name}.log", environment)

    undisturbed, disturbed = job("undisturbed", "mae_dist"), job("run", inject_nan.__name__)
    target = Target(disturbed, config, options.processes, compare.planned_order(config), nan_samples, io_faults)
    results: list[FaultResult] = []
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: no process is left behind
        signal.signal(number, signal.default_int_handler)
    try:
        log.info("undisturbed run of %d steps on %d ranks: %s", config.train.steps, options.processes, undisturbed.log)
        undisturbed.start()
        undisturbed.finish()
        log.info("run with faults: %s", disturbed.log)
        inject_faults(target, faults, results)
    except KeyboardInterrupt:
        log.error("interrupted; all processes are ended, and %s holds what was done", out)
        return errors.INTERRUPTED
    except NotRecovered as error:
        failed = disturbed if disturbed.log.is_file() else undisturbed
        log.error("%s\nthe last lines of %s:\n%s", error, failed.log, tail(failed.log))
    finally:
        undisturbed.kill()
        disturbed.kill()
    return report(target, undisturbed, len(faults), results, out, time.perf_counter() - began)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `config` is a CONFIG.yaml or None, `overrides` the section.key=value."""
    parser = Parser(
        prog="mae-dist chaos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Inject faults into a short pretraining run under torchrun by a seeded plan, and compare it in the end with an
undisturbed run of the same settings: samples with the planned order, losses and weights bit for bit. Exit status 0
only if the run recovered from every fault within {RECOVERY_TIME:.0f} s, lost and repeated no sample, and ended with
the same bits.

Without CONFIG.yaml a tiny model is trained; with one, its model and recipe. The data are always {NUM_TRAIN} small
images that chaos makes in DIR/data: their tars are damaged on purpose, so your data are never used.""",
        epilog="kinds:\n" + "\n".join(f"  {kind:20s}{inject.__doc__}" for kind, inject in KINDS.items()),
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="CONFIG.yaml | section.key=value", help="as for mae-dist pretrain"
    )
    parser.add_argument("--faults", type=int, default=25, help="number of faults (default 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan: kinds, ranks, steps (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="number of ranks, 2 or more (default 2)")
    parser.add_argument("--kinds", help=f"some of the kinds below, with commas (default: all but {ELASTIC})")
    parser.add_argument("--elastic", action="store_true", help=f"{ELASTIC} too; bits may then differ by rounding")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="a new folder (default runs/chaos)")
    options = parser.parse_intermixed_args(argv)
    options.config, options.overrides = configuration.split_words("chaos", options.overrides)
    if options.faults < 1:
        raise ValueError(f"--faults {options.faults}: must be 1 or more")
    if options.processes < 2:
        raise ValueError(f"--processes {options.processes}: must be 2 or more, as ranks detect each other's faults")
    return options


def kinds_of(options: argparse.Namespace) -> list[str]:
    """The kinds to inject, from --kinds and --elastic."""
    kinds = options.kinds.split(",") if options.kinds else [kind for kind in KINDS if kind != ELASTIC]
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {options.kinds}: there is no kind {kind!r}; known: {', '.join(KINDS)}")
    return list(dict.fromkeys([*kinds, ELASTIC] if options.elastic else kinds))


def settings(options: argparse.Namespace) -> list[str]:
    """The settings of both runs but for their folders, data and steps; later ones overrule."""
    for override in options.overrides:
        if override.partition("=")[0] in SET_BY_CHAOS:
            raise ValueError(f"{override}: chaos sets this itself; leave it out")
    model = [] if options.config else MODEL
    return [*model, *PACE, *options.overrides, "data.split=train", "track.every=1", "track.ids=true", "track.wandb=off"]


def plan(seed: int, num_faults: int, kinds: list[str]) -> list[Fault]:
    """Faults in the order of their steps: every kind once, shuffled, before any comes again."""
    draw = random.Random(seed)
    sequence: list[str] = []
    while len(sequence) < num_faults:
        sequence += draw.sample(kinds, len(kinds))
    return [
        Fault(number, kind, number * SLOT + draw.randrange(SLOT // 2), draw.randrange(2**16), draw.random())
        for number, kind in enumerate(sequence[:num_faults], 1)
    ]


def make_data(folder: Path) -> None:
    """Pack the data set. Its image size is left open, so that runs read the tars at each step, not once."""
    pack(from_synthetic(NUM_TRAIN, NUM_TEST), folder, SHARD_SIZE)
    dataclasses.replace(Dataset.load(folder), image_size=None).save(folder)


def on_cpus(processes: int) -> dict[str, str]:
    """Environment that hides the GPUs if there are fewer than ranks, since each rank needs its own."""
    import torch

    return {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < processes else {}


@dataclasses.dataclass(frozen=True)
class FaultResult:
    """One injected fault: the last step before it, and the step reached at the recovery (None: there was none).

    elastic: the number of ranks has changed by then; redone: steps done again; seconds: from the fault to the recovery.
    """

    fault: Fault
    ranks: int
    elastic: bool
    step: int
    recovered_at: int | None
    redone: int | None
    seconds: float


def inject_faults(target: Target, faults: list[Fault], results: list[FaultResult]) -> None:
    """Start the run, inject one fault after the other, append what came of it to `results`, and wait for the run's end.

    Raises NotRecovered at the first fault that the run does not recover from.
    """
    job, elastic = target.job, False
    job.start()
    for fault in faults:
        job.wait(lambda step=fault.step: job.step() >= step, f"step {fault.step}, after which {fault.kind} is injected")
        job.remember()
        step, began, ranks = job.reached, time.perf_counter(), job.num_ranks
        log.info("%d/%d step %d: %s", fault.number, len(faults), step, fault.kind)
        recovery = recovered_at = None
        try:
            recovery = KINDS[fault.kind](target, fault)
            recovered_at = job.step()
        finally:
            elastic = elastic or job.num_ranks != ranks
            redone = recovery.reached - recovery.resumed if recovery else None
            seconds = time.perf_counter() - began
            results.append(FaultResult(fault, job.num_ranks, elastic, step, recovered_at, redone, seconds))
        log.info("    recovered in %.0f s at step %d, %s steps done again", seconds, recovered_at, redone)
    job.finish()


def report(
    target: Target, undisturbed: TorchrunRun, planned: int, results: list[FaultResult], out: Path, seconds: float
) -> int:
    """Compare the two runs, print and write the table; the exit status."""
    steps = target.config.train.steps
    assert steps is not None
    run, reference = (compare.read_evidence(job.run.path) for job in (target.job, undisturbed))
    samples = compare.planned_samples(target.order, target.config.train.global_batch, range(1, steps + 1))

    def compared(first: int, last: int) -> dict[str, Any]:
        stretch = range(first, last + 1)
        counts = dataclasses.asdict(compare.count_sample_errors(run.samples, samples, stretch))
        return counts | {"loss_difference": compare.largest_difference(run.losses, reference.losses, stretch)}

    rows, first = [], 1
    for result in results:
        last = result.recovered_at or target.job.step()
        row = FaultRow(
            number=result.fault.number, kind=result.fault.kind, step=result.step, ranks=result.ranks,
            recovered=result.recovered_at is not None, seconds=result.seconds, redone=result.redone,
            elastic=result.elastic, **compared(first, last),
        )  # fmt: skip
        rows.append(row)
        first = last + 1
    elastic = any(row.elastic for row in rows)
    totals = Totals(
        faults=len(rows), planned=planned, recovered=sum(row.recovered for row in rows), steps=steps,
        redone=sum(row.redone or 0 for row in rows), elastic=elastic, seconds=seconds, **compared(1, steps),
        state_difference=compare.state_difference(run.state, reference.state, key_biases=not elastic),
    )  # fmt: skip
    (out / "chaos.json").write_text(json.dumps(chaos_table.as_json(rows, totals), indent=1) + "\n")
    (out / "chaos.md").write_text(chaos_table.markdown(rows, totals))
    chaos_table.show(rows, totals)
    print(f"{seconds:.0f} s; {out} holds the table (chaos.md, chaos.json), the plan, and both runs with their logs")
    return errors.DONE if chaos_table.passed(rows, totals) else errors.FAILED


def tail(file: Path) -> str:
    """The last TAIL_LINES lines of a log; "" if there is none."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return "\n".join(lines[-TAIL_LINES:])
