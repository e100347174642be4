"""A real SLURM of four nodes on this machine, brought up once for all tests here; skipped, with the reason, where that
cannot be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import NODES, ROOT, Launch

from mae_dist import jobs
from mae_dist.data.pack import from_synthetic, pack

SCRIPT = Path(__file__).with_name("cluster")
CANNOT = 3
"""Exit status of the script where SLURM cannot run."""


@dataclass(frozen=True)
class Slurm:
    """The cluster whose state is in `folder`."""

    folder: Path

    def run(self, *command: str) -> str:
        """What a command answers; it must succeed."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def cluster(self, word: str, *words: str) -> None:
        """`cluster WORD DIR WORDS`."""
        self.run(str(SCRIPT), word, str(self.folder), *words)

    def state(self, job: str) -> str:
        """SLURM's word for a job, as mae-dist asks for it."""
        return jobs.states([job]).get(job, "")

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
        """Until the condition holds; the test fails after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster; its folder has a short name, as sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="mae-slurm-", dir="/tmp"))
    for words in (["install"], ["up", str(folder), "--nodes", str(len(NODES))]):
        done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode == CANNOT:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield Slurm(folder)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        del os.environ["SLURM_CONF"]
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    folder = tmp_path_factory.mktemp("slurm-data") / "set"
    pack(from_synthetic(200, 32), folder, shard_size=50)
    return folder


@pytest.fixture(scope="session")
def cluster_file() -> Path:
    """WHERE: the project's own file for this cluster."""
    return ROOT / "launch" / "clusters" / "test.yaml"


@pytest.fixture(scope="session")
def launch(slurm: Slurm, data: Path, cluster_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Submits runs by name."""
    return Launch(slurm, data, cluster_file, tmp_path_factory.mktemp("slurm-runs"))
