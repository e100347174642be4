"""run/jsonl: files that a kill has torn stay readable; a cut keeps lines as they are; a small file is whole or old."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mae_dist.run import jsonl

DAMAGED = [b"", b"\n", b'{"step": 8, "lo', b'{"step": 8}', b"\xff\xfe\n", b"[1]\n", b"17\n", b"{}}\n"]


def step(number: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number} | fields


def evaluation(number: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "step": number} | fields


def written(path: Path, *records: dict[str, Any]) -> bytes:
    jsonl.append(path, *records)
    return path.read_bytes()


def test_append_then_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.jsonl"
    assert jsonl.read(file) == []
    jsonl.append(file, step(1), evaluation(1))
    jsonl.append(file, step(2))
    assert jsonl.read(file) == [step(1), evaluation(1), step(2)]
    assert jsonl.steps(file) == [step(1), step(2)]
    assert file.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("end", DAMAGED)
def test_read_and_append_after_a_torn_last_line(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(written(file, step(1), step(2)) + end)
    assert jsonl.read(file) == [*jsonl.backwards(file)][::-1] == [step(1), step(2)]
    jsonl.append(file, step(3))
    whole = [step(1), step(2)] + ([{"step": 8}] if end == b'{"step": 8}' else []) + [step(3)]
    assert jsonl.read(file) == whole


@pytest.mark.parametrize("middle", [b'{"step": 8, "lo\n', b"\xff\xfe\n", b"[1]\n", b"null\n", b"\0\0\0\n"])
def test_read_skips_a_torn_middle_line_and_counts_it(tmp_path: Path, middle: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(written(file, step(1)) + middle + json.dumps(step(2)).encode() + b'\n\n{"step')
    assert jsonl.read(file) == [*jsonl.backwards(file)][::-1] == jsonl.records_with(file, "step") == [step(1), step(2)]
    assert jsonl.read_counting(file) == ([step(1), step(2)], 1)


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.touch()
    assert jsonl.read(file) == [*jsonl.backwards(file)] == jsonl.steps(file) == jsonl.records_with(file, "step") == []
    jsonl.cut_after(file, 0)
    assert file.read_bytes() == b""
    jsonl.append(file, step(1))
    assert jsonl.read(file) == [step(1)]


def test_records_backwards_across_blocks_and_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of any length, also longer than a block, each once; of a long file, those that its end holds."""
    file = tmp_path / "x.jsonl"
    lines = [step(number, text="x" * (number * 37 % 500)) for number in range(300)]
    lines += [evaluation(299, map=[0.5] * 40_000)]
    size = len(written(file, *lines))
    for block in (1000, 4096, 2**20):
        monkeypatch.setattr(jsonl, "BLOCK", block)
        assert [*jsonl.backwards(file)] == lines[::-1]
        assert jsonl.last_step(file) == 299
    monkeypatch.setattr(jsonl, "LONGEST_LINE", size - 10)
    assert [*jsonl.backwards(file)] == lines[:0:-1]


def test_records_with_parses_only_lines_that_have_the_field(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = [step(1), step(2, bad=3), step(3, text='a "bad": in a text'), step(4, deep={"bad": 1}), step(5, bad=0)]
    written(file, *lines)
    file.write_bytes(file.read_bytes() + b'{"step": 6, "bad": 7')
    assert jsonl.records_with(file, "bad") == [step(2, bad=3), step(5, bad=0)]


def test_cut_keeps_lines_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    text = b"".join(b'{"step":  %d, "loss": 0.10000, "norm": Infinity}\n' % number for number in range(1, 6))
    file.write_bytes(text + b'{"step": 6')
    jsonl.cut_after(file, 5)
    assert file.read_bytes() == text
    jsonl.cut_after(file, 3)
    assert file.read_bytes() == b"".join(text.splitlines(keepends=True)[:3])
    jsonl.cut_after(file, 0)
    assert file.read_bytes() == b""


def test_cut_keeps_evaluations_of_earlier_steps_in_order(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    late = [evaluation(2, top1=1), evaluation(4, top1=2), evaluation(4, top5=3), evaluation(7, top1=4)]
    written(file, *map(step, range(1, 8)), *late)
    file.write_bytes(file.read_bytes() + b"\xff\n{")
    jsonl.cut_after(file, 4)
    assert jsonl.read(file) == [*map(step, range(1, 5)), *late[:3]]
    before = file.read_bytes()
    jsonl.cut_after(file, 4)
    assert file.read_bytes() == before


def test_cut_after_a_kill_between_its_two_writes(tmp_path: Path) -> None:
    """The evaluation has been copied forwards and the rest is still there, overwritten in its middle."""
    file = tmp_path / "x.jsonl"
    content = bytearray(written(file, *(step(number, x="y" * 50) for number in range(1, 6)), evaluation(2, top1=1)))
    kept, start = content.splitlines(keepends=True)[-1], 2 * len(content.splitlines(keepends=True)[0])
    content[start : start + len(kept)] = kept
    file.write_bytes(content)
    jsonl.cut_after(file, 2)
    assert jsonl.read(file) == [step(1, x="y" * 50), step(2, x="y" * 50), evaluation(2, top1=1)]


def test_cut_at_the_end_of_a_long_file_parses_only_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.jsonl"
    line = json.dumps(step(1, text="x" * 200)).encode() + b"\n"
    file.write_bytes(line * 2_000)
    written(file, step(1_000_000), step(1_000_001))
    parsed: list[bytes] = []
    monkeypatch.setattr(jsonl, "parse", lambda line, parse=jsonl.parse: parsed.append(line) or parse(line))
    jsonl.cut_after(file, 1_000_000)
    assert len(parsed) == 2
    assert jsonl.last_step(file) == 1_000_000


@pytest.mark.parametrize("content", ["", "text \N{BULLET}\n", b"\xff\0bytes"])
def test_atomic_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")
    jsonl.write_atomic(file, content)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [file]


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*x\.json"):
        jsonl.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_append_to_a_full_disk_names_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        jsonl.append(Path("/dev/full"), {"step": 1})


WRITER = """
import sys
from pathlib import Path
from mae_dist.run import jsonl
folder, number = Path(sys.argv[1]), 0
while True:
    number += 1
    jsonl.append(folder / "x.jsonl", {"step": number, "text": "y" * 5000})
    jsonl.write_atomic(folder / "x.json", f"{number} " * 1000)
    if number == 1:
        print("started", flush=True)
"""


def test_sigkill_of_a_writer_leaves_readable_files(tmp_path: Path) -> None:
    for pause in (0.0, 0.011, 0.023):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline()
            time.sleep(pause)
            writer.send_signal(signal.SIGKILL)
        assert len(set((tmp_path / "x.json").read_text().split())) == 1
    found, damaged = jsonl.read_counting(tmp_path / "x.jsonl")
    assert [record["step"] for record in found].count(1) == 3
    assert all(len(record["text"]) == 5000 for record in found)
    assert damaged <= 2  # a torn last line each, ended by the next writer


def test_append_of_several_processes_loses_no_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from mae_dist.run import jsonl\n"
        "for i in range(200): jsonl.append(Path(sys.argv[1]), {'writer': sys.argv[2], 'number': i, 'text': 'x' * 5000})"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(file), name], env=environment) for name in ("a", "b", "c")
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    records, damaged = jsonl.read_counting(file)
    assert damaged == 0
    for name in ("a", "b", "c"):
        assert [record["number"] for record in records if record["writer"] == name] == list(range(200))


