"""Mixup and CutMix: blend two images and their labels, as a pure function of the pair.

Partners are neighbours 2i and 2i + 1 of the run's order, so a pair never crosses a rank or a micro-batch (whose shares
are even, see `data.order.share`), and what is drawn for it depends on (seed, epoch, id) of its first sample alone.
timm's Mixup has the same arithmetic, which a test compares, but it draws from NumPy's global generator and mixes sample
i with sample n - 1 - i of a rank's batch.

Difference to the official fine-tuning (timm's mode="batch"): there lambda, the choice of mixup or CutMix, and the box
are drawn once for all images of a GPU's batch, which depends on ranks and micro-batches; here they are drawn for each
pair (timm's mode="pair"). Each image is mixed as often and as strongly, but not all images of a step alike.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mae_dist import rng
from mae_dist.batch import Batch
from mae_dist.schema import MixConfig

ATTEMPTS = 32
"""Attempts at drawing a Beta. For alpha up to 1 each succeeds with a probability of at least 1/2, so all fail with
one of at most 2^-32; then lambda is 1/2."""


def smoothed(
    labels: Int[Tensor, " b"], num_classes: int, smoothing: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b classes"]:
    """One-hot targets (b, classes) with label smoothing (Szegedy et al. 2016, section 7)."""
    hot = F.one_hot(labels, num_classes).to(dtype)
    return hot * (1 - smoothing) + smoothing / num_classes


def mix(
    batch: Batch, targets: Float[Tensor, "b classes"], settings: MixConfig, seed: int
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
    """Mix images and targets pair by pair (Zhang et al. 2018, eq. 1; Yun et al. 2019, eq. 1), on their device.

    Mixup weighs each image of a pair by lambda ~ Beta(alpha, alpha) and its partner by 1 - lambda; CutMix takes a box
    from the partner. The weight of a target is the mean weight of its image's pixels.
    """
    assert batch.size % 2 == 0, "pairs do not cross micro-batches"
    size = (batch.images.shape[2], batch.images.shape[3])
    words = rng.bits(seed, rng.Purpose.MIX, batch.epochs[::2], batch.ids[::2], 4 + 2 * ATTEMPTS)
    weights = repeat(pixel_weights(words.double() / 2.0**32, settings, size), "p h w -> (p two) 1 h w", two=2)
    share = weights.mean((1, 2, 3))[:, None]
    images = batch.images * weights.to(batch.images) + _partners(batch.images) * (1 - weights).to(batch.images)
    return images, targets * share.to(targets) + _partners(targets) * (1 - share).to(targets)


def pixel_weights(
    draws: Float[Tensor, "pairs draws"], settings: MixConfig, size: tuple[int, int]
) -> Float[Tensor, "pairs h w"]:
    """Weight of each pixel of an image against its partner's: lambda, or 0 within CutMix's box and 1 around it."""
    height, width = size
    cut = draws[:, 0] < (1.0 if settings.mixup == 0 else settings.switch if settings.cutmix > 0 else 0.0)
    alpha = torch.where(cut, settings.cutmix, settings.mixup).clamp(min=1e-9)
    lambda_ = torch.where(draws[:, 1] < settings.prob, beta(draws[:, 4:], alpha), 1.0)
    side = (1 - lambda_).sqrt()
    y = _outside(draws[:, 2], (side * height).floor(), height)
    x = _outside(draws[:, 3], (side * width).floor(), width)
    around = (y[:, :, None] | x[:, None, :]).double()
    return torch.where(cut[:, None, None], around, lambda_[:, None, None])


def _outside(draw: Tensor, length: Tensor, size: int) -> Tensor:
    """Marks pixels along one axis outside a box of this length around a random centre, clipped to the image."""
    centre, place = (draw * size).floor(), torch.arange(size, device=draw.device)
    start, stop = centre - (length / 2).floor(), centre + ((length + 1) / 2).floor()
    return (place < start[:, None]) | (place >= stop[:, None])


def beta(draws: Float[Tensor, "n twice"], alpha: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Beta(alpha, alpha) from uniform numbers by rejection (Johnk 1964).

    The first x, y = u^(1/alpha), v^(1/alpha) with x + y <= 1 give x / (x + y). All attempts are computed at once, so
    the host never waits for the device.
    """
    x, y = rearrange(draws, "n (two k) -> two n k", two=2).pow(1 / alpha[:, None])
    fits = (x + y <= 1) & (x + y > 0)
    first = fits.double().argmax(1, keepdim=True)
    x, y = x.gather(1, first)[:, 0], y.gather(1, first)[:, 0]
    return torch.where(fits.any(1), x / (x + y), 0.5)


def _partners(values: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
