"""Importing state dicts of other trainers: under keys, with prefixes, beside other models and objects, in parts."""

import json
import pathlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from running import refused, weights
from safetensors.torch import save_file
from torch import Tensor

from mae_dist import models
from mae_dist.__main__ import main
from mae_dist.weights.names import split_attention

STATE = models.build("vit_demo4", image_size=32).state_dict()


def under(prefix: str) -> dict[str, Tensor]:
    """The state dict with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        (STATE, []),
        ({"state_dict": under("_orig_mod.")}, ["without their prefix _orig_mod.", "under the key state_dict"]),
        ({"model": under("module._orig_mod.")}, ["without their prefix module._orig_mod."]),
        (under("encoder.backbone."), ["without their prefix encoder.backbone."]),
        ({"net": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ["under the key net"]),
        ({"a": {"b": under("model.")}}, ["under the key a.b"]),
        ({"model": STATE, "model_ema": under("module.")}, ["under the key model_ema", "other state dicts", "model"]),
        (under("backbone.") | {"head.mlp.0.weight": torch.ones(2, 2)}, ["the tensors backbone.*", "head.mlp.0.weight"]),
        (STATE | {"ema": under("x.")}, ["other state dicts of the file: ema"]),
        ({"model": STATE, "ema": [*STATE.values()]}, ["tensors without the names of a model's: ema"]),
        (
            {"state_dict": STATE, "calls": {"EMA": {"shadow": (*STATE.values(),)}}, "optim": [STATE["norm.bias"]]},
            ["names of a model's: calls.EMA.shadow, perhaps averaged"],
        ),
        ({"model": STATE, "ema": torch.ones(9), "epoch": torch.tensor(3)}, ["key model", "names of a model's: ema, "]),
        ({"model": STATE, "epoch": np.int64(3), "best": np.float32(0.5), "to": pathlib.PosixPath("/x")}, []),
        (
            {
                "state_dict": under("model."),
                "hyper_parameters": OmegaConf.create({"a": {"b": [1, "x"]}}),
                "callbacks": defaultdict(list, {"best": [1]}),
            },
            ["without their prefix model."],
        ),
        (under("module.") | {"n_averaged": torch.tensor(5)}, ["tensors beside module.*: n_averaged"]),
        ({"target": STATE, "loss": {"center": torch.ones(9)}}, ["key target", "other state dicts of the file: loss"]),
        (split_attention(STATE), []),
        ({name.replace(".q.", ".q_proj."): tensor for name, tensor in split_attention(STATE).items()}, []),
    ],
)
def test_import_finds_the_state_dict_and_reports_its_key_and_prefix(
    content: Any, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert main(["import", str(tmp_path / "x.pth"), "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    for sentence in sentences:
        assert sentence in output
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[f"model.backbone.{name}"], tensor) for name, tensor in STATE.items())


def test_import_of_several_models_lists_them_and_takes_the_one_of_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ones = {name: torch.ones_like(tensor) for name, tensor in under("backbone.").items()}
    cases = {
        "keys": {"student": under("backbone."), "teacher": ones, "dino_loss": {"center": torch.ones(3)}},
        "prefixes": {f"student.{name}": tensor for name, tensor in STATE.items()}
        | {name.replace("backbone", "teacher"): tensor for name, tensor in ones.items()},
    }
    for name, content in cases.items():
        file, out = tmp_path / f"{name}.pth", tmp_path / name
        torch.save(content, file)
        line = refused(capsys, "import", file, "--out", out)
        assert "student, teacher; choose one with `mae-dist import --key" in line
        assert main(["import", str(file), "--key", "teacher", "--out", str(out)]) == 0
        assert weights(out)["model.backbone.patch_embed.proj.weight"].eq(1).all()
        assert "student, teacher" in refused(capsys, "import", file, "--key", "nobody", "--out", tmp_path / "x")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_import_reads_a_sharded_folder_and_refuses_a_part_outside_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, stem = sorted(STATE), name.partition(".")
    files = {part: f"{stem[0]}-0000{number}-of-00002.{stem[2]}" for number, part in enumerate(("a", "b"), 1)}
    parts = {"a": names[:20], "b": names[20:]}
    for part, own in parts.items():
        tensors = {each: STATE[each].contiguous() for each in own}
        save = save_file if name.endswith("safetensors") else torch.save
        save(tensors, tmp_path / files[part])
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": {each: files[part] for part, own in parts.items() for each in own}}))
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run")]) == 0
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[f"model.backbone.{each}"], tensor) for each, tensor in STATE.items())
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    assert "no such file beside it" in refused(capsys, "import", tmp_path, "--out", tmp_path / "other")
