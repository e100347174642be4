"""Data at the start: one rank of each machine checks the files, and all ranks agree on what they are."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from running import MAE, SETTINGS, finish_ranks, start_ranks

from mae_dist.data import index


def words(out: Path, *more: str) -> list[str]:
    return ["pretrain", "data.path=data", f"out={out}", *SETTINGS, *MAE, "train.steps=1", *more]


def on_its_own_machine(folders: Path) -> None:
    """Let each rank be the first of a machine, on which a folder with its number is the current one."""
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(folders / os.environ["RANK"])


def record_checks(folders: Path) -> None:
    """Write down which rank checks files."""
    os.chdir(folders / "0")
    real = index._check_files

    def check(*arguments: object) -> None:
        with (folders / "checks").open("a") as stream:
            stream.write(os.environ["RANK"])
        real(*arguments)  # pyright: ignore[reportArgumentType]

    index._check_files = check


def test_start_checks_the_files_on_one_rank_of_a_machine(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "0" / "data")
    log = tmp_path / "log"
    ranks = start_ranks(2, *words(tmp_path / "run"), log=log, before=partial(record_checks, tmp_path))
    finish_ranks(ranks, log)
    assert (tmp_path / "checks").read_text() == "00"  # of the training split and of the test split


def remove_a_tar(data: Path) -> None:
    (data / "train-000001.tar").unlink()


def describe_otherwise(data: Path) -> None:
    """Let dataset.json tell of tars of another content."""
    file = data / "dataset.json"
    file.write_text(re.sub(r'("sha256": ")[0-9a-f]', r"\1z", file.read_text()))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (shutil.rmtree, "data.path=data: no such folder or file (rank 1 on "),
        (remove_a_tar, "data/train-000001.tar: cannot be read (No such file or directory) (rank 1 on "),
        (describe_otherwise, "data.path=data: rank 1 finds other data there than rank 0; "),
    ],
)
def test_start_on_a_machine_with_other_data_is_refused_on_all_ranks(
    tiny_data: Path, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    for rank in "01":
        shutil.copytree(tiny_data, tmp_path / rank / "data")
    spoil(tmp_path / "1" / "data")
    log = tmp_path / "log"
    ranks = start_ranks(2, *words(tmp_path / "run"), log=log, before=partial(on_its_own_machine, tmp_path))
    finish_ranks(ranks, log, check=2)
    lines = [line for line in log.read_text().splitlines() if line.startswith("mae-dist: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"mae-dist: {sentence}"), lines
    assert not (tmp_path / "run").exists()
