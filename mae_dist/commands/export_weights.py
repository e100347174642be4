"""`mae-dist export RUN --to timm|hf|fb|npz|safetensors|onnx --out PATH`: convert a run's newest checkpoint.

The file is read back as `import` would read it (ONNX: by onnxruntime), and both models compute the same images. Unless
their results are bit-identical (ONNX: close), the file is deleted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mae_dist import dist
from mae_dist.batch import Batch
from mae_dist.cli import Parser
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import GlobalBatchNorm
from mae_dist.objectives.mae import MAE
from mae_dist.restore import build, of_run, read
from mae_dist.run.directory import RunDir
from mae_dist.starts import SUFFIXES
from mae_dist.weights import FORMATS, Model, Overrides, files, native, onnx

NUM_IMAGES = 4
"""Number of noise images on which the exported file is compared with the run."""


def main(argv: list[str]) -> int:
    """Run `mae-dist export ARGV` and return the exit status."""
    parser = Parser(prog="mae-dist export", description="Write a run's newest checkpoint for another codebase.")
    parser.add_argument("folder", metavar="RUN", help="folder of the run")
    parser.add_argument("--step", type=int, help="step of an older checkpoint (default: the newest)")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the new file or folder (timm: either)")
    arguments = parser.parse_args(argv)
    codec, path = FORMATS[arguments.to], arguments.out
    if codec.SUFFIXES and path.suffix not in codec.SUFFIXES:
        *some, last = filter(None, codec.SUFFIXES)
        folder = "" if "" not in codec.SUFFIXES else ", and a folder has no suffix"
        raise ValueError(f"--out {path}: a file of {arguments.to} ends in {' or '.join([*some, last])}{folder}")
    if not codec.SUFFIXES and path.suffix in SUFFIXES:
        of_files = " or ".join(name for name in FORMATS if FORMATS[name].SUFFIXES)
        raise ValueError(
            f"--out {path}: {arguments.to} is a folder, whose name does not end in {path.suffix}; try --out "
            f"{path.with_suffix('')}, or --to {of_files} for one file"
        )
    files.refuse_existing(path, "--out")
    dist.setup(use_gpu=False)
    model, notes = without_probe_heads(
        of_run(RunDir.existing(arguments.folder, "RUN"), arguments.step, f"--step {arguments.step}")
    )
    original = build(model, arguments.folder)
    if "norm.running_mean" in model.state and codec is not native:
        model = with_folded_norm(model)
        original, probe = build(model, arguments.folder), original
        gap = differences(probe, original)["logits"]
        notes.append(f"head:     the probe's batch norm is folded into it (logits differ by up to {gap:.2g})")
    tensors, left_out = codec.encode(model)
    with files.atomic_output(path, "--out") as temporary:
        try:
            codec.write(tensors, model, temporary)
        except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own
            raise ValueError(f"--out {path}: could not be written (disk full?): {files.first_line(error)}") from error
        if codec is onnx:
            gaps = onnx.differences(temporary, tensors, model, f"--out {path}")
        else:
            gaps = differences_read_back(original, tensors, temporary, f"--out {path}")
        listed = ", ".join(f"{what} {gap:g}" for what, gap in gaps.items())
    print(f"{path}: step {model.step:,} of {arguments.folder} for {arguments.to}, {len(tensors)} tensors")
    for sentence in [*notes, *(f"left out: {sentence}" for sentence in left_out)]:
        print(f"  {sentence}")
    print(f"  largest difference on {NUM_IMAGES} images when read back: {listed}")
    print(f"  use it:   {codec.usage(model, path)}")
    return 0


def without_probe_heads(model: Model) -> tuple[Model, list[str]]:
    """Return (the model without several probe heads, which no format can hold; sentences on what is left out)."""
    if model.verb != "probe" or not model.config.heads.active:
        return model, []
    backbone = {name: tensor for name, tensor in model.state.items() if name.startswith("backbone.")}
    num_heads = sum(name.startswith("linears.") and name.endswith(".bias") for name in model.state)
    methods = [method for method in ("lars", "sgd", "adamw") if getattr(model.config.heads, method)]
    heads = f"the {num_heads} probe heads ({', '.join(methods)}), which stay in the run"
    return dataclasses.replace(model, state=backbone), [f"left out: {heads}"] if num_heads else []


def with_folded_norm(model: Model) -> Model:
    """The model of a probe with one head as a plain classifier: its batch norm, whose statistics are fixed, becomes
    part of the linear head. Up to rounding it computes the same.
    """
    state = dict(model.state)
    mean, variance = state.pop("norm.running_mean").double(), state.pop("norm.running_var").double()
    weight = state["head.weight"].double() / (variance + GlobalBatchNorm(0).eps).sqrt()
    state["head.bias"] = (state["head.bias"].double() - weight @ mean).float()
    state["head.weight"] = weight.float()
    return dataclasses.replace(model, verb="finetune", state=state)


def differences_read_back(original: Objective, tensors: dict[str, Tensor], file: Path, origin: str) -> dict[str, float]:
    """`differences` of the file's model, as `import` reads it, from the original. ValueError, beginning with
    ``origin``, unless all are 0.
    """
    copy = read(file, Overrides()).model
    if lost := num_values(tensors) - num_values(copy.state):
        raise ValueError(f"{origin}: the file has lost {lost:,} numbers when read back; it was deleted")
    gaps = differences(original, build(copy, origin))
    if any(gap != 0 for gap in gaps.values()):
        listed = ", ".join(f"{what} {gap:g}" for what, gap in gaps.items())
        raise ValueError(f"{origin}: the file differs from the run when read back ({listed}); it was deleted")
    return gaps


@torch.no_grad()
def differences(first: Objective, second: Objective) -> dict[str, float]:
    """Return the largest absolute differences of two models' features, and logits or pixels, on the same images."""
    shape, zeros = (first.backbone.channels, *first.backbone.image_size), torch.zeros(NUM_IMAGES, dtype=torch.int64)
    images = torch.randn(NUM_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, zeros, torch.arange(NUM_IMAGES), zeros, zeros.bool())
    pairs = {"features": [objective.backbone(images) for objective in (first, second)]}
    if type(first) is not Objective and type(second) is not Objective:
        if isinstance(first, MAE) and isinstance(second, MAE):
            mask = first.mask(batch)
            pairs["pixel predictions"] = [objective.predict(images, mask) for objective in (first, second)]
        else:
            pairs["logits"] = [objective(batch).prediction for objective in (first, second)]
    return {what: (a - b).abs().max().item() for what, (a, b) in pairs.items()}


def num_values(state: dict[str, Tensor]) -> int:
    """Return how many numbers all tensors have together, which a change of names and shapes keeps."""
    return sum(tensor.numel() for tensor in state.values())
