"""A real SLURM for the tests of this folder: started once, stopped in any case; and runs submitted to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic

from .launching import NODES, ROOT, Launch, Launched

CLUSTER = Path(__file__).with_name("cluster")


@dataclass(frozen=True)
class Slurm:
    """A cluster of four nodes (8 CPUs and 2 simulated GPUs each) with state and logs in `folder`."""

    folder: Path

    def run(self, *command: str) -> str:
        """Run a command; give its output. If it fails, the test fails with its error message."""
        env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=180, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def cluster(self, word: str, *words: str) -> str:
        """Run `cluster WORD DIR WORDS`, for example cluster("kill-node", "node2")."""
        return self.run(str(CLUSTER), word, str(self.folder), *words)

    def state(self, job: str) -> str:
        """The state of a job: from squeue, and from sacct once slurmctld has forgotten it."""
        listed = self.run("squeue", "--noheader", "--states=all", "--format=%A %T")
        states = dict(line.split() for line in listed.splitlines())
        if job not in states:
            ended = self.run("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}")
            assert ended, f"SLURM knows no job {job}"
            return ended.split()[0]
        return states[job]

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait for the condition; fail the test, with queue and log, if it does not hold in time. To ask takes at most
        a tenth of a core, which the jobs need.
        """
        end = (began := time.monotonic()) + seconds
        while not condition():
            if (now := time.monotonic()) > end:
                log = (self.folder / "log" / "slurmctld.log").read_text().splitlines()[-20:]
                pytest.fail("\n".join([f"not in {seconds} s: {what}", self.run("squeue", "--states=all"), *log]))
            time.sleep(min(2, max(0.1, 9 * (now - began))))
            began = time.monotonic()

    def await_idle(self, nodes: Sequence[str]) -> None:
        """Wait until no job runs or is completing on these nodes."""

        def idle() -> bool:
            return set(self.run("sinfo", "-h", "-p", "main", "-n", ",".join(nodes), "-o", "%T").split()) == {"idle"}

        self.wait(idle, f"{', '.join(nodes)} idle")

    def clear(self) -> None:
        """Cancel all jobs and start all nodes: takes a second, or 7 s if jobs ignore SIGTERM."""
        self.run("scancel", "--quiet", "--user=root")
        self.cluster("up")
        self.wait(lambda: not self.run("squeue", "--noheader"), "an empty queue")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster, to which SLURM_CONF points. Skips, with the reason, where this machine cannot run one."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds sockets
    try:
        done = subprocess.run(
            [CLUSTER, "up", folder, "--nodes", str(len(NODES))],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode == 3:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield Slurm(folder)
    finally:
        # In a session of its own: a second Ctrl-C ends pytest, but not this.
        subprocess.run([CLUSTER, "down", folder], capture_output=True, stdin=subprocess.DEVNULL, start_new_session=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    folder = tmp_path_factory.mktemp("slurm-data") / "set"
    pack(from_synthetic(200, 32), folder, shard_size=50)
    return folder


@pytest.fixture(scope="session")
def cluster_file() -> Path:
    """The project's own cluster file for this cluster."""
    return ROOT / "launch" / "clusters" / "test.yaml"


@pytest.fixture(scope="session")
def launch(slurm: Slurm, data: Path, cluster_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Submits runs by name."""
    return Launch(slurm, data, cluster_file, tmp_path_factory.mktemp("slurm-runs"))


@pytest.fixture(scope="session")
def time_limited(launch: Launch) -> Launched:
    """A run on one rank that reaches its time limit, on a node of its own, beside the other tests.

    A start makes 25 of the 40 steps and then waits for SLURM's signal, which comes 60 to 90 s after it began.
    """
    return launch(
        "time-limit", cluster="time: '0:02:00'\nstart_up: 0\nstop_before_end: 30",
        nodes=NODES[3:], slow=0.1, hold=25,
    )  # fmt: skip


@pytest.fixture(scope="session")
def reference(time_limited: Launched, launch: Launch) -> Launched:
    """A run on two ranks of one node that is not interrupted."""
    assert time_limited.job  # queued first, as it takes longest
    launched = launch("reference", nodes=NODES[:1], shape=["--tasks-per-node", "2"])
    launched.finish()
    return launched
