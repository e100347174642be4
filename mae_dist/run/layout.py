"""What a run's folder holds, read without torch, as login nodes, launchers and tables need it.

RUN/
  config.yaml        format (version of this layout), verb, fingerprint of the data, total_steps, every setting, and the
                     checkpoint that the run started from
  events.jsonl       what happened to the run: starts, stops, failures, rewinds, submissions, see `events`
  metrics.jsonl      one line a step, one an evaluation and one an interval, see `tracker`
  preflight.json     what `mae-dist preflight` expected of the run
  log.txt            what was logged, for runs without a job, see `log_file`
  ids.jsonl          with track.ids: the samples of each step
  unreadable.jsonl   samples that could not be read, with the reason, see `unreadable`
  checkpoints/
    step-000001000/  manifest.json (step, files with sizes and sha256) and safetensors shards
    .saving-...      an unfinished save, never read
  result.json        final numbers; only a finished run has it
  pictures/          reconstructions
  forensics/         samples of steps that were not finite, see `rewind`
  classes.json       names of the classes, in the order of their numbers, of a run that is trained on labels
  heads.md, .json    all heads of a probe with several, features/ what they were computed from
  report.html        what `mae-dist report` draws
  replay/            what `mae-dist replay` writes
  wandb/             files of wandb
  jobs/, code/       logs and events of SLURM jobs, see `jobs`, and the copy of the code that they run
  .lock              locked by the process that writes here
"""

from __future__ import annotations

import math
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mae_dist import config as configuration
from mae_dist import small_files, track_settings
from mae_dist.run import events, jobs, jsonl

CONFIG, RESULT, METRICS, LOCK = "config.yaml", "result.json", "metrics.jsonl", ".lock"
CODE, REVISION = "code", "REVISION"
MANIFEST = "manifest.json"
CLASSES = "classes.json"
PREFLIGHT = "preflight.json"
STARTED_FROM = "started_from"
"""Key of config.yaml: `identity.of_checkpoint` of what init_from gave the run."""
CHECKPOINT = re.compile(r"step-[0-9]{9,}")
"""Name of a checkpoint's folder."""
LEFTOVER = re.compile(r"\.(saving|removed)-")
"""How hidden names of unfinished saves and removals beside the checkpoints begin."""
FORMAT = 2
"""Version of the layout of a run's folder, in its config.yaml."""
RECENT = 100
"""Steps, at most, over which `recent` averages the training loss."""
BEFORE_THE_RUN = {jobs.FOLDER, events.FILE, CODE, LOCK, PREFLIGHT}
"""What may lie in the folder before the run starts: its submission, its jobs, the code that they run, the lock, what is
expected of it.
"""


def recent(steps: int) -> int:
    """The last steps of so many whose mean loss tables and results have: a tenth, RECENT at most."""
    return max(1, min(RECENT, steps // 10))


def read_config(path: Path) -> dict[str, Any]:
    """The config.yaml of the run in the folder `path`, as it is. Raises ValueError where it is damaged or of an older
    layout.
    """
    file = path / CONFIG
    plain = small_files.read_yaml(file)
    if not isinstance(plain, dict):
        raise ValueError(f"{file}: not the config.yaml of a run")
    if plain.get("format") != FORMAT:
        raise ValueError(
            f"{file}: was written by an older version of mae_dist; use that version, or make the run again"
        )
    if type(plain.get("total_steps", 0)) is not int:
        raise ValueError(f"{file}: not the config.yaml of a run (total_steps={plain['total_steps']!r} is no number)")
    return plain


def settings(path: Path) -> tuple[str, str, Any]:
    """(verb, fingerprint of the data, config) of the run in the folder `path`. Raises ValueError like `read_config`."""
    plain, file = read_config(path), path / CONFIG
    try:
        verb, data_fingerprint, _, _ = (plain.pop(k) for k in ("verb", "data_fingerprint", "total_steps", "format"))
        plain.pop(STARTED_FROM, None)
    except KeyError as error:
        raise ValueError(f"{file}: not the config.yaml of a run ({error})") from error
    config = configuration.from_dict(verb, plain, str(file), data_fingerprint)
    configuration.check_ranges(config, origin=f"{file}: ")
    track_settings.check_band(config, f"{file}: ")
    return verb, data_fingerprint, config


def result(path: Path) -> dict[str, Any] | None:
    """The final numbers of the run in the folder `path`, or None while it is incomplete. Raises ValueError where they
    are damaged.
    """
    file = path / RESULT
    found = small_files.read_json(file) if file.is_file() else None
    if any(type(value) is int and abs(value) > jsonl.LARGEST for value in (found or {}).values()):
        raise ValueError(f"{file}: has a number that no machine holds")
    return found


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of the run in the folder `path`, oldest first: the folders that are named as `run` names
    them. Others beside them, copies for example, are the user's and are never read, counted or removed.
    """
    found = (path / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if CHECKPOINT.fullmatch(folder.name) and folder.is_dir())


class Best(NamedTuple):
    """The step that an evaluation found to be the best, and its number."""

    step: int
    value: float


def best(path: Path, number: str, also: int = 0) -> Best | None:
    """The best by a `number` of its evaluations among the checkpoints of the run in the folder `path` and the step
    `also`, the earliest of equal ones; None where there is none. A loss is better when lower, all else when higher.
    """
    metrics, steps = path / METRICS, {*map(step_of, checkpoints(path)), also}
    records = jsonl.records_with(metrics, number) if metrics.is_file() else []
    found = [
        Best(record["step"], record[number]) for record in records
        if record.get("kind") == jsonl.EVALUATION and record["step"] in steps
        and isinstance(record[number], int | float) and math.isfinite(record[number])
    ]  # fmt: skip
    sign = 1 if number.endswith("loss") else -1
    return min(found, key=lambda each: (sign * each.value, each.step), default=None)


def checkpoint_at(run: Path, step: int, field: str) -> Path:
    """The checkpoint of a step of a run; ValueError, which begins with `field` and lists those there are, if none."""
    found = {step_of(path): path for path in checkpoints(run)}
    if step not in found:
        there = f"it has those of steps {', '.join(map(str, found))}" if found else "it has none"
        raise ValueError(f"{field}: the run has no checkpoint of step {step}; {there} (see checkpoint.keep_every)")
    return found[step]


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step-"))


def manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: "step", "files", by name their "bytes" and "sha256", and "world" and "num_tensors".
    Raises ValueError where it is damaged, and MachineFault.
    """
    file = checkpoint / MANIFEST
    plain = small_files.read_json(file)
    files = plain.get("files")
    named = isinstance(files, dict) and all(
        isinstance(facts, dict) and type(facts.get("bytes")) is int and isinstance(facts.get("sha256"), str)
        and Path(name).name == name for name, facts in files.items()
    )  # fmt: skip
    numbers = (plain.get(name) for name in ("step", "world", "num_tensors"))
    if not (files and named and all(type(number) is int and number >= 0 for number in numbers)):
        raise ValueError(f"{file}: not the manifest of a checkpoint")
    return plain


def revision() -> str | None:
    """Commit of the running code, with '+' where it was edited; of a copied code, what its REVISION says; else None."""
    return _revision(Path(__file__).parents[1])


@cache  # what runs stays what it is, and a program may start many runs
def _revision(here: Path) -> str | None:
    snapshot = here.with_name(REVISION)
    if snapshot.is_file():
        return snapshot.read_text().strip()

    def git(*argv: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *argv], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
