"""How the images of a run are decoded: its settings, completed by what its data set was packed with.

Imports no torch.
"""

import dataclasses

from mae_dist import image_settings
from mae_dist.data.dataset import Dataset
from mae_dist.data.pixels import Decoding
from mae_dist.schema import C, DataConfig, RunConfig


def decoding(config: RunConfig) -> Decoding:
    """How stored values become pixels, by a run's settings with all their values."""
    data = config.data
    assert data.channels is not None  # `completed` has filled it in
    return Decoding(data.channels, data.white, config.view.exif, data.max_pixels)


def completed(config: C, before: RunConfig | None, dataset: Dataset, origin: RunConfig | None) -> C:
    """The config with data.channels and data.white: as given, else as the run began (`before`), else as the data set
    was packed, else as in the run of init_from (`origin`), else 3 and none. Raises ValueError for settings that do not
    go with these channels.
    """
    data = config.data
    known = before.data if before else dataset if dataset.is_packed else origin.data if origin else DataConfig()
    channels, white = (getattr(known if value is None else data, name) for name, value in
                       (("channels", data.channels), ("white", data.white)))  # fmt: skip
    config = dataclasses.replace(config, data=dataclasses.replace(data, channels=channels or 3, white=white))
    image_settings.check(config)
    return config


def differing(config: RunConfig, dataset: Dataset) -> str:
    """How the data set was packed otherwise than a run decodes it, as the beginning of a sentence; "" if it was not."""
    for name, value in (("channels", config.data.channels), ("white", config.data.white)):
        packed = getattr(dataset, name)
        if dataset.is_packed and packed != value:
            given, other = ("none" if number is None else f"{number:g}" for number in (value, packed))
            return f"data.{name}={given}: {dataset.name} was packed with data.{name}={other}"
    return ""
