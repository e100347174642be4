"""Weights go to other houses and come back bit by bit; timm and transformers load what is written for them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_dist import models, schema
from mae_dist.__main__ import main
from mae_dist.batch import Batch
from mae_dist.commands import export_weights, import_weights
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run.directory import RunDir
from mae_dist.schema import MaeConfig
from mae_dist.weights import HOUSES, Found, Given, npz
from mae_dist.weights.identify import architecture

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
DECODER = MaeConfig(decoder_dim=32, decoder_depth=2, decoder_heads=4, norm_pix=False, mask_ratio=0.5)
Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """`say(word, ...)` runs a command that succeeds, and gives what it printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def randomised(objective: Objective) -> Objective:
    """Every parameter random, except for fixed positions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
    return objective.eval()


def mae(name: str = "vit_demo4", settings: MaeConfig = DECODER) -> MAE:
    objective = randomised(MAE(models.build(name), settings, 0))
    assert isinstance(objective, MAE)
    return objective


def classifier(name: str = "vit_demo4", num_classes: int = 7, **choices: Any) -> Finetune:
    backbone = models.build(name, **choices)
    objective = randomised(Finetune(backbone, num_classes, drop_path=0.0, label_smoothing=0.0, seed=0))
    assert isinstance(objective, Finetune)
    return objective


def official(objective: Objective) -> dict[str, Tensor]:
    """The state dict as the official MAE code, and timm, would have it."""
    return {name.removeprefix("backbone."): tensor for name, tensor in objective.state_dict().items()}


def saved(objective: Objective, name: str, out: Path, size: int = 32, step: int = 3) -> Path:
    """A finished run with these weights, as its verb would leave it."""
    data, train = schema.DataConfig(path="x", mean=MEAN, std=STD), schema.TrainConfig(steps=step)
    backbone = objective.backbone
    model = schema.ModelConfig(name=name, image_size=size, pool="avg" if backbone.pool == "avg" else None)
    common = {"out": str(out), "data": data, "model": model, "train": train}
    if isinstance(objective, MAE):
        verb, config = "pretrain", schema.PretrainConfig(**common, mae=objective.settings)
    elif isinstance(objective, ProbeHeads):
        verb, config = "probe", schema.ProbeConfig(**common, init_from="random", heads=objective.settings)
    elif isinstance(objective, Probe):
        verb, config = "probe", schema.ProbeConfig(**common, init_from="random")
    else:
        verb, config = "finetune", schema.FinetuneConfig(**common, init_from="random")
    run = RunDir(out)
    run.open(verb, config, "abc")
    run.save(step, {f"model.{n}": t for n, t in objective.state_dict().items()} | {"optimizer.x": torch.ones(2)}, 1)
    run.finish({"verb": verb})
    return out


def state(run: Path) -> dict[str, Tensor]:
    return export_weights.load(RunDir(run)).state


def config(run: Path) -> schema.PretrainConfig:
    return RunDir(run).settings()[2]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def travel(say: Say, start: Path, houses: list[str], folder: Path) -> list[Path]:
    """Import a file, then export and import through the houses (name, or name:suffix); the runs on the way."""
    runs = [folder / "run-0"]
    say("import", start, "--out", runs[0])
    for number, stop in enumerate(houses, 1):
        house, _, suffix = stop.partition(":")
        file = folder / f"file-{number}{suffix}"
        assert "features 0" in say("export", runs[-1], "--to", house, "--out", file)
        runs.append(folder / f"run-{number}")
        say("import", file, "--out", runs[-1])
    return runs


def test_round_trip_of_a_backbone(tmp_path: Path, say: Say) -> None:
    objective = mae()
    torch.save({"model": official(objective), "epoch": 799}, tmp_path / "fb.pth")
    runs = travel(say, tmp_path / "fb.pth", ["timm:.pth", "hf", "npz:.npz", "timm:.safetensors"], tmp_path)
    whole = dict(objective.state_dict())
    backbone = {name: tensor for name, tensor in whole.items() if name.startswith("backbone.")}
    assert same(state(runs[0]), whole)
    assert all(same(state(run), backbone) for run in runs[1:])


def test_round_trip_of_a_whole_autoencoder_keeps_what_is_said_of_it(tmp_path: Path, say: Say) -> None:
    objective = mae()
    origin = saved(objective, "vit_demo4", tmp_path / "origin")
    assert "pixel predictions 0" in say("export", origin, "--to", "fb", "--out", tmp_path / "fb.pth")
    for run in travel(say, tmp_path / "fb.pth", ["hf", "fb:.pth", "safetensors", "hf"], tmp_path):
        assert same(state(run), dict(objective.state_dict()))
        assert config(run).mae == DECODER
        assert (config(run).data.mean, config(run).data.std) == (MEAN, STD)
        assert (config(run).model.position, config(run).model.image_size) == ("sincos", 32)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_round_trip_of_a_fine_tuned_model(tmp_path: Path, say: Say, pool: str) -> None:
    objective = classifier(pool=pool, position="learned")
    assert ("backbone.fc_norm.weight" in objective.state_dict()) == (pool == "avg")
    torch.save({"model": official(objective)}, tmp_path / "fb.pth")
    houses = ["timm:.safetensors", "fb:.pth", "safetensors"] + (["hf", "npz:.npz"] if pool == "cls" else [])
    for run in travel(say, tmp_path / "fb.pth", houses, tmp_path):
        assert same(state(run), dict(objective.state_dict()))
        assert (config(run).model.pool, config(run).model.position) == (pool, "learned")
        assert RunDir(run).settings()[0] == "finetune"


def test_averaged_weights_are_what_is_exported(tmp_path: Path, say: Say) -> None:
    """As `init_from=RUN` and evaluations take them."""
    pack(from_synthetic(16, 8), tmp_path / "set", shard_size=16)
    run, out = tmp_path / "run", tmp_path / "out"
    say(
        "pretrain", f"data.path={tmp_path / 'set'}", f"out={run}", "model.name=vit_demo4", "model.image_size=32",
        "machine.processes=1", "train.precision=fp32", "train.global_batch=8", "train.steps=2", "train.ema=0.9",
        "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4",
    )  # fmt: skip
    say("export", run, "--to", "safetensors", "--out", out)
    (newest,) = (run / "checkpoints").glob("step-*")
    kept = {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}
    trained, name = load_file(out / "model.safetensors"), "backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(trained[name], kept[f"ema.{name}"])
    assert not torch.equal(trained[name], kept[f"model.{name}"])


def test_round_trip_of_a_mixer(tmp_path: Path, say: Say) -> None:
    objective = classifier("mixer_demo4")
    torch.save(official(objective), tmp_path / "timm.pth")
    runs = travel(say, tmp_path / "timm.pth", ["npz:.npz", "timm:.safetensors", "safetensors"], tmp_path)
    assert all(same(state(run), dict(objective.state_dict())) for run in runs)
    names = set(np.load(tmp_path / "file-1.npz").files)
    block = {f"LayerNorm_{n}/{leaf}" for n in (0, 1) for leaf in ("scale", "bias")}
    block |= {f"{mix}_mixing/Dense_{n}/{leaf}" for mix in ("token", "channel") for n in (0, 1)
              for leaf in ("kernel", "bias")}  # fmt: skip
    expected = {f"MixerBlock_{number}/{part}" for number in range(4) for part in block}  # vit_jax's models_mixer.py
    line = HOUSES["npz"].usage(export_weights.load(RunDir(runs[0])), tmp_path / "file-1.npz")
    made: dict[str, Any] = {}

    class MlpMixer:
        def __init__(self, patches: Any, **words: Any):
            made.update(words, patch=patches["size"])

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
def test_decoders_that_only_we_have_are_left_out_aloud_and_kept_at_home(
    tmp_path: Path, say: Say, name: str, settings: MaeConfig
) -> None:
    objective = mae(name, settings)
    origin = saved(objective, name, tmp_path / "origin")
    for house, suffix in {"timm": ".pth", **({"fb": ".pth", "hf": ""} if name == "vit_demo4" else {})}.items():
        said = say("export", origin, "--to", house, "--out", tmp_path / f"{house}{suffix}")
        assert "left out: the decoder (" in said
        assert "--to safetensors keeps it" in said
        if house == "fb":
            official_loads(there(said))
    assert "pixel predictions 0" in say("export", origin, "--to", "safetensors", "--out", tmp_path / "own")
    say("import", tmp_path / "own", "--out", tmp_path / "run")
    assert same(state(tmp_path / "run"), dict(objective.state_dict()))
    (verb, data, before), (verb2, data2, after) = RunDir(origin).settings(), RunDir(tmp_path / "run").settings()
    assert (verb, data, dataclasses.replace(before, out=after.out)) == (verb2, data2, after)
    assert [path.name for path in RunDir(tmp_path / "run").checkpoints()] == ["step-000000003"]
    card = (tmp_path / "own/README.md").read_text()
    assert all(word in card for word in (name, "0.4 0.5 0.6", "0.2 0.3 0.25", "no norm_pix", str(origin), "mask_ratio"))


def test_a_probe_keeps_its_head_at_home(tmp_path: Path, say: Say) -> None:
    probe = randomised(Probe(models.build("vit_demo4"), 5, chunk=2, seed=0))
    origin = saved(probe, "vit_demo4", tmp_path / "origin")
    assert "logits 0" in say("export", origin, "--to", "safetensors", "--out", tmp_path / "own")
    said = say("export", origin, "--to", "timm", "--out", tmp_path / "timm.pth")
    assert "left out: the probe's head" in said
    say("import", tmp_path / "own/model.safetensors", "--out", tmp_path / "run")
    assert same(state(tmp_path / "run"), dict(probe.state_dict()))


def test_of_a_probe_board_the_backbone_is_exported_and_the_heads_are_named(tmp_path: Path, say: Say) -> None:
    grids: list[dict[str, Any]] = [{"lars": (1.0, 2.0), "sgd": (0.1,), "features": ("cls", "mean")}, {"ridge": True}]
    grids += [{"adamw": (1e-3,), "attentive": True}]
    for number, grid in enumerate(grids):
        folder = tmp_path / str(number)
        board = randomised(ProbeHeads(models.build("vit_demo4"), 5, schema.HeadsConfig(**grid), chunk=2, seed=0))
        backbone = {name: t for name, t in board.state_dict().items() if name.startswith("backbone.")}
        origin = saved(board, "vit_demo4", folder / "origin")
        for house, suffix in {"timm": ".pth", "hf": "", "safetensors": ""}.items():
            said = say("export", origin, "--to", house, "--out", folder / f"{house}{suffix}")
            assert "features 0" in said
            assert ("left out: the probe board's heads, 6 in all (lars, sgd)" in said) == (number == 0)
            assert ("left out: the probe board's heads, 2 in all (adamw)" in said) == (number == 2)
            say("import", folder / f"{house}{suffix}", "--out", folder / f"run-{house}")
            assert same(state(folder / f"run-{house}"), backbone)
        assert "left out" not in say("export", folder / "run-safetensors", "--to", "fb", "--out", folder / "again.pth")


def there(said: str) -> str:
    """The line that an export says to type."""
    return said.split("use it:")[1].strip()


class Official(timm.models.VisionTransformer):
    """`models_vit.VisionTransformer` of the official MAE code, which says pooling in another way."""

    def __init__(self, global_pool: bool, **words: Any):
        super().__init__(global_pool="avg" if global_pool else "token", **words)


def official_loads(line: str) -> None:
    """The line loads strictly into the official fine-tuning model."""
    vit = argparse.Namespace(VisionTransformer=Official)
    assert str(eval(line, {"models_vit": vit, "partial": partial, "nn": nn, "torch": torch})) == KEYS_MATCH


KEYS_MATCH = "<All keys matched successfully>"


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "size", "choices", "suffix"),
    [
        ("vit_ti16", 224, {"pool": "avg"}, ".pth"),
        ("vit_ti16", 64, {}, ".npz"),
        ("vit_ti4", 32, {}, ".safetensors"),
        ("vit_demo4", 32, {"pool": "avg"}, ".pth"),
        ("mixer_s16", 32, {}, ".safetensors"),
        ("mixer_ti4", 32, {}, ".pth"),
        ("mixer_demo4", 32, {}, ".safetensors"),
    ],
)
def test_timm_loads_strictly_and_computes_the_same(
    tmp_path: Path, say: Say, name: str, size: int, choices: dict[str, Any], suffix: str
) -> None:
    objective = classifier(name, image_size=size, **choices)
    house, file = ("npz" if suffix == ".npz" else "timm"), tmp_path / f"weights{suffix}"
    line = there(say("export", saved(objective, name, tmp_path / "run", size), "--to", house, "--out", file))
    if line.startswith("model = "):
        exec(line, space := {"timm": timm})
        theirs = space["model"]
    else:
        theirs = eval(line, {"timm": timm})
    theirs = theirs.double().eval()
    ours, pixels = objective.double(), images(size)[:1]
    with torch.no_grad():
        expected = ours.backbone(pixels)
        features = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        assert (features - expected).abs().max() < 1e-12 * expected.abs().max().clamp(min=1)
        logits = theirs(pixels)
    assert (logits - ours.head(expected)).abs().max() < 1e-11 * logits.abs().max()


@pytest.mark.parametrize("name", models.BACKBONES)
def test_every_backbone_has_the_names_and_shapes_of_timms_model_and_is_told_by_them(name: str) -> None:
    with torch.device("meta"):
        objective = Finetune(models.build(name), 7, drop_path=0.0, label_smoothing=0.0, seed=0)
    size, ours = objective.backbone.image_size[0], official(objective)
    settings = schema.FinetuneConfig(model=schema.ModelConfig(name=name, image_size=size))
    model = export_weights.Model("finetune", settings, dict(objective.state_dict()))
    timms_name, words = HOUSES["timm"].architecture(model)
    with torch.device("meta"):
        make = timm.models.MlpMixer if timms_name == "MlpMixer" else partial(timm.create_model, timms_name)
        theirs: Any = make(**words)
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {n: t.shape for n, t in ours.items()}
    if model.is_vit:  # shapes do not tell it
        assert {block.attn.num_heads for block in theirs.blocks} == {model.sizes["num_heads"]}
    assert architecture(HOUSES["timm"].ours(theirs.state_dict()), None, "timm's") == (name, size)


def transformed(line: str) -> nn.Module:
    """What a line of transformers loads, in float64, nothing missing and nothing too much."""
    transformers = pytest.importorskip("transformers")
    model, loading = eval(f"{line[:-1]}, output_loading_info=True)", {"transformers": transformers})
    assert not any(loading.values()), loading
    return model.double().eval()


def test_transformers_computes_the_same_autoencoder(tmp_path: Path, say: Say) -> None:
    objective = mae()
    run = saved(objective, "vit_demo4", tmp_path / "run")
    line = there(say("export", run, "--to", "hf", "--out", tmp_path / "hf"))
    assert "ViTMAEForPreTraining" in line
    theirs, ours, pixels = transformed(line), objective.double(), images()
    zeros = torch.zeros(3, dtype=torch.int64)
    batch = Batch(pixels, zeros, torch.arange(3), zeros, zeros.bool())
    mask = ours.mask(batch)
    order = torch.cat(mask, 1)
    noise = torch.zeros(order.shape, dtype=torch.float64).scatter(1, order, torch.arange(64.0).double().expand(3, -1))
    with torch.no_grad():
        output, expected = theirs(pixels, noise=noise), ours(batch)
    predicted = output.logits.gather(1, mask.masked[..., None].expand(-1, -1, 48))
    assert (predicted - expected.prediction).abs().max() < 1e-12 * expected.prediction.abs().max()
    assert abs(output.loss - expected.loss.mean()) < 1e-12 * output.loss
    processor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == (list(MEAN), list(STD))


def test_transformers_computes_the_same_classifier_and_backbone(tmp_path: Path, say: Say) -> None:
    objective = classifier()
    line = there(say("export", saved(objective, "vit_demo4", tmp_path / "a"), "--to", "hf", "--out", tmp_path / "hf"))
    assert "ViTForImageClassification" in line
    pixels = images()
    with torch.no_grad():
        theirs, ours = transformed(line)(pixels).logits, objective.double()
        expected = ours.head(ours.backbone(pixels))
        assert (theirs - expected).abs().max() < 1e-11 * expected.abs().max()
        probe = randomised(Probe(models.build("vit_demo4"), 5, chunk=2, seed=0))
        line = there(say("export", saved(probe, "vit_demo4", tmp_path / "b"), "--to", "hf", "--out", tmp_path / "vit"))
        assert "ViTModel" in line
        theirs, expected = transformed(line)(pixels).last_hidden_state, probe.double().backbone.encode(pixels)
    assert (theirs - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("spelling", ["saved", "in memory", "pytorch_model.bin"])
def test_what_transformers_saves_is_read(tmp_path: Path, say: Say, kind: str, spelling: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
             "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6}  # fmt: skip
    if "MAE" in kind:
        config_ = transformers.ViTMAEConfig(
            **sizes, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=128, norm_pix_loss=True,
        )  # fmt: skip
    else:
        config_ = transformers.ViTConfig(**sizes, num_labels=3)
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(config_).eval()
    theirs.save_pretrained(tmp_path / "hf")
    if spelling == "in memory":
        tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    if spelling == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()
    said = say("import", tmp_path / "hf", "--out", tmp_path / "run")
    assert ("pooler.dense" in said) == (kind == "ViTModel")
    verb = RunDir(tmp_path / "run").settings()[0]
    assert verb == ("finetune" if "Classification" in kind else "pretrain")
    model = export_weights.load(RunDir(tmp_path / "run"))
    ours, pixels = import_weights.build(model, "here").double(), images(16)
    base = theirs.double() if "Model" in kind else theirs.double().vit
    usual = (0.485, 0.456, 0.406) if "MAE" in kind else (0.5, 0.5, 0.5)
    assert config(tmp_path / "run").data.mean == usual
    if kind == "ViTMAEForPreTraining":
        assert config(tmp_path / "run").mae.norm_pix
        assert config(tmp_path / "run").mae.decoder_heads == 2
    with torch.no_grad():
        if "MAE" in kind:
            base.config.mask_ratio = 0.0
            order = torch.arange(16.0).expand(3, -1)
            hidden = base(pixels, noise=order).last_hidden_state
        else:
            hidden = base(pixels).last_hidden_state
        assert (hidden - ours.backbone.encode(pixels)).abs().max() < 1e-12 * hidden.abs().max()


def test_names_of_big_vision_and_of_training_states_are_read() -> None:
    released = npz.theirs(import_model(classifier()))[0]
    ours = npz.ours(released)
    renamed = {}
    for name, array in released.items():
        for old, new in (("_1/query", "_0/query"), ("_1/key", "_0/key"), ("_1/value", "_0/value"), ("_1/out", "_0/out"),
                         ("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0"),
                         ("Transformer/posembed_input/", "")):  # fmt: skip
            name = name.replace(old, new)
        renamed[f"params/{name}"] = array
    assert same(npz.ours(renamed), ours)
    training = {f"opt/target/{name}": array for name, array in released.items()}
    moments = {f"opt/state/{name}": array for name, array in released.items()}
    assert same(npz.ours(training | moments), ours)


def import_model(objective: Objective) -> export_weights.Model:
    data, model = schema.DataConfig("x", mean=MEAN, std=STD), schema.ModelConfig(name="vit_demo4", image_size=32)
    if isinstance(objective, MAE):
        return export_weights.Model("pretrain", schema.PretrainConfig("x", data, model, mae=objective.settings),
                            dict(objective.state_dict()))  # fmt: skip
    return export_weights.Model(
        "finetune", schema.FinetuneConfig("x", data, model, init_from="random"), dict(objective.state_dict())
    )


def test_what_the_file_does_not_say_is_assumed_aloud(tmp_path: Path, say: Say) -> None:
    torch.save({"model": official(mae())}, tmp_path / "fb.pth")
    said = say("import", tmp_path / "fb.pth", "--out", tmp_path / "a")
    assert "assumed:  mae.norm_pix=true, which the file does not say (--no-norm-pix says otherwise)" in said
    assert "assumed:  data.mean 0.485 0.456 0.406" in said
    assert "assumed:  mae.decoder_heads=1" in said
    words = ["--no-norm-pix", "--mean", *MEAN, "--std", *STD, "--decoder-heads", "4"]
    said = say("import", tmp_path / "fb.pth", "--out", tmp_path / "b", *words)
    assert "assumed" not in said
    after = config(tmp_path / "b")
    assert (after.data.mean, after.data.std, after.mae.norm_pix, after.mae.decoder_heads) == (MEAN, STD, False, 4)
    kept = json.loads((tmp_path / "b/result.json").read_text())["imported"]
    assert kept["format"] == "fb"
    assert "mae.norm_pix=false (given)" in kept["found"]
    args = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.6, model="mae_vit_base_patch16")
    bare = {f"module.{name}": tensor for name, tensor in official(classifier()).items()}
    for number, content in enumerate((bare, {"model": bare})):
        torch.save(content, tmp_path / "bare.pth")
        said = say("import", tmp_path / "bare.pth", "--out", tmp_path / f"bare-{number}")
        assert ("since its weights lie below the key model, timm's have 0.5 (--mean" in said) == (number == 1)
    training = {"model": official(mae()), "args": args, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}}
    torch.save(training, tmp_path / "training.pth")
    assert "found:    mae.norm_pix=false" in say("import", tmp_path / "training.pth", "--out", tmp_path / "training")
    assert config(tmp_path / "training").mae.mask_ratio == 0.6
    half = {name: tensor.half() for name, tensor in official(classifier()).items()}
    half |= {"pre_logits.fc.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": half}, tmp_path / "half.pth")
    said = say("import", tmp_path / "half.pth", "--out", tmp_path / "c")
    assert "weights as float32 (the file has float16)" in said
    assert "left out: head.bias, head.weight, pre_logits.fc.weight" in said
    assert "no decoder in the file" in said


def test_a_folder_of_timms_hub_and_norms_of_both_poolings(tmp_path: Path, say: Say) -> None:
    (tmp_path / "hub").mkdir()
    both = official(classifier(pool="avg")) | {"norm.weight": torch.full((128,), 2.0), "norm.bias": torch.ones(128)}
    save_file(both, tmp_path / "hub/model.safetensors", {"format": "pt"})
    cfg = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "hub/config.json").write_text(json.dumps(cfg))
    say("import", tmp_path / "hub", "--out", tmp_path / "run")
    assert same({name.removeprefix("backbone."): t for name, t in state(tmp_path / "run").items()}, both)
    assert (config(tmp_path / "run").data.mean, config(tmp_path / "run").model.pool) == (MEAN, "avg")
    assert "logits 0" in say("export", tmp_path / "run", "--to", "fb", "--out", tmp_path / "fb.pth")


def test_imported_runs_are_starts(tmp_path: Path, say: Say) -> None:
    pack(from_synthetic(48, 16), tmp_path / "data", shard_size=50)
    objective = mae()
    torch.save({"model": official(objective)}, tmp_path / "fb.pth")
    run = tmp_path / "run"
    said = say("import", tmp_path / "fb.pth", "--out", run, "--decoder-heads", 4, "--mean", *MEAN, "--std", *STD)
    following = said.split("next: mae-dist ")[1].partition("  (")[0].replace("DATA", str(tmp_path / "data"))
    say(*shlex.split(following), "knn.k=5", "train.precision=fp32", "machine.processes=1")
    assert RunDir(tmp_path / "run-knn").result()
    shared = ["model.name=vit_demo4", "model.image_size=32", f"data.path={tmp_path / 'data'}", "train.precision=fp32",
              "machine.processes=1", f"init_from={run}"]  # fmt: skip
    say("knn", *shared, f"out={tmp_path / 'knn'}", "model.pool=avg", "knn.k=5")
    for pool in ("cls", "avg"):
        out = tmp_path / f"probe-{pool}"
        say("probe", *shared, f"out={out}", f"model.pool={pool}", "train.steps=1", "train.global_batch=16")
        probed, fresh = state(out), objective.state_dict()
        assert torch.equal(probed["backbone.blocks.3.mlp.fc1.weight"], fresh["backbone.blocks.3.mlp.fc1.weight"])
        assert config(out).data.mean == MEAN
        assert "features 0" in say("export", out, "--to", "timm", "--out", tmp_path / f"{pool}.pth")
    assert "step" in say("ckpt", "list", run)
    assert "whole" in say("ckpt", "verify", run)
    say("report", run, tmp_path / "knn")


def test_an_unlike_copy_is_not_left_lying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, house = saved(mae(), "vit_demo4", tmp_path / "run"), export_weights.HOUSES["fb"]
    theirs, found = house.theirs, house.found

    def slip(model: export_weights.Model) -> tuple[dict[str, Tensor], list[str]]:
        tensors, left_out = theirs(model)
        return tensors | {"decoder_pred.bias": tensors["decoder_pred.bias"] + 1e-3}, left_out

    def forget(tensors: dict[str, Tensor], facts: dict[str, Any], origin: str) -> Found:
        encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder_", "mask_token"))}
        return found(encoder, facts, origin)

    cases = {"theirs": (slip, "features 0, pixel predictions 0.00"), "found": (forget, "lost")}
    for name, (slipping, complaint) in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(house, name, slipping)
            assert main(["export", str(run), "--to", "fb", "--out", str(tmp_path / "x.pth")]) == 2
        assert complaint in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


NOT_THREE: list[Any] = [0.5, "x", {}, [0.5], [0.5] * 4, ["a", "b", "c"], [None] * 3, [math.nan] * 3, [10**400] * 3]
NOT_THREE += [[123.7, 116.3, 103.5], [-0.1, 0, 0]]
NOT_COUNT: list[Any] = [0, 0.5, "x", True, [1]]
NOT_SHARE: list[Any] = [0, 1, "x", [1], math.nan]
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("where", "key", "values", "option"),
    [
        ("pretrained_cfg", "mean", NOT_THREE, ["--mean", *MEAN]),
        ("pretrained_cfg", "std", [*NOT_THREE, [0, 0, 0], [0.2, -0.2, 0.2]], ["--std", *STD]),
        ("beside", "pretrained_cfg", [0.5, "x", "{", "[1]", "null", [1], True], []),
        ("args", "mean", NOT_THREE[:2], ["--mean", *MEAN]),
        ("args", "decoder_num_heads", NOT_COUNT, ["--decoder-heads", 4]),
        ("args", "norm_pix_loss", [0, "x", [1]], ["--norm-pix"]),
        ("args", "mask_ratio", NOT_SHARE, []),
        ("metadata", "pretrained_cfg", ["nope", "[1]", "null", "[" * 100_000, '{"std": [0, 0, 0]}'], []),
        (CONFIG, "model_type", [["vit"], {}, 1, None], []),
        (CONFIG, "num_attention_heads", NOT_COUNT, []),
        (CONFIG, "decoder_num_attention_heads", NOT_COUNT, ["--decoder-heads", 4]),
        (CONFIG, "layer_norm_eps", [None, "x", [1], -1, True], []),
        (CONFIG, "norm_pix_loss", [0, "x", [1]], ["--norm-pix"]),
        (CONFIG, "mask_ratio", NOT_SHARE, []),
        (PROCESSOR, "image_mean", NOT_THREE, ["--mean", *MEAN]),
        (PROCESSOR, "image_std", [*NOT_THREE, [0.2, 0.2, 0.0]], ["--std", *STD]),
        ("own", "data.mean", [(123.0, 117.0, 104.0)], ["--mean", *MEAN]),
        ("own", "data.std", [(0.2, 0.2, 0.0), (58.0, 57.0, 57.0)], ["--std", *STD]),
        ("own", "model.image_size", [31], []),
        ("own", "mae.decoder_heads", [0, "x"], []),
    ],
)
def test_what_a_file_says_wrongly_is_refused_by_its_name_unless_it_is_overruled(
    tmp_path: Path, say: Say, capsys: pytest.CaptureFixture[str],
    where: str, key: str, values: list[Any], option: list[Any],
) -> None:  # fmt: skip
    path = tmp_path / "told"
    for value in values:
        tell(path, where, key, value)
        assert main(["import", str(path), "--out", str(tmp_path / "out")]) == 2, value
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert all(word in said for word in (str(path), key, *option[:1])), said
    if option:
        say("import", path, "--out", tmp_path / "out", *option)


def tell(path: Path, where: str, key: str, value: Any) -> None:
    """Write a file or folder to `path` that says so of its model."""
    objective = mae()
    if where in (CONFIG, PROCESSOR, "own"):
        shutil.rmtree(path, ignore_errors=True)
        house, model = HOUSES["safetensors" if where == "own" else "hf"], import_model(objective)
        if where == "own":
            section, _, name = key.partition(".")
            changed = dataclasses.replace(getattr(model.config, section), **{name: value})
            model = dataclasses.replace(model, config=dataclasses.replace(model.config, **{section: changed}))
        house.write(house.theirs(model)[0], model, path)
        if where != "own":
            (path / where).write_text(json.dumps(json.loads((path / where).read_text()) | {key: value}))
    elif where == "args":
        torch.save({"model": official(objective), "args": argparse.Namespace(**{key: value})}, path)
    elif where == "metadata":
        save_file(official(classifier()), path, {key: value})
    else:
        beside = {key: value} if where == "beside" else {where: {key: value}}
        torch.save({"state_dict": official(classifier())} | beside, path)


def refusal(path: Path) -> str:
    """What is said where `path` is refused, in one line that names it; "" where it is read."""
    said = ""
    try:
        import_weights.read(path, Given())
    except ValueError as error:
        said = str(error)
    assert not said or (said.startswith(str(path)) and len(said.splitlines()) == 1), said
    return said


ODD = [torch.tensor(1.0), torch.zeros(5), torch.zeros(3, 4), torch.zeros(1, 65, 3), torch.zeros(2, 3, 4, 4)]
ODD += [torch.zeros(1, 1, 1, 1, 1), torch.zeros(0)]
TELLING = ("patch_embed.proj.weight", "stem.proj.weight", "pos_embed", "blocks.0.mlp_tokens.fc1.weight", "head.bias",
           "decoder_embed.weight", "cls_token", "mask_token")  # fmt: skip


@pytest.mark.parametrize("objective", [mae(), classifier(), classifier("mixer_demo4")], ids=["mae", "vit", "mixer"])
def test_tensors_of_other_shapes_kinds_and_names_are_refused_by_their_name(
    tmp_path: Path, objective: Objective
) -> None:
    path, good = tmp_path / "odd.pth", official(objective)

    def said(changes: dict[str, Tensor]) -> str:
        torch.save({"model": good | changes}, path)
        return refusal(path)

    assert not said({})
    for name in (name for name in TELLING if name in good):
        for tensor in (tensor for tensor in ODD if tensor.ndim != good[name].ndim):
            assert name.partition(".")[0] in said({name: tensor})
        for change in (
            Tensor.to_sparse,
            lambda t: t.to("meta"),
            lambda t: torch.quantize_per_tensor(t, 1, 0, torch.qint8),
        ):
            assert f"{name} is sparse" in said({name: change(good[name])})
    for name in ("blocks.foo.weight", "blocks.", "blocks.0", f"blocks.{'9' * 5000}.weight", "", "."):
        assert "holds, unknown here" in said({name: torch.zeros(2)})
    if isinstance(objective, MAE):
        assert "holds, unknown here, decoder_blocks.foo.weight" in said({"decoder_blocks.foo.weight": torch.zeros(2)})


def test_flax_arrays_of_other_shapes_are_refused_by_their_name(tmp_path: Path) -> None:
    good = {name: array.numpy() for name, array in npz.theirs(import_model(classifier()))[0].items()}
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    theirs = {f"{attention}/{part}/{leaf}": f"attn.{part[0]}." for part in ("query", "key", "value")
              for leaf in ("kernel", "bias")}  # fmt: skip
    theirs |= {"cls": "cls_token", "Transformer/posembed_input/pos_embedding": "pos_embed", "head/bias": "head",
               "embedding/kernel": "patch_embed", "Transformer/encoderblock_0/LayerNorm_0/scale": "norm1"}  # fmt: skip
    for name, ours in theirs.items():
        for tensor in (tensor for tensor in ODD if tensor.ndim != good[name].ndim):
            np.savez(tmp_path / "odd.npz", **(good | {name: tensor.numpy()}))  # pyright: ignore
            assert ours in refusal(tmp_path / "odd.npz")


@pytest.mark.parametrize("kind", ["zip.pth", "pickle.pth", "safetensors", "npz", "compressed.npz", "own"])
def test_damaged_bytes_are_refused_in_one_sentence_or_do_no_harm(tmp_path: Path, kind: str) -> None:
    path, model = tmp_path / f"damaged.{kind}", import_model(classifier())
    if kind.endswith("pth"):
        content = {"state_dict": official(classifier()), "pretrained_cfg": {"mean": MEAN}}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip.pth")
    elif kind.endswith("npz"):
        save = np.savez_compressed if kind == "compressed.npz" else np.savez
        save(path, **{name: array.numpy() for name, array in npz.theirs(model)[0].items()})  # pyright: ignore
    elif kind == "own":
        HOUSES["safetensors"].write(dict(model.state), model, tmp_path / "whole")
        shutil.move(tmp_path / "whole/model.safetensors", path)
    else:
        save_file(official(classifier()), path, {"pretrained_cfg": json.dumps({"mean": MEAN})})
    whole, draw = path.read_bytes(), random.Random(0)
    assert not refusal(path)
    for number in range(32):
        damaged, at, reach = bytearray(whole), draw.randrange(len(whole)), 1 << draw.randrange(1, 14)
        at = (at, at % reach, -1 - at % reach)[number % 3]  # anywhere, near the beginning, near the end
        if number % 4 == 0:
            damaged = damaged[:at]
        elif number % 4 == 1:
            damaged[at : at + 64] = b"\xff" * len(damaged[at : at + 64])
        else:
            damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        refusal(path)
    for at in (at for at in (whole.find(b"PK\1\2"), whole.find(b"PK\5\6"), len(whole) // 2) if at >= 0):
        path.write_bytes(whole[:at] + b"\xff" * 200 + whole[at + 200 :])
        refusal(path)


def test_a_vit_without_a_class_token_is_refused_for_that(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    gap: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
    for name, words in {"vit_tiny_patch16_224": gap, "vit_base_patch16_siglip_224": {}}.items():
        torch.save(timm.create_model(name, **(sizes | words)).state_dict(), tmp_path / "gap.pth")
        assert "without class token (cls_token)" in refusal(tmp_path / "gap.pth")
    arrays = {name: array.numpy() for name, array in npz.theirs(import_model(classifier()))[0].items()}
    positions = arrays.pop("Transformer/posembed_input/pos_embedding")[:, 1:]
    del arrays["cls"]
    gap = {f"params/{name}": array for name, array in arrays.items()} | {"pos_embedding": positions}
    np.savez(tmp_path / "gap.npz", **gap)
    assert "without class token (cls_token)" in refusal(tmp_path / "gap.npz")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"no_embed_class": True}, "without position for its class token (no_embed_class: pos_embed has 64 for 8 x 8 "),
        ({"no_embed_class": True, "init_values": 1e-4}, "with LayerScale (ls1.gamma), which"),
        ({"reg_tokens": 4}, "with registers (reg_token), which"),
        ({"no_embed_class": True, "reg_tokens": 4, "init_values": 1e-4}, "with registers (reg_token) and LayerScale ("),
    ],
)
def test_parts_of_other_vits_are_refused_by_what_they_are(tmp_path: Path, words: dict[str, Any], reason: str) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    torch.save(timm.create_model("vit_tiny_patch16_224", **sizes, **words).state_dict(), tmp_path / "other.pth")
    assert f"a ViT {reason}" in refusal(tmp_path / "other.pth")


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_mistakes_end_with_one_line_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, fine = official(mae()), tmp_path / "fine.pth"
    torch.save({"model": good}, fine)
    run = saved(mae(), "vit_demo4", tmp_path / "run")
    pooled = saved(classifier(pool="avg"), "vit_demo4", tmp_path / "pooled")
    mixer = saved(classifier("mixer_demo4"), "mixer_demo4", tmp_path / "mixer")
    for zipped in (True, False):
        content = {"model": good, "extra": Hostile(tmp_path / "owned")}
        torch.save(content, tmp_path / f"hostile-{zipped}.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "text.pth").write_text("hello, this is no checkpoint")
    (tmp_path / "short.pth").write_bytes(fine.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "objects.npz", cls=np.array([Hostile(tmp_path / "owned")], dtype=object))

    def variant(name: str, changes: dict[str, Tensor], without: tuple[str, ...] = ()) -> Path:
        torch.save({"model": {k: v for k, v in (good | changes).items() if k not in without}}, tmp_path / name)
        return tmp_path / name

    lone = {name: tensor for name, tensor in good.items() if not name.startswith(("decoder_", "mask_"))}
    torch.save({"model": lone}, tmp_path / "lone.pth")
    torch.save({"model": {"x": torch.zeros(2)}}, tmp_path / "x.pth")
    nan = {"norm.bias": torch.full((128,), math.nan), "blocks.1.norm1.bias": torch.full((128,), math.inf)}
    broken = mae()
    broken.get_parameter("backbone.blocks.1.norm1.bias").data[3] = math.nan
    diverged = saved(broken, "vit_demo4", tmp_path / "diverged")
    wrong = {"blocks.0.attn.qkv.weight": torch.zeros(2, 2)}
    common = {"data": schema.DataConfig(path="x"), "model": schema.ModelConfig(name="vit_demo4")}
    RunDir(tmp_path / "knn").open(
        "knn", schema.KnnRunConfig(str(tmp_path / "knn"), **common, init_from=str(run)), "abc"
    )
    RunDir(tmp_path / "chance").open(
        "knn", schema.KnnRunConfig(str(tmp_path / "chance"), **common, init_from="random"), "abc"
    )
    RunDir(tmp_path / "begun").open("pretrain", schema.PretrainConfig(str(tmp_path / "begun"), **common), "abc")
    transformers = HOUSES["hf"].theirs(import_model(mae()))[0]
    for name in ("lone.bin", "pytorch_model.bin"):
        torch.save(transformers, tmp_path / name)
    cases: list[tuple[list[object], list[str]]] = [
        (["export", tmp_path / "knn", "--to", "timm", "--out", tmp_path / "out.pth"],
         [f"/knn: a knn run trains nothing; export its init_from={run} instead"]),
        (["export", tmp_path / "chance", "--to", "timm", "--out", tmp_path / "out.pth"], ["export one that trains"]),
        (["export", tmp_path / "begun", "--to", "timm", "--out", tmp_path / "out.pth"],
         ["/begun: has no checkpoint yet; wait for its first, or give its pretrain command again"]),
        (["import", tmp_path / "lone.bin"], ["lone.bin", "give the folder that holds both"]),
        (["import", tmp_path / "pytorch_model.bin"], ["without their config.json; give the folder that holds both"]),
        (["import", tmp_path / "none.pth"], ["none.pth", "no such file"]),
        (["import", tmp_path / "text.pth"], ["text.pth", "no checkpoint"]),
        (["import", tmp_path / "short.pth"], ["short.pth", "no checkpoint"]),
        (["import", tmp_path / "empty"], ["empty", "model.safetensors"]),
        (["import", run], [f"init_from={run} starts from it"]),
        (["import", tmp_path / "hostile-True.pth"], ["would execute code", "mkdir"]),
        (["import", tmp_path / "hostile-False.pth"], ["would execute code"]),
        (["import", tmp_path / "objects.npz"], ["objects", "never unpickled"]),
        (["import", tmp_path / "x.pth"], ["x.pth", "neither a ViT", "nor a Mixer"]),
        (["import", variant("wide.pth", {"patch_embed.proj.weight": torch.zeros(100, 3, 4, 4)})],
         ["wide.pth", "vit of width 100", "`mae-dist models`"]),
        (["import", variant("less.pth", {}, ("blocks.1.norm1.bias", "norm.weight", "decoder_norm.bias"))],
         ["lacks", "backbone.blocks.1.norm1.bias", "decoder_norm.bias"]),
        (["import", variant("no.pth", {}, ("pos_embed",))], ["lacks pos_embed"]),
        (["import", variant("more.pth", {"blocks.0.ls1.gamma": torch.ones(128)})], ["LayerScale", "ls1.gamma"]),
        (["import", variant("shape.pth", wrong)], ["blocks.0.attn.qkv.weight", "(2, 2)", "(384, 128)"]),
        (["import", variant("nan.pth", nan)], ["nan.pth: backbone.blocks.1.norm1.bias holds NaN or inf"]),
        (["export", diverged, "--to", "hf"], [f"{diverged}: backbone.blocks.1.norm1.bias holds NaN or inf"]),
        (["import", tmp_path / "lone.pth", "--norm-pix"], ["lone.pth", "has no decoder"]),
        (["import", fine, "--std", "0", "1", "1"], ["--std=[0.0, 1.0, 1.0]", "greater than 0"]),
        (["import", fine, "--mean", "nan", "0", "0"], ["--mean=[nan, 0.0, 0.0]", "three numbers from 0 to 1"]),
        (["import", fine, "--mean", "123", "117", "104"], ["--mean=[123.0, 117.0, 104.0]", "divide by 255"]),
        (["import", fine, "--std", "58", "57", "57"], ["--std=[58.0, 57.0, 57.0]", "divide by 255"]),
        (["import", fine, "--decoder-heads", "5"], ["no 5 heads"]),
        (["import", fine, "--to", "x"], ["unrecognized arguments"]),
        (["export", tmp_path / "empty", "--to", "hf"], ["RUN=", "no config.yaml"]),
        (["export", run, "--to", "keras"], ["--to", "invalid choice", "keras"]),
        (["export", run, "--to", "fb", "--out", tmp_path / "x.bin"], ["x.bin", "ends in .pth"]),
        (["export", run, "--to", "hf", "--out", tmp_path / "x.pth"],
         ["x.pth: hf is a folder", f"try --out {tmp_path / 'x'}, or --to timm or fb or npz"]),
        (["export", run, "--to", "safetensors", "--out", tmp_path / "x.safetensors"], ["safetensors is a folder"]),
        (["export", pooled, "--to", "hf"], ["--to hf", "model.pool=avg"]),
        (["export", pooled, "--to", "npz", "--out", tmp_path / "out.npz"], ["--to npz", "fc_norm"]),
        (["export", mixer, "--to", "hf"], ["--to hf", "no Mixer"]),
        (["export", mixer, "--to", "fb", "--out", tmp_path / "out.pth"], ["--to fb", "no Mixer"]),
    ]  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for words, expected in cases:
        out = [] if "--out" in words else ["--out", tmp_path / "out"]
        capsys.readouterr()
        assert main([str(word) for word in [*words, *out]]) == 2, words
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert all(part in said[0] for part in ["mae-dist: ", *expected]), (said, expected)
    for words in (["import", fine, "--out", run], ["export", run, "--to", "hf", "--out", tmp_path / "empty"]):
        assert main([str(word) for word in words]) == 2
        assert "exists already" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
