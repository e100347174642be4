"""Shared by the tests of launch: paths, settings of a small run, and fake commands."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CLUSTER_FILE = str(ROOT / "launch" / "clusters" / "test.yaml")
SMALL = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.precision=fp32", "train.global_batch=16",
]  # fmt: skip


def command(folder: Path, name: str, text: str) -> None:
    """Write a shell script as the command `name`."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
