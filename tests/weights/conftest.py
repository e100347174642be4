"""The command line for tests of import and export."""

from __future__ import annotations

import pytest
from trained import Cli

from mae_dist.__main__ import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli(argument, ...)` runs a mae-dist command in this process; it must succeed, and its output is returned."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run
