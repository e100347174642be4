"""`mae-dist logs RUN [--lines N] [--all]`: the output of the newest job of a run, the first failing rank first.

Of a run without a job, or that went on without one, it is the end of its log file, with --all the whole.

For a folder of several runs, a sweep or a pipeline, the first failed run is shown; if none failed, the table of all.

When one rank fails, the others soon report that it does not answer, and a launcher kills the rest. So the task that is
likeliest the root cause is shown in full, and each other task in one line. What a rank failed of is read from the run's
events; failures before the run could record any are found in the logs.
"""

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mae_dist.cli import Parser
from mae_dist.errors import FAILED, SIGNAL_BASE, USER_ERROR
from mae_dist.monitor import runs
from mae_dist.monitor.status import (
    EXPECTED_STATUSES,
    PROGRAM,
    describe_status,
    failures,
    find_runs,
    last_ends,
    one_start,
    root_failure,
    run_status,
)
from mae_dist.printed import escaped
from mae_dist.run import events, jobs, layout, log_file, slurm_cli
from mae_dist.run.events import Event
from mae_dist.run.jobs import Submission

LINES = 40
PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""What torch puts before each line of a traceback."""
TRACEBACK = "Traceback (most recent call last):"
CHAINED = ("During handling of the above exception", "The above exception was the direct cause")


@dataclass(frozen=True)
class Task:
    """One task in one start: its log and its events of that start, the run's event `fail` of its rank if there is one,
    and the lines of the log that say why it ended.
    """

    number: int
    lines: list[str]
    events: list[Event]
    failure: Event | None
    cause: range

    @property
    def name(self) -> str:
        """Number and, where it is known, host."""
        return f"task {self.number}" + next(
            (f" on {escaped(event['host'])}" for event in self.events if "host" in event), ""
        )

    @property
    def end(self) -> Event | None:
        """The event `end`, None if there is none."""
        return last_ends({0: self.events}).get(0)

    @property
    def failed(self) -> bool:
        """Whether it ended neither well nor because it was stopped."""
        return self.end is not None and self.end["status"] not in EXPECTED_STATUSES

    @property
    def message(self) -> str:
        """Why it ended, in one line; empty where that is not known."""
        return last_line(self.lines, self.cause) or (self.failure or {}).get("message", "")

    @property
    def outcome(self) -> str:
        """How and when it ended."""
        return f"{describe_status(self.end['status'])} at {self.end['time']}" if self.end else "no end is recorded"

    @property
    def sort_key(self) -> tuple[int, str, int]:
        """Sort key of failed tasks, likeliest root cause first: those with a cause of their own (earliest first), then
        those that agreed in silence, then those that lost another rank or got SIGTERM. A killed rank logs nothing.
        """
        assert self.end is not None
        status, traceback = self.end["status"], len(self.cause) > 1
        lost = not traceback and self.failure is not None and self.failure["reason"] == "rank_lost"
        silent = not self.message and 0 < status < SIGNAL_BASE
        if lost or (silent and status == FAILED) or status == -signal.SIGTERM:
            return 2, self.end["time"], self.number
        own = traceback or self.failure or status == USER_ERROR or not 0 < status < SIGNAL_BASE
        return (0 if own and not silent else 1), self.end["time"], self.number


def main(argv: list[str]) -> int:
    """Run `mae-dist logs ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist logs", description="The output of the newest job of a run, the first failure first.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, or of several")
    parser.add_argument("--lines", type=int, default=LINES, metavar="N", help=f"last lines to show (default: {LINES})")
    parser.add_argument("--all", action="store_true", help="all starts of the job, not only the newest")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    if arguments.lines < 1:
        raise ValueError(f"--lines {arguments.lines}: must be 1 or more")
    if not jobs.submissions(run) and not (run / layout.CONFIG).is_file() and (below := list(find_runs(run))):
        failed = next((row.path for row in runs.read_rows(below) if row.status.state == "failed"), None)
        if failed is None:
            return runs.main([str(run)])
        run = failed
    if is_newest(run / log_file.FILE, jobs.submissions(run)):
        show_file(run, 0 if arguments.all else arguments.lines)
    else:
        show_job(run, newest_submission(run), arguments.lines, arguments.all)
    return 0


def is_newest(file: Path, submissions: list[Submission]) -> bool:
    """Whether the log file of a run was written later than the log of its newest job."""
    logs = [jobs.log_file(Path(job.logs), job.job, 0) for job in submissions[-1:]]
    return file.is_file() and all(not log.is_file() or log.stat().st_mtime < file.stat().st_mtime for log in logs)


def show_file(run: Path, num_lines: int) -> None:
    """Print the status of a run and the last lines of its log file (0: all)."""
    file = run / log_file.FILE
    lines = [*map(escaped, jobs.last_lines(file)[-num_lines:])]
    print(f"{run}: {run_status(run, {})}\n\nlast lines of {file}:" + "".join(f"\n  {line}" for line in lines))


def newest_submission(run: Path) -> Submission:
    """The newest submission of a run. Raises ValueError where there is no run, or where it was not submitted."""
    if submissions := jobs.submissions(run):
        return submissions[-1]
    if (run / layout.CONFIG).is_file():
        raise ValueError(
            f"RUN={run}: was not launched by `mae-dist submit`, so there is no log of it; its record is in "
            f"{run / layout.METRICS} and {run / events.FILE}"
        )
    what = "holds no run of mae-dist" if run.is_dir() else "no such folder"
    raise ValueError(f"RUN={run}: {what}; `mae-dist runs` lists them")


def show_job(run: Path, job: Submission, num_lines: int, all_starts: bool) -> None:
    """Print the status of a run, and the newest start, or all, of its job."""
    logs, tasks, recorded = Path(job.logs), jobs.events(Path(job.logs), job.job), events.read(run)
    states = slurm_cli.states([job.job])
    print(f"{run}: {run_status(run, states)}")
    starts = sorted({event["start"] for task in tasks.values() for event in task}) or [0]
    for start in starts if all_starts else starts[-1:]:
        found = one_start(tasks, start)
        failed = failures_by_task(recorded, failures(recorded, tasks, start), len(found))
        numbers = found.keys() or _tasks_with_log(logs, job.job)
        slurm_state = states.get(job.job, "").partition(" ")[0] if start == starts[-1] else ""
        read = [read_task(logs, job.job, n, start, found.get(n, []), failed.get(n)) for n in sorted(numbers)]
        show_start(logs, job.job, start, read, num_lines, slurm_state)


def failures_by_task(recorded: list[Event], failed: list[Event], num_tasks: int) -> dict[int, Event]:
    """Of each task the `fail` event that is likeliest its cause; a task runs one rank or, under torchrun, several."""
    starts = [event for event in recorded if event["event"] == "start"]
    num_ranks = starts[-1].get("ranks", num_tasks) if starts else num_tasks
    by_task: dict[int, list[Event]] = {}
    for event in failed:
        by_task.setdefault(event["rank"] * num_tasks // max(num_ranks, num_tasks, 1), []).append(event)
    return {task: event for task, found in by_task.items() if (event := root_failure(found))}


def show_start(logs: Path, job: str, start: int, tasks: list[Task], num_lines: int, slurm_state: str) -> None:
    """Print one start of a job: the cause and the last lines of one task, and one line for each other task."""
    if not tasks:
        known = f"SLURM's state is {slurm_state}" if slurm_state else "SLURM does not know it"
        print(f"job {job} has no output yet: {known}, and no task of it has left a log in {logs}")
        return
    failed = sorted((task for task in tasks if task.failed), key=lambda task: task.sort_key)
    shown = failed[0] if failed else tasks[0]
    more = f", the first of {len(failed)} that failed" if len(failed) > 1 else ""
    more += f"; SLURM's state is {slurm_state}" if slurm_state and not shown.end else ""
    print(f"{shown.name}, start {start} of job {job}: {shown.outcome}{more}")
    cause = shown.cause if failed else range(0)
    if failed and shown.message:
        print("\n" + "\n".join([shown.lines[i] for i in cause] or [shown.message]))
    rest = [line for i, line in enumerate(shown.lines) if i not in cause][-num_lines:]
    print(f"\nlast lines of {jobs.log_file(logs, job, shown.number)}:" + "".join(f"\n  {line}" for line in rest))
    print()
    for task in tasks:
        if task is not shown:
            print(f"{task.name}: {task.outcome}" + (f": {task.message}" if task.failed and task.message else ""))


def read_task(logs: Path, job: str, number: int, start: int, found: list[Event], failure: Event | None = None) -> Task:
    """A task with its log of one start: from the line that begins it to the next such line, else what is before any."""
    lines = [*map(escaped, jobs.log_lines(logs, job, number))]
    marks = [i for i, line in enumerate(lines) if line.startswith("== start ")]
    begun = [i for i in marks if lines[i].startswith(f"== start {start} of job {job},")]
    after = begun[-1] if begun else -1
    lines = lines[max(after, 0) : next((i for i in marks if i > after), None)]
    end = last_ends({number: found}).get(number, {"status": FAILED})
    return Task(number, lines, found, failure, find_cause(lines, end["status"], failure))


def find_cause(lines: list[str], status: int, failure: Mapping[str, str] | None = None) -> range:
    """Where the cause of an exit status lies in a log: a traceback, or one line of mae-dist; empty if there is neither.

    The line wins if the ``status`` is a user error, or if the event ``failure`` has its message; but after the loss of
    another rank, or without an event, a traceback explains more.
    """
    trace = traceback_in(lines)
    messages = [i for i, line in enumerate(lines) if line.startswith(PROGRAM)]
    if failure:
        messages = [i for i in messages if lines[i] == f"{PROGRAM}{failure['message']}"]
    own = failure["reason"] != "rank_lost" if failure else status == USER_ERROR
    if trace and not (messages and own):
        return trace
    return range(messages[-1], messages[-1] + 1) if messages else range(0)


def last_line(lines: list[str], cause: range) -> str:
    """The last line of a cause, without what torch puts before it: of a traceback the error."""
    return PREFIX.sub("", lines[cause[-1]]).strip() if cause else ""


def traceback_in(lines: list[str]) -> range:
    """Where the last traceback lies, with those that it is chained to; not one that Python has only reported."""
    bare = [PREFIX.sub("", line) for line in lines]
    before = ["", *bare]
    heads = [i for i, line in enumerate(bare) if line == TRACEBACK and not before[i].startswith("Exception ignored")]
    if not heads:
        return range(0)
    begin = last = heads.pop()
    while heads and any(line.startswith(CHAINED) for line in bare[max(0, begin - 3) : begin]):
        begin = heads.pop()
    framed = True  # frames are indented, the message after them is not; one that quotes a traceback goes on after it
    for place in range(last + 1, len(bare)):
        if TRACEBACK in bare[place]:
            framed = True
        elif not bare[place].startswith((" ", "\t")):
            if not framed:
                return range(begin, place)
            framed = False
    return range(begin, len(bare))


def _tasks_with_log(logs: Path, job: str) -> list[int]:
    """Tasks of a job that have a log, even if none of them has started."""
    names = (file.name.removeprefix(f"{job}_").removesuffix("_log.out") for file in logs.glob(f"{job}_*_log.out"))
    return [int(name) for name in names if name.isdecimal()]
