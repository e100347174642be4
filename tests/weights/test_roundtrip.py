"""Import and export: weights go through other formats and come back bit-identical."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from trained import (
    DECODER,
    MEAN,
    STD,
    Cli,
    classifier,
    identical,
    mae,
    official,
    randomised,
    run_config,
    run_state,
    save_run,
    usage,
)

from mae_dist import models, restore, schema
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.objectives.classify import Probe
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run.directory import RunDir
from mae_dist.schema import MaeConfig
from mae_dist.weights import FORMATS


def convert_through(cli: Cli, start: Path, formats: list[str], folder: Path) -> list[Path]:
    """Import a file, then export and import it in each format (name, or name:suffix); return all the runs."""
    runs = [folder / "run-0"]
    cli("import", start, "--out", runs[0])
    for number, step in enumerate(formats, 1):
        target, _, suffix = step.partition(":")
        file = folder / f"file-{number}{suffix}"
        assert "features 0" in cli("export", runs[-1], "--to", target, "--out", file)
        runs.append(folder / f"run-{number}")
        cli("import", file, "--out", runs[-1])
    return runs


KEYS_MATCH = "<All keys matched successfully>"


class Official(timm.models.VisionTransformer):
    """`models_vit.VisionTransformer` of the official MAE code, whose option for pooling is another."""

    def __init__(self, global_pool: bool, **options: Any):
        super().__init__(global_pool="avg" if global_pool else "token", **options)


def load_officially(line: str) -> None:
    """Run a line of export, which loads its file strictly into the official fine-tuning model."""
    vit = argparse.Namespace(VisionTransformer=Official)
    assert str(eval(line, {"models_vit": vit, "partial": partial, "nn": nn, "torch": torch})) == KEYS_MATCH


def test_roundtrip_of_backbone_through_all_formats_is_bit_identical(tmp_path: Path, cli: Cli) -> None:
    objective = mae()
    torch.save({"model": official(objective), "epoch": 799}, tmp_path / "fb.pth")
    runs = convert_through(cli, tmp_path / "fb.pth", ["timm:.pth", "hf", "npz:.npz", "timm:.safetensors"], tmp_path)
    whole = dict(objective.state_dict())
    backbone = {name: tensor for name, tensor in whole.items() if name.startswith("backbone.")}
    assert identical(run_state(runs[0]), whole)
    assert all(identical(run_state(run), backbone) for run in runs[1:])


def test_roundtrip_of_mae_keeps_every_bit_and_its_settings(tmp_path: Path, cli: Cli) -> None:
    objective = mae()
    origin = save_run(objective, "vit_demo4", tmp_path / "origin")
    assert "pixel predictions 0" in cli("export", origin, "--to", "fb", "--out", tmp_path / "fb.pth")
    for run in convert_through(cli, tmp_path / "fb.pth", ["hf", "fb:.pth", "safetensors", "hf"], tmp_path):
        assert identical(run_state(run), dict(objective.state_dict()))
        assert run_config(run).mae == DECODER
        assert (run_config(run).data.mean, run_config(run).data.std) == (MEAN, STD)
        assert (run_config(run).model.position, run_config(run).model.image_size) == ("sincos", 32)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_roundtrip_of_finetuned_vit_is_bit_identical(tmp_path: Path, cli: Cli, pool: str) -> None:
    objective = classifier(pool=pool, position="learned")
    assert ("backbone.fc_norm.weight" in objective.state_dict()) == (pool == "avg")
    torch.save({"model": official(objective)}, tmp_path / "fb.pth")
    formats = ["timm:.safetensors", "fb:.pth", "safetensors"] + (["hf", "npz:.npz"] if pool == "cls" else [])
    for run in convert_through(cli, tmp_path / "fb.pth", formats, tmp_path):
        assert identical(run_state(run), dict(objective.state_dict()))
        assert (run_config(run).model.pool, run_config(run).model.position) == (pool, "learned")
        assert RunDir(run).settings()[0] == "finetune"


def test_export_takes_ema_weights(tmp_path: Path, cli: Cli) -> None:
    pack(from_synthetic(16, 8), tmp_path / "set", shard_size=16)
    run, out = tmp_path / "run", tmp_path / "out"
    cli(
        "pretrain", f"data.path={tmp_path / 'set'}", f"out={run}", "model.name=vit_demo4", "model.image_size=32",
        "machine.processes=1", "train.precision=fp32", "train.global_batch=8", "train.steps=2", "train.ema=0.9",
        "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4",
    )  # fmt: skip
    cli("export", run, "--to", "safetensors", "--out", out)
    (newest,) = (run / "checkpoints").glob("step-*")
    kept = {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}
    trained, name = load_file(out / "model.safetensors"), "backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(trained[name], kept[f"ema.{name}"])
    assert not torch.equal(trained[name], kept[f"model.{name}"])


def test_roundtrip_of_mixer_is_bit_identical(tmp_path: Path, cli: Cli) -> None:
    objective = classifier("mixer_demo4")
    torch.save(official(objective), tmp_path / "timm.pth")
    runs = convert_through(cli, tmp_path / "timm.pth", ["npz:.npz", "timm:.safetensors", "safetensors"], tmp_path)
    assert all(identical(run_state(run), dict(objective.state_dict())) for run in runs)
    names = set(np.load(tmp_path / "file-1.npz").files)
    block = {f"LayerNorm_{n}/{leaf}" for n in (0, 1) for leaf in ("scale", "bias")}
    block |= {f"{mix}_mixing/Dense_{n}/{leaf}" for mix in ("token", "channel") for n in (0, 1)
              for leaf in ("kernel", "bias")}  # fmt: skip
    expected = {f"MixerBlock_{number}/{part}" for number in range(4) for part in block}  # vit_jax's models_mixer.py
    line = FORMATS["npz"].usage(restore.of_run(RunDir(runs[0])), tmp_path / "file-1.npz")
    made: dict[str, Any] = {}

    class MlpMixer:
        def __init__(self, patches: Any, **options: Any):
            made.update(options, patch=patches["size"])

        def apply(self, variables: dict[str, Any], images: str, train: bool) -> bool:
            return set(variables["params"].files) == names and bool(images) and not train

    jax = SimpleNamespace(models_mixer=SimpleNamespace(MlpMixer=MlpMixer), checkpoint=np)
    assert eval(line, {"vit_jax": jax, "ml_collections": SimpleNamespace(ConfigDict=dict), "images": "some"})
    assert made == {"patch": (4, 4), "num_classes": 7, "num_blocks": 4, "hidden_dim": 128, "tokens_mlp_dim": 64,
                    "channels_mlp_dim": 512}  # fmt: skip
    expected |= {f"{part}/{leaf}" for part in ("stem", "head") for leaf in ("kernel", "bias")}
    assert names == expected | {"pre_head_layer_norm/scale", "pre_head_layer_norm/bias"}


@pytest.mark.parametrize(
    "settings",
    [
        dataclasses.replace(DECODER, decoder="cross", predict=0.25),
        dataclasses.replace(DECODER, hidden="token", masking="block"),
    ],
    ids=["cross", "token"],
)
@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
def test_export_keeps_cross_and_token_decoders_in_own_format_alone(
    tmp_path: Path, cli: Cli, name: str, settings: MaeConfig
) -> None:
    objective = mae(name, settings)
    origin = save_run(objective, name, tmp_path / "origin")
    for target, suffix in {"timm": ".pth", **({"fb": ".pth", "hf": ""} if name == "vit_demo4" else {})}.items():
        output = cli("export", origin, "--to", target, "--out", tmp_path / f"{target}{suffix}")
        assert "left out: the decoder (" in output
        assert "--to safetensors keeps it" in output
        if target == "fb":
            load_officially(usage(output))
    assert "pixel predictions 0" in cli("export", origin, "--to", "safetensors", "--out", tmp_path / "own")
    cli("import", tmp_path / "own", "--out", tmp_path / "run")
    assert identical(run_state(tmp_path / "run"), dict(objective.state_dict()))
    (verb, data, before), (verb2, data2, after) = RunDir(origin).settings(), RunDir(tmp_path / "run").settings()
    assert (verb, data, dataclasses.replace(before, out=after.out)) == (verb2, data2, after)
    assert [path.name for path in RunDir(tmp_path / "run").checkpoints()] == ["step-000000003"]
    card = (tmp_path / "own/README.md").read_text()
    assert all(word in card for word in (name, "0.4 0.5 0.6", "0.2 0.3 0.25", "no norm_pix", str(origin), "mask_ratio"))


def test_export_keeps_probe_and_its_batch_norm_in_own_format(tmp_path: Path, cli: Cli) -> None:
    probe = randomised(Probe(models.build("vit_demo4"), 5, chunk=2, seed=0))
    origin = save_run(probe, "vit_demo4", tmp_path / "origin")
    assert "logits 0" in cli("export", origin, "--to", "safetensors", "--out", tmp_path / "own")
    output = cli("export", origin, "--to", "timm", "--out", tmp_path / "timm.pth")
    assert "the probe's batch norm is folded" in output
    cli("import", tmp_path / "own/model.safetensors", "--out", tmp_path / "run")
    assert identical(run_state(tmp_path / "run"), dict(probe.state_dict()))


def test_export_of_probe_heads_takes_backbone_and_lists_heads(tmp_path: Path, cli: Cli) -> None:
    grids: list[dict[str, Any]] = [{"lars": (1.0, 2.0), "sgd": (0.1,), "features": ("cls", "mean")}, {"ridge": True}]
    grids += [{"adamw": (1e-3,), "attentive": True}]
    for number, grid in enumerate(grids):
        folder = tmp_path / str(number)
        heads = randomised(ProbeHeads(models.build("vit_demo4"), 5, schema.HeadsConfig(**grid), chunk=2, seed=0))
        backbone = {name: t for name, t in heads.state_dict().items() if name.startswith("backbone.")}
        origin = save_run(heads, "vit_demo4", folder / "origin")
        for target, suffix in {"timm": ".pth", "hf": "", "safetensors": ""}.items():
            if number and target != "safetensors":  # how heads are left out does not depend on the format
                continue
            output = cli("export", origin, "--to", target, "--out", folder / f"{target}{suffix}")
            assert "features 0" in output
            assert ("left out: the 6 probe heads (lars, sgd)" in output) == (number == 0)
            assert ("left out: the 2 probe heads (adamw)" in output) == (number == 2)
            cli("import", folder / f"{target}{suffix}", "--out", folder / f"run-{target}")
            assert identical(run_state(folder / f"run-{target}"), backbone)
        assert "left out" not in cli("export", folder / "run-safetensors", "--to", "fb", "--out", folder / "again.pth")
