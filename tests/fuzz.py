"""`python tests/fuzz.py [--mutations N] [--seed S] [--only TEXT]`: verbs on damaged inputs, each in a forked process.

Mutation number n of seed s is always the same: of one command one file that it reads. An ending is right if the exit
status is 0, or 1 or 2 with a message. Wrong are an exception that leaves the program (trace), a process that is ended
by a signal (crash), one that computes for more than LIMIT s or waits ten times as long (hang), one that needs GROWTH
bytes more than usual (memory), a fault of the machine where only a file is damaged (fault), and a message with control
characters or of more than LONGEST bytes (message; but a script of --dry-run is shown whole). Silent are damages after
which the same is printed as without, up to numbers.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).parents[1]))

import torch
from fuzz_inputs import COMMANDS, Command, make
from fuzz_mutations import mutated

from launch import submit
from mae_dist import __main__
from mae_dist.stages import pretrain, probe

IMPORTED = (pretrain, probe)
"""Modules that forked processes need not import again."""
LIMIT, GROWTH, LONGEST = 20.0, 600 * 2**20, 3000
WRONG = ("trace", "crash", "hang", "memory", "fault", "message")
ADDRESS_SPACE = 24 * 2**30


class Ended(NamedTuple):
    """How a process has ended: its exit status (negative: by this signal), memory, seconds of computing or a tenth of
    those from start to end, whichever are more, and what it has printed."""

    status: int
    memory: int
    seconds: float
    output: str


class Case(NamedTuple):
    """A mutation: its number, the command, the damaged file, and what came of it."""

    number: int
    command: Command
    file: str
    ending: str
    ended: Ended


def run(argv: Sequence[str], folder: Path) -> Ended:
    """Run `mae-dist ARGV`, or `submit ARGV`, in a forked process with this working folder; it is killed after ten times
    LIMIT seconds, as the machine may be busy.
    """
    log, began = folder / ".log", time.monotonic()
    if not (child := os.fork()):
        _be_child([*argv], folder, log)
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - began > 10 * LIMIT:
            os.killpg(child, signal.SIGKILL)
            pid, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    output = log.read_bytes().decode(errors="replace")
    seconds = max(usage.ru_utime + usage.ru_stime, (time.monotonic() - began) / 10)
    return Ended(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, seconds, output)


def _be_child(argv: list[str], folder: Path, log: Path) -> None:
    """End this process with the exit status of a command; 70 where an exception leaves it."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0), "utf-8", "surrogateescape") for n in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = submit.main(argv[1:]) if argv[0] == "submit" else __main__.main(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ending(ended: Ended, usual: Ended, argv: tuple[str, ...]) -> str:
    """What to call this ending, compared with that of the undamaged inputs."""
    if ended.seconds > LIMIT:
        return "hang"
    if ended.status < 0:
        return "crash"
    if ended.status == 70 or "Traceback (most recent call last)" in ended.output:
        return "trace"
    if ended.memory > usual.memory + GROWTH:
        return "memory"
    is_script = argv[0] == "submit" and ended.status == 0
    is_long = len(ended.output) > LONGEST + len(usual.output) and not is_script
    if is_long or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", ended.output.replace("\r", "")):
        return "message"
    if ended.status == 1 and argv[:2] not in (("data", "check"), ("logs", "run")):
        return "fault"
    if ended.status:
        return "refused"
    return "silent" if words(ended.output) == words(usual.output) else "told"


def words(output: str) -> list[str]:
    """The words that a command has printed: numbers and times may differ."""
    return re.findall(r"[a-z_]{3,}", output.lower())


def fuzz(seed: int, numbers: range, only: Sequence[str] = ("",)) -> Iterator[Case]:
    """Run the mutations of these numbers, of commands that contain one of these texts."""
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    with TemporaryDirectory(prefix="fuzz-") as place:
        good = Path(place) / "good"
        good.mkdir()
        commands = [command for command in COMMANDS if any(text in " ".join(command.argv) for text in only)]
        needed = {name for command in commands for name in command.reads}
        make(good, needed, lambda argv: check(argv, run(argv, good)))
        usual = {command: _in_copy(command, good, Path(place) / "usual") for command in commands}
        for command, ended in usual.items():
            check(command.argv, ended)
        for number in numbers:
            chance = random.Random(f"{seed} {number}")
            command = commands[number % len(commands)]
            file = chance.choice(sorted(str(f.relative_to(good)) for p in command.damaged for f in good.glob(p)))
            content = mutated((good / file).read_bytes(), file, chance)
            ended = _in_copy(command, good, Path(place) / "damaged", file, content)
            yield Case(number, command, file, ending(ended, usual[command], command.argv), ended)


def check(argv: Sequence[str], ended: Ended) -> None:
    """Raise AssertionError where a command has not succeeded."""
    assert ended.status == 0, f"{' '.join(argv)}: status {ended.status}, {ended.output}"


def _in_copy(command: Command, good: Path, folder: Path, file: str = "", content: bytes = b"") -> Ended:
    """Run a command in a copy of what it reads, in which a file has another content."""
    folder.mkdir()
    try:
        for name in command.reads:
            (shutil.copytree if (good / name).is_dir() else shutil.copy2)(good / name, folder / name)
        if file:
            (folder / file).write_bytes(content)
        return run(list(command.argv), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run mutations, print those that end wrongly, and count all; 1 where some end wrongly."""
    parser = argparse.ArgumentParser(description="Run verbs on damaged inputs.")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="commands that contain one of these texts")
    parser.add_argument("--show", nargs="*", default=WRONG, help="endings to print in full")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    numbers = range(arguments.first, arguments.first + arguments.mutations)
    for case in fuzz(arguments.seed, numbers, arguments.only):
        counts[case.command.name, case.ending] += 1
        if case.ending in arguments.show:
            print(f"--- {case.number} {case.ending}: {' '.join(case.command.argv)}, {case.file}, {case.ended[:3]}")
            print(case.ended.output[-1500:], flush=True)
    for name in dict.fromkeys(name for name, _ in counts):
        print(f"{name:16s}", {kind: count for (other, kind), count in counts.items() if other == name})
    totals = Counter({kind: sum(c for (_, k), c in counts.items() if k == kind) for _, kind in counts})
    print("all", dict(totals))
    return int(any(totals[kind] for kind in WRONG))


if __name__ == "__main__":
    sys.exit(main())
