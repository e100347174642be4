"""Runs over tars as other projects publish them, named as their users name them."""

import json
from pathlib import Path

import pytest
import webdataset
from image_files import image_file
from running import MAE, SETTINGS, losses

from mae_dist.__main__ import main


def test_imagenet_tars_of_timm_by_brace_range_are_indexed_and_trained(tmp_path: Path) -> None:
    """Members .jpg, .cls and .json, as in timm/imagenet-1k-wds."""
    folder = tmp_path / "wds"
    folder.mkdir()
    for split, count in (("train", 2), ("validation", 1)):
        for shard in range(count):
            with webdataset.TarWriter(str(folder / f"imagenet1k-{split}-{shard:04d}.tar")) as writer:  # pyright: ignore
                for i in range(12):
                    image = image_file(tmp_path / "x.jpg", 20 * i, (48, 40), "JPEG").read_bytes()
                    facts = json.dumps({"label": i % 3, "class_name": "tench", "width": 48}).encode()
                    name = f"n0{i % 3}_{shard}_{i}"
                    writer.write({"__key__": name, "jpg": image, "cls": str(i % 3).encode(), "json": facts})
    train, test = f"{folder}/imagenet1k-train-{{0000..0001}}.tar", f"{folder}/imagenet1k-validation-{{0000..0000}}.tar"
    assert main(["data", "index", train]) == 0
    assert main(["data", "index", test, "--split", "val"]) == 0
    run = tmp_path / "run"
    shared = [f"data.path={train}", f"data.test_path={test}", *SETTINGS, "train.steps=2", "machine.workers=0"]
    assert main(["pretrain", *shared, *MAE, f"out={run}"]) == 0
    assert len(losses(run)) == 2
    assert main(["probe", *shared, f"init_from={run}", f"out={tmp_path / 'probe'}"]) == 0
    assert json.loads((tmp_path / "probe" / "result.json").read_text())["num_test_images"] == 12
    assert (
        main(["pretrain", f"data.path={folder}", "data.split=train", *shared[2:], *MAE, f"out={tmp_path / 'all'}"]) == 0
    )


def test_run_refuses_a_pattern_that_catches_tars_of_several_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of the tars, or the dataset.json that lists them, say the splits; words in a path are meant."""
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a-train-0", "a-train-1", "b-val-0"):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:  # pyright: ignore
            for i in range(8):
                image = image_file(tmp_path / "x.png", 20 * i + len(name), (32, 32), "PNG").read_bytes()
                writer.write({"__key__": f"{name}{i}", "png": image, "cls": b"0"})
        assert main(["data", "index", f"{folder}/{name}.tar", f"--split={'all' if name < 'b' else 'val'}"]) == 0
    run = ["pretrain", *SETTINGS, "train.steps=1", "machine.workers=0", *MAE, f"out={tmp_path / 'run'}"]
    for listed in (True, False):
        capsys.readouterr()
        assert main([*run, f"data.path={folder}/*.tar"]) == 2
        assert "of several splits" in capsys.readouterr().err
        if listed:
            (folder / "dataset.json").unlink()
    pack = ["data", "pack", "tars", f"--source={folder}/*.tar", f"--out={tmp_path / 'packed'}"]
    assert main(pack) == 2
    assert "of several splits" in capsys.readouterr().err
    assert main([*pack, "--split=train"]) == 0
    assert main([*run, f"data.path={folder}/*{{train,val}}*.tar"]) == 0
