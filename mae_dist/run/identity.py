"""Whether the folder of a run holds the run that a command describes: by its settings, and by what its data and initial
weights are, wherever they lie. Imports no torch.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from mae_dist import config as configuration
from mae_dist import paths, starts
from mae_dist.run import jsonl, layout
from mae_dist.schema import C, RunConfig

log = logging.getLogger(__name__)

AUTO = "auto"
"""Value of train.precision that a run's first start replaces."""


def refuse_others(path: Path, verb: str, config: RunConfig, data_fingerprint: str) -> None:
    """Raise ValueError where the folder `path` holds another run, or files that are no run's. A run that has made no
    step yet may be started again with other settings.
    """
    if not path.exists() or (path.is_dir() and {entry.name for entry in path.iterdir()} <= layout.BEFORE_THE_RUN):
        return
    if not (path / layout.CONFIG).is_file():
        raise ValueError(f"out={path}: exists and is no run of mae-dist; choose another folder")
    if not (layout.checkpoints(path) or next(jsonl.backwards(path / layout.METRICS), None) or layout.result(path)):
        return
    old_verb, old_data, old = layout.settings(path)
    if old_verb != verb:
        changes = [f"verb: {old_verb} -> {verb}"]
    else:
        changes = differences(old, config, same_start(old, config, started_from(path)))
        if old_data != data_fingerprint and not config.data.accept_change:
            changes.append(
                f"content of data.path: {old_data} -> {data_fingerprint}, data.accept_change=true accepts it"
            )
    if changes:
        raise ValueError(
            f"out={path}: holds a run with other settings ({'; '.join(changes)}); "
            f"choose another out= or give the old values{longer(path, verb, old, config)}"
        )
    if old_data != data_fingerprint:
        log.warning("the data have changed (%s -> %s), accepted from here on", old_data, data_fingerprint)


def longer(path: Path, verb: str, old: RunConfig, new: RunConfig) -> str:
    """How a finished run of pretraining is extended, where the new settings only ask for more steps; else empty."""
    more = new.train.epochs > old.train.epochs or (new.train.steps or 0) > (old.train.steps or 0)
    if verb != "pretrain" or not more or layout.result(path) is None:
        return ""
    return (
        f"; to train it further, begin a new run with its weights: init_from={path} out=NEW (it has its own schedule)"
    )


def finished(path: Path, verb: str, config: RunConfig) -> bool:
    """Whether the folder `path` holds a finished run of these settings. Data and initial weights are not compared, so
    they may be gone.
    """
    if not (path / layout.CONFIG).is_file() or layout.result(path) is None:
        return False
    old_verb, _, old = layout.settings(path)
    return old_verb == verb and not differences(old, completed(config, old), same_start=True)


def completed(config: C, old: RunConfig) -> C:
    """The config of a command, and what it leaves open as an earlier start has found it."""
    data, known = config.data, old.data
    data = dataclasses.replace(
        data, mean=data.mean or known.mean, std=data.std or known.std,
        white=known.white if data.white is None else data.white, channels=data.channels or known.channels,
        test_split=known.test_split if data.test_split == "auto" else data.test_split,
    )  # fmt: skip
    config = with_precision(config, old.train.precision)
    mapped = old.origin == str(starts.imported(old.out)) and config.origin is not None
    if mapped and not (starts.run_and_step(str(config.origin))[0] / layout.CONFIG).is_file():
        config = dataclasses.replace(config, **{"init_from": old.origin})
    return dataclasses.replace(config, data=data)


def with_precision(config: C, chosen: str) -> C:
    """The config with `chosen` in place of train.precision=auto."""
    if config.train.precision != AUTO:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=chosen))


def precision_for(own: RunConfig | None, origin: RunConfig | None, fast: Collection[str]) -> str:
    """What train.precision=auto is: what the run began with, its settings being `own`; else that of the run it starts
    from, or bf16, if the device has instructions for it, which `fast` lists; else fp32.
    """
    if own is not None and own.train.precision != AUTO:
        return own.train.precision
    wanted = "bf16" if origin is None or origin.train.precision == AUTO else origin.train.precision
    return wanted if wanted in fast else "fp32"


def differences(old: RunConfig, new: RunConfig, same_start: bool) -> list[str]:
    """The result-changing settings in which two configs differ, as 'field: old -> new'. ``same_start``: their initial
    weights are the same, though init_from may name another folder.
    """
    old, new = absolute(old), absolute(new)
    if same_start and None not in (old.origin, new.origin):
        new = dataclasses.replace(new, **{"init_from": old.origin})
    return configuration.differences(old, new)


def absolute(config: C) -> C:
    """The settings with absolute paths, which are valid in any working directory."""
    data = config.data
    test_path = data.test_path and paths.absolute(data.test_path)
    data = dataclasses.replace(data, path=paths.absolute(data.path), test_path=test_path)
    start = {} if config.origin is None else {"init_from": str(Path(config.origin).absolute())}
    return dataclasses.replace(config, out=str(Path(config.out).absolute()), data=data, **start)


# Initial weights


def same_start(old: RunConfig, new: RunConfig, recorded: str | None) -> bool:
    """Whether a run of settings `old`, which began with the checkpoint `recorded`, has the initial weights that `new`
    names: its init_from has that checkpoint; or it is the same folder, whose run has gone on since, or is gone.
    """
    if old.origin is None or new.origin is None:
        return old.origin == new.origin
    in_place = Path(old.origin).absolute() == Path(new.origin).absolute()
    run, step = starts.run_and_step(new.origin)
    if recorded is not None and step not in (None, layout.step_of(Path(recorded.split()[0]))):
        return False
    if recorded is None or find_checkpoint(run, recorded):
        return in_place or recorded is not None
    there = layout.checkpoints(run)
    return in_place and (not there or layout.step_of(there[-1]) > layout.step_of(Path(recorded.split()[0])))


def of_checkpoint(path: Path) -> str:
    """What a checkpoint is, wherever it lies: its name and a short hash of the names and sha256 of its files. Raises
    ValueError where its manifest is damaged.
    """
    files = layout.manifest(path)["files"]
    text = json.dumps([(name, files[name]["sha256"]) for name in sorted(files)])
    return f"{path.name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def started_from(path: Path) -> str | None:
    """`of_checkpoint` of what init_from gave the run in the folder `path`; None where it has not begun, or began with
    random weights.
    """
    return layout.read_config(path).get(layout.STARTED_FROM) if (path / layout.CONFIG).is_file() else None


def find_checkpoint(run: Path, wanted: str) -> Path | None:
    """The checkpoint `wanted` (as `of_checkpoint` gives it) of the run in the folder `run`, where it still has it."""
    for checkpoint in layout.checkpoints(run):
        with suppress(ValueError):
            if of_checkpoint(checkpoint) == wanted:
                return checkpoint
    return None
