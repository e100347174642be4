"""YAML and JSON of others: limits of size and depth, no aliases, and one sentence that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mae_dist import small_files

LAUGHS = "a: &a [x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)},' * 9}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "more than 30 levels"), (LAUGHS, "alias"), ("a: [", "not YAML"),
        ("a: " + "9" * 5000, "number"), ("a: " + "59:" * 10**6 + "59", "number"), ("0x" + "f" * 101, "number"),
        ('!!int "' + "59:" * 10**6 + '59"', "number"), ("a:\n- -1_" + "0" * 99, "number that no machine .* line 2"),
        ("a: 0000-00-00", "not YAML"),
        ("!!python/object/apply:os.system [id]", "not YAML"), ("x" * 2**23, "bytes"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_with_the_file(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"x.yaml: .*{problem}") as caught:
        small_files.read_yaml(tmp_path / "x.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "[1]", "null", "\udcff"])
def test_hostile_json_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="x.json: ") as caught:
        small_files.read_json(tmp_path / "x.json")
    assert len(str(caught.value)) < 500


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    for path in (tmp_path / "x.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"^{path}: is no regular file$"):
            small_files.read_json(path)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read"):
            small_files.read_json(path)
