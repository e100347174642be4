"""`mae_dist.load`: any source of weights; images as the run saw them; features, reconstructions and classes."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared_types import Tars
from torch import nn
from trained import Cli, classifier, mae, randomised, save_run

import mae_dist
from mae_dist import models, schema
from mae_dist.data.loader import TarSource
from mae_dist.models.layers import EPS
from mae_dist.objectives.classify import Probe
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run.directory import RunDir

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def photo(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    """An image file of noise, (width, height)."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_load_transform_gives_the_bits_of_a_runs_evaluation(tmp_path: Path, tars: Tars, extension: str) -> None:
    m = mae_dist.load(save_run(mae(), "vit_demo4", tmp_path / "run", test_crop=0.875))
    index = tars([5], size=None, extension=extension)
    ids = np.arange(5)
    (batch,) = TarSource(index, CPU, 0).batches([(np.zeros_like(ids), ids)], m.transform.view)
    paths = []
    for number in ids:
        paths.append(tmp_path / f"{number}.{extension}")
        paths[-1].write_bytes(index.read(int(number)).image)
    assert torch.equal(m.transform(paths), batch.images)
    opened = [Image.open(path) for path in paths]
    assert torch.equal(m.transform(opened), batch.images)
    assert torch.equal(m.transform(str(paths[1])), batch.images[1])
    array = np.array(opened[2])
    channels_first = torch.from_numpy(array).permute(2, 0, 1)
    for values in (array, channels_first, array / 255):
        assert torch.equal(m.transform(values), batch.images[2])
    assert torch.equal(m.transform(array[None]), batch.images[2:3])
    assert m.transform([]).shape == (0, 3, 32, 32)
    grey = m.transform(opened[0].convert("L"))
    assert torch.equal(grey, m.transform(opened[0].convert("L").convert("RGB")))


def test_load_reads_runs_steps_exports_and_files_of_others_alike(tmp_path: Path, cli: Cli) -> None:
    run = save_run(classifier(), "vit_demo4", tmp_path / "run")
    names = [f"class {number}" for number in range(7)]
    RunDir(run).record_classes(names)
    cli("export", run, "--to", "safetensors", "--out", tmp_path / "own")
    cli("export", run, "--to", "timm", "--out", tmp_path / "timm.pth")
    image = photo(tmp_path / "a.png")
    first = mae_dist.load(run)
    expected = first.predict(image)
    assert expected.shape == (1, 7)
    assert first.classes == tuple(names)
    assert first.step == 3
    assert first.config.view.test_crop == 1
    for source in (f"{run}@3", tmp_path / "own", tmp_path / "timm.pth"):
        other = mae_dist.load(source)
        assert torch.equal(other.predict(other.transform(image)), expected)
        assert torch.equal(other.features(image), first.model(first.transform(image)[None]))
    assert mae_dist.load(tmp_path / "own").classes == tuple(names)
    assert repr(first) == f"Trained({run}: vit_demo4, finetune, step 3)"


def test_load_needs_no_process_group_where_torchrun_has_started_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(mae(), "vit_demo4", tmp_path / "run")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert mae_dist.load(run).features(photo(tmp_path / "a.png")).shape == (1, 128)


@pytest.mark.parametrize(("name", "pool"), [("vit_demo4", "cls"), ("vit_demo4", "avg"), ("mixer_demo4", "avg")])
def test_features_are_those_that_heads_read(tmp_path: Path, name: str, pool: str) -> None:
    m = mae_dist.load(save_run(classifier(name, pool=pool), name, tmp_path / "run"))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(m.features(x), m.model(x))
    last, prefix = m.features(x, "tokens"), m.model.num_prefix
    assert last.shape == (2, prefix + 64, m.model.dim)
    assert torch.equal(last[:, prefix:], m.features(x, "patches"))
    settings = schema.HeadsConfig(ridge=True, features=("cls", "mean") if prefix else ("mean",), blocks=(2, 4))
    heads = ProbeHeads(m.model, 3, settings, chunk=2, seed=0)
    rows = heads.rows(x)
    for (block, kind), columns in heads.columns.items():
        if kind != "both":
            assert torch.equal(m.features(x, kind, block), rows[:, columns])
    with torch.no_grad():
        (tokens,) = m.model.layers(x, {2})
    assert torch.equal(m.features(x, "patches", 2), tokens[:, prefix:])
    torch.testing.assert_close(tokens, nn.functional.layer_norm(tokens, (m.model.dim,), eps=EPS), rtol=1e-4, atol=1e-4)


