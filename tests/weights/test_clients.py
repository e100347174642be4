"""timm and transformers load what `mae-dist export` writes, compute the same, and what they save can be imported."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained import (
    MEAN,
    STD,
    Cli,
    classifier,
    mae,
    official,
    randomised,
    run_config,
    save_run,
    usage,
)

from mae_dist import models, restore, schema
from mae_dist.batch import IMAGENET_MEAN, Batch
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.run.directory import RunDir
from mae_dist.weights import FORMATS, Model
from mae_dist.weights.identify import architecture


def random_images(size: int = 32) -> Tensor:
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
def test_timm_loads_export_strictly_and_computes_the_same(
    tmp_path: Path, cli: Cli, name: str, size: int, choices: dict[str, Any], suffix: str
) -> None:
    objective = classifier(name, image_size=size, **choices)
    target, file = ("npz" if suffix == ".npz" else "timm"), tmp_path / f"weights{suffix}"
    line = usage(cli("export", save_run(objective, name, tmp_path / "run", size), "--to", target, "--out", file))
    if line.startswith("model = "):
        exec(line, space := {"timm": timm})
        other = space["model"]
    else:
        other = eval(line, {"timm": timm})
    other = other.double().eval()
    own, pixels = objective.double(), random_images(size)[:1]
    with torch.no_grad():
        expected = own.backbone(pixels)
        features = other.forward_head(other.forward_features(pixels), pre_logits=True)
        assert (features - expected).abs().max() < 1e-12 * expected.abs().max().clamp(min=1)
        logits = other(pixels)
    assert (logits - own.head(expected)).abs().max() < 1e-11 * logits.abs().max()


EACH_SIZE_AND_PATCH = [name for name in models.BACKBONES if "_ti" in name or name.endswith(("16", "demo4", "vit_h14"))]


@pytest.mark.parametrize("name", EACH_SIZE_AND_PATCH)
def test_timm_has_names_and_shapes_of_every_backbone(name: str) -> None:
    with torch.device("meta"):
        objective = Finetune(models.build(name), 7, drop_path=0.0, label_smoothing=0.0, seed=0)
    size, own = objective.backbone.image_size[0], official(objective)
    settings = schema.FinetuneConfig(
        data=schema.DataConfig(channels=3), model=schema.ModelConfig(name=name, image_size=size)
    )
    model = Model("finetune", settings, dict(objective.state_dict()))
    timm_name, options = FORMATS["timm"].architecture(model)
    with torch.device("meta"):
        make = timm.models.MlpMixer if timm_name == "MlpMixer" else partial(timm.create_model, timm_name)
        other: Any = make(**options)
    assert {n: t.shape for n, t in other.state_dict().items()} == {n: t.shape for n, t in own.items()}
    if model.is_vit:  # shapes do not show it
        assert {block.attn.num_heads for block in other.blocks} == {model.sizes["num_heads"]}
    assert architecture(FORMATS["timm"].decode_tensors(other.state_dict()), None, "timm's") == (name, size)


def load_transformers(line: str) -> nn.Module:
    """Load a model by a line of export, in float64; no tensor may be missing or unexpected."""
    transformers = pytest.importorskip("transformers")
    model, loading = eval(f"{line[:-1]}, output_loading_info=True)", {"transformers": transformers})
    assert not any(loading.values()), loading
    return model.double().eval()


def test_transformers_loads_exported_mae_and_computes_the_same(tmp_path: Path, cli: Cli) -> None:
    objective = mae()
    run = save_run(objective, "vit_demo4", tmp_path / "run")
    line = usage(cli("export", run, "--to", "hf", "--out", tmp_path / "hf"))
    assert "ViTMAEForPreTraining" in line
    other, own, pixels = load_transformers(line), objective.double(), random_images()
    zeros = torch.zeros(3, dtype=torch.int64)
    batch = Batch(pixels, zeros, torch.arange(3), zeros, zeros.bool())
    mask = own.mask(batch)
    order = torch.cat(mask, 1)
    noise = torch.zeros(order.shape, dtype=torch.float64).scatter(1, order, torch.arange(64.0).double().expand(3, -1))
    with torch.no_grad():
        output, expected = other(pixels, noise=noise), own(batch)
    predicted = output.logits.gather(1, mask.masked[..., None].expand(-1, -1, 48))
    assert (predicted - expected.prediction).abs().max() < 1e-12 * expected.prediction.abs().max()
    assert abs(output.loss - expected.loss.mean()) < 1e-12 * output.loss
    processor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == (list(MEAN), list(STD))


def test_transformers_loads_exported_vits_and_computes_the_same(tmp_path: Path, cli: Cli) -> None:
    objective = classifier()
    run = save_run(objective, "vit_demo4", tmp_path / "finetune")
    line = usage(cli("export", run, "--to", "hf", "--out", tmp_path / "hf"))
    assert "ViTForImageClassification" in line
    pixels = random_images()
    with torch.no_grad():
        other, own = load_transformers(line)(pixels).logits, objective.double()
        expected = own.head(own.backbone(pixels))
        assert (other - expected).abs().max() < 1e-11 * expected.abs().max()
        probe = randomised(Probe(models.build("vit_demo4"), 5, chunk=2, seed=0))
        run = save_run(probe, "vit_demo4", tmp_path / "probe")
        line = usage(cli("export", run, "--to", "hf", "--out", tmp_path / "vit"))
        assert "ViTForImageClassification" in line  # its batch norm is folded into the head
        own: Any = probe.double()
        other, expected = load_transformers(line)(pixels).logits, own.head(own.norm(own.backbone(pixels)))
    assert (other - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("spelling", ["saved", "in memory", "pytorch_model.bin"])
def test_import_reads_what_transformers_saves(tmp_path: Path, cli: Cli, kind: str, spelling: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
             "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6}  # fmt: skip
    if "MAE" in kind:
        config = transformers.ViTMAEConfig(
            **sizes, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=128, norm_pix_loss=True,
        )  # fmt: skip
    else:
        config = transformers.ViTConfig(**sizes, num_labels=3)
    torch.manual_seed(0)
    other = getattr(transformers, kind)(config).eval()
    other.save_pretrained(tmp_path / "hf")
    if spelling == "in memory":
        tensors = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    if spelling == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()
    output = cli("import", tmp_path / "hf", "--out", tmp_path / "run")
    assert ("pooler.dense" in output) == (kind == "ViTModel")
    verb = RunDir(tmp_path / "run").settings()[0]
    assert verb == ("finetune" if "Classification" in kind else "pretrain")
    model = restore.of_run(RunDir(tmp_path / "run"))
    own, pixels = restore.build(model, "here").double(), random_images(16)
    base = other.double() if "Model" in kind else other.double().vit
    usual = IMAGENET_MEAN if "MAE" in kind else (0.5, 0.5, 0.5)
    assert run_config(tmp_path / "run").data.mean == usual
    if kind == "ViTMAEForPreTraining":
        assert run_config(tmp_path / "run").mae.norm_pix
        assert run_config(tmp_path / "run").mae.decoder_heads == 2
    with torch.no_grad():
        if "MAE" in kind:
            base.config.mask_ratio = 0.0
            order = torch.arange(16.0).expand(3, -1)
            hidden = base(pixels, noise=order).last_hidden_state
        else:
            hidden = base(pixels).last_hidden_state
        assert (hidden - own.backbone.encode(pixels)).abs().max() < 1e-12 * hidden.abs().max()
