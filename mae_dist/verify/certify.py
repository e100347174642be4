"""`mae-dist certify`: one short pretraining in every shape that this machine can run, and the gaps between them.

The reference runs on one rank. Runs on several ranks with DDP, FSDP2 and HSDP, with many micro-batches, with a stop and
a resume, and on a changing number of ranks must take the same samples in the same order and have equal losses, up to
the order of float sums; a run resumed in its own shape must be bit-identical. Each run is the command that a user would
type, in processes of its own. A second call skips the runs that are finished.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mae_dist import config, devices, dist, errors
from mae_dist.cli import Parser
from mae_dist.run import checkpoint, directory
from mae_dist.run.layout import step_of
from mae_dist.verify import certificate, processes
from mae_dist.verify.certificate import FAILED, HEADINGS, IDENTICAL, Certificate, ShapeRow

NUM_TRAIN = 160
MIN_STEPS = 6
WIDTH = 120
"""Characters of a line where there is no terminal."""
SETTINGS = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "mae.decoder_dim=32", "mae.decoder_depth=1",
    "mae.decoder_heads=4", "train.global_batch=22", "train.precision=fp32", "train.clip_grad=1", "train.ema=0.9",
    "optim.base_lr=1e-2", "data.shuffle_window=4",
]  # fmt: skip
"""Settings without a CONFIG.yaml. 22 images divide neither by 3 nor by 4; 20 steps are nearly three epochs."""
TRACKED = ["track.every=1", "track.ids=true", "track.wandb=off", "machine.restarts=0"]
SET_BY_CERTIFY = {"out", "train.steps", "track.every", "track.ids", "track.wandb", "machine.restarts",
                  "machine.processes", "machine.strategy", "machine.shards"}  # fmt: skip
"""Settings that a user cannot give."""


@dataclass(frozen=True)
class Leg:
    """A part of a run between two stops: its number of ranks and the settings that differ from the reference."""

    ranks: int
    settings: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """The settings of this part, for the command line."""
        return [f"machine.processes={self.ranks}", *self.settings]


@dataclass(frozen=True)
class Shape:
    """A run of several legs with a stop between them, and the run that it must equal; `exact`: bit for bit."""

    title: str
    folder: str
    legs: tuple[Leg, ...]
    against: str = "reference"
    exact: bool = False


def main(argv: list[str]) -> int:
    """Run every shape, print and write the certificate; exit status DONE if all rows pass, else FAILED."""
    options = parse(argv)
    out, data = options.out, options.out / "data"
    defaults = [] if options.config else [*SETTINGS, f"data.path={data}"]
    overrides = [*defaults, *options.overrides, *TRACKED, f"train.steps={options.steps}"]
    settings = config.load("pretrain", options.config, [*overrides, f"out={out}"])
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    shapes, left_out = plan(options.ranks, settings, num_gpus)
    shapes = chosen(shapes, options.only)
    dist.setup(use_gpu=False)  # a group of one, in which checkpoints can be read
    out.mkdir(parents=True, exist_ok=True)
    if defaults and settings.data.path == str(data):
        processes.embedded_data(data, NUM_TRAIN)
    command = ["pretrain", *([options.config] if options.config else []), *overrides]
    print(f"certify: {len(shapes)} shapes of {options.steps} steps, {settings.train.precision}, into {out}", flush=True)
    for shape, why in left_out.items():
        print(f"left out: {shape}: {why}", flush=True)
    rows = []
    for number, shape in enumerate(shapes, 1):
        print(f"[{number}/{len(shapes)}] {shape.title} ...", flush=True)
        began = time.perf_counter()
        failure = run_shape(shape, command, out / shape.folder, options.steps)
        rows.append(compare_shape(shape, out, failure))
        cells = rows[-1].cells()
        gaps = [f"{heading} {cell}" for heading, cell in zip(HEADINGS[1:-1], cells[1:-1], strict=True) if cell]
        print(f"    {'  '.join([*gaps, cells[-1]])}  {time.perf_counter() - began:.0f} s", flush=True)
    found = make_certificate(out, rows, left_out, devices.of_rank(0))
    found.write(out)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(found))
    print(f"{'every row passes' if found.passed else 'NOT every row passes'}; see {out}/certificate.md and .json")
    return errors.DONE if found.passed else errors.FAILED


def parse(argv: list[str]) -> Any:
    """The command line: `config` (a CONFIG.yaml or None), `overrides`, `ranks` (ascending, with 1), `steps`, `out`."""
    parser = Parser(
        prog="mae-dist certify", description="Compare one short run in every shape that this machine can run."
    )
    parser.add_argument("overrides", nargs="*", metavar="CONFIG.yaml section.key=value", help="settings of the run")
    parser.add_argument("--ranks", default="1,2,3,4", help="numbers of ranks (default 1,2,3,4)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default 20)")
    parser.add_argument("--only", metavar="A,B", help="only these rows, by their folders: fsdp-2,resume-fsdp-2")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/certify"), help="folder for the runs and the certificate"
    )
    options = parser.parse_intermixed_args(argv)
    options.config, options.overrides = config.split_words("certify", options.overrides)
    try:
        options.ranks = sorted({1, *map(int, options.ranks.split(","))})
    except ValueError:
        raise ValueError(f"--ranks {options.ranks}: expected numbers with commas, for example 1,2,4") from None
    if options.ranks[0] < 1:
        raise ValueError(f"--ranks {options.ranks[0]}: must be 1 or more")
    if options.steps < MIN_STEPS:
        raise ValueError(f"--steps {options.steps}: must be {MIN_STEPS} or more, to stop twice on the way")
    for override in options.overrides:
        if override.partition("=")[0] in SET_BY_CERTIFY:
            raise ValueError(f"{override}: certify sets this itself; use --ranks, --steps and --out")
    if dist.launched():
        raise ValueError("certify starts its ranks itself; start it without torchrun")
    return options


def chosen(shapes: list[Shape], only: str | None) -> list[Shape]:
    """The shapes of these folders, with those that they are compared with; None: all."""
    if only is None:
        return shapes
    names, known = only.split(","), {shape.folder: shape for shape in shapes}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {only}: no row {unknown[0]!r}; with these ranks there are {', '.join(known)}")
    wanted = {*names, *(known[name].against for name in names)}
    wanted |= {known[name].against for name in wanted}
    return [shape for shape in shapes if shape.folder in wanted]


def plan(ranks: list[int], settings: Any, num_gpus: int | None) -> tuple[list[Shape], dict[str, str]]:
    """The shapes to run, the reference first, and those that this machine cannot run, each with the reason."""
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
        folder = f"chain-{'-'.join(str(leg.ranks) for leg, _ in legs)}-1"
        shapes.append(Shape(title, folder, (*(leg for leg, _ in legs), one)))
    return shapes, left_out


def accumulating(several: list[int], settings: Any) -> Iterator[Shape]:
    """Shapes with about four times as many micro-batches as the settings have, where the batch is large enough."""
    batch, micro = settings.train.global_batch, settings.machine.micro_batch
    for ranks in (1, *several):
        share = -(-batch // ranks)
        size = -(-(min(micro, share) if isinstance(micro, int) else share) // 4)
        if size < share:
            title, folder, strategy = f"{ranks} ranks, FSDP2", f"accumulation-fsdp-{ranks}", ("machine.strategy=fsdp",)
            if ranks == 1:
                title, folder, strategy = "1 rank", "accumulation", ()
            leg = Leg(ranks, (*strategy, f"machine.micro_batch={size}"))
            yield Shape(f"{title}, micro-batches of {size}", folder, (leg,))


def compare_shape(shape: Shape, out: Path, failure: str | None) -> ShapeRow:
    """Compare the run of a shape with its reference; `failure` says why it did not run, if so.

    Raises ValueError if the reference of all shapes did not run.
    """
    folder, is_reference = out / shape.folder, shape.folder == shape.against
    gaps, verdict = None, FAILED
    if failure is None:
        try:
            run, reference = (certificate.read_finished(out / name) for name in (shape.folder, shape.against))
            gaps = certificate.measure_gaps(run, reference, certificate.planned_samples(folder))
            allowed = certificate.tolerance(directory.RunDir(folder).settings()[2].train.precision)
            verdict = certificate.verdict(gaps, allowed, shape.exact)
        except ValueError as error:
            failure = str(error)
    if is_reference and failure is not None:
        raise ValueError(f"the reference did not run: {failure}")
    if is_reference and verdict == IDENTICAL:
        verdict = "the reference"
    return ShapeRow(shape.title, shape.folder, shape.against, certificate.read_starts(folder), gaps, verdict, failure)


def run_shape(shape: Shape, command: list[str], folder: Path, steps: int) -> str | None:
    """Run the legs of a shape that are not done yet; None, or what went wrong."""
    run, num_legs = directory.RunDir(folder), len(shape.legs)
    for number in range(min(len(ranks_of_legs(run)), num_legs - 1), num_legs):
        last = number == num_legs - 1
        log = folder.with_name(f"{shape.folder}.log")
        leg = Leg(1) if run.result() else shape.legs[number]  # one process is enough to compare settings
        with processes.start([*command, f"out={folder}", *leg.overrides()], log) as process:
            if not last and processes.wait_for_step(process, folder, steps * (number + 1) // num_legs):
                process.terminate()
            status = process.wait()
        if not last and status == errors.DONE:
            return f"it finished before it could be stopped; remove {folder} and give more --steps"
        if status != (errors.DONE if last else errors.STOPPED):
            return f"status {status}: {processes.last_line(log)}"
    ranks = [leg.ranks for leg in shape.legs]
    if ranks_of_legs(run)[:num_legs] != ranks and num_legs > 1:
        return f"its legs ran on {ranks_of_legs(run)} ranks, not on {ranks}; remove {folder}"
    return None


def ranks_of_legs(run: directory.RunDir) -> list[int]:
    """The number of ranks of each start that led to a later checkpoint."""
    newest = max(map(step_of, run.checkpoints()), default=0)
    ranks = {start.step: start.ranks for start in certificate.read_starts(run.path)}
    return [number for step, number in ranks.items() if step < newest]


def make_certificate(out: Path, rows: list[ShapeRow], left_out: dict[str, str], device: torch.device) -> Certificate:
    """The certificate of these rows, with the settings and data of the reference."""
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
    """The certificate's rows as a table for the terminal."""
    table = Table(title=f"one run in {len(found.rows)} shapes; gaps to 1 rank")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading in HEADINGS[1:-1])
    for row in found.rows:
        table.add_row(*row.cells())
    return table
