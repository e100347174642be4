"""Initial weights of a run: the backbone of an earlier one and, in pretraining, its decoder where it fits. What fits
only after a change, what the earlier run lacks and what is left out is logged.
"""

import dataclasses
import logging
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mae_dist import dist, hints, parallel, starts
from mae_dist.model_sizes import sides
from mae_dist.models.backbone import fit_channels
from mae_dist.models.vit import class_and_grid, resize_positions
from mae_dist.objectives import Objective
from mae_dist.objectives.mae import MAE
from mae_dist.run import checkpoint, identity
from mae_dist.run.directory import RunDir
from mae_dist.schema import MaeConfig, PretrainConfig, RunConfig

log = logging.getLogger(__name__)

BACKBONE, NORMS = "backbone.", ("backbone.norm.", "backbone.fc_norm.")
DECODER = ("decoder_", "mask_token", "stand_in")
"""How names outside of the backbone begin in an MAE."""
EMBEDDINGS = (".patch_embed.proj.weight", ".stem.proj.weight")
"""Ends of the names of patch embeddings, a ViT's and a Mixer's."""
POSITIONS = "pos_embed"
"""End of the names of positions, the backbone's and the decoder's."""
SAME_DECODER = ("decoder", "decoder_dim", "decoder_heads")
"""Settings of `mae` that must be equal for a decoder's weights to compute what they were trained to compute."""


@dataclass(frozen=True)
class InitialWeights:
    """An earlier run to start from: its settings, and the folder of one of its checkpoints."""

    config: RunConfig
    path: Path


def find(path: str, began: str | None) -> InitialWeights:
    """The run that `init_from` names: the checkpoint of RUN@STEP, else its newest undamaged one, or that with which
    this run `began`, where it is still there. Raises ValueError when it is no run or has no checkpoint.
    """
    folder, step = starts.run_and_step(path)
    run = RunDir.existing(folder, "init_from")

    def choose() -> str:
        if step is not None:
            return str(run.at(step, f"init_from={path}"))
        same = identity.find_checkpoint(run.path, began) if began else None
        return str(same if same and checkpoint.verify(same) is None else run.newest() or "")

    newest = Path(dist.run_on_rank0(choose))
    if newest == Path():
        raise ValueError(f"init_from={path}: the run has no checkpoint; start from a pretrain, probe or finetune run")
    if dist.is_main() and step is None and run.result() is None:
        log.warning("init_from=%s: this run is not finished; using its checkpoint %s", path, newest.name)
    return InitialWeights(run.settings()[2], newest)


