"""Pipelines: a file of stages that depend on each other, run as SLURM jobs or one after another on this machine.

    out: runs/cifar100
    stages:
      data:     {run: "data pack cifar100 --out {data}", gpus_per_node: 0}
      pretrain: {run: "pretrain configs/pretrain/cifar100_vit_ti4.yaml data.path={data}", nodes: 2}
      finetune: {run: "finetune configs/finetune/cifar100_vit_ti4.yaml data.path={data} init_from={pretrain}",
                 sweep: "train.seed=0,1,2"}
      report:   {run: "report {pretrain} {finetune} --out {out}/report.html", gpus_per_node: 0}

``run`` is what a user would type after `mae-dist`. {name} is the folder of an earlier stage (of a swept stage: those of
all its runs), which this stage then waits for; {own name} is the stage's own folder, out/NAME, which a run gets as
`out=`. Other keys override the cluster file. A stage is skipped if it is done already with the same fingerprint, which
covers its settings and the stages it depends on.
"""

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

from launch import preflight, sweep
from launch.cluster import Cluster
from mae_dist import config as configuration
from mae_dist import setting_texts, small_files, starts
from mae_dist.cli import VERBS
from mae_dist.data.index import open_split
from mae_dist.run import identity, jobs, layout
from mae_dist.schema import SCHEMAS, RunConfig

KEYS = {"run", "sweep", "at_once"}
RESERVED_NAMES = ("out", jobs.PIPELINE, jobs.FOLDER, layout.CODE)
"""Names that no stage can have, as the folder, or {name}, means something else."""


@dataclass(frozen=True)
class Run:
    """One `mae-dist ARGV` of a stage. ``folder`` is where its events are recorded, ``output`` the folder that it makes,
    if any; ``config`` is there for verbs that make runs; ``stamp`` is a file and the text, the fingerprint, that is
    written to it when the run is done.
    """

    name: str
    folder: Path
    argv: tuple[str, ...]
    output: Path | None = None
    config: RunConfig | None = None
    stamp: tuple[str, str] | None = None

    @cached_property  # computed once: a run that ends while others are being queued changes nothing
    def done(self) -> bool:
        """Whether this run is finished, with the same settings and inputs."""
        if self.stamp is None:
            return self.config is not None and preflight.finished(self.argv[0], self.config)
        if not Path(self.stamp[0]).is_file():
            return False
        same = Path(self.stamp[0]).read_text() == self.stamp[1]
        exists = self.output is None or self.output.exists()
        return same and exists and (self.config is None or preflight.finished(self.argv[0], self.config))


@dataclass(frozen=True)
class Stage:
    """Runs that are queued together, as an array if there are several, after the stages that it ``needs``.

    ``overrides`` of the cluster file are key=value; ``at_once`` is the number of runs at the same time;
    ``run_after_failures``: run it also when a needed stage has failed.
    """

    name: str
    verb: str
    runs: tuple[Run, ...]
    needs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    at_once: int = 8
    fingerprint: str = ""
    run_after_failures: bool = False

    @property
    def ranked(self) -> bool:
        """Whether its runs can use several ranks."""
        return self.verb in {*SCHEMAS, "embed", "predict"}

    @property
    def remaining(self) -> tuple[Run, ...]:
        """Its runs that are not done."""
        return tuple(run for run in self.runs if not run.done)

    @property
    def folder(self) -> Path:
        """The folder of its run, or the one around the folders of its runs."""
        return self.runs[0].folder if len(self.runs) == 1 else self.runs[0].folder.parent


def load(file: str, overrides: list[str]) -> tuple[Path, list[Stage]]:
    """Read a pipeline's file; give its `out` folder and its stages in order. ``overrides`` are settings of every run.

    Raises ValueError with one sentence that names the file and the stage.
    """
    if not Path(file).is_file():
        examples = Path(__file__).parent / "pipelines"
        raise ValueError(f"pipeline {file}: no such file; {examples} has examples")
    plain = small_files.read_yaml(Path(file))
    complete = isinstance(plain, dict) and set(plain) == {"out", "stages"}
    if not complete or not isinstance(plain["stages"], dict) or not plain["stages"]:
        raise ValueError(f"pipeline {file}: must have `out: FOLDER` and `stages:` with a name and a `run:` each")
    if not isinstance(plain["out"], str) or not plain["out"]:
        raise ValueError(f"pipeline {file}: out: {plain['out']}: must be the path of a folder")
    setting_texts.refuse_odd({"out": plain["out"]}, f"pipeline {file}: ")
    out, stages = Path(plain["out"]).absolute(), {}
    for name, given in ((str(key), value) for key, value in plain["stages"].items()):
        try:
            stages[name] = read_stage(name, given, out, str(Path(plain["out"])), stages, overrides)
        except ValueError as error:
            raise ValueError(f"pipeline {file}, stage {name}: {error}") from error
    return out, list(stages.values())


