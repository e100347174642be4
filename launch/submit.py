"""`mae-dist submit VERB CONFIG.yaml --cluster FILE.yaml [section.key=value ...]`: a run as a SLURM job.

`python launch/submit.py` does the same. Also a sweep of runs as a job array, and a pipeline of stages as jobs that
wait for each other. All checks come first; an error is one sentence, and then nothing is queued. The code and the
resolved settings are copied into the run's folder, so that later edits change no job that waits or is requeued.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # a script has its own folder on the path, not the one around it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main begins, Ctrl-C ends the process without a traceback

import argparse
import dataclasses
import itertools
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launch import cluster as cluster_file
from launch import local, pipeline, preflight, preflight_screen, slurm, snapshot, sweep
from launch.cluster import Cluster
from launch.pipeline import Run, Stage
from launch.task_runner import JobSpec
from mae_dist import config as configuration
from mae_dist import printed
from mae_dist.cli import VERBS
from mae_dist.errors import DONE, INTERRUPTED, USER_ERROR
from mae_dist.forecast import Forecast
from mae_dist.run import identity, jobs, layout, slurm_cli
from mae_dist.schema import SCHEMAS, C, PretrainConfig, SupervisedConfig

DESCRIPTION = """\
Queue a run, a sweep of runs (--sweep), or a pipeline of stages, as SLURM jobs that save and are requeued at
preemption, time limits and lost nodes.

  mae-dist submit pretrain CONFIG.yaml --cluster mine.yaml data.path=DIR out=RUN --nodes 4
  mae-dist submit pretrain CONFIG.yaml --cluster ... out=DIR --sweep optim.base_lr=1e-4,1.5e-4 seed=0,1,2 --at-once 4
  mae-dist submit pipeline PIPELINE.yaml --cluster ...
  mae-dist submit VERB ... --local                      (on this machine without SLURM, one run after another)"""


def main(argv: list[str]) -> int:
    """Run `mae-dist submit ARGV`; give the exit status."""
    printed.log_to_stderr(logging.INFO)
    options = parse(argv)
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        base, stages = stages_of(options)
        if options.local:
            return local.run_stages(stages, options.dry_run)
        with ignore_closed_stdout():
            submit(stages, base, options)
        return DONE
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"mae-dist: {printed.message(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("mae-dist: interrupted, nothing is queued", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def ignore_closed_stdout() -> Iterator[None]:
    """Context in which the reader of standard output, `| head` for example, may exit before the end."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises SystemExit, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="mae-dist submit", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=[*SCHEMAS, "pipeline"])
    parser.add_argument("words", nargs="*", metavar="FILE.yaml | section.key=value", help="as for mae-dist")
    cluster_file.add_flags(parser)
    parser.add_argument("--torchrun", action="store_true", help="one task on each node, which starts its ranks")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="key=a,b,...", help="a job array of all combinations")
    parser.add_argument("--at-once", type=int, default=8, help="runs of a sweep at the same time (default 8)")
    parser.add_argument("--local", action="store_true", help="on this machine without SLURM, one run after another")
    dry = "print the scripts for sbatch, or the commands of --local; write, queue and run nothing, nor call SLURM, "
    dry += "so partitions are not checked"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    if argv and (verb := argv[0]) in VERBS.keys() - {*SCHEMAS, "submit"}:
        parser.exit(
            USER_ERROR, f"mae-dist: submit {verb}: makes no run; submit a pipeline that has a stage `run: {verb} ...`\n"
        )
    return parser.parse_intermixed_args(argv)


