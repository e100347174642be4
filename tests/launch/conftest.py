"""Small data, and a fake SLURM: commands that answer as SLURM would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_slurm import command

from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of its own for a test that may damage it."""
    pack(from_synthetic(32, 16), tmp_path / "set", shard_size=16)
    return tmp_path / "set"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with fake commands of SLURM, which a test may replace. sbatch accepts every job, counts from
    1 and keeps the script as N.sbatch and its environment as N.env; squeue knows no job; scancel writes its arguments
    to the file `cancelled`.
    """
    commands = tmp_path / "slurm"
    commands.mkdir()
    command(commands, "sinfo", "echo 'main*|infinite|gpu:2|8|16000|4'")
    command(commands, "srun", "exit 1")
    command(commands, "sacct", "exit 1")
    command(commands, "squeue", "exit 0")
    command(commands, "scancel", f'echo "$@" > {commands}/cancelled')
    command(
        commands,
        "sbatch",
        f"""[ "$1" != --test-only ] || exit 0
        n=$(($(ls {commands}/*.sbatch 2>/dev/null | wc -l) + 1))
        cp "$1" {commands}/$n.sbatch; env > {commands}/$n.env; echo "Submitted batch job $n\"""",
    )
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return commands