def test_reconstruct_hides_patches_by_seed_and_predicts_all(tmp_path: Path) -> None:
    settings = schema.MaeConfig(decoder="cross", predict=0.25, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    m = mae_dist.load(save_run(mae(settings=settings), "vit_demo4", tmp_path / "run"))
    image = photo(tmp_path / "a.png", (32, 32))
    first, again, other = (m.reconstruct([image, image], seed) for seed in (1, 1, 2))
    assert torch.equal(first.visible, again.visible)
    assert np.array_equal(first.reconstructed, again.reconstructed)
    assert not torch.equal(first.visible, other.visible)
    assert not torch.equal(first.visible[0], first.visible[1])
    assert first.visible.shape == (2, 16)
    assert np.array_equal(first.original[0], np.array(Image.open(image)))
    mean = np.rint(255 * np.array(m.config.data.mean))
    hidden = (first.masked == mean).all(3).reshape(2, 8, 4, 8, 4).all((2, 4)).reshape(2, 64)
    shown = torch.zeros(2, 64, dtype=torch.bool).scatter_(1, first.visible, True)
    assert torch.equal(~torch.from_numpy(hidden), shown)
    predicted = (first.reconstructed != first.masked).any(3).reshape(2, 8, 4, 8, 4).any((2, 4)).reshape(2, 64)
    assert np.array_equal(predicted, hidden)


def test_predict_takes_the_chosen_one_of_several_heads(tmp_path: Path) -> None:
    settings = schema.HeadsConfig(lars=(0.1,), sgd=(0.1,), features=("cls", "mean"), blocks=(2, 4))
    heads: Any = randomised(ProbeHeads(models.build("vit_demo4", image_size=32), 5, settings, chunk=2, seed=0))
    run = save_run(heads, "vit_demo4", tmp_path / "run")
    with pytest.raises(ValueError, match="is not finished, so it cannot predict"):
        mae_dist.load(run).predict(photo(tmp_path / "a.png"))
    number = 5
    (run / "heads.json").write_text(json.dumps({"chosen": heads.heads[number].name}))
    m = mae_dist.load(run)
    x = m.transform([tmp_path / "a.png"])
    with torch.no_grad():
        assert torch.equal(m.predict(x), heads.logits(heads.rows(x))[:, number])
    (run / "heads.json").write_text(json.dumps({"chosen": "ridge penalty 0.1 on cls of block 4"}))
    with pytest.raises(ValueError, match=r"chose ridge penalty 0\.1 .*, which keeps no weights"):
        mae_dist.load(run).predict(x)
    probe: Any = randomised(Probe(models.build("vit_demo4", image_size=32), 5, chunk=2, seed=0))
    probe.norm.running_mean.fill_(0.5)
    alone = mae_dist.load(save_run(probe, "vit_demo4", tmp_path / "probe"))
    with torch.no_grad():
        assert torch.equal(alone.predict(x), probe.head(probe.norm(probe.backbone(x))))


def test_load_refusals_are_one_sentence(tmp_path: Path) -> None:
    m, mixer = (mae_dist.load(save_run(mae(name), name, tmp_path / name)) for name in ("vit_demo4", "mixer_demo4"))
    x = torch.zeros(1, 3, 32, 32)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    tuned = mae_dist.load(save_run(classifier(), "vit_demo4", tmp_path / "tuned"))
    cases: list[tuple[Any, str]] = [
        (lambda: mae_dist.load(tmp_path / "none"), "none: no such file or folder"),
        (lambda: mae_dist.load(tmp_path / "folder"), "folder: a folder without model.safetensors"),
        (lambda: mae_dist.load(f"{tmp_path}/vit_demo4@7"), "has no checkpoint of step 7; it has those of steps 3"),
        (lambda: m.transform(tmp_path / "none.png"), "none.png: No such file"),
        (lambda: m.transform([str(tmp_path / "text.png")]), "text.png: is no BMP"),
        (lambda: m.transform(np.zeros((4, 4, 5), np.uint8)), r"\(4, 4, 5\) is no image of 3 channels"),
        (lambda: m.transform([None]), r"an array of shape \(\) is no image"),  # pyright: ignore[reportArgumentType]
        (lambda: m.transform(np.zeros(4)), r"an array of shape \(4,\) is no image"),
        (lambda: m.transform(np.full((4, 4), 300)), "int64 values from 300 to 300"),
        (lambda: m.features(torch.zeros(1, 3, 64, 64)), r"\(1, 3, 64, 64\): the model takes \(b, 3, 32, 32\)"),
        (lambda: m.features(x, "sum"), "features sum: must be pooled, cls"),
        (lambda: m.features(x, block=5), "block 5: vit_demo4 has blocks 1 to 4"),
        (lambda: m.features(x, block=0), "block 0"),
        (lambda: mixer.features(x, "cls"), "mixer_demo4 has no class token"),
        (lambda: m.predict(x), "has no head to predict classes with"),
        (lambda: m.reconstruct(x, seed=-1), "seed=-1: must be a whole number"),
        (lambda: tuned.reconstruct(x), "has no decoder to reconstruct with"),
    ]  # fmt: skip
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as found:
            call()
        assert "\n" not in str(found.value)


def test_page_of_python_and_its_script_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    save_run(mae("vit_ti4"), "vit_ti4", tmp_path / "runs/ti4")
    RunDir(save_run(classifier("vit_ti4"), "vit_ti4", tmp_path / "runs/ti4-finetune")).record_classes([*"abcdefg"])
    for name in ("a.png", "b.png"):
        photo(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["patches"].shape == (2, 64, 192)
    assert found["shown"].reconstructed.shape == (2, 32, 32, 3)
    assert set(eval(capsys.readouterr().out)) <= {*"abcdefg"}
    monkeypatch.setattr(sys, "argv", ["look_inside.py", "runs/ti4", "a.png", "b.png", "--block", "3"])
    runpy.run_path(str(ROOT / "docs/look_inside.py"), run_name="__main__")
    width, height = Image.open("look.png").size
    assert height > 4 * 96
    assert width > 2 * 96
