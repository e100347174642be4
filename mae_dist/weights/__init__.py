"""Checkpoints of other codebases, read and written: the official MAE code, timm, Hugging Face, Flax; and our own file.

    fb           .pth of the official MAE repository: backbone, decoder or head
    timm         state dict of VisionTransformer or MlpMixer, .pth or .safetensors: backbone, head
    hf           folder of ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification
    npz          Flax arrays of google-research/vision_transformer, ViT and Mixer: backbone, head
    safetensors  folder with mae_dist's own names, settings and a model card: everything

A file is recognised by its content, and reading it executes nothing that is in it. Names and shapes are converted;
bits never change. Whatever the file does not record is assumed, and each assumption is printed; whatever cannot be kept
is listed. A tensor that no model here has a place for is refused, since features without it would be different. Each
format is one file with `decode` (its tensors to mae_dist's names), `encode` (the reverse), `write` and `usage`. This
package knows no data, no loop and no run folder.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from mae_dist.weights import fb, files, hf, native, npz, timm
from mae_dist.weights.checks import brief
from mae_dist.weights.identify import Decoded, Model, Overrides, Reading, identify

FORMATS: dict[str, ModuleType] = {"timm": timm, "hf": hf, "fb": fb, "npz": npz, "safetensors": native}
"""Values of `mae-dist export --to` and the module that writes each."""

__all__ = ["FORMATS", "Decoded", "Model", "Overrides", "Reading", "read"]


def read(path: Path, overrides: Overrides) -> Reading:
    """Read the model in a checkpoint file or folder of any format; ``overrides`` replace what the file records.

    Raises ValueError with one sentence if `path` is no checkpoint, would execute code, has an architecture that is not
    in `models.BACKBONES`, or records a value that is invalid.
    """
    file, config = locate(path)
    origin, kind = str(path), files.detect(file)
    if kind == "npz":
        return identify(npz.decode(files.read_npz(file), origin), overrides)
    if kind == "pth":
        tensors, extras = timm.unwrap(files.read_pth(file), origin)
    else:
        tensors, extras = files.read_safetensors(file)
        if native.MARK in extras:
            return native.decode(tensors, extras, origin, overrides)
    model_type = config.get("model_type")
    if str(model_type) in hf.STATISTICS:
        processor = files.read_json(file.with_name(hf.PROCESSOR))
        return identify(hf.decode(tensors, config, processor, origin), overrides)
    if hf.recognises(tensors) and config:
        problem = f"model_type={brief(model_type)}: must be vit_mae or vit; try another model"
        raise ValueError(f"{path}: config.json: {problem}")
    if hf.recognises(tensors):
        raise ValueError(
            f"{path}: weights of transformers without their config.json; give the folder that holds both, config.json "
            f"and {' or '.join(files.WEIGHT_FILES)}"
        )
    codec = fb if fb.recognises(tensors, extras) else timm
    return identify(codec.decode(tensors, extras | config, origin), overrides)


def locate(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the tensors of a file or folder, and the content of the config.json beside it (or {})."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        has_config = path.name in files.WEIGHT_FILES
        return path, files.read_json(path.with_name("config.json")) if has_config else {}
    for name in files.WEIGHT_FILES:
        if (path / name).is_file():
            return path / name, files.read_json(path / "config.json")
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: is already a run of mae-dist; init_from={path} starts from it")
    raise ValueError(f"{path}: a folder without {' or '.join(files.WEIGHT_FILES)}; give a checkpoint file")
