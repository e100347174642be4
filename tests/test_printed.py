"""Names and contents that others wrote reach no terminal as commands, and no message grows without a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import refused

from mae_dist import printed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\rb", r"a\rb"), ("a\nb", r"a\nb"), ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m", r"\x9b31m"), ("caf\xe9\u3000\u65e5", "caf\xe9\u3000\u65e5"), ("\udcff", r"\udcff"),
    ],
)  # fmt: skip
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printed.escaped(text) == shown


def test_counts_agree_in_number_with_their_noun() -> None:
    assert [printed.counted(number, "tar") for number in (0, 1, 2000)] == ["0 tars", "1 tar", "2,000 tars"]
    assert [printed.counted(2, thing) for thing in ("class", "micro-batch")] == ["2 classes", "2 micro-batches"]
    assert [printed.span(8, 8), printed.span(2, 3)] == ["8", "2 to 3"]


def test_rates_of_slow_machines_keep_digits() -> None:
    assert [printed.rate(value) for value in (12345.6, 10.4, 3.14, 0.0312)] == ["12,346", "10", "3.1", "0.0312"]


def test_message_is_cut_in_its_middle() -> None:
    text = printed.message("begin" + "x" * 100_000 + "end")
    assert len(text) < printed.LONGEST + 20
    assert text.startswith("begin")
    assert text.endswith("end")


def test_name_of_a_file_commands_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "report", tmp_path / "a\x1b]0;owned\x07b")
    assert "\x1b" not in line
    assert r"a\x1b]0;owned\x07b" in line
