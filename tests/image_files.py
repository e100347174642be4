"""Small image files, and folders of them, for tests of packing and reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def image_file(path: Path, value: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value % 256, 7)).save(path, kind)
    return path
