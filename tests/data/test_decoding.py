"""How a run decodes images: settings left out are those of the run that it resumes, of packing, or of init_from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mae_dist.data.dataset import Dataset
from mae_dist.data.decoding import completed, decoding, differing
from mae_dist.schema import DataConfig, PretrainConfig, ViewConfig


def config(**data: object) -> PretrainConfig:
    return PretrainConfig(data=DataConfig(path="x", **data))  # pyright: ignore


PACKED, INDEXED = Dataset("a", white=4095.0, channels=5), Dataset("b")
BEFORE, ORIGIN = config(channels=2, white=100.0), config(channels=4, white=9.0)


@pytest.mark.parametrize(
    ("given", "before", "dataset", "origin", "expected"),
    [
        ({"channels": 1, "white": 7.0}, BEFORE, PACKED, ORIGIN, (1, 7.0)), ({}, BEFORE, PACKED, ORIGIN, (2, 100.0)),
        ({}, None, PACKED, ORIGIN, (5, 4095.0)), ({"white": 7.0}, None, PACKED, None, (5, 7.0)),
        ({}, None, INDEXED, ORIGIN, (4, 9.0)), ({}, None, INDEXED, None, (3, None)),
        ({}, None, replace(PACKED, white=None), ORIGIN, (5, None)),
    ],
)  # fmt: skip
def test_decoding_of_a_run_is_given_begun_packed_or_that_of_init_from(
    given: dict, before: PretrainConfig, dataset: Dataset, origin: PretrainConfig, expected: tuple
) -> None:
    how = decoding(completed(config(**given), before, dataset, origin))
    assert (how.channels, how.white) == expected


def test_decoding_otherwise_than_packed_is_named() -> None:
    assert differing(config(channels=5, white=4095.0), PACKED) == ""
    assert differing(config(channels=1, white=2.0), INDEXED) == ""
    assert differing(config(channels=3, white=4095.0), PACKED) == "data.channels=3: a was packed with data.channels=5"
    assert differing(config(channels=5), PACKED) == "data.white=none: a was packed with data.white=4095"


def test_decoding_with_channels_of_packing_refuses_settings_of_others() -> None:
    wrong = replace(config(), view=ViewConfig(color_jitter=0.4))
    with pytest.raises(ValueError, match=r"view\.color_jitter=0\.4: is for 3 channels, not data\.channels=5"):
        completed(wrong, None, PACKED, None)
