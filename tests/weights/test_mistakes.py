"""Mistakes of users of import and export: one line each, nothing is written, nothing in a file is executed."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from running import refused
from torch import Tensor
from trained import as_model, classifier, mae, official, save_run

from mae_dist import schema
from mae_dist.run.directory import RunDir
from mae_dist.weights import FORMATS
from mae_dist.weights.files import atomic_output


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_import_and_export_mistakes_print_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, fine = official(mae()), tmp_path / "fine.pth"
    torch.save({"model": good}, fine)
    run = save_run(mae(), "vit_demo4", tmp_path / "run")
    pooled = save_run(classifier(pool="avg"), "vit_demo4", tmp_path / "pooled")
    mixer = save_run(classifier("mixer_demo4"), "mixer_demo4", tmp_path / "mixer")
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
    diverged = save_run(broken, "vit_demo4", tmp_path / "diverged")
    wrong = {"blocks.0.attn.qkv.weight": torch.zeros(2, 2)}
    common = {"data": schema.DataConfig(path="x", channels=3), "model": schema.ModelConfig(name="vit_demo4")}
    RunDir(tmp_path / "knn").open(
        "knn", schema.KnnRunConfig(str(tmp_path / "knn"), **common, init_from=str(run)), "abc"
    )
    RunDir(tmp_path / "chance").open(
        "knn", schema.KnnRunConfig(str(tmp_path / "chance"), **common, init_from="random"), "abc"
    )
    RunDir(tmp_path / "begun").open("pretrain", schema.PretrainConfig(str(tmp_path / "begun"), **common), "abc")
    transformers = FORMATS["hf"].encode(as_model(mae()))[0]
    for name in ("lone.bin", "pytorch_model.bin"):
        torch.save(transformers, tmp_path / name)
    cases: list[tuple[list[object], list[str]]] = [
        (["export", tmp_path / "knn", "--to", "timm", "--out", tmp_path / "out.pth"],
         [f"/knn: this knn run trains nothing; take its init_from={run} instead"]),
        (["export", tmp_path / "chance", "--to", "timm", "--out", tmp_path / "out.pth"], ["take one that trains"]),
        (["export", tmp_path / "begun", "--to", "timm", "--out", tmp_path / "out.pth"],
         ["/begun: has no checkpoint yet; wait for the first, or run its pretrain command again"]),
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
        (["import", variant("nan.pth", nan)], ["nan.pth: backbone.blocks.1.norm1.bias contains NaN or inf"]),
        (["export", diverged, "--to", "hf"], [f"{diverged}: backbone.blocks.1.norm1.bias contains NaN or inf"]),
        (["import", tmp_path / "lone.pth", "--norm-pix"], ["lone.pth", "has no decoder"]),
        (["import", fine, "--std", "0", "1", "1"], ["--std=[0.0, 1.0, 1.0]", "greater than 0"]),
        (["import", fine, "--mean", "nan", "0", "0"], ["--mean=[nan, 0.0, 0.0]", "a number from 0 to 1 for each"]),
        (["import", fine, "--mean", "123", "117", "104"], ["--mean=[123.0, 117.0, 104.0]", "divide by 255"]),
        (["import", fine, "--std", "58", "57", "57"], ["--std=[58.0, 57.0, 57.0]", "divide by 255"]),
        (["import", fine, "--decoder-heads", "5"], ["cannot have 5 heads"]),
        (["import", fine, "--to", "x"], ["import: --to: is no option of it"]),
        (["export", tmp_path / "empty", "--to", "hf"], ["RUN=", "no config.yaml"]),
        (["export", run, "--to", "keras"], ["--to", "invalid choice", "keras"]),
        (["export", run, "--to", "fb", "--out", tmp_path / "x.bin"], ["x.bin", "ends in .pth"]),
        (["export", run, "--to", "hf", "--out", tmp_path / "x.pth"],
         ["x.pth: hf is a folder", f"try --out {tmp_path / 'x'}, or --to timm or fb or npz or onnx"]),
        (["export", run, "--to", "safetensors", "--out", tmp_path / "x.safetensors"], ["safetensors is a folder"]),
        (["export", pooled, "--to", "hf"], ["--to hf", "model.pool=avg"]),
        (["export", pooled, "--to", "npz", "--out", tmp_path / "out.npz"], ["--to npz", "fc_norm"]),
        (["export", mixer, "--to", "hf"], ["--to hf", "no Mixer"]),
        (["export", mixer, "--to", "fb", "--out", tmp_path / "out.pth"], ["--to fb", "no Mixer"]),
    ]  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for argv, expected in cases:
        out = [] if "--out" in argv else ["--out", tmp_path / "out"]
        line = refused(capsys, *argv, *out)
        assert all(part in line for part in expected), (line, expected)
    for argv in (["import", fine, "--out", run], ["export", run, "--to", "hf", "--out", tmp_path / "empty"]):
        assert "already exists" in refused(capsys, *argv)
    assert sorted(tmp_path.iterdir()) == before


def test_export_to_a_file_system_without_modes_is_kept_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with atomic_output(tmp_path / "x.pth", "--out") as work:
        work.touch(0o600)
        monkeypatch.setattr(Path, "chmod", refuse)
    assert (tmp_path / "x.pth").exists()
    assert "x.pth is up to its file system (Operation not permitted)" in caplog.text
