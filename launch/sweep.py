"""Sweeps: every combination of some settings' values, each a run in a folder of its own. Pure functions of strings."""

import itertools
import re
from collections.abc import Sequence

from mae_dist import config as configuration
from mae_dist.schema import SCHEMAS


def combinations(verb: str, settings: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(folder name, settings) of each combination of ``key=a,b,c`` settings; the first key varies slowest.

    A key without its section is completed where only one section has it (`seed` is `train.seed`). A setting with one
    value adds nothing to folder names. Raises ValueError for a malformed setting, for one that is given twice, and for
    two combinations whose folders would have the same name.
    """
    keys, values = [], []
    for setting in settings:
        key, equals, given = setting.partition("=")
        if not equals or not given:
            raise ValueError(f"--sweep {setting}: expected section.key=value,value,..., for example train.seed=0,1,2")
        keys.append(complete_key(verb, key))
        between = re.split(r",(?![^\[\]]*\])", given)  # not within brackets, as in view.scale=[0.2,1],[0.5,1]
        values.append([*filter(None, between)])
    for key, chosen in zip(keys, values, strict=True):
        if keys.count(key) > 1:
            raise ValueError(f"--sweep {key}: given more than once")
        if repeated := {value for value in chosen if chosen.count(value) > 1}:
            raise ValueError(f"--sweep {key}: {', '.join(sorted(repeated))} is given more than once")
    lasts = [key.rpartition(".")[2] for key in keys]
    short = [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]
    found = []
    for choice in itertools.product(*values):
        parts = [f"{s}-{v}" for s, v, vs in zip(short, choice, values, strict=True) if len(vs) > 1]
        name = re.sub(r"[^\w.+-]", "-", "_".join(parts))
        name, chosen = name or "run", [f"{key}={value}" for key, value in zip(keys, choice, strict=True)]
        if twin := next((earlier for other, earlier in found if other == name), None):
            raise ValueError(
                f"--sweep: {' '.join(twin)} and {' '.join(chosen)} would share the folder {name}, in which / and the "
                f"like become -; submit one of them by itself"
            )
        found.append((name, chosen))
    return found


def complete_key(verb: str, key: str) -> str:
    """A key with its section: `train.seed` for `seed`. Raises ValueError where none or several sections have it."""
    if "." in key or key in ("out", "init_from"):
        return key
    matches = [name for name in configuration.settings_of(verb) if name.partition(".")[2] == key]
    if len(matches) == 1:
        return matches[0]
    assert verb in SCHEMAS
    hint = f"which one: {', '.join(matches)}?" if matches else f"mae-dist {verb} --help lists all settings"
    raise ValueError(f"--sweep {key}: is no section.key; {hint}")
