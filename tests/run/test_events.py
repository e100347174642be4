"""run/events: one file says what happened to a run, in the order in which it happened."""

from __future__ import annotations

import re
from pathlib import Path

from mae_dist.run import events


def test_events_are_read_in_order_and_by_kind(tmp_path: Path) -> None:
    assert events.read(tmp_path) == events.of(tmp_path, "start") == []
    events.append(tmp_path, "submit", job="7", logs="jobs", nodes="1", tasks_per_node=1)
    events.append(tmp_path, "start", step=0)
    events.append(tmp_path, "stop", reason="signal", step=4, message="stopped")
    events.append(tmp_path, "start", step=4)
    assert [event["event"] for event in events.read(tmp_path)] == ["submit", "start", "stop", "start"]
    assert [event["step"] for event in events.of(tmp_path, "start", "stop")] == [0, 4, 4]
    assert [event["job"] for event in events.of(tmp_path, "submit")] == ["7"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", e["time"]) for e in events.read(tmp_path))


def test_events_after_a_torn_line_are_read_and_odd_ones_are_not(tmp_path: Path) -> None:
    events.append(tmp_path, "start", step=0)
    file = tmp_path / events.FILE
    file.write_text(file.read_text() + '{"time": "2026-')
    events.append(tmp_path, "fail", reason="rank_lost", rank=1, message="rank 1 did not answer")
    events.append(tmp_path, "start", step=0, host="h" * 256)  # no host has such a name
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "fail"]


def test_data_since_is_the_step_at_which_the_data_last_changed(tmp_path: Path) -> None:
    assert events.data_since(tmp_path) == 0
    for step, fingerprint, since in ((0, "a", 0), (7, "a", 0), (9, "b", 9), (12, "b", 9), (14, "a", 14)):
        events.append(tmp_path, "start", step=step, data_fingerprint=fingerprint)
        assert events.data_since(tmp_path) == since
