"""Runs over tars as other projects publish them, named as their users name them."""

import json
from pathlib import Path

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
