"""Images of five 16-bit channels and 24 x 40 pixels go through everything: packing to import."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import refused, weights

from mae_dist.__main__ import main
from mae_dist.data.index import Dataset
from mae_dist.models.backbone import fit_channels
from mae_dist.run.directory import RunDir
from mae_dist.schema import DataConfig, ModelConfig, PretrainConfig
from mae_dist.weights.identify import Model

TINY = [
    "model.name=vit_demo4", "train.global_batch=4", "train.steps=1", "train.precision=fp32", "machine.processes=1",
    "machine.restarts=0", "machine.workers=0",
]  # fmt: skip
MAE = ["mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4", "mae.mask_ratio=0.9"]
WIDE = ["model.image_size=[24,40]"]


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two test images of 5 channels, of sizes of their own, in two classes."""
    root, generator = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            folder = root / "images" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            values = generator.integers(0, 60_000, (26 + number, 44, 5), dtype=np.uint16)
            np.save(folder / f"{number}.npy", values.transpose(2, 0, 1) if number == 1 else values)
    run("data", "pack", "folder", "--source", root / "images", "--out", root / "data", "--channels", 5, "--workers", 1)
    return root / "data"


@pytest.fixture(scope="module")
def pretrained(packed: Path) -> Path:
    out = packed.parent / "pretrained"
    run("pretrain", *TINY, *MAE, *WIDE, f"data.path={packed}", f"out={out}")
    return out


def test_five_channel_rectangles_are_packed_shown_and_pretrained(packed: Path, pretrained: Path) -> None:
    known = Dataset.load(packed)
    assert known.mean is not None
    assert known.std is not None
    assert known.mean == pytest.approx([0.457] * 5, abs=0.01)
    assert (known.channels, len(known.std)) == (5, 5)
    assert RunDir(pretrained).settings()[2].data.channels == 5
    run("data", "show", packed)
    picture = Image.open(next((pretrained / "pictures").glob("*.png")))
    assert picture.getcolors(2**20) is not None
    assert weights(pretrained)["model.decoder_pred.weight"].shape == (4 * 4 * 5, 32)
    assert weights(pretrained)["model.backbone.pos_embed"].shape == (1, 1 + 6 * 10, 128)
    assert np.isfinite(json.loads((pretrained / "result.json").read_text())["loss"])
    run("report", pretrained)


@pytest.mark.parametrize("verb", ["probe", "finetune", "knn"])
def test_five_channel_rectangles_are_evaluated(verb: str, packed: Path, pretrained: Path, tmp_path: Path) -> None:
    few = [word for word in TINY if verb != "knn" or not word.startswith("train.steps")]
    run(verb, *few, *WIDE, f"data.path={packed}", f"init_from={pretrained}", f"out={tmp_path / verb}")
    assert json.loads((tmp_path / verb / "result.json").read_text())["num_test_images"] == 2


@pytest.mark.parametrize("target", ["timm.pth", "timm.safetensors", "hf", "fb.pth", "safetensors"])
def test_five_channel_rectangles_are_exported_and_imported(
    target: str, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / target, tmp_path / "again"
    run("export", pretrained, "--to", target.partition(".")[0], "--out", out)
    printed = capsys.readouterr().out
    if target.startswith("timm"):
        model = eval(printed.partition("use it:")[2].strip(), {"timm": timm})
        assert model.patch_embed.proj.weight.shape == (128, 5, 4, 4)
        assert model(torch.zeros(1, 5, 24, 40)).shape == (1, 128)
    assert ("left out: the decoder" in printed) == (target != "safetensors")
    run("import", out, "--out", again)
    _, _, config = RunDir(again).settings()
    assert (config.model.image_size, config.data.channels) == ((24, 40), 5)
    assert config.data.mean == pytest.approx(RunDir(pretrained).settings()[2].data.mean)
    before, after = (weights(path)["model.backbone.pos_embed"] for path in (pretrained, again))
    assert torch.equal(before, after)


def test_export_to_npz_refuses_five_channels(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "1 or 3 channels" in refused(capsys, "export", pretrained, "--to", "npz", "--out", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.channels=3", "was packed with data.channels=5"),
        ("data.white=1000", "data.white=1000: images was packed with data.white=none, and so were its mean and std"),
        ("data.mean=[0.5,0.5,0.5]", "data.channels=5 numbers"),
        ("view.color_jitter=0.4", "is for 3 channels"), ("view.randaugment=rand-m9", "is for 3 channels"),
        ("model.image_size=[96,150]", "not divisible"), ("model.image_size=96x160", "for example [96, 160]"),
        ("model.image_size=[96]", "for example [96, 160]"), ("model.image_size=[96,0]", "must be at least 1"),
    ],
)  # fmt: skip
def test_settings_of_other_channels_or_sizes_are_refused(
    setting: str, message: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, *MAE, *WIDE, f"data.path={packed}", f"out={tmp_path / 'run'}", setting]
    assert message in refused(capsys, "pretrain", *words)


def test_init_from_a_run_of_other_channels_and_size_adapts_embedding_and_positions(
    packed: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["model.image_size=[20,40]", "data.channels=1", "data.mean=[0.5]", "data.std=[0.2]"]
    grey = tmp_path / "grey"
    for number in range(4):
        folder = grey / "images" / ("train" if number < 2 else "val") / "a"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((22, 44), 40 * number, np.uint8)).save(folder / f"{number}.png")
    run("data", "pack", "folder", "--source", grey / "images", "--out", grey / "data", "--channels", 1, "--workers", 1)
    with caplog.at_level(logging.INFO):
        start = [f"init_from={pretrained}", f"data.path={grey / 'data'}", f"out={tmp_path / 'probe'}"]
        run("probe", *TINY, *words, *start)
    assert "patch embedding of 5 channels summed for 1" in caplog.text
    assert "6 x 10 patches computed for 5 x 10" in caplog.text
    stored, found = weights(pretrained), weights(tmp_path / "probe")
    name = "model.backbone.patch_embed.proj.weight"
    assert torch.equal(found[name], stored[name].sum(1, keepdim=True))
    assert packed.exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7])
def test_fit_channels_follows_timm(channels: int) -> None:
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = timm.models.adapt_input_conv(channels, weight)
    assert torch.allclose(fit_channels(weight, channels), expected)
    assert torch.allclose(fit_channels(weight, channels).sum(1), weight.sum(1)) == (channels in (1, 3))


def test_square_as_a_pair_is_the_square() -> None:
    assert ModelConfig(image_size=(32, 32)) == ModelConfig(image_size=32)


def test_export_names_the_white_that_other_formats_cannot_keep() -> None:
    config = PretrainConfig(data=DataConfig("x", white=4095.0))
    _, left_out = Model("pretrain", config, {"backbone.cls_token": torch.zeros(1)}, 1, "").portable(decoder=False)
    assert left_out == ["data.white=4095: give it to runs of the imported model"]
