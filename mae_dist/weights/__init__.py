"""Checkpoints of other houses, in and out: the official MAE code's, timm's, Hugging Face's, Flax's, and our own file.

    fb           .pth of the official MAE repository: backbone, decoder or head
    timm         state dict of VisionTransformer or MlpMixer, .pth or .safetensors: backbone, head
    hf           folder of ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification
    npz          Flax arrays of google-research/vision_transformer, ViT and Mixer: backbone, head
    safetensors  folder with our own names, settings and a model card: everything

Promises: a file is recognised by its content; reading one executes nothing that is in it; names and shapes change, bits
do not; what a file does not say is assumed aloud; what cannot be kept is named; a tensor that our models have no place
for is refused, for without it the features would be others. Each house is one file with `found` (theirs to ours),
`theirs` (ours to theirs), `write` and `usage`. Knows no data, no loop and no run folder.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from mae_dist.weights import fb, files, hf, native, npz, timm
from mae_dist.weights.checks import brief
from mae_dist.weights.identify import Found, Given, Model, Reading, identify

HOUSES: dict[str, ModuleType] = {"timm": timm, "hf": hf, "fb": fb, "npz": npz, "safetensors": native}
"""What `--to` knows."""

__all__ = ["HOUSES", "Found", "Given", "Model", "Reading", "read"]


def read(path: Path, given: Given) -> Reading:
    """The model that a file or folder of any house holds; ``given``: what the user says of it.

    Raises ValueError, one sentence, for what is no checkpoint, would execute code, is of an architecture that
    `models.BACKBONES` has not, lacks what must be known, or says of itself what cannot be.
    """
    file, config = locate(path)
    kind = files.kind(file)
    if kind == "npz":
        return identify(npz.found(files.npz(file)), str(path), given)
    if kind == "pth":
        tensors, facts = timm.unwrap(files.pth(file), str(path))
    else:
        tensors, facts = files.safetensors(file)
        if native.MARK in facts:
            return native.reading(tensors, facts, str(path), given)
    processor = file.with_name(hf.PROCESSOR)
    if str(config.get("model_type")) in hf.KINDS:
        return identify(hf.found(tensors, config, files.json_file(processor), str(path)), str(path), given)
    if hf.looks_like(tensors) and config:
        kind = brief(config.get("model_type"))
        raise ValueError(f"{path}: config.json: model_type={kind}: must be vit_mae or vit; try another model")
    if hf.looks_like(tensors):
        raise ValueError(
            f"{path}: weights of transformers without their config.json; give the folder that holds both, config.json "
            f"and {' or '.join(files.IN_FOLDERS)}"
        )
    house = fb if fb.looks_like(tensors, facts) else timm
    return identify(house.found(tensors, facts | config, str(path)), str(path), given)


def locate(path: Path) -> tuple[Path, dict]:
    """(the file with the tensors, the config.json beside it or {}) of a file or folder."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        known = path.name in files.IN_FOLDERS
        return path, files.json_file(path.with_name("config.json")) if known else {}
    for name in files.IN_FOLDERS:
        if (path / name).is_file():
            return path / name, files.json_file(path / "config.json")
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: is a run of mae-dist already; init_from={path} starts from it")
    raise ValueError(f"{path}: a folder without {' or '.join(files.IN_FOLDERS)}; give a checkpoint file")
