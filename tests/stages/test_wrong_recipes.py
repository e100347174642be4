"""A wrong recipe is called out in one sentence, once: in the log, and in the events that a report shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image
from running import MAE, SETTINGS, losses

from mae_dist.__main__ import main
from mae_dist.data.pack import Picture, Source, pack
from mae_dist.run import events, warned
from mae_dist.schema import MaeConfig, OptimConfig, PretrainConfig, TrackConfig

SMALL = [*SETTINGS, "model.image_size=16", "train.steps=10"]


def said(run: Path) -> dict[str, str]:
    """The warnings of a run: what about -> sentence."""
    found = events.of(run, "warn")
    assert len({event["about"] for event in found}) == len(found)
    return {event["about"]: event["message"] for event in found}


@pytest.fixture(scope="module")
def band(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return band_of(tmp_path_factory.mktemp("right") / "run", tiny_data)


def band_of(out: Path, data: Path, *words: str) -> str:
    """The band of a right recipe's first epoch, as a setting."""
    assert main(["pretrain", f"data.path={data}", f"out={out}", *SMALL, *MAE, *words]) == 0
    assert said(out) == {}
    middle = mean(losses(out))
    return f"track.band=[[1,{middle - 0.04},{middle + 0.04}]]"


@pytest.mark.parametrize(
    ("words", "about", "first"),
    [
        ([], None, ""),
        (["optim.base_lr=1e-3"], "track.band above at 1", "optim.base_lr=0.001,"),
        (["mae.norm_pix=false"], "track.band below at 1", "mae.norm_pix=false,"),
        (["mae.mask_ratio=0.9"], "track.band above at 1", "mae.mask_ratio=0.9,"),
    ],
)
def test_band_calls_out_a_wrong_recipe_and_its_setting(
    words: Sequence[str], about: str | None, first: str, band: str, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", f"data.path={tiny_data}", f"out={run}", *SMALL, *MAE, band, *words]) == 0
    found = {name: text for name, text in said(run).items() if name.startswith("track.band")}
    assert [*found] == ([about] if about else [])
    if about:
        assert f"compare with it, in this order, {first}" in found[about]
        assert main(["report", str(run)]) == 0
        assert "the mean loss of epochs 0 to 1 is" in (run / "report.html").read_text()


def test_lr_ten_times_too_high_is_called_out_before_the_first_step_and_by_the_band(
    tiny_data: Path, tmp_path: Path
) -> None:
    band, run = band_of(tmp_path / "right", tiny_data, "optim.base_lr=0.07"), tmp_path / "wrong"
    words = [*SMALL, *MAE, band, "optim.base_lr=0.7"]
    assert main(["pretrain", f"data.path={tiny_data}", f"out={run}", *words]) == 0
    assert [*said(run)] == ["optim.base_lr", "track.band above at 1"]
    assert "rises to 0.04375, and usually stays below 0.005" in said(run)["optim.base_lr"]
    assert "in this order, optim.base_lr=0.7," in said(run)["track.band above at 1"]


def content(array: np.ndarray) -> bytes:
    """A PNG of these pixels."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def coloured(folder: Path, labels: str) -> Path:
    """60 training and 60 test images in three colours, which are their labels; `labels`: right, shuffled or one."""

    def pictures(split: str, numbers: range) -> list[Picture]:
        drawn = np.random.default_rng(split == "test").integers(0, 3, 60)
        given = {"right": drawn, "shuffled": np.random.default_rng(7).permutation(drawn), "one": 0 * drawn}[labels]
        noise = np.random.default_rng(3).integers(0, 90, (60, 16, 16, 3))
        images = [(noise[n] + 150 * (np.arange(3) == drawn[n])).astype(np.uint8) for n in numbers]
        return [Picture("png", content(image), int(given[n])) for n, image in zip(numbers, images, strict=True)]

    pack(Source("coloured", ["r", "g", "b"], {"train": 60, "test": 60}, pictures), folder)
    return folder


@pytest.mark.parametrize(
    ("labels", "about"), [("right", []), ("shuffled", ["the chosen head at chance"]), ("one", ["labels"])]
)
def test_probe_calls_out_labels_that_are_shuffled_or_all_the_same(
    labels: str, about: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["heads.ridge=true", "init_from=random", "train.global_batch=8"]
    data, run = coloured(tmp_path / "data", labels), tmp_path / "run"
    assert main(["probe", f"data.path={data}", f"out={run}", *SMALL, *words]) == 0
    assert [*said(run)] == about
    assert all(text in caplog.text for text in said(run).values())


def test_warning_is_said_once_over_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (3, 8):
        warned.warn(tmp_path, step, [warned.Warned("x", "too much"), warned.Warned("x", "too much again")][: step // 3])
    assert [event["step"] for event in events.of(tmp_path, "warn")] == [3]
    assert caplog.text.count("too much") == 1


def test_band_compares_the_part_of_the_loss_that_has_just_ended(tmp_path: Path) -> None:
    config = PretrainConfig(track=TrackConfig(band=((1, 0.5, 0.6), (2, 0.1, 0.2), (3, 0.1, 0.2))))
    lines = [
        f'{{"kind": "step", "step": {n}, "epoch": {n / 4}, "loss": {0.7 if n < 5 else 0.15 if n < 9 else 0.5}}}\n'
        for n in range(1, 13)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))

    def found(before: float, epoch: float) -> list[str]:
        warned.warn(tmp_path, 1, warned.outside_band(tmp_path, config, before, epoch))
        return [*said(tmp_path)]

    assert found(0, 0.75) == []
    assert found(0.75, 1) == ["track.band above at 1"]
    assert found(1, 2) == ["track.band above at 1"]
    assert found(2, 3) == ["track.band above at 1", "track.band above at 3"], "each row is a warning of its own"


@pytest.mark.parametrize(
    ("mae", "word", "names"),
    [
        (MaeConfig(), "below", ["mae.norm_pix=true", "mae.mask_ratio=0.75", "optim.base_lr=0.1"]),
        (MaeConfig(), "above", ["optim.base_lr=0.1", "mae.mask_ratio=0.75", "mae.norm_pix=true"]),
        (MaeConfig(mask_ratio=0.9), "above", ["mae.mask_ratio=0.9", "optim.base_lr=0.1", "mae.norm_pix=true"]),
        (MaeConfig(mask_ratio=0.9), "below", ["mae.norm_pix=true", "mae.mask_ratio=0.9", "optim.base_lr=0.1"]),
        (MaeConfig(norm_pix=False), "above", ["optim.base_lr=0.1", "mae.mask_ratio=0.75", "mae.norm_pix=false"]),
    ],
)
def test_band_names_first_what_is_unusual_in_its_direction(mae: MaeConfig, word: str, names: list[str]) -> None:
    assert warned.suspects(PretrainConfig(mae=mae, optim=OptimConfig(base_lr=0.1)), word) == names
