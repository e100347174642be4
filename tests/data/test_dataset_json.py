"""A damaged dataset.json is refused in words that name the field, not Python's."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from mae_dist.data.dataset import FORMAT, Dataset, Shard

SHARD = Shard("a.tar", 2, 2, 10, "")
GOOD: dict[str, Any] = {"format": FORMAT} | asdict(Dataset("x", {"train": [SHARD]}, 2, ["a", "b"], (8, 8)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": None}, 'it has no "format"'),
        ({"format": "mae_dist dataset 9"}, "its format is 'mae_dist dataset 9'"),
        ({"name": None}, "name: must be a text"),
        ({"splits": None}, "splits: must be an object from split to tars"),
        ({"splits": {"train": ["a.tar"]}}, "splits.train: must be a list of tars, each an object"),
        ({"splits": {"train": [{"tar": "a.tar"}]}}, "'num_samples' is missing in splits.train"),
        ({"splits": {"train": [asdict(SHARD) | {"more": 1}]}}, "unknown field 'more' in splits.train"),
        ({"more": 1}, "unknown field 'more'; was it written by a newer mae_dist?"),
        ({"mean": ["0.5"] * 3}, "mean: must be a list of numbers"),
        ({"image_size": 32}, "image_size: must be two whole numbers"),
        ({"image_size": [32.0, 32]}, "image_size: must be two whole numbers"),
        ({"num_classes": "2"}, "num_classes: must be a whole number"),
        ({"num_classes": 1}, "num_classes: must be at least the number of classes"),
        ({"classes": {"a": 0}}, "classes: must be a list of names"),
        ({"white": "255"}, "white: must be a number"),
        ({"label_counts": {"train": "22"}}, "label_counts: must be numbers of samples by split"),
    ],
)
def test_dataset_json_refuses_a_damaged_field_by_its_name(change: dict[str, Any], sentence: str) -> None:
    assert Dataset.parse(json.dumps(GOOD), "d/dataset.json").classes == ["a", "b"]
    with pytest.raises(ValueError, match="^d/dataset.json: ") as refusal:
        Dataset.parse(json.dumps(GOOD | change), "d/dataset.json")
    assert sentence in str(refusal.value)
    assert "restore it from a copy" in str(refusal.value)


@pytest.mark.parametrize("text", ["", "<html>", json.dumps(GOOD)[:90], "[" * 10**5])
def test_dataset_json_refuses_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="^d/dataset.json: not a 'mae_dist dataset 1' file"):
        Dataset.parse(text, "d/dataset.json")
