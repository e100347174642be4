"""A run's folder as a stage opens it, without data: for the tests of run/."""

from __future__ import annotations

from pathlib import Path

from mae_dist import config, schema
from mae_dist.run.directory import RunDir

DATA = "0123456789abcdef"
"""The fingerprint of the data."""


def settings(path: Path, *overrides: str) -> schema.PretrainConfig:
    """Settings of a pretraining in the folder `path`."""
    return config.load("pretrain", None, [f"out={path}", "data.path=/data", "model.name=vit_demo4", *overrides])


def opened(path: Path, *overrides: str) -> RunDir:
    """The folder `path`, opened for a new run with these settings."""
    run = RunDir(path)
    assert run.open("pretrain", settings(path, *overrides), DATA)
    return run
