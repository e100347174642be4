"""What a start finds out about the images of a run: that they can be read, and their statistics."""

import dataclasses
import logging

from mae_dist import dist
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD
from mae_dist.data import decoding
from mae_dist.data.decode import check_channels, decode
from mae_dist.data.index import ShardIndex
from mae_dist.data.pixels import ChannelsError, Decoding
from mae_dist.schema import C, RunConfig

log = logging.getLogger(__name__)

FIRST = 32
"""Images at the beginning of a split of which one must be readable."""
UNKNOWN_MEAN, UNKNOWN_STD = 0.5, 0.25
"""Statistics of each channel where none are known and the channels are not those of colour images."""


def check_first_images(split: ShardIndex, how: Decoding) -> None:
    """Raise ValueError where the first FIRST images of a split have other channels than wanted, or none can be read."""
    reason = ""
    for number in range(min(FIRST, len(split))):
        try:
            sample = split.read(number)
            check_channels(sample, how, split.sample_name(number))
            decode(sample, how=how)
            return
        except ChannelsError:
            raise
        except ValueError as error:
            reason = reason or f"{split.sample_name(number)}: {error}"
        except OSError:  # is the loader's business
            return
    raise ValueError(
        f"none of the first {min(FIRST, len(split))} images can be read, {reason}; `mae-dist data check` reads all"
    )


def with_statistics(config: C, earlier: RunConfig | None, index: ShardIndex) -> C:
    """The config with mean and std: as given, else of `init_from`, else of the data set, else ImageNet's (logged). A
    standard deviation of 0 becomes 1, with a warning. Raises ValueError where the data set was packed otherwise than it
    is decoded, so that its statistics are of other pixels.
    """
    data, dataset = config.data, index.dataset
    mean, std, channels = data.mean, data.std, data.channels or 3
    if mean is None or std is None:
        use_earlier = earlier is not None and len(earlier.data.mean or ()) in (0, channels)
        known = earlier.data if earlier is not None and use_earlier else dataset
        if known is dataset and dataset.mean is not None and (differs := decoding.differing(config, dataset)):
            raise ValueError(
                f"{differs}, and so were its mean and std; leave it out, give data.mean and data.std, or pack anew"
            )
        if (known.mean is None or known.std is None) and dist.is_main():
            whose = "ImageNet's" if channels == 3 else f"{UNKNOWN_MEAN} and {UNKNOWN_STD}"
            names = ", ".join(index.parts.unmeasured) or "the data sets"
            log.info("mean and std are not known of %s: using %s (data.mean, data.std)", names, whose)
        colours = channels == 3
        mean = mean or known.mean or (IMAGENET_MEAN if colours else (UNKNOWN_MEAN,) * channels)
        std = std or known.std or (IMAGENET_STD if colours else (UNKNOWN_STD,) * channels)
    if 0 in std:
        if not any(std):
            raise ValueError("dataset.json: std is 0 in all channels, all pixels are the same; pack them again")
        if dist.is_main():
            log.warning("channel %d of the data set is constant (std 0): it is divided by 1", std.index(0))
        std = tuple(value or 1.0 for value in std)
    return dataclasses.replace(config, data=dataclasses.replace(data, mean=mean, std=std))
