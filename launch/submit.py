"""`python launch/submit.py VERB CONFIG.yaml --cluster FILE.yaml [section.key=value ...]`: a run as a SLURM job.

Also a sweep of runs as a job array, and a pipeline of stages as jobs that wait for each other. Everything that can be
known is checked first; a mistake is one sentence, and nothing is queued. The code is copied into the run's folder, and
the settings are resolved there, so that nothing that is edited later changes a job that waits or is requeued.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this folder is on it, not the one around it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main begins Ctrl-C just ends it, without a word

import argparse
import dataclasses
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from launch import cluster as clusters
from launch import local, pipeline, preflight, slurm, snapshot, sweep
from launch.cluster import Cluster
from launch.pipeline import Run, Stage
from launch.task_runner import JobSpec
from mae_dist import config as configuration
from mae_dist.run import jobs, layout
from mae_dist.schema import SCHEMAS

DESCRIPTION = """\
Queue a run, a sweep of runs (--sweep), or a pipeline of stages, as SLURM jobs that save and requeue themselves at
preemption, time limits and lost nodes.

  submit.py pretrain CONFIG.yaml --cluster launch/clusters/mine.yaml data.path=DIR out=RUN --nodes 4
  submit.py pretrain CONFIG.yaml --cluster ... out=DIR --sweep optim.base_lr=1e-4,1.5e-4 seed=0,1,2 --at-once 4
  submit.py pipeline PIPELINE.yaml --cluster ...        (or --local, on this machine without SLURM)"""


def main(argv: list[str]) -> int:
    """Submit; 0, or 2 for what a user got wrong, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = parse(argv)
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        base, stages = stages_of(options)
        if options.local:
            if options.verb != "pipeline":
                raise ValueError(f"--local: is for a pipeline; on this machine a run is `mae-dist {options.verb} ...`")
            return local.walk(stages)
        with until_enough_is_read():
            submit(stages, base, options)
        return 0
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"submit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("submit: interrupted, nothing is queued", file=sys.stderr)
        return 130


@contextmanager
def until_enough_is_read() -> Iterator[None]:
    """Whoever reads what is printed in it, `| head` say, may leave before the end."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. `file` is the CONFIG.yaml, the pipeline's, or None; `settings` are the section.key=value."""
    parser = argparse.ArgumentParser(
        prog="submit.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=[*SCHEMAS, "pipeline"])
    parser.add_argument("words", nargs="*", metavar="FILE.yaml | section.key=value", help="as for mae-dist")
    parser.add_argument("--cluster", help="WHERE: a cluster file, see launch/clusters/example.yaml")
    for name in ("partition", "nodes", "gpus-per-node", "tasks-per-node", "time"):
        parser.add_argument(f"--{name}", help=f"overrules {name.replace('-', '_')} of the cluster file")
    parser.add_argument("--torchrun", action="store_true", help="one task and torchrun on each node")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="key=a,b,...", help="a job array of all combinations")
    parser.add_argument("--at-once", type=int, default=8, help="runs of a sweep at the same time (default 8)")
    parser.add_argument("--local", action="store_true", help="a pipeline on this machine, one stage after another")
    dry = "print what sbatch would get; queue and write nothing, and ask SLURM nothing, so partitions are not checked"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    return parser.parse_intermixed_args(argv)


def stages_of(options: argparse.Namespace) -> tuple[Path, list[Stage]]:
    """(the folder that everything lies in, the stages): those of a pipeline's file; for a single run one; for a sweep
    its runs, and the table of their results.
    """
    file, settings = configuration.split_words(options.verb, options.words)
    if options.at_once < 1:
        raise ValueError(f"--at-once {options.at_once}: must be 1 or more")
    if options.verb == "pipeline":
        if file is None or options.sweep:
            raise ValueError("pipeline: needs a PIPELINE.yaml, and no --sweep, as each stage can have a `sweep:`")
        return pipeline.load(file, settings)
    several = sweep.combinations(options.verb, options.sweep)
    base = Path(configuration.load(options.verb, file, [*settings, *several[0][1]]).out)
    runs = [
        pipeline.run_of(name, base / name, options.verb, file, [*settings, *chosen]) if len(several) > 1
        else pipeline.run_of(options.verb, base, options.verb, file, [*settings, *chosen])
        for name, chosen in several
    ]  # fmt: skip
    stages = [Stage(options.verb, options.verb, tuple(runs), at_once=options.at_once)]
    if len(runs) > 1 and (stages[0].waiting or not (base / "results.md").exists()):
        words = ("runs", str(base.absolute()), "--results", str(base.absolute() / "results.md"))
        table = Run("results", base / jobs.RECORDS / "results", words)
        stages.append(Stage("results", "runs", (table,), (options.verb,), whatever_came=True))
    return base, stages


