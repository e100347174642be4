"""Reading a run's folder without torch: what login nodes, launchers and tables need. `checkpoint.RunDir` writes it.

`checkpoint` draws what a run's folder holds, `jobs` what launchers leave there. Opens no checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mae_dist import config as configuration
from mae_dist.run import jobs
from mae_dist.schema import RANDOM, RunConfig

log = logging.getLogger(__name__)

CONFIG, RESULT, ENDS, CODE, REVISION = "config.yaml", "result.json", "ends.jsonl", "code", "REVISION"
LOCK = ".lock"
"""The file that the process at work in a run holds locked; it says which process that is."""
BEFORE_THE_RUN = {jobs.FOLDER, CODE, LOCK, "events.jsonl"}
"""What is in the folder before the run has begun: what became of its jobs, the code that runs, who has claimed it."""
TAIL = 2**16
"""Bytes of the end of a metrics.jsonl that `recent` reads."""


def settings(path: Path) -> tuple[str, str, Any]:
    """(verb, fingerprint of the data, config) as the config.yaml of the run `path` has them, else ValueError."""
    file = path / CONFIG
    try:
        plain = yaml.safe_load(file.read_text())
        verb, data_fingerprint = plain.pop("verb"), plain.pop("data_fingerprint")
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the config.yaml of a run ({error})") from error
    return verb, data_fingerprint, configuration.from_dict(verb, plain, str(file))


def result(path: Path) -> dict[str, Any] | None:
    """The final numbers of the run `path`, or None while it is incomplete."""
    file = path / RESULT
    return json.loads(file.read_text()) if file.is_file() else None


def checkpoints(path: Path) -> list[Path]:
    """Complete checkpoints of the run `path`, oldest first."""
    return sorted((path / "checkpoints").glob("step-*"))


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def recent(file: Path) -> list[dict[str, Any]]:
    """The whole records in the last TAIL bytes of a metrics.jsonl."""
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL))
        lines = stream.read().splitlines(keepends=True)
    found = []
    for line in lines[1:] if size > TAIL else lines:
        with suppress(ValueError):
            found += [json.loads(line)] if line.endswith(b"\n") else []
    return found


def absolute(config: Any) -> Any:
    """The settings with paths that mean the same in any working directory."""
    data, start = config.data, getattr(config, "init_from", RANDOM)
    test_path = data.test_path and str(Path(data.test_path).absolute())
    data = dataclasses.replace(data, path=str(Path(data.path).absolute()), test_path=test_path)
    start = {} if start == RANDOM else {"init_from": str(Path(start).absolute())}
    return dataclasses.replace(config, out=str(Path(config.out).absolute()), data=data, **start)


def refuse_others(path: Path, verb: str, config: RunConfig, data_fingerprint: str) -> None:
    """Raise ValueError if the folder `path` holds anything but the same run, or what a launcher puts there before. A
    run that has not made a step has nothing to lose, and may be begun anew with other settings.
    """
    if not path.exists() or (path.is_dir() and {entry.name for entry in path.iterdir()} <= BEFORE_THE_RUN):
        return
    if not (path / CONFIG).is_file():
        raise ValueError(f"out={path}: exists and is no run of mae-dist; choose another folder")
    if not (checkpoints(path) or recent(path / "metrics.jsonl") or result(path)):
        return
    old_verb, old_data, old = settings(path)
    if old_verb != verb:
        changes = [f"verb: {old_verb} -> {verb}"]
    else:
        changes = configuration.differences(absolute(old), absolute(config))
        if old_data != data_fingerprint and not config.data.accept_change:
            changes.append(
                f"content of data.path: {old_data} -> {data_fingerprint}, data.accept_change=true accepts it"
            )
    if changes:
        raise ValueError(
            f"out={path}: holds a run with other settings ({'; '.join(changes)}); "
            f"choose another out= or give the old values"
        )
    if old_data != data_fingerprint:
        log.warning("the data have changed (%s -> %s), accepted from here on", old_data, data_fingerprint)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def revision() -> str | None:
    """Commit of the code that runs, with '+' when it was edited, or what its snapshot says; None outside a checkout."""
    here = Path(__file__).parents[1]
    snapshot = here.with_name(REVISION)
    if snapshot.is_file():
        return snapshot.read_text().strip()

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return ask("rev-parse", "--short=12", "HEAD") + ("+" if ask("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
