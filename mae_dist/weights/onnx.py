"""ONNX files, written only: a backbone with its linear head as a graph that takes any number of images.

Input `images` (n, channels, height, width), scaled to 0..1, then (x - mean) / std; outputs `features` (n, dim) and, of
a classifier, `logits` (n, classes). The file's metadata says how images are made, as timm's pretrained_cfg, and the
names of the classes. Needs the packages onnx, onnxscript and onnxruntime.
"""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist import models
from mae_dist.models.backbone import Backbone
from mae_dist.weights import timm
from mae_dist.weights.identify import Model

SUFFIXES = (".onnx",)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("features", "logits")
CLOSE = 1e-4
"""How far outputs in onnxruntime may be from torch's, as a share of the largest: it adds in another order."""


class Served(nn.Module):
    """A backbone with its linear head, if it has one."""

    def __init__(self, backbone: Backbone, head: nn.Linear | None):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features and, with a head, logits of images (n, channels, height, width)."""
        features = self.backbone(images)
        return (features,) if self.head is None else (features, self.head(features))


def encode(model: Model) -> tuple[dict[str, Tensor], list[str]]:
    """Return (tensors of backbone and linear head, sentences on what is left out). ValueError without the packages."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"--to onnx: needs the packages of pip install 'mae_dist[onnx]' ({error})") from error
    return model.portable(decoder=False)


def write(tensors: dict[str, Tensor], model: Model, path: Path) -> None:
    """Write the graph, traced with two images."""
    served = served_by(tensors, model)
    for talkative in ("onnxscript", "onnx_ir"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    with torch.no_grad():
        program = torch.onnx.export(
            served, (images_of(model, 2),), dynamo=True, verbose=False, input_names=["images"],
            output_names=[*OUTPUTS[: 1 + bool(model.num_classes)]],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(pretrained_cfg=json.dumps(timm.images(model)), arch=model.config.model.name)
    if model.num_classes:
        program.model.metadata_props["label_names"] = json.dumps(model.labels)
    program.save(str(path))


def served_by(tensors: dict[str, Tensor], model: Model) -> Served:
    """The backbone, and the head if there is one, that have these tensors, in evaluation mode."""
    chosen: dict[str, Any] = {"image_size": model.config.model.image_size, "channels": model.config.data.channels}
    chosen |= {"pool": model.pool} if model.is_vit else {}
    if model.config.model.position is not None:
        chosen["position"] = model.config.model.position
    with torch.device("meta"):
        backbone = models.build(model.config.model.name, **chosen)
        served = Served(backbone, nn.Linear(backbone.dim, model.num_classes) if model.num_classes else None)
    served.load_state_dict(tensors, assign=True)
    return served.eval()


def images_of(model: Model, number: int) -> Tensor:
    """Images of noise (number, channels, height, width), always the same."""
    shape = (number, model.config.data.channels, *model.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def differences(path: Path, tensors: dict[str, Tensor], model: Model, origin: str) -> dict[str, float]:
    """The largest absolute difference of each output of the file in onnxruntime from torch's, on another number of
    images than it was traced with. ValueError, beginning with ``origin``, where one is not close.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    images = images_of(model, 3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]
    with torch.no_grad():
        expected = served_by(tensors, model)(images)
    gaps = {}
    for name, output, own in zip(OUTPUTS[: len(expected)], found, expected, strict=True):
        gaps[name] = (output - own).abs().max().item()
        if not gaps[name] <= CLOSE * own.abs().max().item():
            raise ValueError(f"{origin}: onnxruntime computes other {name}, by up to {gaps[name]:g}; it was deleted")
    return gaps


def usage(_: Model, path: Path) -> str:
    """Return the Python expression that computes outputs for a NumPy array `images` from the file at `path`."""
    return f"onnxruntime.InferenceSession('{path}').run(None, {{'images': images}})"
