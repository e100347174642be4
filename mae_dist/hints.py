"""What to write instead of a setting, or a value, that does not exist: the names of other codebases, and ours.

The words are in `hints.yaml`; one in several rows of its names gets all of their settings. Knows settings by name only;
`config` has their types and ranges.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mae_dist import small_files


@cache
def words(table: str) -> dict[str, Any]:
    """A table of `hints.yaml`: sections, names, no_setting or values."""
    return small_files.read_yaml(Path(__file__).with_suffix(".yaml"))[table]


def wrong_value(name: str, value: Any, choices: Sequence[str]) -> str:
    """What is wrong with a value, or elements of a list, that are none of the choices; empty if nothing is."""
    wrong = [part for part in parts(value) if part is not None and choices and part not in choices]
    ours = [choice for part in wrong if (choice := _value_for(name, part))]
    hint = f"; use {', '.join(ours)}" if ours else ""
    return f"{given(name, value)}: must be one of {', '.join(choices)}{hint}" if wrong else ""


def wrong_name(name: str, value: Any, meanings: Mapping[str, str], verbs: Mapping[str, Sequence[str]]) -> str:
    """Why there is no setting of this name, and what to write. `meanings` has the settings that there are; `verbs` has
    those of all verbs and who reads them, and is empty if the settings are not those of a verb.
    """
    is_section = any(other.startswith(f"{name}.") for other in meanings)
    what = f"{name}: {'is a section of settings' if is_section else 'there is no such setting'}"
    if name in verbs:
        return f"{given(name, value)}: is for {', '.join(verbs[name])}; leave it out"
    meant = _settings_for(name, list(verbs), is_section) if verbs else []
    if uses := [setting for setting in meant if setting in meanings]:
        values = [_value_for(setting, value) for setting in uses]
        ours = [f"{s}{f'={v}' if v else ''} ({meanings[s]})" for s, v in zip(uses, values, strict=True)]
        return f"{what}; use {' or '.join(ours)}"
    if meant:
        return f"{what}; {meant[0]} is for {', '.join(verbs[meant[0]])}; leave it out"
    if verbs and (advice := _lookup(words("no_setting"), name)):
        return f"{what}; {advice[0]}"
    if is_section:
        return f"{what}; write {name}.KEY=value"
    near = difflib.get_close_matches(name, meanings, n=1)
    return what + (f"; did you mean {near[0]}?" if near else "")


def parts(value: Any) -> Sequence[Any]:
    """The elements of a list or tuple; of any other value, itself."""
    return value if isinstance(value, list | tuple) else (value,)


def given(name: str, value: Any) -> str:
    """A setting as it is written on the command line."""
    return f"{name}={shown(value)}"


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return {"???": "(required)", "None": "none", "True": "true", "False": "false"}.get(str(value), str(value))


def leaves(plain: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict by their dotted names."""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings_for(name: str, known: Sequence[str], is_section: bool) -> list[str]:
    """The known settings that a wrong name may mean: those with its key in other sections, else those of names."""
    section, _, key = name.rpartition(".")
    same = [] if is_section else [setting for setting in known if setting.endswith(f".{key}")]
    ours = words("sections").get(section)
    renamed = f"{ours}.{key}"
    return [renamed] if renamed in same else same or _lookup(words("names"), name)


def _value_for(setting: str, value: object) -> str | None:
    found = _by_word(words("values").get(setting, {})).get(str(value).lower())
    return found[0] if found else None


def _lookup(table: Mapping[str, str], name: str) -> list[str]:
    plain, found = name.lower().replace("-", "_").lstrip("_"), _by_word(table)
    return found.get(plain) or found.get(plain.rpartition(".")[2], [])


def _by_word(table: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for meaning, row in table.items():
        for word in row.split():
            found.setdefault(word, []).append(meaning)
    return found


def choices_of(kind: Any) -> tuple[str, ...]:
    """The words that a type allows, within a tuple too; () where it allows any."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in choices_of(part))
