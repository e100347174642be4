"""Pipelines: one file of stages that follow from each other, as SLURM jobs or one after another on this machine.

    out: runs/cifar100
    stages:
      data:     {run: "data pack cifar100 --out {data}", gpus_per_node: 0}
      pretrain: {run: "pretrain configs/pretrain/cifar100_vit_ti4.yaml data.path={data}", nodes: 2}
      finetune: {run: "finetune configs/finetune/cifar100_vit_ti4.yaml data.path={data} init_from={pretrain}",
                 sweep: "train.seed=0,1,2"}
      report:   {run: "report {pretrain} {finetune} --out {out}/report.html", gpus_per_node: 0}

``run`` is what one would type after `mae-dist`. {name} is the folder of a stage above (of a swept stage: those of all
its runs) and makes this one wait for it; {own name} is the stage's own folder, out/NAME, which a run gets as `out=`.
Other keys overrule the cluster file. A stage whose fingerprint (its settings and those of the stages it stands on) has
been reached already is passed over.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from launch import preflight, sweep
from launch.cluster import Cluster
from mae_dist import config as configuration
from mae_dist.cli import VERBS
from mae_dist.data.index import open_split
from mae_dist.run import jobs, layout
from mae_dist.schema import RANDOM, SCHEMAS

KEYS = {"run", "sweep", "at_once"}
TAKEN = ("out", jobs.RECORDS, jobs.FOLDER, layout.CODE)
"""What no stage can be called: its folder, or {name}, is something else's."""


@dataclass(frozen=True)
class Run:
    """One `mae-dist WORDS` of a stage; ``folder`` gets what is noted of it, ``makes`` is the folder that it makes, if
    any, ``config`` is that of a verb that makes runs, ``receipt`` a file and what is written to it when it is done.
    """

    name: str
    folder: Path
    words: tuple[str, ...]
    makes: Path | None = None
    config: Any = None
    receipt: tuple[str, str] | None = None

    @cached_property  # what ends while others are being queued changes nothing
    def done(self) -> bool:
        """Whether this very run has been reached: same settings, same foundations, finished."""
        if self.receipt is None:
            return self.config is not None and preflight.finished(self.words[0], self.config)
        if not Path(self.receipt[0]).is_file():
            return False
        same = Path(self.receipt[0]).read_text() == self.receipt[1]
        there = self.makes is None or self.makes.exists()
        return same and there and (self.config is None or layout.result(self.folder) is not None)


@dataclass(frozen=True)
class Stage:
    """Runs that are queued together, as an array if they are several, after the stages that it ``needs``.

    ``shape``: what overrules the cluster file, as key=value; ``whatever_came``: also after needs that have failed.
    """

    name: str
    verb: str
    runs: tuple[Run, ...]
    needs: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    at_once: int = 8
    fingerprint: str = ""
    whatever_came: bool = False

    @property
    def ranked(self) -> bool:
        """Whether any number of ranks can share a run of it."""
        return self.verb in SCHEMAS

    @property
    def waiting(self) -> tuple[Run, ...]:
        """Its runs that are not done."""
        return tuple(run for run in self.runs if not run.done)

    @property
    def home(self) -> Path:
        """The folder of its run, or of all its runs."""
        return self.runs[0].folder if len(self.runs) == 1 else self.runs[0].folder.parent


def load(file: str, overrides: list[str]) -> tuple[Path, list[Stage]]:
    """The folder that a pipeline's file names, and its stages in their order; ``overrides`` are settings of every run.

    Raises ValueError in one sentence.
    """
    try:
        plain = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"pipeline {file}: {error.strerror}; launch/pipelines/ has examples") from error
    except yaml.YAMLError as error:
        raise ValueError(f"pipeline {file}: not YAML: {' '.join(str(error).split())}") from error
    named = isinstance(plain, dict) and set(plain) == {"out", "stages"}
    if not named or not isinstance(plain["stages"], dict) or not plain["stages"]:
        raise ValueError(f"pipeline {file}: must have `out: FOLDER` and `stages:` with a name and a `run:` each")
    if not isinstance(plain["out"], str) or not plain["out"]:
        raise ValueError(f"pipeline {file}: out: {plain['out']}: must be the path of a folder")
    out, stages = Path(plain["out"]).absolute(), {}
    for name, given in ((str(key), value) for key, value in plain["stages"].items()):
        try:
            stages[name] = read_stage(name, given, out, str(Path(plain["out"])), stages, overrides)
        except ValueError as error:
            raise ValueError(f"pipeline {file}, stage {name}: {error}") from error
    return out, list(stages.values())


