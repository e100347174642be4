"""Settings as they are written: a text stays that text (0042, no, 1e3), paths have no variables left, and no setting
refers to another one or to the environment. Imports no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mae_dist import hints, paths
from mae_dist.printed import CONTROL, escaped
from mae_dist.schema import PATHS

UNUSUAL = re.compile(r"[-+]?(0[0-9xob_].*|[0-9][0-9_]*[_:][0-9_:.]*)")
"""Numbers that YAML reads in base 8, 16, 2 or 60, or without their underscores."""


def is_text(kind: Any) -> bool:
    """Whether a type has only texts as values, and perhaps None."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return all(part in (str, NoneType) or get_origin(part) is Literal for part in kinds)


def from_override(name: str, value: str) -> dict[str, Any]:
    """The nested settings of `section.key=text` on the command line; quotes around all of a text are left out."""
    value = value.strip()
    text = value[1:-1] if len(value) > 1 and value[0] == value[-1] in "\"'" else value
    return functools.reduce(lambda inner, key: {key: inner}, reversed(name.split(".")), text)  # pyright: ignore


def joined(layers: Iterable[dict]) -> dict | None:
    """Settings and sections of several layers in one; None where two of them give the same setting."""
    found: dict[Any, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            section = found.setdefault(key, {}) if isinstance(value, dict) else found
            added = value if isinstance(value, dict) else {key: value}
            if not isinstance(section, dict) or section.keys() & added.keys():
                return None
            section |= added
    return found


def as_written(plain: Mapping[Any, Any], written: Any, kinds: Mapping[str, Any], origin: str, prefix: str = "") -> dict:
    """Nested settings that YAML has read, with texts as they are ``written`` (the same, read without types), a list of
    paths as one text, and ~ and variables replaced in paths.

    ``kinds`` are the types of all settings by `section.key`. Raises ValueError, which begins with ``origin``.
    """
    result = {}
    for key, value in plain.items():
        name, text = f"{prefix}{key}", written.get(str(key), value) if isinstance(written, Mapping) else value
        if isinstance(value, Mapping) and name not in kinds:
            result[key] = as_written(value, text, kinds, origin, f"{name}.")
            continue
        if name in kinds:
            _check_kind(kinds[name], value, f"{_where(origin, name)}{name}={text}", name)
        if name in kinds and is_text(kinds[name]) and isinstance(text, str) and value is not None:
            value = text
        elif name in kinds and isinstance(text, str) and not isinstance(value, str) and UNUSUAL.fullmatch(text):
            raise ValueError(f"{_where(origin, name)}{name}={text}: write a plain number (YAML would read {value})")
        if name in PATHS and isinstance(value, str | list):
            value = value if isinstance(value, str) else paths.listed([str(path) for path in value])
            try:
                value = paths.with_variables(value)
            except ValueError as error:
                raise ValueError(
                    f"{_where(origin, name)}{name}={value}: {str(error).removeprefix(f'{value}: ')}"
                ) from error
        result[key] = value
    refuse_odd(result, origin, prefix)
    return result


def _check_kind(kind: Any, value: Any, given: str, name: str) -> None:
    """Raise ValueError, which begins with what is ``given``, where a list, its elements or null are none of a kind."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    lists = [part for part in kinds if get_origin(part) is tuple]
    if value is None and NoneType not in kinds:
        raise ValueError(f"{given}: needs a value; leave {name} out for its default")
    if lists and value is not None and len({*kinds} - {NoneType}) == 1 and not isinstance(value, list):
        raise ValueError(f"{given}: must be a list, in brackets: {name}=[...]")
    rows = value if isinstance(value, list) else []
    if lists and get_origin(get_args(lists[0])[0]) is tuple and not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{given}: must be a list of lists: {name}=[[...], ...]")
    if lists and get_args(lists[0])[0] in (int, float) and isinstance(value, list) and not all(map(_is_number, value)):
        raise ValueError(f"{given}: must be a list of numbers")


def _is_number(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        float(value)
        return not isinstance(value, bool)
    return False


def refuse_odd(plain: Mapping[Any, Any], origin: str, prefix: str = "") -> None:
    """Raise ValueError where a value refers to another one, or to the environment, a key in it for example; where a
    name or value has control characters (but in `setup`, which is shell), is `???`, or is a number of no machine.
    """
    for name, value in hints.leaves(plain, prefix):
        where, parts = _where(origin, name), [*_flat(value)]
        if "${" in str(value):
            instead = "$NAME, or " if name in PATHS else ""
            raise ValueError(f"{where}{name}={value}: ${{...}} is not read (oc.env neither); write {instead}the value")
        if name != "setup" and any(isinstance(part, str) and CONTROL.search(part) for part in (name, *parts)):
            given = f"{escaped(name)}={value!r}"
            raise ValueError(f"{where}{given}: has a line end or another control character; write plain text")
        if "???" in parts:
            raise ValueError(f"{where}{name}=???: needs a value")
        if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):
            raise ValueError(f"{where}{name}={str(value)[:30]}: is a number that no machine holds")


def _flat(value: Any) -> Iterator[Any]:
    """The elements of nested lists and mappings, keys included."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        yield from _flat([*value, *value.values()])
    else:
        yield value


def _where(origin: str, name: str) -> str:
    """What a message begins with: nothing where it would say a setting of the command line twice."""
    return "" if origin.startswith(f"{name}=") else origin
