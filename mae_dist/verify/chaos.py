"""`mae-dist chaos`: harm a real run under torchrun by a seeded plan, and hold what it becomes against its promises.

The same settings run twice: once undisturbed, and once with ranks killed and hung, power lost, tars cut, checkpoints
damaged, disks full and NaN in the loss. In the end both must have trained on the same samples in the same order, with
the same losses and to the same weights, bit for bit.
"""

from __future__ import annotations

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
from mae_dist.cli import Parser
from mae_dist.data.index import Dataset, open_split
from mae_dist.data.order import Order
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.verify import audit
from mae_dist.verify.faults import ELASTIC, KINDS, Fault, Target
from mae_dist.verify.inject_nan import POISON
from mae_dist.verify.torchrun import PATIENCE, NotRecovered, TorchrunRun

log = logging.getLogger(__name__)

NUM_TRAIN, NUM_TEST, SHARD_SIZE = 256, 32, 32
SLOT = 40
"""Steps of the run for each fault; it strikes in the first half of them."""
MODEL = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "mae.decoder_dim=32", "mae.decoder_depth=1",
    "mae.decoder_heads=4", "train.global_batch=16", "train.precision=fp32", "train.clip_grad=1", "optim.base_lr=1e-2",
]  # fmt: skip
"""The run without a CONFIG."""
PACE = [
    "checkpoint.every=5", "checkpoint.rewind_after=3", "machine.timeout=10", "machine.workers=1",
]  # fmt: skip
"""What makes faults quick to strike and to survive; settings of the command line overrule."""
TAIL_LINES = 40