def stages_of(options: argparse.Namespace) -> tuple[Path, list[Stage]]:
    """(folder around everything, stages): those of a pipeline's file; one stage for a single run; for a sweep one with
    its runs and one that writes the table of their results.
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
    if len(runs) > 1 and (stages[0].remaining or not (base / "results.md").exists()):
        argv = ("runs", str(base.absolute()), "--results", str(base.absolute() / "results.md"))
        table = Run("results", base / jobs.PIPELINE / "results", argv)
        stages.append(Stage("results", "runs", (table,), (options.verb,), run_after_failures=True))
    return base, stages


def cluster_for(stage: Stage, options: argparse.Namespace) -> Cluster:
    """The cluster file with its overrides: flags first, then the stage's. A stage whose runs are not ranked gets the
    CPUs and memory of one rank.
    """
    if options.cluster is None:
        known = ", ".join(sorted(str(path) for path in Path(__file__).parent.glob("clusters/*.yaml")))
        raise ValueError(f"--cluster FILE.yaml is needed: where to run; there are {known}")
    overrides = cluster_file.overrides_of(options)
    overrides += ["torchrun=true"] if options.torchrun else []
    cluster = cluster_file.load(options.cluster, overrides)
    overrides += [] if stage.ranked else cluster_file.one_rank(cluster)
    with prefix_errors(stage, options):
        return cluster_file.load(options.cluster, [*overrides, *stage.overrides])


def submit(stages: list[Stage], base: Path, options: argparse.Namespace) -> None:
    """Check all stages, queue those that are not done, all of them or none, and print what was queued."""
    remaining = [stage for stage in stages if stage.remaining]
    quoted_base = shlex.quote(str(base))
    if not remaining:
        print_done(stages)
        print(f"next: mae-dist runs {quoted_base}")
        return
    clusters = {stage.name: cluster_for(stage, options) for stage in remaining}
    preflight.check_writable(base)
    preflight.check_idle(run.folder for stage in remaining for run in stage.remaining)
    for stage in remaining:
        with prefix_errors(stage, options):
            check(stage, clusters[stage.name], {other.name for other in remaining})
    if options.dry_run:
        print_done(stages)
        for stage in remaining:
            num = len(stage.remaining)
            print(f"# {stage.name}: {num} job{'s' * (num > 1)}\n{script(stage, clusters[stage.name])}")
            for found in expected(stage, clusters[stage.name], remaining):
                print("\n".join(f"# {line}" for line in preflight_screen.lines(found)) + "\n")
        return
    for stage in remaining:
        for found in expected(stage, clusters[stage.name], remaining):
            if problem := preflight_screen.problem(found):
                logging.warning("%s: %s", stage.name, problem)
    slurm.leave_allocation()
    largest = slurm_cli.max_array_size() if any(len(stage.remaining) > 1 for stage in remaining) else None
    for stage in remaining:
        with prefix_errors(stage, options):
            cluster_file.check_partition(clusters[stage.name])
            slurm.check_script(script(stage, clusters[stage.name], largest))
    code = snapshot.new_snapshot_dir(base.absolute())
    queued = queue(remaining, clusters, base.absolute(), code, largest)
    print_done(stages)
    for stage in remaining:
        print_queued(stage, clusters[stage.name], queued[stage.name])
    numbers = " ".join(slurm.numbers_of(itertools.chain.from_iterable(queued.values())))
    print(f"code  {code} ({(code / layout.REVISION).read_text().strip()})")
    print(f"next: mae-dist runs {quoted_base} --watch | mae-dist logs {quoted_base} | scancel {numbers}")


def expected(stage: Stage, cluster: Cluster, remaining: list[Stage]) -> list[Forecast]:
    """What the first run of a stage is expected to take; none where that is not known before other stages are done."""
    run, waits = stage.remaining[0], {other.name for other in remaining} & {*stage.needs}
    if waits or not isinstance(run.config, PretrainConfig | SupervisedConfig):
        return []
    place = preflight_screen.place_of(cluster)
    return [preflight_screen.without_trial(stage.verb, with_save_interval(run.config, cluster), place)]


@contextmanager
def prefix_errors(stage: Stage, options: argparse.Namespace) -> Iterator[None]:
    """Context in which the message of a ValueError gets the name of the stage in front, if it is a pipeline's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}" if options.verb == "pipeline" else str(error)) from error


