"""The recipes that come with mae_dist: files of settings, found by name in a clone and in an installed wheel."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).with_name("configs")
"""The folder `configs` of a clone (a link in the package), which a wheel holds as files of the package."""


def known() -> dict[str, Path]:
    """All recipes: the name with its folder, such as pretrain/cifar100_vit_ti4, -> the file."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(FOLDER.glob("*/*.yaml"))}


def of_verb(verb: str) -> list[str]:
    """Names of a verb's recipes, as its command line takes them."""
    return [name.removeprefix(f"{verb}/") for name in known() if name.startswith(f"{verb}/")]


def find(verb: str, word: str) -> Path:
    """The file of settings that `word` of a command line names: a path, else a recipe, with or without its folder and
    `.yaml`. Raises ValueError, with the names that there are, for neither.
    """
    if Path(word).is_file():
        return Path(word)
    name, recipes = word.removeprefix("configs/").removesuffix(".yaml"), known()
    found = recipes.get(f"{verb}/{name}") or recipes.get(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(name, names := of_verb(verb), n=1)
    which = f"did you mean the recipe {near[0]}?" if near else f"recipes of {verb}: {', '.join(names) or 'none'}"
    raise ValueError(f"config {word}: no such file and no recipe; {which} (recipes lie in {FOLDER.resolve()})")


def with_data(verb: str, words: Sequence[str]) -> list[str]:
    """The words of a command line `CONFIG.yaml DATA key=value ...`, where the path of data becomes data.path=DATA: that
    which does not end in .yaml and is no recipe, nor almost. Raises ValueError for two of them.
    """
    names = [part for name in known() for part in (name, name.partition("/")[2])]

    def is_config(word: str) -> bool:
        near = not os.path.exists(word) and difflib.get_close_matches(word, names, n=1, cutoff=0.8)
        return word.endswith((".yaml", ".yml")) or word in names or bool(near)

    data = [word for word in words if "=" not in word and not is_config(word)]
    if len(data) > 1:
        raise ValueError(f"{verb}: one CONFIG.yaml and one DATA, not also {' '.join(data[1:])}; quote a glob")
    return [f"data.path={word}" if word in data else word for word in words]
