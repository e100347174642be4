"""What `init_from` may name: RUN@STEP, and a checkpoint of other software, which is imported on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import refused, weights
from safetensors.torch import load_file

from launch import preflight
from mae_dist import config, models
from mae_dist.__main__ import main
from mae_dist.run import identity

FEW = ["model.image_size=32", "train.global_batch=8", "train.precision=fp32", "machine.processes=1",
       "machine.workers=0", "optim.warmup_epochs=0"]  # fmt: skip
DEMO = ["model.name=vit_demo4", *FEW]


def origin_of(run: Path) -> str:
    """What config.yaml says of the checkpoint with which a run began."""
    return identity.started_from(run) or ""


def test_init_from_and_export_take_an_older_checkpoint_by_its_step(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", f"data.path={tiny_data}"
    more = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep=3", "mae.decoder_dim=16", "mae.decoder_heads=1"]
    assert main(["pretrain", data, f"out={run}", *DEMO, *more, "mae.decoder_depth=1"]) == 0
    knn = ["knn", data, f"out={tmp_path / 'knn'}", *FEW[:-1], f"init_from={run}"]  # its model is the run's
    knn.remove("model.image_size=32")
    assert main([*knn[:-1], f"{knn[-1]}@2"]) == 0
    assert origin_of(tmp_path / "knn").startswith("step-000000002 ")
    assert main([*knn[:-1], f"{knn[-1]}@2"]) == 0  # it is finished
    assert "init_from" in refused(capsys, *knn[:-1], f"{knn[-1]}@3")
    assert "no checkpoint of step 7; it has those of steps 1, 2, 3" in refused(
        capsys, *knn[:1], data, f"out={tmp_path / 'other'}", *FEW[:-1], f"{knn[-1]}@7"
    )
    wanted = config.load("knn", None, [data, f"out={tmp_path / 'x'}", f"init_from={run}@9"])
    with pytest.raises(ValueError, match="no checkpoint of step 9"):
        preflight.check_initial_weights(wanted)
    out = tmp_path / "exported"
    assert main(["export", str(run), "--step", "2", "--to", "safetensors", "--out", str(out)]) == 0
    (file,) = (run / "checkpoints" / "step-000000002").glob("*.safetensors")
    name = "backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(load_file(out / "model.safetensors")[name], load_file(file)[f"model.{name}"])
    assert "--step 7: the run has no checkpoint of step 7" in refused(
        capsys, "export", run, "--step", 7, "--to", "timm", "--out", tmp_path / "x.pth"
    )


def test_init_from_imports_a_checkpoint_of_others_once(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    state, file, out = models.build("vit_demo4", image_size=32, seed=5).state_dict(), tmp_path / "x.pth", tmp_path / "r"
    torch.save({"state_dict": state}, file)
    words = ["finetune", f"data.path={tiny_data}", f"out={out}", f"init_from={file}", "train.steps=1", *FEW]
    with pytest.raises(ValueError, match="does not say model.name"):
        preflight.check_initial_weights(config.load("finetune", None, words[1:]))
    words += ["optim.base_lr=1e-12"]
    assert "set model.name=vit_demo4" in refused(capsys, *words, "model.name=vit_ti4")
    preflight.check_initial_weights(config.load("finetune", None, words[1:]))
    assert main(words) == 0
    imported = tmp_path / "r-init"
    assert json.loads((imported / "result.json").read_text())["imported"]["format"] == "timm"
    assert caplog.text.count(f"init_from={file}: imported") == 1
    found = weights(out)["model.backbone.blocks.3.attn.qkv.weight"]
    torch.testing.assert_close(found, state["blocks.3.attn.qkv.weight"])
    assert main(words) == 0  # finished
    shutil.move(file, tmp_path / "gone.pth")
    assert main(words) == 0
    torch.save({"state_dict": {**state, "cls_token": state["cls_token"] + 1}}, file)
    assert "is not what" in refused(capsys, *words, "train.steps=2")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    words[3], words[2] = f"init_from={tmp_path / 'bad.pth'}", f"out={tmp_path / 'q'}"
    assert f"init_from={tmp_path / 'bad.pth'}: is no checkpoint" in refused(capsys, *words)
    assert not (tmp_path / "q-init").exists()
