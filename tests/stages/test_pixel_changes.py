"""What decoding changes in images that any rank reads is counted over all ranks, and logged once."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from running import MAE, SETTINGS, finish_ranks, start_ranks

from mae_dist.__main__ import main


def test_changes_of_pixels_on_other_ranks_are_logged_once_with_the_count_of_all(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(24):
            stream, image = io.BytesIO(), Image.fromarray(pixels[: 30 + number % 8])  # of several sizes: not resident
            if number == 20:
                image.putalpha(99)
            image.save(stream, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(stream.getvalue())
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    assert main(["data", "index", str(tmp_path / "x.tar")]) == 0
    log, settings = tmp_path / "log", [*SETTINGS, *MAE, "train.steps=2", "train.global_batch=12", "machine.workers=0"]
    words = ["pretrain", *settings, f"data.path={tmp_path}", f"out={tmp_path}/run"]
    finish_ranks(start_ranks(2, *words, log=log), log)
    (line,) = [line for line in log.read_text().splitlines() if "transparency is drawn on white" in line]
    assert "1 image so far, 20.png in x.tar first: " in line  # with this seed it is of rank 1
