"""A wheel, unpacked where there is no clone: recipes by name, `submit`, and what else an installed copy must hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mae_dist import config, recipes

ROOT = Path(__file__).parents[1]
EACH = "import json, sys; from mae_dist.__main__ import main; [sys.exit(1) for w in json.loads(sys.argv[1]) if main(w)]"
"""One process that runs several verbs, since each would import torch again."""
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, built from a copy of the tree with the setuptools that is here."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, source := folder / "source", symlinks=True,
        ignore=shutil.ignore_patterns(".*", "tests", "docs", "docker", "runs", "*.egg-info", "__pycache__"),
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def test_wheel_outside_a_clone_packs_pretrains_reports_and_submits(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mae_dist" / "configs", tmp_path / "expected")
    here, there = (sorted(str(p.relative_to(f)) for p in f.glob("*/*.yaml"))
                   for f in (tmp_path / "expected", installed / "mae_dist" / "configs"))  # fmt: skip
    assert here == there
    assert (installed / "launch" / "torchrun.sh").is_file()
    run = ["pretrain", "cifar100_vit_ti4", "data.path=data", "out=run"]
    tiny = [
        "model.name=vit_demo4",
        "train.epochs=1",
        "optim.warmup_epochs=0",
        "train.global_batch=16",
        "machine.processes=1",
    ]
    cluster = str(installed / "launch" / "clusters" / "example.yaml")
    verbs = [
        ["data", "pack", "synthetic", "--out", "data", "--train", "16", "--test", "8"], ["recipe", "data"],
        [*run, *tiny], ["report", "run"], ["submit", *run, "out=other", "--cluster", cluster, "--dry-run"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(verbs)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "srun --unbuffered" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
    found = subprocess.run(
        [sys.executable, "-m", "mae_dist", "pretrain", "--help"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(installed)}, check=True,
    )  # fmt: skip
    assert "cifar100_vit_ti4" in found.stdout
    assert str(installed / "mae_dist" / "configs") in found.stdout


def test_recipes_are_found_by_name_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["out=run", "data.path=data"]
    forms = ("cifar100_vit_ti4", "pretrain/cifar100_vit_ti4", "configs/pretrain/cifar100_vit_ti4.yaml")
    assert len({config.load("pretrain", form, words) for form in forms}) == 1
    scratch = config.load("finetune", "scratch/imagenet_vit_b16", [*words, "init_from=random"])
    assert scratch.model.name == "vit_b16"
    Path("cifar100_vit_ti4").write_text("model: {name: vit_demo4}")  # a file of the user comes first
    assert config.load("pretrain", "cifar100_vit_ti4", words).model.name == "vit_demo4"
    for wrong in ("cifar100_vit_ti", "../pretrain/cifar100_vit_ti4", "nothing.yaml"):
        with pytest.raises(
            ValueError, match=rf"config {wrong}: no such file and no recipe; .*cifar100_vit_ti4"
        ) as error:
            config.load("pretrain", wrong, words)
        assert str(recipes.FOLDER.resolve()) in str(error.value)