def load(objective: Objective, initial: InitialWeights, config: RunConfig) -> None:
    """Fill the backbone, sharded or not, from an earlier run, with its averaged weights if it has them, and the decoder
    of an MAE where that run has one of the same kind, width and heads. A final norm that its pooling lacks, and what
    has another shape in its decoder, stay as initialised.

    A ViT for another image size gets the positions of that run resized (`vit.resize_positions`); fixed sin-cos
    positions, where this run does not train them, are computed for its size instead. For another number of channels
    the patch embedding is that run's by `backbone.fit_channels`.
    """
    backbone, stored, start = objective.backbone, checkpoint.names_in(initial.path), config.origin
    height, width = sides(initial.config.model.image_size)
    grid = (height // backbone.patch, width // backbone.patch)
    no_decoder = why_no_decoder(objective, initial.config, stored)
    wanted, adapted, fresh = {}, {}, []
    for name, tensor in objective.state_dict().items():
        key, in_backbone = checkpoint.trained(stored, name), name.startswith(BACKBONE)
        if not in_backbone and no_decoder is not None:
            continue
        missing, other_shape = key not in stored, stored.get(key, tensor.shape) != tensor.shape
        positions_change = name.endswith(POSITIONS) and (grid != backbone.grid or config.train.resolutions)
        if positions_change or (name.endswith(EMBEDDINGS) and other_shape):
            adapted[name] = wanted[key] = torch.empty(stored[key])
        elif (missing and name.startswith(NORMS)) or (not in_backbone and (missing or other_shape)):
            fresh.append(name)
        else:
            wanted[key] = tensor
    checkpoint.load(initial.path, wanted)
    for name, value in adapted.items():
        fit = fit_positions if name.endswith(POSITIONS) else fit_embedding
        how = fit(objective, name, value, grid, config)
        if how and dist.is_main():
            log.info("init_from=%s: %s", start, how)
    if dist.is_main():
        for sentence in sentences(objective, initial.config, no_decoder, fresh, unused(wanted, stored)):
            log.info("init_from=%s: %s", start, sentence)
        if any(key.startswith(checkpoint.EMA) for key in wanted):
            log.info("init_from=%s: its averaged weights", start)


def why_no_decoder(objective: Objective, earlier: RunConfig, stored: dict[str, torch.Size]) -> str | None:
    """Why an objective gets no decoder from an earlier run; None where it gets one."""
    if not isinstance(objective, MAE):
        return "this run has no decoder"
    if not isinstance(earlier, PretrainConfig) or f"{checkpoint.MODEL}decoder_pred.weight" not in stored:
        return "it has none"
    differing = [words for name, words in differences(earlier.mae, objective.settings).items() if name in SAME_DECODER]
    return f"its own has {', '.join(differing)}" if differing else None


def differences(earlier: MaeConfig, here: MaeConfig) -> dict[str, str]:
    """The settings of `mae` in which an earlier run differs, by name, each as "mae.field=value"."""
    found = {item.name: getattr(earlier, item.name) for item in dataclasses.fields(earlier)}
    return {k: hints.given(f"mae.{k}", value) for k, value in found.items() if value != getattr(here, k)}


def fit_embedding(objective: Objective, name: str, weight: Tensor, _: tuple[int, int], __: RunConfig) -> str:
    """Give a backbone the patch embedding that was trained for another number of channels; how, in a sentence."""
    channels = objective.backbone.channels
    parallel.copy_into(objective.get_parameter(name), fit_channels(weight, channels))
    how = "summed" if channels == 1 else "repeated and scaled"
    return f"patch embedding of {weight.shape[1]} channels {how} for {channels} (timm's rule)"


def fit_positions(
    objective: Objective, name: str, positions: Tensor, grid: tuple[int, int], config: RunConfig
) -> str:  # fmt: skip
    """Give a ViT or its decoder the positions that were trained for another `grid` of patches; how, in a sentence.
    Raises ValueError where they would be computed at each resolution of the run, and have been trained.
    """
    dim, new, whose = positions.shape[2], objective.backbone.grid, "" if name.startswith(BACKBONE) else "the decoder's "
    learned = not whose and config.model.position == "learned"
    fixed = torch.allclose(positions, class_and_grid(dim, grid), atol=1e-5)
    if config.train.resolutions and not (fixed or learned):
        way = "leave it out" if whose else "set model.position=learned, or leave it out"
        raise ValueError(f"train.resolutions: {whose}positions of init_from={config.origin} were trained; {way}")
    if grid == new:
        parallel.copy_into(objective.get_parameter(name), positions)
        return ""
    compute = fixed and not learned
    fitted = class_and_grid(dim, new) if compute else resize_positions(positions, grid, new)
    parallel.copy_into(objective.get_parameter(name), fitted)
    how = "computed" if compute else "resized (bicubic)"
    return f"{whose}positions of {grid[0]} x {grid[1]} patches {how} for {new[0]} x {new[1]}"


def sentences(
    objective: Objective, earlier: RunConfig, no_decoder: str | None, fresh: list[str], left_out: list[str]
) -> Iterator[str]:
    """Which parts a run has from an earlier one: `fresh` parameters are as initialised; in pretraining also what of
    the earlier run is `left_out`, and in which settings the decoder was trained otherwise.
    """
    if isinstance(objective, MAE):
        yield "backbone and decoder" if no_decoder is None else f"the backbone; no decoder, as {no_decoder}"
        if left := [name for name in left_out if no_decoder is None or not name.startswith(DECODER)]:
            yield f"no place here for its {modules(left)}"
        if isinstance(earlier, PretrainConfig) and no_decoder is None:
            changes = differences(earlier.mae, objective.settings).values()
            yield from [f"it was trained with {', '.join(changes)}"] if changes else ()
    if fresh:
        yield f"it lacks, or has in another shape, {modules(fresh)}: as initialised"


def unused(wanted: Container[str], stored: Iterable[str]) -> list[str]:
    """Parameters of a checkpoint that have no place in a run which reads the tensors `wanted`."""
    names = [key.removeprefix(checkpoint.MODEL) for key in stored if key.startswith(checkpoint.MODEL)]
    return [n for n in names if f"{checkpoint.MODEL}{n}" not in wanted and f"{checkpoint.EMA}{n}" not in wanted]


def modules(names: Iterable[str]) -> str:
    """The modules of parameters, each once; of a stack of blocks each block."""
    found = (re.match(r"(backbone\.)?[a-z_]+(\.[0-9]+)?", name) for name in names)
    return ", ".join(dict.fromkeys(match[0] for match in found if match))
