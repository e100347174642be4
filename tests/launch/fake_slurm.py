"""Shared by the tests of launch: paths, settings of a small run, and fake commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_dist import config
from mae_dist.run import layout

ROOT = Path(__file__).parents[2]
CLUSTER_FILE = str(ROOT / "launch" / "clusters" / "test.yaml")
SMALL = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.precision=fp32", "train.global_batch=16",
]  # fmt: skip


def write_config(run: Path, verb: str, settings: Any, data_fingerprint: str) -> None:
    """Write the config.yaml of a run that has been started with these settings."""
    run.mkdir(exist_ok=True)
    head = f"format: {layout.FORMAT}\nverb: {verb}\ndata_fingerprint: {data_fingerprint}\ntotal_steps: 100\n"
    (run / layout.CONFIG).write_text(head + config.dump(settings))


def command(folder: Path, name: str, text: str) -> None:
    """Write a shell script as the command `name`."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
