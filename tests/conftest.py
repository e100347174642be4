"""Fixtures for all tests: small data sets as real tars in a temporary folder. See running.py for running commands."""

from __future__ import annotations

import gc
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from jaxtyping import install_import_hook
from PIL import Image

# Check shape annotations wherever tensors are computed. This must come before the first import of these modules.
CHECKED = ("batch", "data.resample", "data.views", "evaluate", "models", "objectives")
install_import_hook([f"mae_dist.{name}" for name in CHECKED], "beartype.beartype")

from shared_types import Tars  # noqa: E402

from mae_dist.data import index, indexing  # noqa: E402
from mae_dist.data.pack import pack  # noqa: E402
from mae_dist.data.sources import from_synthetic  # noqa: E402

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
gc.freeze()  # what is imported is no garbage: collections are faster


def encoded(array: np.ndarray, extension: str) -> bytes:
    """An image file of these pixels."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "JPEG" if extension == "jpg" else extension.upper())
    return stream.getvalue()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set for whole runs: 160 training images in four shards, 40 test images, 32x32, ten classes.

    All tests share it, so no test may write into it.
    """
    folder = tmp_path_factory.mktemp("tiny") / "data"
    pack(from_synthetic(160, 40), folder, shard_size=50)
    return folder


@pytest.fixture
def tars(tmp_path: Path) -> Tars:
    """`tars([4, 3], size=(32, 32), extension="png", broken={2})`: an index over new shards of that many samples.

    `size` is (height, width); with None each sample has a size of its own. Samples in `broken` are cut in half.
    Sample i has key `s000i` and label i % 3.
    """

    def make(
        counts: list[int],
        size: tuple[int, int] | None = (32, 32),
        extension: str = "png",
        broken: set[int] = frozenset(),  # pyright: ignore
    ) -> index.ShardIndex:
        folder = tmp_path / "tars"
        folder.mkdir()
        generator = np.random.default_rng(0)
        shards, number = [], 0
        for shard, count in enumerate(counts):
            tar = folder / f"x-{shard}.tar"
            with webdataset.TarWriter(str(tar)) as writer:  # pyright: ignore
                for _ in range(count):
                    shape = size or generator.integers(20, 50, 2)
                    content = encoded(generator.integers(0, 256, (*shape, 3), dtype=np.uint8), extension)
                    content = content[: len(content) // 2] if number in broken else content
                    writer.write({"__key__": f"s{number:04d}", extension: content, "cls": str(number % 3).encode()})
                    number += 1
            shards.append(indexing.build(tar, tar.with_suffix(".idx")).shard)
        index.Dataset("tiny", {"train": shards}, num_classes=3, image_size=size).save(folder)
        return index.open_split(str(folder), "train")

    return make
