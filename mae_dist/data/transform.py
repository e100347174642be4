"""Images in memory, or files by their paths, as the tensors that a model sees in evaluation: decoded, cropped, resized
and normalised by the functions that decode and crop the samples of a data set.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mae_dist.data.crop import crop, decode_crop
from mae_dist.data.decode import Decoded, decoded, of_array, of_pil, stored_size
from mae_dist.data.index import Sample
from mae_dist.data.pixels import Decoding
from mae_dist.data.views import View

Picture = Image.Image | np.ndarray | Tensor | str | os.PathLike
"""One image: Pillow's, an array or tensor of stored values, (h, w), (h, w, c) or (c, h, w), or the path of a file."""


@dataclass(frozen=True)
class Transform:
    """Maps images to tensors by a `view` that does not augment, decoded by the rules `how`.

    A file gives the bits that a run reads of it out of a tar, a JPEG of Pillow's the same but for the shortcut of
    decoding large ones at a fraction of their size, and small images that a run keeps in memory differ where they are
    resized, as a run does not round those to 8 bits.
    """

    view: View
    how: Decoding

    def __call__(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "... c h w"]:
        """One image as (c, h, w), several, a list or an array of four axes, as (b, c, h, w). Raises ValueError for what
        is no image of these channels.
        """
        is_array, is_text = isinstance(images, np.ndarray | Tensor), isinstance(images, str)
        if cast(Any, images).ndim < 4 if is_array else is_text or not isinstance(images, Sequence):
            return self._one(cast(Picture, images))
        found = [self._one(image) for image in cast(Sequence[Picture], images)]
        return torch.stack(found) if found else torch.empty(0, self.how.channels, *self.view.size)

    def _one(self, image: Picture) -> Float[Tensor, "c h w"]:
        out, name = np.empty((*self.view.size, self.how.channels), dtype=np.uint8), ""
        try:
            if isinstance(image, str | os.PathLike):
                name = f"{os.fspath(image)}: "
                self._crop_file(Path(image), out)
            else:
                found = of_pil(image, self.how) if isinstance(image, Image.Image) else _of_array(image, self.how)
                crop(found.pixels, self._box(*found.pixels.shape[:2]), False, out)
                _warn_of(found)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}{getattr(error, 'strerror', None) or error}") from error
        pixels, zero = torch.from_numpy(out).permute(2, 0, 1)[None].float().div_(255), np.zeros(1, dtype=np.int64)
        return self.view.finish(pixels, zero, zero)[0]

    def _crop_file(self, path: Path, out: np.ndarray) -> None:
        sample = Sample(path.stem, path.suffix[1:].lower(), path.read_bytes(), -1)
        size = stored_size(sample, self.how) or decoded(sample, how=self.how).pixels.shape[:2]  # raises what is wrong

        def decode(sample: Sample, shrink: int) -> np.ndarray:
            found = decoded(sample, shrink, None, self.how)
            _warn_of(found)
            return found.pixels

        decode_crop(sample, size, self._box(*size), False, out, decode)

    def _box(self, height: int, width: int) -> list[float]:
        zero = torch.zeros(1, dtype=torch.int64)
        return self.view.boxes(zero, zero, torch.tensor([[height, width]]))[0][0].tolist()


def _of_array(values: np.ndarray | Tensor, how: Decoding) -> Decoded:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"an array of shape {array.shape} is no image")
    return of_array(array, how)


def _warn_of(found: Decoded) -> None:
    for what in found.changes:
        warnings.warn(what, stacklevel=5)  # Python says each of these once
