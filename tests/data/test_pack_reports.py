"""What packing says of images that it leaves out, and paths as they are typed in quotes."""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path

import pytest
from image_files import image_file

from mae_dist.__main__ import run
from mae_dist.commands.data import main
from mae_dist.config import load
from mae_dist.data import source_files
from mae_dist.data.dataset import Dataset


def folder_of(root: Path, good: int, bad: int, split: str = "train") -> Path:
    for number in range(good + bad):
        image_file(root / split / "a" / f"{number}.png", number)
    for number in range(bad):
        (root / split / "a" / f"{number}.png").write_bytes(b"no image" if number % 3 else b"")
    return root


def pack(root: Path, *options: str) -> None:
    main(["pack", "folder", "--source", str(root), "--out", str(root.parent / "out"), "--workers", "1", *options])


def test_pack_names_all_reasons_with_counts_where_too_many_images_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^9 of 30 images \(3 empty file, 6 unreadable\) of split train ") as caught:
        pack(folder_of(tmp_path / "in", 21, 9))
    assert str(caught.value).count(".png: ") == 2  # an example of each
    assert "more than --max-bad 0.01 allows" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_pack_stops_at_100_images_that_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^100 of the first 100 of 130 images "):
        pack(folder_of(tmp_path / "in", 0, 130))


def test_pack_refuses_a_split_without_a_readable_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'val': none of its images can be packed, 2 of 2 images"):
        pack(folder_of(folder_of(tmp_path / "in", 3, 0), 0, 2, "val"), "--max-bad", "1")
    assert not (tmp_path / "out").exists()


def test_pack_reads_tilde_and_variables_in_quoted_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "in", 2, 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "in"))
    main(["pack", "folder", "--source", "$WHERE", "--out", "~/out", "--workers", "1"])
    assert Dataset.load(tmp_path / "out").name == "in"
    main(["pack", "tars", "--source", "~/out", "--out", "~/again", "--workers", "1"])
    assert Dataset.load(tmp_path / "again").channels == 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--source", "", "argument --source: is empty"), ("--out", "", "argument --out: is empty"),
        ("--out", "$NOWHERE/x", "argument --out: .*the environment has no variable NOWHERE"),
        ("--white", "inf", "--white inf: must be finite and"), ("--white", "nan", "--white nan: must be finite"),
        ("--white", "0", "--white 0: must be"), ("--white", "-1", "--white -1: must be"),
        ("--channels", "0", "--channels 0: must be 1 or more"), ("--channels", "-2", "--channels -2: must be"),
    ],
)  # fmt: skip
def test_pack_options_without_sense_are_refused(tmp_path: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(folder_of(tmp_path / "in", 1, 0), option, value)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_show_takes_tars_as_runs_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(folder_of(tmp_path / "in", 2, 0))
    tar = tmp_path / "out" / "train-000000.tar"
    main(["pack", "tars", "--source", str(tar.parent), "--out", str(tmp_path / "again"), "--workers", "1"])
    for folder in (tar.parent, tmp_path / "again"):  # keys lead back to the files that were packed
        files = source_files.read(folder / tar.name)
        assert {key.rpartition("-")[2]: file for key, file in files.items()} == {n: f"train/a/{n}.png" for n in "01"}
        with tarfile.open(folder / tar.name) as archive:
            assert {name.partition(".")[0] for name in archive.getnames()} == files.keys()
    capsys.readouterr()
    main(["show", str(tar)])
    output = capsys.readouterr().out
    assert f"{tar}: in, 1 class," in output
    recipe, _, training = output.partition("next: ")[2].partition(" && ")
    assert recipe == f"mae-dist recipe {tar} > mine.yaml"
    file = tmp_path / "mine.yaml"
    assert run(shlex.split(recipe)[1:-2]) == 0
    file.write_text(capsys.readouterr().out)
    words = shlex.split(training)[3:]
    assert load("pretrain", file, words).data.path == str(tar)
    assert (tmp_path / "out" / "sheet-train.png").is_file()
    for words, message in (
        (["index", str(tar), "--test-share", "0.1"], "data index: --test-share: is no option of it, but of `mae-dist "
         "data pack folder`, `mae-dist data pack tars`; see mae-dist data index --help"),
        (["pack", "folder", "--source", "x", "--out", "y", "--classes", "f"], "data pack folder: --classes: is no "
         "option of it, but of `mae-dist data index`; see mae-dist data pack folder --help"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            main(words)
    with pytest.raises(ValueError, match="--split val: .* names tars, which are one split; leave it out"):
        main(["show", str(tar), "--split", "val"])