def where(options: argparse.Namespace, stage: Stage) -> Cluster:
    """The cluster file with what overrules it: flags, then the stage's shape. Of a stage that no ranks can share the
    share of one rank.
    """
    if options.cluster is None:
        known = ", ".join(sorted(str(path) for path in Path(__file__).parent.glob("clusters/*.yaml")))
        raise ValueError(f"--cluster FILE.yaml is needed: where to run; there are {known}")
    flags = {name: getattr(options, name) for name in ("partition", "nodes", "gpus_per_node", "tasks_per_node", "time")}
    if flags["time"] and flags["time"].isdigit():  # minutes, as for sbatch
        flags["time"] = f"{int(flags['time']) // 60}:{int(flags['time']) % 60:02d}:00"
    words = [f"{name}={pipeline.as_word(value)}" for name, value in flags.items() if value is not None]
    words += ["torchrun=true"] if options.torchrun else []
    place = clusters.load(options.cluster, words)
    words += [] if stage.ranked else clusters.one_rank(place)
    with naming(stage, options):
        return clusters.load(options.cluster, [*words, *stage.shape])


def submit(stages: list[Stage], base: Path, options: argparse.Namespace) -> None:
    """Check all stages, then queue those that are not done, in their order; all of them or none. Speaks after that."""
    waiting = [stage for stage in stages if stage.waiting]
    home = shlex.quote(str(base))
    if not waiting:
        tell_done(stages)
        print(f"next: mae-dist runs {home}")
        return
    places = {stage.name: where(options, stage) for stage in waiting}
    preflight.check_writable(base)
    preflight.check_idle(run.folder for stage in waiting for run in stage.waiting)
    for stage in waiting:
        with naming(stage, options):
            check(stage, places[stage.name], {other.name for other in waiting})
    scripts = {stage.name: script(stage, places[stage.name]) for stage in waiting}
    if options.dry_run:
        tell_done(stages)
        for stage in waiting:
            num = len(stage.waiting)
            print(f"# {stage.name}: {num} job{'s' * (num > 1)}\n{scripts[stage.name]}")
        return
    slurm.leave_allocation()
    for stage in waiting:
        with naming(stage, options):
            clusters.check_real(places[stage.name])
            slurm.rehearse(scripts[stage.name])
    code = snapshot.new_snapshot_dir(base.absolute())
    queued = queue(waiting, places, base.absolute(), code)
    tell_done(stages)
    for stage in waiting:
        tell(stage, places[stage.name], queued[stage.name])
    numbers = " ".join(map(number, queued.values()))
    print(f"code  {code} ({(code / 'REVISION').read_text().strip()})")
    print(f"next: mae-dist runs {home} --watch | mae-dist logs {home} | scancel {numbers}")


