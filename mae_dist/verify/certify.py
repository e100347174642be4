"""`mae-dist certify`: one short pretraining in every shape that this machine can take, and how far they are apart.

One rank is the reference. Several ranks with DDP, FSDP2 and HSDP, many micro-batches, a stop with a resume, and a chain
of other rank counts with stops between must all have its order of samples, and its losses but for the order of float
sums; a resume in the same shape must have every bit. Each run is the command that a user would type, in processes of
its own. Running certify again goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mae_dist import config, dist, signals
from mae_dist.cli import Parser
from mae_dist.run import checkpoint, directory
from mae_dist.run.layout import step_of
from mae_dist.verify import certificate, processes
from mae_dist.verify.certificate import FAILED, HEADINGS, IDENTICAL, Certificate, Row

NUM_TRAIN = 160
LEAST_STEPS = 6
WIDTH = 120
"""Characters of a line where there is no terminal."""
SETTINGS = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "mae.decoder_dim=32", "mae.decoder_depth=1",
    "mae.decoder_heads=4", "train.global_batch=22", "train.precision=fp32", "train.clip_grad=1", "train.ema=0.9",
    "optim.base_lr=1e-2", "data.shuffle_window=4",
]  # fmt: skip
"""Without a CONFIG.yaml. 22 images divide neither by 3 nor by 4; 20 steps pass through the data nearly three times."""
TRACKED = ["track.every=1", "track.ids=true", "track.wandb=off", "machine.restarts=0"]
OURS = {"out", "train.steps", "track.every", "track.ids", "track.wandb", "machine.restarts", "machine.processes",
        "machine.strategy", "machine.shards"}  # fmt: skip
"""Settings that certify itself gives."""


@dataclass(frozen=True)
class Leg:
    """A part of a run between two stops: so many ranks, placed like this."""

    ranks: int
    settings: tuple[str, ...] = ()

    def words(self) -> list[str]:
        return [f"machine.processes={self.ranks}", *self.settings]


@dataclass(frozen=True)
class Shape:
    """A row: legs with a stop after each but the last, and the folder that it must equal (exactly: every bit)."""

    title: str
    folder: str
    legs: tuple[Leg, ...]
    against: str = "reference"
    exact: bool = False


def main(argv: list[str]) -> int:
    """Run every shape, print and write the certificate; 0 when all rows pass, else 1."""
    options = parse(argv)
    out, data = options.out, options.out / "data"
    defaults = [] if options.config else [*SETTINGS, f"data.path={data}"]
    words = [*defaults, *options.words, *TRACKED, f"train.steps={options.steps}"]
    settings = config.load("pretrain", options.config, [*words, f"out={out}"])
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    shapes, left_out = plan(options.ranks, settings, num_gpus)
    device = dist.setup()  # a group of one, in which checkpoints can be read
    out.mkdir(parents=True, exist_ok=True)
    if defaults and settings.data.path == str(data):
        processes.embedded_data(data, NUM_TRAIN)
    command = ["pretrain", *([options.config] if options.config else []), *words]
    print(f"certify: {len(shapes)} shapes of {options.steps} steps, {settings.train.precision}, into {out}", flush=True)
    for shape, why in left_out.items():
        print(f"left out: {shape}: {why}", flush=True)
    rows = []
    for number, shape in enumerate(shapes, 1):
        print(f"[{number}/{len(shapes)}] {shape.title} ...", flush=True)
        began = time.perf_counter()
        rows.append(perform(shape, command, out, options.steps))
        said = [f"{name} {cell}" for name, cell in zip(HEADINGS[1:-1], rows[-1].cells()[1:-1], strict=True) if cell]
        print(f"    {'  '.join([*said, rows[-1].cells()[-1]])}  {time.perf_counter() - began:.0f} s", flush=True)
    found = conclude(out, rows, left_out, device)
    found.write(out)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(found))
    print(f"{'every row passes' if found.passed else 'NOT every row passes'}; {out}/certificate.md and .json say all")
    return 0 if found.passed else 1


def parse(argv: list[str]) -> Any:
    """The arguments; ValueError for what a user got wrong."""
    parser = Parser(prog="mae-dist certify", description="The same run in every shape that this machine can take.")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml section.key=value", help="settings of the run")
    parser.add_argument("--ranks", default="1,2,3,4", help="numbers of ranks (default 1,2,3,4)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default 20)")
    parser.add_argument("--out", type=Path, default=Path("runs/certify"), help="folder of runs and certificate")
    options = parser.parse_intermixed_args(argv)
    options.config, options.words = config.split_words("certify", options.words)
    try:
        options.ranks = sorted({1, *map(int, options.ranks.split(","))})
    except ValueError:
        raise ValueError(f"--ranks {options.ranks}: expected numbers with commas, for example 1,2,4") from None
    if options.ranks[0] < 1:
        raise ValueError(f"--ranks {options.ranks[0]}: must be 1 or more")
    if options.steps < LEAST_STEPS:
        raise ValueError(f"--steps {options.steps}: must be {LEAST_STEPS} or more, to stop twice on the way")
    for word in options.words:
        if word.partition("=")[0] in OURS:
            raise ValueError(f"{word}: certify sets this itself; use --ranks, --steps and --out")
    if dist.launched():
        raise ValueError("certify starts its ranks itself; start it without torchrun")
    return options


def plan(ranks: list[int], settings: Any, num_gpus: int | None) -> tuple[list[Shape], dict[str, str]]:
    """The shapes to run, the reference first, and those that this machine cannot take, with the reason."""
    config.check_world(settings, ranks[-1])
    most = ranks[-1] if num_gpus is None else min(num_gpus, ranks[-1])
    several = [n for n in ranks if 1 < n <= most]
    left_out = {f"{n} ranks": f"this machine has {num_gpus} GPUs" for n in ranks if n > most}
    one, ddp, fsdp = Leg(1), ("machine.strategy=ddp",), ("machine.strategy=fsdp",)
    shapes = [Shape("1 rank", "reference", (one,))]
    shapes += [Shape(f"{n} ranks, DDP", f"ddp-{n}", (Leg(n, ddp),)) for n in several]
    shapes += [Shape(f"{n} ranks, FSDP2", f"fsdp-{n}", (Leg(n, fsdp),)) for n in several]
    if 4 in several:
        hsdp = Leg(4, ("machine.strategy=hsdp", "machine.shards=2"))
        shapes.append(Shape("4 ranks, HSDP of 2 x 2", "hsdp-2x2", (hsdp,)))
    else:
        left_out["HSDP"] = "needs 4 ranks" + ("" if 4 in ranks else " (--ranks)")
    shapes += list(accumulating(several[:1], settings))
    shapes.append(Shape("1 rank, resumed", "resume", (one, one), exact=True))
    if several:
        few = Leg(several[0], fsdp)
        shapes.append(Shape(f"{several[0]} ranks, FSDP2, resumed", f"resume-fsdp-{several[0]}", (few, few),
                            against=f"fsdp-{several[0]}", exact=True))  # fmt: skip
        many = Leg(several[-1], ddp)
        shapes.append(Shape(f"{several[-1]} ranks, DDP, resumed", f"resume-ddp-{several[-1]}", (many, many),
                            against=f"ddp-{several[-1]}", exact=True))  # fmt: skip
        legs = [(Leg(n, fsdp), f"{n} ranks FSDP2") if n == several[-1] else (Leg(n, ddp), f"{n} ranks DDP")
                for n in several[-2:][::-1]]  # fmt: skip
        title = " -> ".join([*(text for _, text in legs), "1 rank"])
        shapes.append(
            Shape(title, f"chain-{'-'.join(str(leg.ranks) for leg, _ in legs)}-1", (*(leg for leg, _ in legs), one))
        )
    return shapes, left_out


def accumulating(several: list[int], settings: Any) -> Iterator[Shape]:
    """Shapes with about four times as many micro-batches as the settings have, where the batch is large enough."""
    batch, micro = settings.train.global_batch, settings.machine.micro_batch
    for ranks in (1, *several):
        share = -(-batch // ranks)
        size = -(-(min(micro, share) if isinstance(micro, int) else share) // 4)
        if size < share:
            where = (
                ("1 rank", "accumulation") if ranks == 1 else (f"{ranks} ranks, FSDP2", f"accumulation-fsdp-{ranks}")
            )
            parallel = () if ranks == 1 else ("machine.strategy=fsdp",)
            leg = Leg(ranks, (*parallel, f"machine.micro_batch={size}"))
            yield Shape(f"{where[0]}, micro-batches of {size}", where[1], (leg,))


def perform(shape: Shape, words: list[str], out: Path, steps: int) -> Row:
    """Run a shape and compare what it leaves. The reference must succeed (ValueError)."""
    folder, is_reference = out / shape.folder, shape.folder == shape.against
    gaps, verdict = None, FAILED
    why = follow(shape, words, folder, steps)
    if why is None:
        try:
            run, reference = (certificate.read_evidence(out / name) for name in (shape.folder, shape.against))
            gaps = certificate.compare(run, reference, certificate.planned_ids(folder))
            allowed = certificate.tolerance(directory.RunDir(folder).settings()[2].train.precision)
            verdict = certificate.verdict(gaps, allowed, shape.exact)
        except ValueError as error:
            why = str(error)
    if is_reference and why is not None:
        raise ValueError(f"the reference did not run: {why}")
    if is_reference and verdict == IDENTICAL:
        verdict = "the reference"
    return Row(shape.title, shape.folder, shape.against, certificate.read_starts(folder), gaps, verdict, why)


def follow(shape: Shape, words: list[str], folder: Path, steps: int) -> str | None:
    """Go through the legs of a shape from where its folder is; None, or what went wrong."""
    run, num_legs = directory.RunDir(folder), len(shape.legs)
    for number in range(min(len(effective(run)), num_legs - 1), num_legs):
        last = number == num_legs - 1
        said = folder.with_name(f"{shape.folder}.log")
        leg = Leg(1) if run.result() else shape.legs[number]  # one process is enough to compare settings
        with processes.start([*words, f"out={folder}", *leg.words()], said) as process:
            if not last and processes.watch(process, folder, steps * (number + 1) // num_legs):
                process.terminate()
            status = process.wait()
        if not last and status == 0:
            return f"it was finished before it could be stopped; remove {folder} and give more --steps"
        if status != (0 if last else signals.REQUEUE):
            return f"status {status}: {processes.last_line(said)}"
    ranks = [leg.ranks for leg in shape.legs]
    if effective(run)[:num_legs] != ranks and num_legs > 1:
        return f"its parts ran on {effective(run)} ranks, not on {ranks}; remove {folder}"
    return None


def effective(run: directory.RunDir) -> list[int]:
    """Ranks of those starts that led to a checkpoint further on."""
    newest = max(map(step_of, run.checkpoints()), default=0)
    ranks = {start.step: start.ranks for start in certificate.read_starts(run.path)}
    return [number for step, number in ranks.items() if step < newest]


def conclude(out: Path, rows: list[Row], left_out: dict[str, str], device: torch.device) -> Certificate:
    """The certificate of these rows."""
    reference = directory.RunDir(out / "reference")
    _, fingerprint, settings = reference.settings()
    shapes = checkpoint.names_in(reference.checkpoints()[-1])
    return Certificate(
        passed=all(row.verdict != FAILED for row in rows),
        provenance=directory.provenance(device),
        code=sorted({str(start.git) for row in rows for start in row.starts}),
        settings=config.to_dict(settings),
        data_fingerprint=fingerprint,
        num_parameters=sum(shape.numel() for name, shape in shapes.items() if name.startswith("model.")),
        tolerance=certificate.tolerance(settings.train.precision),
        rows=rows,
        left_out=left_out,
    )


def table(found: Certificate) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"the same run in {len(found.rows)} shapes; gaps to 1 rank")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading in HEADINGS[1:-1])
    for row in found.rows:
        table.add_row(*row.cells())
    return table