def read_stage(
    name: str, given: Any, out: Path, written_out: str, before: dict[str, Stage], overrides: list[str]
) -> Stage:
    """One stage, from its entry in the file and the stages before it. ``written_out`` is `out` as the file has it."""
    if not re.fullmatch(r"[\w.-]*\w", name) or name in RESERVED_NAMES:
        raise ValueError(
            f"is no name for a stage; use letters, digits, - and _, and none of {', '.join(RESERVED_NAMES)}"
        )
    if not isinstance(given, dict) or "run" not in given:
        raise ValueError("has no `run:`, the words after mae-dist")
    cluster_keys = {item.name for item in fields(Cluster)}
    for key in set(given) - KEYS - cluster_keys:
        near = difflib.get_close_matches(key, KEYS | cluster_keys, n=1)
        raise ValueError(f"{key}: there is no such key" + (f"; did you mean {near[0]}?" if near else ""))
    at_once = given.get("at_once", 8)
    if type(at_once) is not int or at_once < 1:
        raise ValueError(f"at_once: {at_once}: must be a number, 1 or more")
    own = out / name
    argv, needs = substitute(split_line(given, "run"), name, own, out, before)
    verb = argv[0] if argv else ""
    if verb not in (known := VERBS.keys() - {"submit"}):
        near = difflib.get_close_matches(verb, known, n=1)
        raise ValueError(f"run: {verb}: no such verb" + (f"; did you mean {near[0]}?" if near else ""))
    if verb in SCHEMAS:
        config_file, settings = configuration.split_words(verb, argv[1:])
        settings += overrides
        several = sweep.combinations(verb, split_line(given, "sweep")) if "sweep" in given else [("", [])]
        runs = [
            run_of(f"{name}/{part}" if part else name, own / part, verb, config_file, settings + chosen)
            for part, chosen in several
        ]
        made = {origin.folder: origin.config for need in needs for origin in before[need].runs if origin.config}
        for run in runs:
            if run.config and run.config.origin and (start := starts.run_and_step(run.config.origin)[0]) in made:
                starts.check_same_model(run.config, made[start])
    elif "sweep" in given:
        raise ValueError(f"sweep: {verb} has no settings to sweep")
    else:
        runs = [Run(name, out / jobs.PIPELINE / name, tuple(argv), own if f"{{{name}}}" in given["run"] else None)]
    runs = [with_stamp(run, out, written_out, [before[need] for need in needs]) for run in runs]
    cluster_overrides = [f"{key}={as_yaml(given[key])}" for key in given if key in cluster_keys]
    fingerprint = " ".join(str(run.stamp) for run in runs).replace(str(out), written_out)
    return Stage(name, verb, tuple(runs), tuple(needs), tuple(cluster_overrides), at_once, fingerprint)


def split_line(given: dict[str, Any], key: str) -> list[str]:
    """The words of a line of the file, split as a shell does."""
    if not isinstance(given[key], str):
        raise ValueError(f"{key}: {given[key]}: must be words in one line, as on a command line")
    try:
        return shlex.split(given[key])
    except ValueError as error:
        raise ValueError(f"{key}: {given[key]}: {error}; every quotation mark needs its other one") from error


def run_of(name: str, own: Path, verb: str, config_file: str | None, settings: list[str]) -> Run:
    """A run, its settings read and checked."""
    settings = [*(word for word in settings if not word.startswith("out=")), f"out={own}"]
    argv = (verb, *([config_file] if config_file else []), *settings)
    return Run(name, own, argv, own, configuration.load(verb, config_file, settings))


def with_stamp(run: Run, out: Path, written_out: str, needs: list[Stage]) -> Run:
    """A copy of the run with its stamp. Its fingerprint covers the settings on which its result depends and the
    fingerprints of the stages that it needs. Data that no stage makes count by their own fingerprint; where those of a
    finished run are gone, its stamp stays as it is.
    """
    file = out / jobs.PIPELINE / run.name / "done"
    what: list[Any] = [word.replace(str(out), written_out) for word in run.argv]
    if run.config is not None:
        what = [run.argv[0], configuration.result_settings(run.config) | {"init_from": None}]
        made = [made.output for need in needs for made in need.runs if made.output]
        if not any(Path(run.config.data.path).is_relative_to(folder) for folder in made):
            try:
                data = run.config.data
                what.append(open_split(data.path, data.split, allow_outside=data.allow_outside).fingerprint)
            except ValueError:
                if not (file.is_file() and identity.finished(run.folder, run.argv[0], run.config)):
                    raise
                return dataclasses.replace(run, stamp=(str(file), file.read_text()))
    text = json.dumps([what, [need.fingerprint for need in needs]], sort_keys=True, default=str)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16] + "\n"
    return dataclasses.replace(run, stamp=(str(file), fingerprint))


def substitute(
    words: list[str], name: str, own: Path, out: Path, before: dict[str, Stage]
) -> tuple[list[str], list[str]]:
    """The words with folders in place of {names}, and the names of the stages used. A word {name} of a swept stage
    becomes as many words as the stage has runs.
    """
    known = {stage: [str(run.output) for run in before[stage].runs if run.output] for stage in before}
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


def as_yaml(value: Any) -> str:
    """A value for a key=value, which is read as YAML: text is quoted, as YAML would read 24:00:00 as a number."""
    return json.dumps(value, default=str)