def main(argv: list[str]) -> int:
    """Run the plan; 0 if every promise was kept, else 1. Raises ValueError for what a user got wrong."""
    options = parse(argv)
    began, out = time.perf_counter(), Path(os.path.abspath(options.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {options.out}: exists and is not an empty folder; choose another or remove it")
    kinds = kinds_of(options)
    faults = plan(options.seed, options.faults, kinds)
    words = [*settings(options), f"train.steps={(len(faults) + 1) * SLOT}", f"data.path={out / 'data'}"]
    files = [options.config] if options.config else []
    config = configuration.load("pretrain", options.config, [*words, f"out={out / 'run'}"])
    configuration.check_world(config, options.processes + (ELASTIC in kinds))

    make_data(out / "data")
    order = Order(config.train.seed, open_split(config.data.path, config.data.split).counts, config.data.shuffle_window)
    (out / "plan.json").write_text(json.dumps([dataclasses.asdict(fault) for fault in faults], indent=1) + "\n")
    log.info("planned faults: %d, in %s", len(faults), out / "plan.json")

    def job(name: str, module: str) -> TorchrunRun:
        command = ["pretrain", *files, *words, f"out={out / name}"]
        environment = {POISON: str(out / "poison.json")} | on_cpus(options.processes)
        return TorchrunRun(out / name, module, command, options.processes, out / f"{name}.log", environment)

    undisturbed, harmed = job("undisturbed", "mae_dist"), job("run", "mae_dist.verify.inject_nan")
    patient = Target(harmed, config, options.processes, order, out / "poison.json")
    struck: list[FaultResult] = []
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: nothing is left behind
        signal.signal(number, signal.default_int_handler)
    try:
        log.info("undisturbed run of %d steps on %d ranks: %s", config.train.steps, options.processes, undisturbed.log)
        undisturbed.start()
        undisturbed.finish()
        log.info("harmed run: %s", harmed.log)
        inject_fault(patient, faults, struck)
    except KeyboardInterrupt:
        log.error("interrupted; nothing is left running, and %s shows how far it came", out)
        return 130
    except NotRecovered as error:
        failed = undisturbed if not harmed.log.is_file() else harmed
        log.error("%s\nthe last lines of %s:\n%s", error, failed.log, tail(failed.log))
    finally:
        undisturbed.kill()
        harmed.kill()
    return conclude(patient, undisturbed, faults, struck, out, time.perf_counter() - began)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. `config` is the CONFIG.yaml or None, `settings` the section.key=value."""
    parser = Parser(
        prog="mae-dist chaos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Harm a short pretraining run under torchrun by a seeded plan, and compare it in the end with an undisturbed run of the
same settings: samples against the planned order, losses and weights bit for bit. Exit status 0 only if the run survived
every fault, each within {PATIENCE:.0f} s, lost and repeated no sample, and came to the same bits.

Without CONFIG.yaml a tiny model is trained; with one, its model and recipe. The data is always chaos's own, {NUM_TRAIN}
small images in DIR/data: its tars are damaged on purpose, so yours are never touched.""",
        epilog="kinds:\n" + "\n".join(f"  {kind:20s}{strike.__doc__}" for kind, strike in KINDS.items()),
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="as for mae-dist pretrain")
    parser.add_argument("--faults", type=int, default=25, help="faults in all (default 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan: kinds, victims, moments (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="ranks, 2 or more (default 2)")
    parser.add_argument("--kinds", help=f"some of the kinds below, with commas (default: all but {ELASTIC})")
    parser.add_argument(
        "--elastic", action="store_true", help=f"{ELASTIC} too; from then on bits may differ by rounding"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="a new folder (default runs/chaos)")
    options = parser.parse_intermixed_args(argv)
    options.config, options.settings = configuration.split_words("chaos", options.words)
    if options.faults < 1:
        raise ValueError(f"--faults {options.faults}: must be 1 or more")
    if options.processes < 2:
        raise ValueError(f"--processes {options.processes}: must be 2 or more, as ranks watch over each other")
    return options


def kinds_of(options: argparse.Namespace) -> list[str]:
    """The kinds that were asked for."""
    kinds = options.kinds.split(",") if options.kinds else [kind for kind in KINDS if kind != ELASTIC]
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {options.kinds}: there is no kind {kind!r}; known: {', '.join(KINDS)}")
    return list(dict.fromkeys([*kinds, ELASTIC] if options.elastic else kinds))


def settings(options: argparse.Namespace) -> list[str]:
    """All settings but those that chaos decides itself, later ones overruling."""
    for word in options.settings:
        if word.partition("=")[0] in ("out", "data.path", "data.split", "train.steps", "track.every", "track.ids"):
            raise ValueError(f"{word}: chaos decides this setting itself; leave it out")
    model = [] if options.config else MODEL
    return [*model, *PACE, *options.settings, "data.split=train", "track.every=1", "track.ids=true", "track.wandb=off"]


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
    """The small data set. Its images are not said to be equally large, so that they are read while the run goes on."""
    pack(from_synthetic(NUM_TRAIN, NUM_TEST), folder, SHARD_SIZE)
    dataclasses.replace(Dataset.load(folder), image_size=None).save(folder)


def on_cpus(processes: int) -> dict[str, str]:
    """Environment that hides GPUs, of which each rank would need its own, where there are too few."""
    import torch

    return {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < processes else {}


@dataclasses.dataclass(frozen=True)
class FaultResult:
    """What is known of a fault when it is over: the last step before it, the step at which it was survived."""

    fault: Fault
    ranks: int
    elastic: bool
    step: int
    survived: int | None
    redone: int | None
    seconds: float


def inject_fault(patient: Target, faults: list[Fault], struck: list[FaultResult]) -> None:
    """Strike one fault after the other, noting each in `struck`, and wait for the end of the run.

    Raises NotRecovered at the first fault that the run does not survive.
    """
    job, elastic = patient.job, False
    job.start()
    for fault in faults:
        job.wait(lambda step=fault.step: job.step() >= step, f"step {fault.step}, at which {fault.kind} strikes")
        job.note()
        step, began, ranks = job.reached, time.perf_counter(), job.processes
        log.info("%d/%d step %d: %s", fault.number, len(faults), step, fault.kind)
        recovery = survived = None
        try:
            recovery = KINDS[fault.kind](patient, fault)
            survived = job.step()
        finally:
            elastic = elastic or job.processes != ranks
            redone = recovery.reached - recovery.resumed if recovery else None
            seconds = time.perf_counter() - began
            struck.append(FaultResult(fault, job.processes, elastic, step, survived, redone, seconds))
        log.info("    recovered in %.0f s at step %d, %s steps done again", seconds, survived, redone)
    job.finish()


def conclude(
    patient: Target, undisturbed: TorchrunRun, faults: list[Fault], struck: list[FaultResult], out: Path, seconds: float
) -> int:
    """Compare, print and write the table; give the exit status."""
    batch, steps = patient.config.train.global_batch, patient.config.train.steps
    assert steps is not None
    lines = patient.job.lines("ids.jsonl")
    found, wanted = audit.losses(patient.job.run), audit.losses(undisturbed.run)

    def compared(first: int, last: int) -> dict[str, Any]:
        samples = dataclasses.asdict(audit.audit(lines, patient.order, batch, first, last))
        return samples | {"loss_difference": audit.loss_difference(found, wanted, first, last)}

    rows, first = [], 1
    for one in struck:
        last = one.survived or patient.job.step()
        row = audit.Row(
            number=one.fault.number, kind=one.fault.kind, step=one.step, ranks=one.ranks, elastic=one.elastic,
            recovered=one.survived is not None, seconds=one.seconds, redone=one.redone, **compared(first, last),
        )  # fmt: skip
        rows.append(row)
        first = last + 1
    elastic = any(row.elastic for row in rows)
    states = audit.final_state(patient.job.run), audit.final_state(undisturbed.run)
    totals = audit.Totals(
        faults=len(rows), planned=len(faults), recovered=sum(row.recovered for row in rows), steps=steps,
        redone=sum(row.redone or 0 for row in rows), state_difference=audit.state_difference(*states, elastic),
        elastic=elastic, seconds=seconds, **compared(1, steps),
    )  # fmt: skip
    (out / "chaos.json").write_text(json.dumps(audit.plain(rows, totals), indent=1) + "\n")
    (out / "chaos.md").write_text(audit.markdown(rows, totals))
    audit.show(rows, totals)
    print(f"{seconds:.0f} s; {out} holds the table (chaos.md, chaos.json), the plan, and both runs with their logs")
    return 0 if audit.verdict(rows, totals) else 1


def tail(file: Path) -> str:
    """The last lines of a log."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return "\n".join(lines[-TAIL_LINES:])
