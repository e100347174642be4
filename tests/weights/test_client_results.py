"""Exports in the clients' own hands: loaded and evaluated by timm and transformers on photos, traced and exported."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_model_data_config  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from trained import MEAN, STD, Cli, classifier, randomised, save_run, usage

from mae_dist import models, restore
from mae_dist.data import crop, views
from mae_dist.objectives.classify import Probe
from mae_dist.run.directory import RunDir
from mae_dist.schema import ViewConfig
from mae_dist.weights import FORMATS, card

SIZES = [(32, 32), (61, 45), (40, 97), (33, 64)]
"""(height, width) of the photos."""


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Photos of several shapes: smooth colours with some noise."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(24):
        height, width = SIZES[number % len(SIZES)]
        rough = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        found.append(rough.resize((width, height), Image.Resampling.BICUBIC))
    return found


def own_images(photos: list[Image.Image], test_crop: float) -> Tensor:
    """The photos through the test view of mae_dist, (n, 3, 32, 32)."""
    view = views.View(ViewConfig(test_crop=test_crop), 32, MEAN, STD, 0, training=False)
    zero, pixels = torch.zeros(1, dtype=torch.int64), np.zeros((len(photos), 32, 32, 3), np.uint8)
    for photo, out in zip(photos, pixels, strict=True):
        array = np.asarray(photo)
        boxes, _ = view.boxes(zero, zero, torch.tensor([array.shape[:2]]))
        crop.crop(array, boxes[0].tolist(), False, out)
    ids = np.zeros(len(photos), np.int64)
    return view.finish(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, ids, ids)


def top1(logits: Tensor, labels: Tensor) -> float:
    """Percentage of right answers."""
    return (logits.argmax(1) == labels).double().mean().item() * 100


@pytest.mark.parametrize("test_crop", [1.0, 0.8])
def test_clients_see_and_classify_photos_as_mae_dist_does(
    test_crop: float, photos: list[Image.Image], tmp_path: Path, cli: Cli
) -> None:
    transformers = pytest.importorskip("transformers")
    objective = classifier("vit_demo4", image_size=32)
    run = save_run(objective, "vit_demo4", tmp_path / "run", test_crop=test_crop)
    own = own_images(photos, test_crop)
    with torch.no_grad():
        expected = objective.head(objective.backbone(own))
        labels = expected.roll(1, 0).argmax(1)  # some are right, some wrong
        for target in ("timm.pth", "timm.safetensors", "timm", "hf"):
            line = usage(cli("export", run, "--to", target.partition(".")[0], "--out", tmp_path / target))
            if target == "hf":
                model = eval(line, {"transformers": transformers}).eval()
                processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / target)
                images = torch.cat([processor(photo, return_tensors="pt").pixel_values for photo in photos])
                logits = model(images).logits
            else:
                model = eval(line, {"timm": timm}).eval()
                transform: Any = create_transform(**resolve_model_data_config(model))
                images = torch.stack([transform(photo) for photo in photos])
                logits = model(images)
            assert (images - own).abs().mean() * 0.25 < 4 / 255, target  # a centre crop of whole pixels
            assert top1(logits, labels) == top1(expected, labels), target
            assert torch.equal(logits.argmax(1), expected.argmax(1)), target


def test_export_says_where_a_crop_of_whole_pixels_is_another_one(tmp_path: Path) -> None:
    """0.875 of 32 px is that of 36.57 px, and clients take 37; of 224 px it is that of 256."""
    for size, said in ((32, True), (224, False)):
        run = save_run(
            classifier("vit_demo4", image_size=size), "vit_demo4", tmp_path / f"{size}", size, test_crop=0.875
        )
        for target in ("timm", "hf"):
            encoded = FORMATS[target].encode(restore.of_run(RunDir(run)))[1]
            assert any("crop 32 of 37 whole pixels, which is 0.8649 of the image" in line for line in encoded) == said
    assert "crop 32 of 37" in card.card(restore.of_run(RunDir(tmp_path / "32")), "timm", "")


def test_probe_exports_as_a_linear_head_with_its_batch_norm_folded(tmp_path: Path, cli: Cli) -> None:
    probe: Any = randomised(Probe(models.build("vit_demo4", image_size=32), 5, chunk=2, seed=0))
    probe.norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
    probe.norm.running_var.uniform_(0.01, 4, generator=torch.Generator().manual_seed(4))
    run = save_run(probe, "vit_demo4", tmp_path / "run")
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = probe.head(probe.norm(probe.backbone(images)))
        line = usage(cli("export", run, "--to", "timm", "--out", tmp_path / "x.pth"))
        found = eval(line, {"timm": timm}).eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_folders_have_a_card_class_names_and_the_modes_of_umask(tmp_path: Path, cli: Cli) -> None:
    objective = classifier("vit_demo4", 3, image_size=32)
    torch.save({"state_dict": {n.removeprefix("backbone."): t for n, t in objective.state_dict().items()},
                "label_names": ["cat", "dog", "yak"]}, tmp_path / "x.pth")  # fmt: skip
    cli("import", tmp_path / "x.pth", "--out", tmp_path / "run")
    folder = tmp_path
    for number, target in enumerate(("hf", "safetensors", "timm", "hf")):
        folder, again = tmp_path / f"{number}-{target}", tmp_path / f"run-{number}"
        cli("export", tmp_path / "run" if number == 0 else tmp_path / f"run-{number - 1}",
            "--to", target, "--out", folder)  # fmt: skip
        header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
        assert header["pipeline_tag"] == "image-classification"
        modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
        assert modes == {stat.S_IMODE((tmp_path / "x.pth").stat().st_mode)}
        cli("import", folder, "--out", again)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog", "2": "yak"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
def test_onnx_computes_in_onnxruntime_what_the_run_does_for_any_batch(name: str, tmp_path: Path, cli: Cli) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    objective = classifier(name, image_size=32)
    run, file = save_run(objective, name, tmp_path / "run"), tmp_path / "x.onnx"
    line = usage(cli("export", run, "--to", "onnx", "--out", file))
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    features, logits = eval(line, {"onnxruntime": onnxruntime, "images": images.numpy()})
    with torch.no_grad():
        expected = objective.backbone(images)
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(logits), objective.head(expected), rtol=1e-4, atol=1e-4)
    known = onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map
    assert json.loads(known["pretrained_cfg"])["mean"] == list(MEAN)
    assert json.loads(known["label_names"])[:2] == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize(("name", "pool"), [("vit_demo4", "cls"), ("vit_demo4", "avg"), ("mixer_demo4", "avg")])
@pytest.mark.filterwarnings("ignore")
def test_backbones_are_traced_and_exported_for_any_batch(name: str, pool: str) -> None:
    backbone = models.build(name, image_size=32, pool=pool).eval()
    two, five = torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    # unchecked: in this suite type checkers give values names of their own, which the check compares
    traced: Any = torch.jit.trace(backbone, two, check_trace=False)
    exported = torch.export.export(backbone, (two,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with torch.no_grad():
        for other in (traced, exported):
            torch.testing.assert_close(other(five), backbone(five))
