"""The command line: all verbs, their argument parser, and how durations are printed."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, NoReturn

from mae_dist import paths


class Verb(NamedTuple):
    """A verb: its module, which has `run(config)` if the verb has a schema, else `main(argv)`, and its help text."""

    module: str
    summary: str


VERBS = {
    "pretrain": Verb("mae_dist.stages.pretrain", "masked autoencoder pretraining on images without labels"),
    "knn": Verb("mae_dist.stages.knn", "nearest neighbours on frozen features: a measure without training"),
    "probe": Verb("mae_dist.stages.probe", "linear probe: a linear head on a frozen backbone"),
    "finetune": Verb("mae_dist.stages.finetune", "train backbone and head on labels"),
    "submit": Verb("launch.submit", "queue a run, a sweep or a pipeline of runs as SLURM jobs"),
    "preflight": Verb(
        "launch.preflight_screen", "will it fit, how fast, how long, what limits it: before it is started"
    ),
    "report": Verb("mae_dist.monitor.report", "one HTML file from one or more runs: curves, pictures, numbers"),
    "runs": Verb("mae_dist.monitor.runs", "a table of runs: status, step, loss, speed, result"),
    "logs": Verb("mae_dist.monitor.logs", "output of the newest job of a run, the first failing rank first"),
    "ckpt": Verb("mae_dist.commands.ckpt", "list, inspect and verify the checkpoints of a run"),
    "replay": Verb("mae_dist.commands.replay", "compute a past step again: samples, crops, masks and losses"),
    "data": Verb(
        "mae_dist.commands.data", "pack archives and folders into tars, index existing ones, show or check a data set"
    ),
    "recipe": Verb("mae_dist.commands.recipe", "settings to begin with for a data set, each with its reason"),
    "models": Verb("mae_dist.commands.models", "all models: parameters, operations and activation memory"),
    "import": Verb(
        "mae_dist.commands.import_weights", "make a run from an official MAE, timm, transformers or Flax checkpoint"
    ),
    "export": Verb(
        "mae_dist.commands.export_weights", "write a run's weights in another format, read them back and compare"
    ),
    "embed": Verb("mae_dist.commands.embed", "features of every image of a data set, as one array with its keys"),
    "predict": Verb("mae_dist.commands.predict", "classes of every image of a data set, by a fine-tuned or probed run"),
    "chaos": Verb("mae_dist.verify.chaos", "inject faults into a run and compare it with an undisturbed one"),
    "demo": Verb("mae_dist.commands.demo", "all of the above on the embedded data set, in minutes"),
    "certify": Verb("mae_dist.verify.certify", "compare the same short run on 1 to 4 ranks, DDP, FSDP2, resumed, ..."),
    "bench": Verb(
        "mae_dist.verify.bench",
        "measure a cost: steps, loading, opening, resuming, ordering, saving, scaling, Mixer, decoder, heads, a GPU",
    ),
}
"""All verbs, in the order of --help. Nothing is imported before a verb is chosen."""


def import_module(name: str) -> ModuleType:
    """The module of this name. Objects of imports are no garbage: without collections meanwhile, a process starts in
    two thirds of the time. Later collections leave these objects alone, too.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for a user's mistake instead of ending the process. In paths it replaces
    ~ and $NAME, which a shell leaves in quotes.
    """

    made: ClassVar[dict[str, Parser]] = {}
    """The parsers of this process by the commands that they are of."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("type", Path, _path)
        Parser.made[self.prog] = self

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('mae-dist ')}: {message}; see {self.prog} --help")

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """As of ArgumentParser; ValueError for an option that this parser, an action's for example, does not have."""
        found, unknown = super().parse_known_args(*args, **options)
        if flag := next((word.partition("=")[0] for word in unknown if word.startswith("-")), None):
            verb, known = self.prog.split()[1:2], Parser.made.items()
            having = [f"`{prog}`" for prog, other in known if flag in other._option_string_actions and
                      prog.split()[1:2] == verb]  # fmt: skip
            self.error(f"{flag}: is no option of it" + (f", but of {', '.join(having)}" if having else ""))
        return found, unknown


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path")
    try:
        return Path(paths.with_variables(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def duration(seconds: float) -> str:
    """A time in the largest unit that fits: '2.5 h'."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