def test_records_of_a_file_system_that_maps_no_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    jsonl.append(file, *({"kind": "step", "step": step, "bad": step} for step in (1, 2, 3)))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert [record["step"] for record in jsonl.records_with(file, "bad")] == [1, 2, 3]
    jsonl.cut_after(file, 2)
    assert [record["step"] for record in jsonl.read(file)] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000, '{"kind": "step"}', '{"kind": "step", "step": "7"}', '{"kind": "step", "step": 1, "loss": []}',
        '{"step": null}', '{"event": 5}', '{"kind": "step", "step": ' + "9" * 5000 + "}",
        '{"kind": "step", "step": 1, "loss_scale": "x"}',
    ],
)  # fmt: skip
def test_line_that_no_run_writes_counts_as_damaged(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(step(1)) + "\n" + line + "\n")
    assert jsonl.read_counting(file) == ([step(1)], 1)
    jsonl.cut_after(file, 1)
    assert jsonl.read_counting(file) == ([step(1)], 0)


@pytest.mark.parametrize("write", [lambda file: jsonl.append(file, step(1)), lambda file: jsonl.cut_after(file, 0)])
def test_link_or_pipe_at_the_place_of_a_file_is_not_written_to(tmp_path: Path, write: Any) -> None:
    (tmp_path / "victim").write_text("precious\n")
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "y.jsonl")
    for name in ("x.jsonl", "y.jsonl"):
        with pytest.raises(OSError, match=name):
            write(tmp_path / name)
    assert (tmp_path / "victim").read_text() == "precious\n"


def test_file_that_a_reader_keeps_locked_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, (awaited, ready) = tmp_path / "x.jsonl", os.pipe()
    jsonl.append(file, step(1))
    if not (reader := os.fork()):
        fcntl.lockf(os.open(file, os.O_RDONLY), fcntl.LOCK_SH)
        os.write(ready, b".")
        signal.pause()
    try:
        os.read(awaited, 1)
        for number, seconds in ((2, 0.1), (3, 3600)):
            monkeypatch.setattr(jsonl, "WAIT_FOR_LOCK", seconds)
            jsonl.append(file, step(number))
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    assert jsonl.read(file) == [step(1), step(2), step(3)]


def test_long_metrics_are_thinned_while_they_are_read(tmp_path: Path) -> None:
    """Every number of steps keeps its last one and all unreadable samples; evaluations have a bound of their own."""
    lines = [json.dumps(step(n, bad=1, loss=0.5)) for n in range(1, 1001)]
    lines[500:500] = [json.dumps(evaluation(500, test_top1=3.0)), "damaged"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    for most, every in ((1000, 1), (500, 2), (100, 8), (10, 64)):
        (first, *found), damaged, found_every = jsonl.read_thinned(tmp_path / "x.jsonl", most)
        assert (first, damaged, found_every) == (evaluation(500, test_top1=3.0), 1, every)
        assert [record["step"] for record in found] == [*range(every, 1001, every), *([1000] if 1000 % every else [])]
        assert sum(record["bad"] for record in found) == 1000
        assert len(found) <= 2 * most


def test_line_without_an_end_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1000)
    (tmp_path / "x.jsonl").write_bytes(bytes(10_500) + b'\n{"step": 1}\n')
    assert jsonl.read_counting(tmp_path / "x.jsonl") == ([{"step": 1}], 1)


def test_record_without_kind_or_step_is_no_step_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(step(1, bad=2)) + '\n{"step": 1, "bad": 3}\n{"bad": 4}\n{}\n')
    assert jsonl.records_with(file, "bad") == [step(1, bad=2)]
    assert jsonl.last_step(file) == 1
    jsonl.cut_after(file, 1)
    assert jsonl.read(file) == [step(1, bad=2), {"step": 1, "bad": 3}]
