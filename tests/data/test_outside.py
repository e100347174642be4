"""A data set that somebody brought names no file outside its folder, unless the user allows it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from shared_types import Tars

from mae_dist.commands.data import main
from mae_dist.data import index

ALLOWED = "data.allow_outside=true"


@pytest.fixture
def brought(tars: Tars, tmp_path: Path) -> Path:
    """A folder with a data set of two tars, copied from where it was made."""
    tars([3, 3])
    return Path(shutil.copytree(tmp_path / "tars", tmp_path / "brought"))


@pytest.mark.parametrize("name", ["/absolute", "../outside/x-0.tar", "inner/x-0.tar"])
def test_tar_outside_is_refused_and_named(brought: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "outside"
    elsewhere.mkdir()
    (brought / "x-0.tar").rename(elsewhere / "x-0.tar")
    (brought / "inner").symlink_to(elsewhere)
    name = str(elsewhere / "x-0.tar") if name == "/absolute" else name
    plain = json.loads((brought / "dataset.json").read_text())
    plain["splits"]["train"][0] |= {"tar": name, "index": "x-0.idx"}
    (brought / "dataset.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=rf"outside the folder of .*: 1 file .*{name}.*{ALLOWED}"):
        index.open_split(str(brought), "train")
    assert len(index.open_split(str(brought), "train", allow_outside=True)) == 6


@pytest.mark.parametrize("name", ["x-0.tar", "x-0.idx"])
@pytest.mark.parametrize("pattern", ["", "/x-*.tar"])
def test_link_to_the_outside_is_refused_and_named(brought: Path, tmp_path: Path, name: str, pattern: str) -> None:
    (brought / name).rename(tmp_path / "elsewhere")
    (brought / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"outside the folder of .*: 1 file .*{name}.*{ALLOWED}"):
        index.open_split(f"{brought}{pattern}", "train")
    (brought / name).unlink()
    os.link(tmp_path / "elsewhere", brought / name)
    assert len(index.open_split(f"{brought}{pattern}", "train")) == 6


def test_index_that_the_user_wrote_may_name_tars_elsewhere(tars: Tars, tmp_path: Path) -> None:
    tars([3, 3])
    main(["index", str(tmp_path / "tars"), "--out", str(tmp_path / "own")])
    assert len(index.open_split(str(tmp_path / "own"), "train")) == 6
    shutil.copytree(tmp_path / "own", tmp_path / "copied")
    with pytest.raises(ValueError, match=ALLOWED):
        index.open_split(str(tmp_path / "copied"), "train")
    with pytest.raises(ValueError, match="came from elsewhere"):
        main(["index", str(tmp_path / "tars"), "--out", str(tmp_path / "copied"), "--split", "test"])


def test_name_of_an_index_is_no_path(brought: Path) -> None:
    text = (brought / "dataset.json").read_text()
    (brought / "dataset.json").write_text(text.replace('"index": ""', '"index": "../x-0.idx"', 1))
    with pytest.raises(ValueError, match=r"dataset.json.*index"):
        index.open_split(str(brought), "train")