def read_stage(name: str, given: Any, out: Path, typed: str, before: dict[str, Stage], overrides: list[str]) -> Stage:
    """One stage, given those before it. The file has `out` as ``typed``, which need not be absolute."""
    if not re.fullmatch(r"[\w.-]*\w", name) or name in TAKEN:
        raise ValueError(f"is no name for a stage; take letters, digits, - and _, and none of {', '.join(TAKEN)}")
    if not isinstance(given, dict) or "run" not in given:
        raise ValueError("has no `run:`, the words after mae-dist")
    shapes = {item.name for item in fields(Cluster)}
    for key in set(given) - KEYS - shapes:
        near = difflib.get_close_matches(key, KEYS | shapes, n=1)
        raise ValueError(f"{key}: there is no such key" + (f"; did you mean {near[0]}?" if near else ""))
    at_once = given.get("at_once", 8)
    if type(at_once) is not int or at_once < 1:
        raise ValueError(f"at_once: {at_once}: must be a number, 1 or more")
    own = out / name
    words, needs = placed(words_of(given, "run"), name, own, out, before)
    verb = words[0] if words else ""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ValueError(f"run: {verb}: no such verb" + (f"; did you mean {near[0]}?" if near else ""))
    if verb in SCHEMAS:
        config_file, settings = configuration.split_words(verb, words[1:])
        settings += overrides
        several = sweep.combinations(verb, words_of(given, "sweep")) if "sweep" in given else [("", [])]
        runs = [
            run_of(f"{name}/{part}" if part else name, own / part, verb, config_file, settings + chosen)
            for part, chosen in several
        ]
        made = {origin.folder: origin.config for need in needs for origin in before[need].runs if origin.config}
        for run in runs:
            if (start := Path(getattr(run.config, "init_from", RANDOM))) in made:
                configuration.check_same_model(run.config, made[start])
    elif "sweep" in given:
        raise ValueError(f"sweep: {verb} has no settings to sweep")
    else:
        runs = [Run(name, out / jobs.RECORDS / name, tuple(words), own if f"{{{name}}}" in given["run"] else None)]
    runs = [with_receipt(run, out, typed, [before[need] for need in needs]) for run in runs]
    shape = [f"{key}={as_word(given[key])}" for key in given if key in shapes]
    fingerprint = " ".join(str(run.receipt) for run in runs).replace(str(out), typed)
    return Stage(name, verb, tuple(runs), tuple(needs), tuple(shape), at_once, fingerprint)


def words_of(given: dict[str, Any], key: str) -> list[str]:
    """The words of a line of the file, as a shell parts them."""
    if not isinstance(given[key], str):
        raise ValueError(f"{key}: {given[key]}: must be words in one line, as on a command line")
    try:
        return shlex.split(given[key])
    except ValueError as error:
        raise ValueError(f"{key}: {given[key]}: {error}; every quotation mark needs its other one") from error


def run_of(name: str, own: Path, verb: str, config_file: str | None, settings: list[str]) -> Run:
    """A run with its settings read and checked."""
    settings = [*settings, f"out={own}"]
    words = (verb, *([config_file] if config_file else []), *settings)
    return Run(name, own, words, own, configuration.load(verb, config_file, settings))


def with_receipt(run: Run, out: Path, typed: str, needs: list[Stage]) -> Run:
    """The run with its fingerprint: what decides its result, and the fingerprints of the stages that it stands on. For
    what lies in a stage's folder the stage's fingerprint speaks; data of elsewhere have one of their own.
    """
    what: list[Any] = [word.replace(str(out), typed) for word in run.words]
    if run.config is not None:
        what = [run.words[0], configuration.result_settings(run.config) | {"from": None}]
        if Path(run.config.data.path) not in [made.makes for need in needs for made in need.runs]:
            what.append(open_split(run.config.data.path, run.config.data.split).fingerprint)
    text = json.dumps([what, [need.fingerprint for need in needs]], sort_keys=True, default=str)
    receipt = hashlib.sha256(text.encode()).hexdigest()[:16] + "\n"
    return dataclasses.replace(run, receipt=(str(out / jobs.RECORDS / run.name / "done"), receipt))


def placed(words: list[str], name: str, own: Path, out: Path, before: dict[str, Stage]) -> tuple[list[str], list[str]]:
    """The words with folders for {names}, and the names that they stand on. A word {name} of a swept stage becomes as
    many words as it has runs.
    """
    known = {stage: [str(run.makes) for run in before[stage].runs if run.makes] for stage in before}
    known |= {name: [str(own)], "out": [str(out)]}
    needs, result = [], []
    for word in words:
        for used in re.findall(r"\{(.*?)\}", word):
            if used not in known:
                near = difflib.get_close_matches(used, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"run: {{{used}}}: no stage above has this name; {hint}")
            if used in before and used not in needs:
                needs.append(used)
        if (whole := re.fullmatch(r"\{(.*?)\}", word)) is not None:
            result += known[whole[1]]
            continue
        for used in re.findall(r"\{(.*?)\}", word):
            if len(known[used]) > 1:
                raise ValueError(f"run: {word}: stage {used} has {len(known[used])} runs; only a word of its own, "
                                 f"{{{used}}}, can stand for all of them")  # fmt: skip
        result.append(re.sub(r"\{(.*?)\}", lambda match: known[match[1]][0], word))
    return result, needs


def as_word(value: Any) -> str:
    """A value for a key=value, which is read as YAML: text stays text, though YAML has 24:00:00 for a number."""
    return json.dumps(value, default=str)
