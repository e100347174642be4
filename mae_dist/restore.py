"""A trained model out of a run's checkpoint, or a file of any format, as the objective that trained it."""

import dataclasses
import logging
from pathlib import Path

import torch

from mae_dist import models, small_files, weights
from mae_dist.data.index import open_split
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run import checkpoint, layout
from mae_dist.run.directory import RunDir
from mae_dist.schema import RANDOM, RunConfig
from mae_dist.weights import Model, Overrides, Reading
from mae_dist.weights.checks import listed
from mae_dist.weights.identify import NORMS

log = logging.getLogger(__name__)

CHUNK = 256
"""Images whose features a probe computes at once."""


def of_run(run: RunDir, step: int | None = None, field: str = "RUN") -> Model:
    """The model in a run's newest checkpoint, or in that of a step, with its EMA weights if it has them; read by this
    process alone, whatever others there are. ValueError if there is none, which names the `field` of the step.
    """
    verb, fingerprint, config = run.settings()
    newest = run.newest() if step is None else run.at(step, field)
    heads = getattr(config, "heads", None)
    if newest is None and (verb == "knn" or (heads and heads.active and not (heads.lars or heads.sgd or heads.adamw))):
        other = "one that trains" if config.init_from == RANDOM else f"its init_from={config.init_from}"
        raise ValueError(f"RUN={run.path}: this {verb} run trains nothing; take {other} instead")
    if newest is None:
        raise ValueError(f"RUN={run.path}: has no checkpoint yet; wait for the first, or run its {verb} command again")
    if step is None and run.result() is None:
        log.warning("RUN=%s: this run is not finished; taking its checkpoint %s", run.path, newest.name)
    shapes = checkpoint.names_in(newest)
    names = [name.removeprefix("model.") for name in shapes if name.startswith("model.")]
    stored = {name: checkpoint.trained(shapes, name) for name in names}
    tensors = checkpoint.read_named(newest, stored.values())
    state = {name: tensors[key] for name, key in stored.items()}
    return Model(verb, config, state, layout.step_of(newest), fingerprint, class_names(run, config, fingerprint))


def class_names(run: RunDir, config: RunConfig, fingerprint: str) -> tuple[str, ...]:
    """Names of the classes that a run was trained on, or of the checkpoint that it was imported from; of a run that
    does not record them those of its data, unless they have changed since; () where none are known.
    """
    if (run.path / layout.CLASSES).is_file():
        return tuple(small_files.read_json(run.path / layout.CLASSES)["classes"])
    imported = (run.result() or {}).get("imported")
    if imported is not None:
        return tuple(imported.get("classes", ()))
    data = config.data
    try:
        split = open_split(data.path, data.split, None, data.merge_labels, data.allow_outside)
    except (ValueError, OSError):
        return ()
    return tuple(split.dataset.classes or ()) if fingerprint.startswith(split.fingerprint) else ()


def read(path: Path, overrides: Overrides, key: str | None = None) -> Reading:
    """Read a checkpoint file or folder. ValueError, one sentence, unless it has every tensor of a model of mae_dist."""
    reading = weights.read(path, overrides, key)
    build(reading.model, str(path))
    return reading


def build(model: Model, origin: str) -> Objective:
    """Build the objective of a model with its tensors, in evaluation mode. ``origin`` begins error messages.

    Raises ValueError if tensors are missing, unknown, of another shape or not finite. The only tensor allowed without
    a place in the model is the final norm of the other pooling.
    """
    config, state = model.config, model.state
    try:
        with torch.device("meta"):
            objective = build_untrained(model)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    expected, faults = objective.state_dict(), []
    unknown = [name for name in state if name not in expected and not name.startswith(NORMS)]
    for names, what in (([n for n in expected if n not in state], "lacks"), (unknown, "has unknown tensors")):
        if names:
            faults.append(f"{what} {listed(names)}")
    if faults:
        raise ValueError(f"{origin}: as {config.model.name} it {' and '.join(faults)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, and {config.model.name} has {tuple(tensor.shape)}"
            raise ValueError(f"{origin}: {name} is {shapes}")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{origin}: {name} contains NaN or inf, so its outputs would be NaN; try another file")
    objective.load_state_dict({name: state[name] for name in expected}, assign=True)
    return objective.eval()


def build_untrained(model: Model) -> Objective:
    """Build the objective of a model's settings without its tensors. ValueError for settings that contradict."""
    config, state = model.config, model.state
    chosen = {name: value for name in ("pool", "position") if (value := getattr(config.model, name)) is not None}
    chosen |= {"image_size": config.model.image_size, "channels": config.data.channels}
    backbone = models.build(config.model.name, **chosen)
    if model.has_decoder:
        return MAE(backbone, dataclasses.replace(config.mae, predict=1.0), config.train.seed)
    if "linears.0.bias" in state:
        return ProbeHeads(backbone, len(state["linears.0.bias"]), config.heads, chunk=CHUNK, seed=config.train.seed)
    if "head.bias" not in state:
        return Objective(backbone, config.train.seed)
    if model.verb == "probe":
        return Probe(backbone, len(state["head.bias"]), chunk=CHUNK, seed=config.train.seed)
    return Finetune(backbone, len(state["head.bias"]), drop_path=0.0, label_smoothing=0.0, seed=0)
