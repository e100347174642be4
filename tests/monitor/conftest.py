"""A SLURM that consists of the commands which a test gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`slurm(squeue="echo '7|RUNNING'")` installs scripts under these names; no other command is found.

    Their output is that of a real SLURM 22.05.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))

    def install(**scripts: str) -> None:
        for name, text in scripts.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)

    return install
