"""YAML and JSON that others may have written: read within limits of size and depth, or refused in one sentence.

An alias of YAML, which lets a line stand for a billion, is refused. Imports no torch.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

from mae_dist.errors import from_os_error

MOST_YAML, MOST_JSON, MOST_LIST = 2**22, 2**28, 2**30
"""Bytes of a file; of one that lists images or labels."""
MOST_LEVELS = 30
"""Lists and mappings of YAML within each other."""
LONGEST_NUMBER = 100
"""Characters of a number in YAML."""


def errors() -> tuple[type[Exception], ...]:
    """What parsers raise for damaged texts."""
    from yaml import YAMLError  # imported where it is needed: help and much else needs none

    return YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError


def loader() -> Any:
    """PyYAML's loader of plain values; that of C is ten times as fast, for tables of many runs."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_bytes(file: Path, most: int) -> bytes:
    """The content of a file of at most so many bytes. Raises ValueError for a larger one, for a pipe, which would wait
    for who writes into it, and MachineFault.
    """
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ValueError(f"{file}: is no regular file")
            content = stream.read(most + 1)
    except OSError as error:
        raise from_os_error(error, f"{file}: cannot be read ({error.strerror or error})") from error
    if len(content) > most:
        raise ValueError(f"{file}: has more than {most:,} bytes, which is no file of this kind")
    return content


def read_text(file: Path, most: int) -> str:
    """A text in UTF-8 of at most so many bytes, without a byte order mark. Raises ValueError for any other, and as
    `read_bytes`.
    """
    try:
        return read_bytes(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def read_yaml(file: Path) -> Any:
    """The value of a YAML file, of plain types. Raises ValueError where it is none, and MachineFault."""
    import yaml

    text = read_text(file, MOST_YAML)
    check_yaml(file, text)
    try:
        return yaml.load(text, loader())
    except errors() as error:
        raise ValueError(f"{file}: not YAML: {_one_line(error)}") from error


def check_yaml(file: Path | str, text: str) -> None:
    """Raise ValueError where a text is no YAML, has aliases or numbers without end, or is too deep."""
    import yaml

    level = 0
    try:
        for event in yaml.parse(text, loader()):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"has an alias, *{event.anchor}, in line {event.start_mark.line + 1}: write it out")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_NUMBER and _is_number(event):
                raise ValueError(f"has a number that no machine holds in line {event.start_mark.line + 1}")
            if level > MOST_LEVELS:
                raise ValueError(f"has more than {MOST_LEVELS} levels")
    except errors() as error:
        raise ValueError(f"{file}: not YAML: {_one_line(error)}") from error


def _is_number(event: Any) -> bool:
    """Whether a scalar of YAML becomes a number, also one to the base 16, or 60, as 1:30 is: the time for that grows
    with the square of its digits.
    """
    tagged = (event.tag or "").endswith((":int", ":float"))
    return tagged or (not event.style and re.fullmatch(r"[-+]?\d[\da-fA-FxX_:.]*", event.value) is not None)


def parse_json(text: str | bytes, origin: object) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError, which begins with ``origin``, where it is none."""
    import json

    try:
        found = json.loads(text)
    except errors() as error:
        raise ValueError(f"{origin}: not JSON: {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{origin}: no JSON object, but {str(found)[:40]!r}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError where it is none, and MachineFault."""
    return parse_json(read_text(file, MOST_JSON), file)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
