"""Pretraining from the weights of an earlier run or of a file of others: what is taken over, and that resumes hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import MAE, SETTINGS, copy_of_begun, losses, refused, weights

from mae_dist import config
from mae_dist.__main__ import main
from mae_dist.models.layers import sincos_positions
from mae_dist.run import layout

FEW = [word for word in SETTINGS if not word.startswith("model.")]
"""A tiny run that says nothing of its model."""


@pytest.fixture(scope="module")
def source(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining of few steps, with averaged weights."""
    out = tmp_path_factory.mktemp("source") / "run"
    assert main(["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "train.steps=2", f"out={out}"]) == 0
    return out


def test_pretrain_from_an_official_file_starts_with_the_loss_at_which_its_source_ended(
    tiny_data: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model, its decoder and its statistics are those of the file, of which the command says nothing."""
    caplog.set_level("INFO")
    file, out = tmp_path / "mae.pth", tmp_path / "further"
    assert main(["export", str(source), "--to", "fb", "--out", str(file)]) == 0
    words = ["pretrain", f"data.path={tiny_data}", f"init_from={file}", *FEW, "train.steps=1", "optim.base_lr=1e-12"]
    assert main([*words, f"out={out}"]) == 0
    ended, begun = layout.result(source) or {}, layout.result(out) or {}
    assert begun["test_loss"] == pytest.approx(ended["test_loss"], abs=1e-6)
    old, new = layout.settings(source)[2], layout.settings(out)[2]
    assert (new.model.name, new.model.image_size, new.mae) == (old.model.name, old.model.image_size, old.mae)
    assert new.data.mean == pytest.approx(old.data.mean)
    assert "further-init: backbone and decoder" in caplog.text


def test_resume_of_a_run_from_initial_weights_gives_the_same_losses(
    tiny_data: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run is extended by a new one, as the refusal of more steps says; that one resumes as any other."""
    longer = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "train.steps=8"]
    assert f"begin a new run with its weights: init_from={source}" in refused(capsys, *longer, f"out={source}")
    shared = ["pretrain", f"data.path={tiny_data}", *FEW, "train.steps=3", "train.ema=0.9", f"init_from={source}"]
    whole = tmp_path / "whole"
    assert main([*shared, "checkpoint.every=1", f"out={whole}"]) == 0
    out = copy_of_begun(whole, tmp_path / "begun")
    assert main([*shared, f"out={out}"]) == 0
    assert losses(out) == losses(whole)
    assert losses(out)[0] < losses(source)[0]


def test_what_does_not_fit_the_initial_weights_is_changed_or_named(
    tiny_data: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    shared = ["pretrain", f"data.path={tiny_data}", *FEW, "train.steps=1", "optim.base_lr=1e-12"]
    larger = [*shared, f"init_from={source}", "model.image_size=48", "mae.decoder_depth=2", "mae.mask_ratio=0.5"]
    assert main([*larger, f"out={tmp_path / 'larger'}"]) == 0
    for sentence in (
        "positions of 8 x 8 patches computed for 12 x 12",
        "the decoder's positions of 8 x 8 patches computed for 12 x 12",
        "it was trained with mae.mask_ratio=0.75, mae.decoder_depth=1",
        "it lacks, or has in another shape, decoder_blocks.1: as initialised",
    ):
        assert f"init_from={source}: {sentence}" in caplog.text
    found, old = weights(tmp_path / "larger"), weights(source)
    assert torch.equal(found["model.decoder_pos_embed"][0, 1:], sincos_positions(32, 12, 12))
    for name in ("backbone.blocks.3.mlp.fc1.weight", "decoder_blocks.0.mlp.fc1.weight", "mask_token"):
        torch.testing.assert_close(found[f"model.{name}"], old[f"model.{name}"], rtol=0, atol=1e-6)

    caplog.clear()
    narrow = [*shared, f"init_from={source}", "mae.decoder_heads=2", f"out={tmp_path / 'narrow'}"]
    assert main(narrow) == 0
    assert "the backbone; no decoder, as its own has mae.decoder_heads=4" in caplog.text
    assert "set model.name=vit_demo4" in refused(
        capsys, *shared, f"init_from={source}", "model.name=vit_ti4", f"out={tmp_path / 'x'}"
    )

    caplog.clear()
    tuned = ["finetune", f"data.path={tiny_data}", *FEW, "train.steps=1", "model.pool=avg", f"init_from={source}"]
    assert main([*tuned, f"out={tmp_path / 'tuned'}"]) == 0
    assert "it lacks, or has in another shape, backbone.fc_norm: as initialised" in caplog.text
    assert main([*shared, f"init_from={tmp_path / 'tuned'}", *MAE[:3], f"out={tmp_path / 'after'}"]) == 0
    assert "the backbone; no decoder, as it has none" in caplog.text
    assert "no place here for its backbone.fc_norm, head" in caplog.text
    assert "backbone.norm: as initialised" in caplog.text


def test_settings_of_the_start_are_defaults_and_stay_those_of_a_run_that_has_begun(tmp_path: Path) -> None:
    """Name, size and pooling in every verb, in pretraining also positions and decoder; what is given decides."""
    start, out = tmp_path / "start", tmp_path / "out"
    given = ["data.path=d", f"out={start}", "model.name=vit_ti4", "model.image_size=[32,48]"]
    mae = ["model.position=learned", "mae.decoder_dim=64", "mae.norm_pix=false", "train.seed=5"]
    start.mkdir()
    (start / "config.yaml").write_text(config.dump(config.load("pretrain", None, [*given, *mae])))
    needed = ["data.path=d", f"out={out}", f"init_from={start}"]
    further = config.load("pretrain", None, [*needed, "mae.norm_pix=true", "model.name=vit_ti4"])
    assert (further.model.image_size, further.model.position, further.train.seed) == ((32, 48), "learned", 0)
    assert (further.mae.decoder_dim, further.mae.norm_pix) == (64, True)
    tuned = config.load("finetune", None, [*needed, "model.pool=avg"])
    assert (tuned.model.image_size, tuned.model.pool, tuned.model.position) == ((32, 48), "avg", None)
    out.mkdir()
    (out / "config.yaml").write_text(config.dump(config.load("finetune", None, [*needed, "model.image_size=64"])))
    assert config.load("finetune", None, needed).model.image_size == (32, 48)  # that run has made no step
    (out / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    assert config.load("finetune", None, needed).model.image_size == 64
    (start / "config.yaml").write_text("model: {name: vit_ti4, image_size: x}")
    with pytest.raises(ValueError, match=f"^init_from={start}: its config.yaml is damaged"):
        config.load("knn", None, [*needed[:1], "out=o", needed[2]])
