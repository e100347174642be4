"""Commands that may follow on a run: go on with it, measure it, compare it, use it. Words are quoted for a shell."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dist import config as configuration
from mae_dist import hints, recipes
from mae_dist.printed import CONTROL
from mae_dist.schema import RANDOM, RunConfig

SAME = ("data.", "model.", "train.precision=")
"""What settings begin with that a measure of a pretraining has, too, where they were typed, but for OF_TRAINING."""
OF_TRAINING = {"data.path", "data.split", "data.weights", "data.aug_repeats"}
OF_START = ("model.name", "model.image_size", "model.pool", "train.precision")
"""What a run takes from that which it starts from."""


class Next(NamedTuple):
    """Why a command may be the next, and the command."""

    why: str
    command: str


def resuming(command: object) -> list[str] | None:
    """The words of a recorded command as `mae-dist` takes them; None where it is none."""
    try:
        words = shlex.split(command) if isinstance(command, str) and not CONTROL.search(command) else []
    except ValueError:
        return None
    return ["mae-dist", *words[1:]] if len(words) > 1 else None


def after_pretraining(config: RunConfig, out: str, words: Sequence[str]) -> list[Next]:
    """Probe and fine-tuning of a finished pretraining, by the recipes that `words`, those of its command, name."""
    stem, found = next((Path(word).stem for word in words if "=" not in word), ""), []
    for verb, why in (("probe", "how good its features are"), ("finetune", "what they become with labels")):
        recipe = [stem] if f"{verb}/{stem}" in recipes.known() else []
        data, known = f"data.path={hints.shown(config.data.path)}", configuration.settings_of(verb).keys() - OF_TRAINING
        given = [word for word in words if word.partition("=")[0] in known and word.startswith(SAME)]
        given = [word for word in given if recipe or not word.startswith("model.")]  # else those of init_from
        command = ["mae-dist", verb, *recipe, data, *given, f"init_from={out}", f"out={out}-{verb}"]
        found.append(Next(f"{why}, where there are labels", shlex.join(command)))
    return found


def after(
    verb: str, config: RunConfig, out: str, command: object, *, finished: bool, is_start: bool, has_random: bool,
    predicted: bool,
) -> list[Next]:  # fmt: skip
    """What may follow on the run in the folder `out`. ``command``: that of its last start; ``is_start``: whether a run
    of the report starts from it; ``has_random``: whether an equal run from random weights is there; ``predicted``:
    whether its predictions are.
    """
    words = resuming(command)
    if not finished:
        return [Next("resume it", shlex.join(words))] if words else []
    if verb == "pretrain":
        return [] if is_start else after_pretraining(config, out, words[2:] if words else ())
    found = []
    if config.origin is not None and not has_random and words:
        changed = [word for word in words if not word.startswith(("init_from=", "out="))]
        values = {name: item.value for name, item in configuration.settings(config).items()}
        taken = [f"{name}={hints.shown(values[name])}" for name in OF_START if values[name] is not None]
        typed = {word.partition("=")[0] for word in words}
        changed += [word for word in taken if word.partition("=")[0] not in typed]
        changed += [f"init_from={RANDOM}", f"out={out}-{RANDOM}"]
        found.append(Next("what pretraining adds: the same from random weights", shlex.join(changed)))
    if verb in ("finetune", "probe") and not predicted:
        folder = f"{out}-predictions"
        data = config.data.path if isinstance(config.data.path, str) else "DATA"
        commands = (["predict", out, data, "--out", folder], ["report", out, folder])
        shown = " && ".join(shlex.join(["mae-dist", *part]) for part in commands)
        found.append(Next("which classes it takes for which", shown))
    return found
