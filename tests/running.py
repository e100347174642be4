"""Running mae-dist as a user does, in processes of its own, and reading what a run leaves. For all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_dist.__main__ import main

SETTINGS = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.global_batch=16", "train.precision=fp32",
    "track.every=1", "machine.processes=1", "machine.restarts=0",
]  # fmt: skip
MAE = ["mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4", "optim.base_lr=1e-2", "train.clip_grad=1"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "mae_dist", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def start(*words: object, check: int | None = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert check is None or done.returncode == check, done.stderr
    return done


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    return [int(pid) for pid in found if b"mae_dist" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a mistake gets; exit status 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("mae-dist: ")
    return said[0]