def queue(
    remaining: list[Stage], clusters: dict[str, Cluster], base: Path, code: Path, largest: int | None
) -> dict[str, list[str]]:
    """Copy the code and queue the stages, in arrays of at most `largest` jobs; give the names of each one's jobs. If
    anything fails, nothing stays queued or written.
    """
    new = [path for path in (code, *code.parents) if not path.exists()]
    queued: dict[str, list[str]] = {}
    try:
        snapshot.copy_code(code)
        for stage in remaining:
            write_settings(stage, clusters[stage.name], code)
            with defer_interrupt():  # until sbatch has printed the job's number
                queued[stage.name] = enqueue(stage, clusters[stage.name], code, queued, largest)
            record_submissions(stage, clusters[stage.name], queued[stage.name])
    except BaseException:
        if queued:
            slurm.cancel(slurm.numbers_of(itertools.chain.from_iterable(queued.values())))
        shutil.rmtree(base if base in new else code, ignore_errors=True)
        for path in new:
            with suppress(OSError):  # another process may have put something there
                path.rmdir()
        raise
    return queued


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Context in which Ctrl-C is deferred to the end. Processes started in it never get it, as they inherit the signal
    mask. The mask alone would not do in this process: a thread of NumPy's could take the signal.
    """
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


def check(stage: Stage, cluster: Cluster, remaining: set[str]) -> None:
    """Run the checks of a stage; those of data and initial weights only if no stage has still to make them."""
    for run in stage.remaining:
        preflight.check_writable(run.folder)
        if run.config is not None:
            if remaining.intersection(stage.needs):
                preflight.check_ranks(run.config, cluster)
                preflight.check_disk(run.config)
            else:
                preflight.check(stage.verb, run.config, cluster)


def job_specs(stage: Stage, cluster: Cluster, code: Path) -> list[JobSpec]:
    """The jobs of a stage. Their settings are files beside the code."""
    return [
        JobSpec(
            argv=(stage.verb, str(settings_file(code, run))) if run.config else run.argv,
            logs=str((stage.folder / jobs.FOLDER).absolute()), ranks_per_node=cluster.ranks_per_node,
            stop_before_end=cluster.stop_before_end, run=str(run.folder.absolute()) if run.config else None,
            restarts=run.config.machine.restarts if run.config else 0,
            ranked=stage.ranked, torchrun=cluster.torchrun, stamp=run.stamp,
        )
        for run in stage.remaining
    ]  # fmt: skip


def settings_file(code: Path, run: Run) -> Path:
    """The file with the resolved settings of a run."""
    return code / "settings" / f"{run.name}.yaml"


def script(stage: Stage, cluster: Cluster, largest: int | None = None) -> str:
    """The script that sbatch will get for the first array of a stage, without the folder of the code and the
    dependency.
    """
    code = Path("CODE")
    return slurm.script(slurm.parts(job_specs(stage, cluster, code), largest)[0], cluster, stage, code)


def write_settings(stage: Stage, cluster: Cluster, code: Path) -> None:
    """Write the resolved settings of the runs beside the code. Paths are absolute, as a job may have another working
    directory than this process.
    """
    for run in stage.remaining:
        if run.config is not None:
            file = settings_file(code, run)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(configuration.dump(identity.absolute(with_save_interval(run.config, cluster))))


def enqueue(stage: Stage, cluster: Cluster, code: Path, queued: dict[str, list[str]], largest: int | None) -> list[str]:
    """Queue the jobs of a stage after those of the stages that it needs; give their names."""
    before = slurm.numbers_of(job for name in stage.needs for job in queued.get(name, ()))
    condition = "afterany" if stage.run_after_failures else "afterok"
    after = f"{condition}:{':'.join(before)}" if before else None
    return slurm.submit(job_specs(stage, cluster, code), cluster, stage, code, after, largest)


def record_submissions(stage: Stage, cluster: Cluster, names: list[str]) -> None:
    """Record each run's job in the run's folder."""
    logs, nodes = str((stage.folder / jobs.FOLDER).absolute()), cluster.nodes if stage.ranked else "1"
    tasks = cluster.ranks_per_node if stage.ranked and not cluster.torchrun else 1
    for run, name in zip(stage.remaining, names, strict=True):
        jobs.record_submission(run.folder, jobs.Submission(name, logs, nodes, tasks))


def with_save_interval(config: C, cluster: Cluster) -> C:
    """The settings with checkpoints every `lose_at_most` minutes, unless they set checkpoint.minutes themselves."""
    if config.checkpoint.minutes is not None:
        return config
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, minutes=cluster.lose_at_most))


def print_done(stages: list[Stage]) -> None:
    """Print the runs and stages that are skipped because they are done."""
    for stage in stages:
        for name in [run.name for run in stage.runs if run.done] if stage.remaining else [stage.name]:
            print(f"{name}: done already, skipped")


def print_queued(stage: Stage, cluster: Cluster, names: list[str]) -> None:
    """Print the job of a stage, its resources, its folder and its first log."""
    many = f"{len(names)} runs, {min(stage.at_once, len(names))} at once, " if len(names) > 1 else ""
    resources = str(cluster) if stage.ranked else f"1 task, {cluster.time}"
    numbers = slurm.numbers_of(names)
    print(f"job{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {stage.name}, {many}{resources}")
    print(f"      {stage.folder}; log {jobs.log_file(stage.folder / jobs.FOLDER, names[0], 0)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
