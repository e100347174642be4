"""What import reads from files: other spellings of names, metadata, and what it assumes without metadata."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trained import MEAN, STD, Cli, as_model, classifier, identical, mae, official, run_config, run_state

from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.run.directory import RunDir
from mae_dist.weights import npz


def test_npz_decodes_names_of_big_vision_and_training_states() -> None:
    released = npz.encode(as_model(classifier()))[0]
    expected = npz.decode_tensors(released)
    renamed = {}
    for name, array in released.items():
        for old, new in (("_1/query", "_0/query"), ("_1/key", "_0/key"), ("_1/value", "_0/value"), ("_1/out", "_0/out"),
                         ("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0"),
                         ("Transformer/posembed_input/", "")):  # fmt: skip
            name = name.replace(old, new)
        renamed[f"params/{name}"] = array
    assert identical(npz.decode_tensors(renamed), expected)
    training = {f"opt/target/{name}": array for name, array in released.items()}
    moments = {f"opt/state/{name}": array for name, array in released.items()}
    assert identical(npz.decode_tensors(training | moments), expected)


def test_import_prints_what_is_assumed(tmp_path: Path, cli: Cli) -> None:
    torch.save({"model": official(mae())}, tmp_path / "fb.pth")
    output = cli("import", tmp_path / "fb.pth", "--out", tmp_path / "a")
    assert "assumed:  mae.norm_pix=true, which the file does not record (--no-norm-pix overrides it)" in output
    assert "assumed:  data.mean 0.485 0.456 0.406" in output
    assert "assumed:  mae.decoder_heads=1" in output
    options = ["--no-norm-pix", "--mean", *MEAN, "--std", *STD, "--decoder-heads", "4"]
    output = cli("import", tmp_path / "fb.pth", "--out", tmp_path / "b", *options)
    assert "assumed" not in output
    after = run_config(tmp_path / "b")
    assert (after.data.mean, after.data.std, after.mae.norm_pix, after.mae.decoder_heads) == (MEAN, STD, False, 4)
    kept = json.loads((tmp_path / "b/result.json").read_text())["imported"]
    assert kept["format"] == "fb"
    assert "mae.norm_pix=false (given)" in kept["found"]
    args = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.6, model="mae_vit_base_patch16")
    bare = {f"module.{name}": tensor for name, tensor in official(classifier()).items()}
    for number, content in enumerate((bare, {"model": bare})):
        torch.save(content, tmp_path / "bare.pth")
        output = cli("import", tmp_path / "bare.pth", "--out", tmp_path / f"bare-{number}")
        assert ("because its weights are under the key model; timm's have 0.5 (--mean" in output) == (number == 1)
    training = {"model": official(mae()), "args": args, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}}
    torch.save(training, tmp_path / "training.pth")
    assert "found:    mae.norm_pix=false" in cli("import", tmp_path / "training.pth", "--out", tmp_path / "training")
    assert run_config(tmp_path / "training").mae.mask_ratio == 0.6
    half = {name: tensor.half() for name, tensor in official(classifier()).items()}
    half |= {"pre_logits.fc.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": half}, tmp_path / "half.pth")
    output = cli("import", tmp_path / "half.pth", "--out", tmp_path / "c")
    assert "weights converted to float32 (the file has float16)" in output
    assert "left out: head.bias, head.weight, pre_logits.fc.weight" in output
    assert "no decoder in the file" in output


def test_import_of_timm_hub_folder_keeps_norms_of_both_poolings(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "hub").mkdir()
    both = official(classifier(pool="avg")) | {"norm.weight": torch.full((128,), 2.0), "norm.bias": torch.ones(128)}
    save_file(both, tmp_path / "hub/model.safetensors", {"format": "pt"})
    cfg = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "hub/config.json").write_text(json.dumps(cfg))
    cli("import", tmp_path / "hub", "--out", tmp_path / "run")
    assert identical({name.removeprefix("backbone."): t for name, t in run_state(tmp_path / "run").items()}, both)
    assert (run_config(tmp_path / "run").data.mean, run_config(tmp_path / "run").model.pool) == (MEAN, "avg")
    assert "logits 0" in cli("export", tmp_path / "run", "--to", "fb", "--out", tmp_path / "fb.pth")


def test_init_from_imported_run_loads_its_weights(tmp_path: Path, cli: Cli) -> None:
    pack(from_synthetic(48, 16), tmp_path / "data", shard_size=50)
    objective = mae()
    torch.save({"model": official(objective)}, tmp_path / "fb.pth")
    run = tmp_path / "run"
    output = cli("import", tmp_path / "fb.pth", "--out", run, "--decoder-heads", 4, "--mean", *MEAN, "--std", *STD)
    following = output.split("next: mae-dist ")[1].partition("  (")[0].replace("DATA", str(tmp_path / "data"))
    cli(*shlex.split(following), "knn.k=5", "train.precision=fp32", "machine.processes=1")
    assert RunDir(tmp_path / "run-knn").result()
    shared = ["model.name=vit_demo4", "model.image_size=32", f"data.path={tmp_path / 'data'}", "train.precision=fp32",
              "machine.processes=1", f"init_from={run}"]  # fmt: skip
    cli("knn", *shared, f"out={tmp_path / 'knn'}", "model.pool=avg", "knn.k=5")
    for pool in ("cls", "avg"):
        out = tmp_path / f"probe-{pool}"
        cli("probe", *shared, f"out={out}", f"model.pool={pool}", "train.steps=1", "train.global_batch=16")
        probed, fresh = run_state(out), objective.state_dict()
        assert torch.equal(probed["backbone.blocks.3.mlp.fc1.weight"], fresh["backbone.blocks.3.mlp.fc1.weight"])
        assert run_config(out).data.mean == MEAN
        assert "features 0" in cli("export", out, "--to", "timm", "--out", tmp_path / f"{pool}.pth")
    assert run_config(run).train.steps is None
    file, text = run / "config.yaml", (run / "config.yaml").read_text()
    file.write_text(text.replace("steps: null", "steps: 0").replace("fingerprint: imported", "fingerprint: 1234abcd"))
    with pytest.raises(ValueError, match="config.yaml: train.steps=0: must be at least 1"):
        run_config(run)
    file.write_text(text.replace("steps: null", "steps: 0"))  # as it was written before
    assert run_config(run).train.steps is None
    assert "step" in cli("ckpt", "list", run)
    assert "intact" in cli("ckpt", "verify", run)
    cli("report", run, tmp_path / "knn")
