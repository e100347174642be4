"""Rows of images in one sheet, with captions: arrays in, a PIL image out. Imports no torch."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

GAP = 4
CAPTION = 14
BACKGROUND = (250, 250, 248)
INK = (40, 40, 40)


def sheet(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str] = (), tile: int = 96) -> Image.Image:
    """Draw rows of uint8 images (h, w, channels) of any size, each scaled into a square of `tile` pixels.

    Of 1 or 2 channels the first is drawn in grey, of more the first three as red, green and blue.
    `captions` are written above the columns, cut to the width of a column. Small images are enlarged without smoothing.
    """
    columns = max(len(row) for row in rows)
    top = CAPTION if captions else 0
    size = (columns * (tile + GAP) + GAP, len(rows) * (tile + GAP) + GAP + top)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        draw.text((GAP + column * (tile + GAP), 2), caption[: tile // 6], fill=INK)
    for y, row in enumerate(rows):
        for x, array in enumerate(row):
            shown = array[:, :, :3] if array.shape[2] > 2 else array[:, :, 0]
            image = Image.fromarray(np.ascontiguousarray(shown, dtype=np.uint8))
            scale = tile / max(image.size)
            shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(shape, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
            left = GAP + x * (tile + GAP) + (tile - image.width) // 2
            canvas.paste(image, (left, top + GAP + y * (tile + GAP) + (tile - image.height) // 2))
    return canvas
