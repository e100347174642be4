"""Checkpoints of other codebases, read and written: the official MAE code, timm, Hugging Face, Flax; and our own file.

    fb           .pth of the official MAE repository: backbone, decoder or head
    timm         state dict of VisionTransformer or MlpMixer, .pth or .safetensors: backbone, head
    hf           folder of ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification
    npz          Flax arrays of google-research/vision_transformer, ViT and Mixer: backbone, head
    safetensors  folder with mae_dist's own names, settings and a model card: everything
    onnx         graph of the backbone and its head, written only

A file is recognised by its content, and reading it executes nothing that is in it. Names and shapes are converted;
bits never change. Whatever the file does not record is assumed, and each assumption is printed; whatever cannot be kept
is listed. A tensor that no model here has a place for is refused, since features without it would be different. Each
format is one file with `decode` (its tensors to mae_dist's names), `encode` (the reverse), `write` and `usage`. This
package knows no data, no loop and no run folder.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from mae_dist.starts import INDEX, PARTS, WEIGHT_FILES, weight_files
from mae_dist.weights import fb, files, hf, native, npz, onnx, state_dicts, timm
from mae_dist.weights.checks import brief, class_names, listed
from mae_dist.weights.identify import Decoded, Model, Overrides, Reading, identify

FORMATS: dict[str, ModuleType] = {"timm": timm, "hf": hf, "fb": fb, "npz": npz, "safetensors": native, "onnx": onnx}
"""Values of `mae-dist export --to` and the module that writes each."""

__all__ = ["FORMATS", "Decoded", "Model", "Overrides", "Reading", "read"]


def read(path: Path, overrides: Overrides, key: str | None = None) -> Reading:
    """Read the model in a checkpoint file or folder of any format; ``overrides`` replace what the file records, and
    ``key`` chooses between several models in one file.

    Raises ValueError with one sentence if `path` is no checkpoint, would execute code, has an architecture that is not
    in `models.BACKBONES`, or records a value that is invalid.
    """
    parts, config = locate(path)
    origin, kind = str(path), files.detect(parts[0])
    if kind == "npz":
        return identify(npz.decode(files.read_npz(parts[0]), origin), overrides)
    if kind == "pth":
        found = state_dicts.choose(files.read_pth(parts[0]), key, origin)
        for part in parts[1:]:
            found.tensors.update(state_dicts.choose(files.read_pth(part), None, str(part)).tensors)
    else:
        tensors, extras = files.read_safetensors(parts[0])
        if native.MARK in extras:
            return native.decode(tensors, extras, origin, overrides)
        for part in parts[1:]:
            tensors |= files.read_safetensors(part)[0]
        found = state_dicts.StateDict(tensors, extras, [], [])
    found = state_dicts.without_prefix(found, key, origin)
    codec = _codec(found, config, path)
    if codec is hf:
        processor = files.read_json(parts[0].with_name(hf.PROCESSOR))
        reading = identify(hf.decode(found.tensors, config, processor, origin), overrides)
    else:
        reading = identify(codec.decode(found.tensors, found.extras | config, origin), overrides)
    names = class_names(config.get("id2label") if codec is hf else (found.extras | config).get("label_names"))
    if names and len(names) == reading.model.num_classes:
        reading = dataclasses.replace(reading, model=dataclasses.replace(reading.model, classes=names))
    reading.notes.found.extend(found.found)
    reading.notes.left_out.extend(found.left_out)
    return reading


def _codec(found: state_dicts.StateDict, config: dict[str, Any], path: Path) -> ModuleType:
    """The format of a state dict: transformers' by its names or the config.json beside it, else the official code's or
    timm's. Raises ValueError for transformers' weights without a model type that is known.
    """
    model_type = config.get("model_type")
    if str(model_type) in hf.STATISTICS:
        return hf
    if hf.recognises(found.tensors) and config:
        problem = f"model_type={brief(model_type)}: must be vit_mae or vit; try another model"
        raise ValueError(f"{path}: config.json: {problem}")
    if hf.recognises(found.tensors):
        raise ValueError(
            f"{path}: weights of transformers without their config.json; give the folder that holds both, config.json "
            f"and {' or '.join(WEIGHT_FILES)}"
        )
    return fb if fb.recognises(found.tensors, found.extras) else timm


def locate(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The file with the tensors of a file or folder, or the files of a sharded one, and the content of the config.json
    beside it (or {}).
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix == ".distcp":
        raise ValueError(f"{path}: is a part of a checkpoint; give the folder that holds it")
    if path.is_file():
        name = path.name.removesuffix(INDEX)
        if name != path.name:
            return files.shards(path), files.read_json(path.with_name("config.json"))
        return [path], files.read_json(path.with_name("config.json")) if name in WEIGHT_FILES else {}
    for name in WEIGHT_FILES:
        index = path / (name + INDEX)
        if (path / name).is_file() or index.is_file():
            parts = [path / name] if (path / name).is_file() else files.shards(index)
            return parts, files.read_json(path / "config.json")
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: is already a run of mae-dist; init_from={path} starts from it")
    raise ValueError(f"{path}: a folder without {' or '.join(WEIGHT_FILES)}; {advice(path)}")


def advice(folder: Path) -> str:
    """What to give instead of a folder that holds no weights by a usual name."""
    inside = weight_files(folder)
    if parts := [file.parent for file in inside if file.name == PARTS]:
        convert = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        return f"one file of its parts is made by `{convert} {parts[-1]} FILE.pth`, which trusts them"
    found = [str(file.relative_to(folder)) for file in inside if file.suffix != ".distcp"]
    return f"give one of its files: {listed(found)}" if found else "give a checkpoint file"