@contextmanager
def naming(stage: Stage, options: argparse.Namespace) -> Iterator[None]:
    """What is wrong with a stage of a pipeline begins with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}" if options.verb == "pipeline" else str(error)) from error


def queue(waiting: list[Stage], places: dict[str, Cluster], base: Path, code: Path) -> dict[str, list[str]]:
    """Copy the code and queue the stages; the names of each one's jobs. All of it or, whatever comes, nothing."""
    new = [path for path in (code, *code.parents) if not path.exists()]
    queued: dict[str, list[str]] = {}
    try:
        snapshot.take(code)
        for stage in waiting:
            freeze(stage, places[stage.name], code)
            with undisturbed():  # until sbatch has given its number
                queued[stage.name] = enqueue(stage, places[stage.name], code, queued)
            note(stage, places[stage.name], queued[stage.name])
    except BaseException:
        if queued:
            subprocess.run(["scancel", *map(number, queued.values())], check=False)
        shutil.rmtree(base if base in new else code, ignore_errors=True)
        for path in new:
            with suppress(OSError):  # others may have put something there
                path.rmdir()
        raise
    return queued


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Processes that are started in it never get it, as they inherit the mask,
    which alone would not do here: a thread of NumPy's could take the signal.
    """
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if noted:
        raise KeyboardInterrupt


def number(names: list[str]) -> str:
    """The number of the job that has these names, which may be an array."""
    return names[0].partition("_")[0]


def check(stage: Stage, place: Cluster, waiting: set[str]) -> None:
    """What can be known of a stage now: of the data and the start only if they are not still to be made."""
    for run in stage.waiting:
        preflight.check_writable(run.folder)
        if run.config is not None:
            if waiting.intersection(stage.needs):
                preflight.check_shape(run.config, place)
                preflight.check_disk(run.config)
            else:
                preflight.check(stage.verb, run.config, place)


def jobs_of(stage: Stage, place: Cluster, code: Path) -> list[JobSpec]:
    """The jobs of a stage, which find their settings beside the code."""
    return [
        JobSpec(
            words=(stage.verb, str(settings_file(code, run))) if run.config else run.words,
            logs=str((stage.home / jobs.FOLDER).absolute()), ranks_per_node=place.ranks_per_node,
            stop_before_end=place.stop_before_end, run=str(run.folder.absolute()) if run.config else None,
            restarts=run.config.machine.restarts if run.config else 0,
            ranked=stage.ranked, torchrun=place.torchrun, receipt=run.receipt,
        )
        for run in stage.waiting
    ]  # fmt: skip


def settings_file(code: Path, run: Run) -> Path:
    """Where the resolved settings of a run lie."""
    return code / "settings" / f"{run.name}.yaml"


def script(stage: Stage, place: Cluster) -> str:
    """What sbatch will get, but for where the code lies and what is waited for."""
    code = Path("CODE")
    return slurm.script(jobs_of(stage, place, code), place, stage, code)


def freeze(stage: Stage, place: Cluster, code: Path) -> None:
    """Write the settings of the runs where their jobs find them. A job may have another working directory than this
    process, so its paths are absolute.
    """
    for run in stage.waiting:
        if run.config is not None:
            file = settings_file(code, run)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(configuration.dump(layout.absolute(saving(run.config, place))))


def enqueue(stage: Stage, place: Cluster, code: Path, queued: dict[str, list[str]]) -> list[str]:
    """Queue the jobs of a stage after those that it needs; their names."""
    before = [number(queued[name]) for name in stage.needs if name in queued]
    word = "afterany" if stage.whatever_came else "afterok"
    after = f"{word}:{':'.join(before)}" if before else None
    return slurm.submit(jobs_of(stage, place, code), place, stage, code, after)


def note(stage: Stage, place: Cluster, names: list[str]) -> None:
    """Note in each run's folder that it was submitted."""
    logs = str((stage.home / jobs.FOLDER).absolute())
    tasks = place.ranks_per_node if stage.ranked and not place.torchrun else 1
    for run, name in zip(stage.waiting, names, strict=True):
        submission = jobs.Submission(name, logs, place.nodes if stage.ranked else "1", tasks, jobs.now())
        jobs.note_submission(run.folder, submission)


def saving(config: Any, place: Cluster) -> Any:
    """The settings with checkpoints as often as the cluster asks for, unless they say themselves."""
    if config.checkpoint.minutes is not None:
        return config
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, minutes=place.lose_at_most))


def tell_done(stages: list[Stage]) -> None:
    """Say what was reached before."""
    for stage in stages:
        for name in [run.name for run in stage.runs if run.done] if stage.waiting else [stage.name]:
            print(f"{name}: done already, passed over")


def tell(stage: Stage, place: Cluster, names: list[str]) -> None:
    """Say what was queued, and where what it says will lie."""
    many = f"{len(names)} runs, {min(stage.at_once, len(names))} at once, " if len(names) > 1 else ""
    shape = str(place) if stage.ranked else f"1 task, {place.time}"
    print(f"job {number(names)}: {stage.name}, {many}{shape}")
    print(f"      {stage.home}; log {jobs.log_file(stage.home / jobs.FOLDER, names[0], 0)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
