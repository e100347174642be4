"""Models with random weights, as objectives, as state dicts of other codebases and as finished runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import modules
import torch
from torch import Tensor

from mae_dist import models, restore, schema
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir
from mae_dist.schema import MaeConfig
from mae_dist.weights import Model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
DECODER = MaeConfig(decoder_dim=32, decoder_depth=2, decoder_heads=4, norm_pix=False, mask_ratio=0.5)
Cli = Callable[..., str]
"""Type of the fixture `cli`."""


def randomised(objective: Objective) -> Objective:
    """The objective with random numbers in all parameters except fixed positions, in evaluation mode."""
    return modules.randomised(objective, deviation=0.2).eval()


def mae(name: str = "vit_demo4", settings: MaeConfig = DECODER) -> MAE:
    """A masked autoencoder with random weights."""
    objective = randomised(MAE(models.build(name), settings, 0))
    assert isinstance(objective, MAE)
    return objective


def classifier(name: str = "vit_demo4", num_classes: int = 7, **choices: Any) -> Finetune:
    """A backbone with a linear head, with random weights."""
    backbone = models.build(name, **choices)
    objective = randomised(Finetune(backbone, num_classes, drop_path=0.0, label_smoothing=0.0, seed=0))
    assert isinstance(objective, Finetune)
    return objective


def official(objective: Objective) -> dict[str, Tensor]:
    """The state dict as the official MAE code, and timm, would have it."""
    return {name.removeprefix("backbone."): tensor for name, tensor in objective.state_dict().items()}


def save_run(objective: Objective, name: str, out: Path, size: int = 32, step: int = 3, test_crop: float = 1.0) -> Path:
    """A finished run with these weights, as its verb would leave it."""
    data, train = schema.DataConfig(path="x", mean=MEAN, std=STD, channels=3), schema.TrainConfig(steps=step)
    backbone = objective.backbone
    model = schema.ModelConfig(name=name, image_size=size, pool="avg" if backbone.pool == "avg" else None)
    view = schema.ViewConfig(test_crop=test_crop)
    common = {"out": str(out), "data": data, "model": model, "train": train, "view": view}
    if isinstance(objective, MAE):
        verb, config = "pretrain", schema.PretrainConfig(**common, mae=objective.settings)
    elif isinstance(objective, ProbeHeads):
        verb, config = "probe", schema.ProbeConfig(**common, init_from="random", heads=objective.settings)
    elif isinstance(objective, Probe):
        verb, config = "probe", schema.ProbeConfig(**common, init_from="random")
    else:
        verb, config = "finetune", schema.FinetuneConfig(**common, init_from="random")
    run = RunDir(out)
    run.open(verb, config, "abc")
    state = {f"model.{n}": t for n, t in objective.state_dict().items()} | {"optimizer.x": torch.ones(2)}
    run.save(step, checkpoint.share(state), 1)
    run.finish({"verb": verb})
    return out


def run_state(run: Path) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint that export takes."""
    return restore.of_run(RunDir(run)).state


def run_config(run: Path) -> schema.PretrainConfig:
    """The settings of a run."""
    return RunDir(run).settings()[2]


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def as_model(objective: Objective) -> Model:
    """The objective as export takes it from a run of vit_demo4."""
    data, model = (
        schema.DataConfig("x", mean=MEAN, std=STD, channels=3),
        schema.ModelConfig(name="vit_demo4", image_size=32),
    )
    if isinstance(objective, MAE):
        return Model("pretrain", schema.PretrainConfig("x", data, model, mae=objective.settings),
                            dict(objective.state_dict()))  # fmt: skip
    return Model("finetune", schema.FinetuneConfig("x", data, model, init_from="random"), dict(objective.state_dict()))


def usage(output: str) -> str:
    """The line that an export prints for loading its file."""
    return output.split("use it:")[1].strip()
