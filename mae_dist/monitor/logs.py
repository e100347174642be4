"""`mae-dist logs RUN [--lines N] [--all]`: what the newest job of a run said, the first failing rank first.

Of a folder of runs, a sweep's or a pipeline's, the first that has failed is shown; else how all of them stand.

When one rank fails the others soon say that it does not answer, and a launcher kills the rest; so the task that ended
first with a cause of its own is shown in full, and each other task in one line. Reads only, and no torch.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from mae_dist.cli import Parser
from mae_dist.monitor import runs
from mae_dist.monitor.status import STOPPED, Event, ended, endings, find, of_start, run_status
from mae_dist.run import jobs, layout, slurm_cli

LINES = 40
LOST = re.compile(r"does? not answer|did not answer|lost touch")
"""What ranks say that have only lost another (`dist`)."""
PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""What torch puts before each line of a traceback."""
TRACEBACK = "Traceback (most recent call last):"
CHAINED = ("During handling of the above exception", "The above exception was the direct cause")


@dataclass(frozen=True)
class Task:
    """One task in one start: its log of that start, its events, and what of the log is the cause of its end."""

    number: int
    lines: list[str]
    events: list[Event]
    cause: range

    @property
    def host(self) -> str:
        return next((f" on {event['host']}" for event in self.events if "host" in event), "")

    @property
    def end(self) -> Event | None:
        return endings({0: self.events}).get(0)

    @property
    def failed(self) -> bool:
        return self.end is not None and self.end["status"] not in (0, *STOPPED)

    @property
    def said(self) -> str:
        """The cause in one line, a traceback's last."""
        return PREFIX.sub("", self.lines[self.cause[-1]]).strip() if self.cause else ""

    @property
    def blame(self) -> tuple[int, str, int]:
        """Least for the task to show first: those with a cause, the earliest first, then those that agreed in silence,
        then those that lost another or were told to end by SIGTERM. A rank that was killed has nothing to say.
        """
        assert self.end is not None
        status, lost = self.end["status"], LOST.search(self.said)
        silent = not self.cause and 0 < status < 128
        consequence = lost or (silent and status == 1) or status == -signal.SIGTERM
        return (2 if consequence else 1 if silent else 0), self.end["time"], self.number

    def outcome(self) -> str:
        """How it ended, in words."""
        return f"{ended(self.end['status'])} at {self.end['time']}" if self.end else "no end is noted"


def main(argv: list[str]) -> int:
    """Run `mae-dist logs ARGV`; give the exit status."""
    parser = Parser(prog="mae-dist logs", description="What the newest job of a run said, the first failure first.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, or of several")
    parser.add_argument("--lines", type=int, default=LINES, metavar="N", help=f"last lines to show (default: {LINES})")
    parser.add_argument("--all", action="store_true", help="all starts of the job, not only the newest")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    if arguments.lines < 1:
        raise ValueError(f"--lines {arguments.lines}: must be 1 or more")
    submissions = jobs.submissions(run)
    if not submissions and not (run / layout.CONFIG).is_file() and (below := list(find(run))):
        failed = next((row.path for row in runs.look(below) if row.status.state == "failed"), None)
        if failed is None:
            return runs.main([str(run)])
        run, submissions = failed, jobs.submissions(failed)
    if not submissions:
        if not (run / layout.CONFIG).is_file():
            what = "holds no run of mae-dist" if run.is_dir() else "no such folder"
            raise ValueError(f"RUN={run}: {what}; `mae-dist runs` lists them")
        raise ValueError(
            f"RUN={run}: was not launched through launch/submit.py, so nobody kept what it said; its record is in "
            f"{run / 'metrics.jsonl'} and {run / 'provenance.jsonl'}"
        )
    newest = submissions[-1]
    logs, events = Path(newest.logs), jobs.events(Path(newest.logs), newest.job)
    states = slurm_cli.states([newest.job])
    how, word = run_status(run, states), states.get(newest.job, "")
    starts = sorted({event["start"] for notes in events.values() for event in notes}) or [0]
    print(f"{run}: {how}")
    for start in starts if arguments.all else starts[-1:]:
        told = word if start == starts[-1] else ""
        show(logs, newest.job, start, of_start(events, start), arguments.lines, told)
    return 0


def show(logs: Path, job: str, start: int, notes: dict[int, list[Event]], num: int, word: str) -> None:
    """Print what a start of a job said, the last ``num`` lines at most beside the cause; ``word`` is SLURM's."""
    numbers = notes.keys() or {int(name) for name in _numbers(logs, job)}
    tasks = [read(logs, job, number, start, notes.get(number, [])) for number in sorted(numbers)]
    if not tasks:
        known = f"SLURM says {word}" if word else "SLURM does not know it"
        print(f"job {job} has said nothing yet: {known}, and no task of it has left a log in {logs}")
        return
    failures = sorted((task for task in tasks if task.failed), key=lambda task: task.blame)
    shown = failures[0] if failures else tasks[0]
    where = f"task {shown.number}{shown.host}, start {start} of job {job}"
    more = f", the first of {len(failures)} that failed" if len(failures) > 1 else ""
    more += f"; SLURM says {word}" if word and not shown.end else ""
    print(f"{where}: {shown.outcome()}{more}")
    cause = shown.cause if failures else range(0)
    if cause:
        print("\n" + "\n".join(shown.lines[i] for i in cause))
    rest = [line for i, line in enumerate(shown.lines) if i not in cause][-num:]
    print(f"\nlast lines of {jobs.log_file(logs, job, shown.number)}:" + "".join(f"\n  {line}" for line in rest))
    print()
    for task in tasks:
        if task is not shown:
            said = f": {task.said}" if task.said and task.failed else ""
            print(f"task {task.number}{task.host}: {task.outcome()}{said}")


def read(logs: Path, job: str, number: int, start: int, events: list[Event]) -> Task:
    """A task's log from the line that begins its start up to the next; without that line, what came before any."""
    file = jobs.log_file(logs, job, number)
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    marks = [i for i, line in enumerate(lines) if line.startswith("== start ")]
    begun = [i for i in marks if lines[i].startswith(f"== start {start} of job {job},")]
    after = begun[-1] if begun else -1
    lines = lines[max(after, 0) : next((i for i in marks if i > after), None)]
    return Task(number, lines, events, cause_in(lines))


def cause_in(lines: list[str]) -> range:
    """Where the last traceback or the last sentence of mae-dist lies, whichever is later; empty for neither.

    That a rank was lost counts only where there is nothing else: a log may be of several ranks.
    """
    trace = traceback_in(lines)
    sentences = [i for i, line in enumerate(lines) if line.startswith("mae-dist: ")]
    own = [i for i in sentences if not LOST.search(lines[i])]
    if trace and not (own and own[-1] >= trace.stop):
        return trace
    chosen = (own or sentences)[-1:]
    return range(chosen[0], chosen[0] + 1) if chosen else range(0)


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


def _numbers(logs: Path, job: str) -> list[str]:
    """Tasks of a job that have a log, in which nothing need have started."""
    names = (file.name.removeprefix(f"{job}_").removesuffix("_log.out") for file in logs.glob(f"{job}_*_log.out"))
    return [name for name in names if name.isdigit()]
