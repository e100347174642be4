"""Submit a small run through launch/submit.py to the test cluster, and watch it from outside."""

from __future__ import annotations

import io
import pickle
import subprocess
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from launch import submit as program
from mae_dist.errors import STOPPED
from mae_dist.monitor.status import run_status
from mae_dist.run import events, jobs, slurm_cli
from mae_dist.verify import compare, processes

ROOT = Path(__file__).parents[2]
NODES = ["node1", "node2", "node3", "node4"]
STEPS = 40
SETTINGS = [
    "model.name=vit_demo4", "model.image_size=16", "view.test_crop=1", "mae.decoder_dim=32", "mae.decoder_depth=1",
    "mae.decoder_heads=4", "train.global_batch=16", "train.precision=fp32", f"train.steps={STEPS}",
    "optim.base_lr=1e-2", "track.ids=true", "track.every=1", "checkpoint.every=5", "machine.timeout=60",
]  # fmt: skip
SLOW = """\
# Longer steps without more computing: the run sleeps each time it checks for signals, and from the step `hold` of a
# start on it waits for one.
import itertools
import time

from mae_dist import signals

STEPS = itertools.count(1)


class Slow(signals.StopFlag):
    def __getattribute__(self, name):
        if name == "requested":
            time.sleep({seconds})
            hold = next(STEPS) >= {hold}
            while hold and not super().__getattribute__(name):
                time.sleep(0.1)
        return super().__getattribute__(name)


signals.StopFlag = Slow
"""


class Slurm(Protocol):
    """The methods of the fixture `slurm` that are used here."""

    def run(self, *command: str) -> str: ...
    def state(self, job: str) -> str: ...
    def await_idle(self, nodes: Sequence[str]) -> None: ...
    def wait(self, condition: Callable[[], Any], what: str, seconds: float = ...) -> Any: ...
    def cluster(self, word: str, *words: str) -> str: ...


def submit(*words: str | Path, status: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `launch/submit.py WORDS` in this process, in the folder `cwd`; it must exit with `status`."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, chdir(cwd or Path.cwd()):
        found = program.main([str(word) for word in words])
    assert found == status, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(words, found, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Launched:
    """A submitted run."""

    slurm: Any
    run: Path
    job: str
    code: Path
    total: int = STEPS

    @property
    def logs(self) -> Path:
        return self.run / jobs.FOLDER

    def task_events(self) -> dict[int, list[dict[str, Any]]]:
        return jobs.events(self.logs, self.job)

    def num_starts(self) -> int:
        return sum(event["event"] == "start" for event in self.task_events().get(0, []))

    def starts(self) -> list[dict[str, Any]]:
        """The starts that the run itself has recorded."""
        return events.of(self.run, "start")

    def state(self) -> str:
        """As in `mae-dist runs`."""
        return run_status(self.run, slurm_cli.states([self.job])).state

    def output(self, task: int) -> str:
        return jobs.log_file(self.logs, self.job, task).read_text()

    def saved_before_leaving(self) -> bool:
        """Whether all ranks of all starts that have ended stopped and saved."""
        ends = [[e["status"] for e in own if e["event"] == "end"] for own in self.task_events().values()]
        return all(own and {*own} == {STOPPED} for own in ends)

    def succeeded(self) -> bool:
        return self.slurm.state(self.job) in ("COMPLETED", "COMPLETING")

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 300) -> None:
        self.slurm.wait(condition, f"{self.run.name}: {what}", seconds)

    def reach(self, step: int) -> None:
        self.wait(lambda: processes.reached(self.run) >= step, f"step {step}")

    def finish(self, seconds: float = 300) -> None:
        self.wait((self.run / "result.json").exists, "the end", seconds)
        self.wait(self.succeeded, "success")

    def results(self) -> list[str]:
        """Outcomes in submitit's result files, of the tasks that have one."""
        found = sorted(self.logs.glob(f"{self.job}_*result.pkl"))
        return [pickle.loads(file.read_bytes())[0] for file in found]


@dataclass(frozen=True)
class Launch:
    """Submits runs, by default on 2 nodes x 1 task of the test cluster: each rank costs seconds of start-up."""

    slurm: Slurm
    data: Path
    cluster_file: Path
    folder: Path

    def words(
        self, name: str, words: tuple[str, ...], cluster: str, nodes: Sequence[str], shape: Sequence[str]
    ) -> list[str]:
        """The command line of a run; ``cluster`` overrides lines of the cluster file."""
        plain = yaml.safe_load(self.cluster_file.read_text()) | (yaml.safe_load(cluster) or {})
        others = ",".join(node for node in NODES if node not in nodes)
        plain["sbatch"] = {"exclude": others} | plain.get("sbatch", {})
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(plain))
        where = ["--cluster", str(file), "--nodes", str(len(nodes)), "--tasks-per-node", "1", *shape]
        return ["pretrain", *where, *SETTINGS, f"data.path={self.data}", f"out={self.folder / name}", *words]

    def __call__(
        self, name: str, *words: str, cluster: str = "", nodes: Sequence[str] = NODES[:2], shape: Sequence[str] = (),
        slow: float = 0.0, hold: int = STEPS,
    ) -> Launched:  # fmt: skip
        """Submit a run as `name`, whose steps take `slow` seconds longer, and `hold` of which a start makes at most."""
        if slow:
            folder = self.folder / f"slow-{slow:g}-{hold}"
            folder.mkdir(exist_ok=True)
            (folder / "sitecustomize.py").write_text(SLOW.format(seconds=slow, hold=hold))
            cluster += f"\nsetup: [export PYTHONPATH={folder}]"
        done = submit(*self.words(name, words, cluster, nodes, shape), cwd=self.edited_checkout())
        job = done.stdout.split()[1].rstrip(":")
        code = max((self.folder / name / "code").iterdir())
        return Launched(self.slurm, self.folder / name, job, code)

    def edited_checkout(self) -> Path:
        """A working directory with packages that cannot be imported, as after an edit: jobs must use their copy."""
        for package in ("mae_dist", "launch"):
            (self.folder / package).mkdir(exist_ok=True)
            (self.folder / package / "__init__.py").write_text("raise ImportError('edited after submission')")
        return self.folder

    def refused(self, name: str) -> str:
        """The error message for a run that is refused."""
        return submit(*self.words(name, (), "", NODES[:2], ()), status=2).stderr


def assert_equal_runs(found: Launched, wanted: Launched, elastic: bool = False) -> None:
    """Both runs have the same samples in the same order, losses, weights, moments and averages."""
    assert (found.run / "ids.jsonl").read_text() == (wanted.run / "ids.jsonl").read_text()
    run, reference = (compare.read_evidence(launched.run) for launched in (found, wanted))
    losses = compare.largest_difference(run.losses, reference.losses, range(1, found.total + 1))
    if elastic:
        assert losses < 1e-5
    else:
        assert (compare.state_difference(run.state, reference.state), losses) == (0, 0)
