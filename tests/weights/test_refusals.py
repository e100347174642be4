"""What import and export refuse: invalid metadata and tensors, damaged or hostile files, mistakes of users."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
import math
import random
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from running import refused
from safetensors.torch import save_file
from torch import Tensor
from trained import MEAN, STD, Cli, as_model, classifier, mae, official, save_run

from mae_dist import restore, starts
from mae_dist.__main__ import main
from mae_dist.objectives import Objective
from mae_dist.objectives.mae import MAE
from mae_dist.weights import FORMATS, Decoded, Model, Overrides, fb, npz


def test_export_deletes_file_that_differs_when_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(mae(), "vit_demo4", tmp_path / "run")
    encode, decode = fb.encode, fb.decode

    def encode_wrongly(model: Model) -> tuple[dict[str, Tensor], list[str]]:
        tensors, left_out = encode(model)
        return tensors | {"decoder_pred.bias": tensors["decoder_pred.bias"] + 1e-3}, left_out

    def decode_encoder(tensors: dict[str, Tensor], extras: dict[str, Any], origin: str) -> Decoded:
        encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder_", "mask_token"))}
        return decode(encoder, extras, origin)

    cases = {"encode": (encode_wrongly, "features 0, pixel predictions 0.00"), "decode": (decode_encoder, "lost")}
    for name, (broken, complaint) in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(fb, name, broken)
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
        ("pretrained_cfg", "std", [*NOT_THREE[:2], [0, 0, 0], [0.2, -0.2, 0.2]], ["--std", *STD]),
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
        (PROCESSOR, "image_mean", NOT_THREE[:4], ["--mean", *MEAN]),
        (PROCESSOR, "image_std", [*NOT_THREE[:2], [0.2, 0.2, 0.0]], ["--std", *STD]),
        ("own", "data.mean", [(123.0, 117.0, 104.0)], ["--mean", *MEAN]),
        ("own", "data.std", [(0.2, 0.2, 0.0), (58.0, 57.0, 57.0)], ["--std", *STD]),
        ("own", "model.image_size", [31], []),
        ("own", "mae.decoder_heads", [0, "x"], []),
    ],
)
def test_import_refuses_invalid_metadata_by_name_unless_overridden(
    tmp_path: Path, cli: Cli, capsys: pytest.CaptureFixture[str],
    where: str, key: str, values: list[Any], option: list[Any],
) -> None:  # fmt: skip
    path = tmp_path / "invalid"
    for value in values:
        write_checkpoint(path, where, key, value)
        line = refused(capsys, "import", path, "--out", tmp_path / "out")
        assert all(word in line for word in (str(path), key, *option[:1])), (value, line)
    if option:
        cli("import", path, "--out", tmp_path / "out", *option)


MODELS = {"mae": mae(), "vit": classifier(), "mixer": classifier("mixer_demo4")}


def write_checkpoint(path: Path, where: str, key: str, value: Any) -> None:
    """Write a checkpoint to `path` whose metadata has `value` for `key`. ``where``: the file or object that has it."""
    objective = MODELS["mae"]
    if where in (CONFIG, PROCESSOR, "own"):
        shutil.rmtree(path, ignore_errors=True)
        codec, model = FORMATS["safetensors" if where == "own" else "hf"], as_model(objective)
        if where == "own":
            section, _, name = key.partition(".")
            changed = dataclasses.replace(getattr(model.config, section), **{name: value})
            model = dataclasses.replace(model, config=dataclasses.replace(model.config, **{section: changed}))
        codec.write(codec.encode(model)[0], model, path)
        if where != "own":
            (path / where).write_text(json.dumps(json.loads((path / where).read_text()) | {key: value}))
    elif where == "args":
        torch.save({"model": official(objective), "args": argparse.Namespace(**{key: value})}, path)
    elif where == "metadata":
        save_file(official(MODELS["vit"]), path, {key: value})
    else:
        beside = {key: value} if where == "beside" else {where: {key: value}}
        torch.save({"state_dict": official(MODELS["vit"])} | beside, path)


def refusal(path: Path) -> str:
    """The message, one line that begins with `path`, if the file is refused; "" if it is read."""
    try:
        restore.read(path, Overrides())
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert len(message.splitlines()) == 1, message
        return message
    return ""


ODD = [torch.tensor(1.0), torch.zeros(5), torch.zeros(3, 4), torch.zeros(1, 65, 3), torch.zeros(2, 3, 4, 4)]
ODD += [torch.zeros(1, 1, 1, 1, 1), torch.zeros(0)]
KEY_TENSORS = ("patch_embed.proj.weight", "stem.proj.weight", "pos_embed", "blocks.0.mlp_tokens.fc1.weight",
               "head.bias", "decoder_embed.weight", "cls_token", "mask_token")  # fmt: skip


@pytest.mark.parametrize("objective", MODELS.values(), ids=MODELS)
def test_import_refuses_tensors_of_wrong_shape_kind_or_name(tmp_path: Path, objective: Objective) -> None:
    path, good = tmp_path / "odd.pth", official(objective)

    def error(changes: dict[str, Tensor]) -> str:
        torch.save({"model": good | changes}, path)
        return refusal(path)

    assert not error({})
    for name in (name for name in KEY_TENSORS if name in good):
        for tensor in (tensor for tensor in ODD if tensor.ndim != good[name].ndim):
            assert name.partition(".")[0] in error({name: tensor})
        for change in (
            Tensor.to_sparse,
            lambda t: t.to("meta"),
            lambda t: torch.quantize_per_tensor(t, 1, 0, torch.qint8),
        ):
            assert f"{name} is sparse" in error({name: change(good[name])})
    for name in ("blocks.foo.weight", "blocks.", "blocks.0", f"blocks.{'9' * 5000}.weight", "", "."):
        assert "has unknown tensors" in error({name: torch.zeros(2)})
    if isinstance(objective, MAE):
        assert "has unknown tensors decoder_blocks.foo.weight" in error({"decoder_blocks.foo.weight": torch.zeros(2)})


def test_npz_import_refuses_arrays_of_wrong_shape(tmp_path: Path) -> None:
    good = {name: array.numpy() for name, array in npz.encode(as_model(classifier()))[0].items()}
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    names = {f"{attention}/{part}/{leaf}": f"attn.{part[0]}." for part in ("query", "key", "value")
             for leaf in ("kernel", "bias")}  # fmt: skip
    names |= {"cls": "cls_token", "Transformer/posembed_input/pos_embedding": "pos_embed", "head/bias": "head",
              "embedding/kernel": "patch_embed", "Transformer/encoderblock_0/LayerNorm_0/scale": "norm1"}  # fmt: skip
    for name, own in names.items():
        for tensor in (tensor for tensor in ODD if tensor.ndim != good[name].ndim):
            np.savez(tmp_path / "odd.npz", **(good | {name: tensor.numpy()}))  # pyright: ignore
            assert own in refusal(tmp_path / "odd.npz")


@pytest.mark.parametrize("kind", ["zip.pth", "pickle.pth", "safetensors", "npz", "compressed.npz", "own"])
def test_import_of_damaged_bytes_is_refused_in_one_line_or_harmless(tmp_path: Path, kind: str) -> None:
    path, model = tmp_path / f"damaged.{kind}", as_model(classifier())
    if kind.endswith("pth"):
        content = {"state_dict": official(classifier()), "pretrained_cfg": {"mean": MEAN}}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip.pth")
    elif kind.endswith("npz"):
        save = np.savez_compressed if kind == "compressed.npz" else np.savez
        save(path, **{name: array.numpy() for name, array in npz.encode(model)[0].items()})  # pyright: ignore
    elif kind == "own":
        FORMATS["safetensors"].write(dict(model.state), model, tmp_path / "whole")
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


def test_import_refuses_vit_without_class_token(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    gap: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
    for name, options in {"vit_tiny_patch16_224": gap, "vit_base_patch16_siglip_224": {}}.items():
        torch.save(timm.create_model(name, **(sizes | options)).state_dict(), tmp_path / "gap.pth")
        assert "without class token (cls_token)" in refusal(tmp_path / "gap.pth")
    arrays = {name: array.numpy() for name, array in npz.encode(as_model(classifier()))[0].items()}
    positions = arrays.pop("Transformer/posembed_input/pos_embedding")[:, 1:]
    del arrays["cls"]
    gap = {f"params/{name}": array for name, array in arrays.items()} | {"pos_embedding": positions}
    np.savez(tmp_path / "gap.npz", **gap)
    assert "without class token (cls_token)" in refusal(tmp_path / "gap.npz")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_embed_class": True}, "without position for its class token (no_embed_class: pos_embed has 64 for 8 x 8 "),
        ({"no_embed_class": True, "init_values": 1e-4}, "with LayerScale (ls1.gamma), which"),
        ({"reg_tokens": 4}, "with registers (reg_token), which"),
        ({"no_embed_class": True, "reg_tokens": 4, "init_values": 1e-4}, "with registers (reg_token) and LayerScale ("),
        ({"qk_norm": True, "pre_norm": True}, "with norms of queries and keys (q_norm.weight) and a norm before the"),
    ],
)
def test_import_refuses_unsupported_parts_of_vits(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    torch.save(timm.create_model("vit_tiny_patch16_224", **sizes, **options).state_dict(), tmp_path / "other.pth")
    assert f"a ViT {reason}" in refusal(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("changes", "without", "reason"),
    [
        (("blocks.0.attn.relative_position_bias_table", "blocks.0.gamma_1"), "pos_embed",
         "a ViT with LayerScale (gamma_1) and relative positions (relative_position_bias_table), which ViTs here"),
        (("dist_token",), "", "a ViT with a distillation token (dist_token), which ViTs here do not"),
        (("layers.0.blocks.0.norm1.weight",), "blocks.", "no blocks.0, so it is no ViT or Mixer (perhaps a Swin)"),
    ],
)  # fmt: skip
def test_import_names_what_beit_deit_and_swin_have_that_no_model_here_has(
    changes: tuple[str, ...], without: str, reason: str, tmp_path: Path
) -> None:
    state = {n: t for n, t in official(classifier()).items() if not without or not n.startswith(without)}
    torch.save({"state_dict": state | dict.fromkeys(changes, torch.ones(128))}, tmp_path / "other.pth")
    assert reason in refusal(tmp_path / "other.pth")


def test_import_says_what_to_do_with_what_is_no_state_dict(tmp_path: Path) -> None:
    state, folder = official(MODELS["vit"]), tmp_path / "parts/step-3"
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).touch()
    (tmp_path / "files/last").mkdir(parents=True)
    for name in ("last/mp_rank_00_model_states.pt", "notes.txt"):
        (tmp_path / "files" / name).touch()
    with zipfile.ZipFile(tmp_path / "code.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "code.pt")
    (tmp_path / "x.pth.gz").write_bytes(gzip.compress(b"some"))
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\n")
    contents = {
        "bytes.pth": {n: t.to(torch.int8) for n, t in state.items()},
        "odd.pth": {"a\nb": torch.ones(2)},
        "zero.pth": {"module": {n: t[:0] for n, t in state.items()}},
        "shadow.pth": {"ema": {"shadow_params": [*state.values()]}},
        "other.pth": {"state_dict": {"conv_proj.weight": torch.ones(2)}},
        "partial.ckpt": {"state_dict": state, "net": functools.partial(torch.optim.SGD, lr=1)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    for name, advice in {
        "parts": f"dcp_to_torch {folder} FILE.pth`", "parts/step-3/__0_0.distcp": "give the folder",
        "files": "give one of its files: last/mp_rank_00_model_states.pt", "code.pt": "save its state_dict() alone",
        "x.tar.gz": "unpack it", "x.pth.gz": "compressed by gzip; unpack it", "lfs.pth": "`git lfs pull`",
        "odd.pth": r"but a\nb; rename",
        "bytes.pth": "is of torch.int8, so its weights are quantised; use a file of plain floats",
        "zero.pth": "zero_to_fp32.py", "shadow.pth": "the tensors of ema.shadow_params have no names",
        "other.pth": "but conv_proj.weight; rename its tensors as timm does",
        "partial.ckpt": "execute code (functools.partial, torch.optim.sgd.SGD), which mae-dist never does; load",
    }.items():  # fmt: skip
        assert advice in refusal(tmp_path / name), name
        assert starts.is_of_others(tmp_path / name), "init_from has the same answer"
