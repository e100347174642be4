"""A run that reaches its time limit and goes on. The last file, as the run goes on beside all other tests."""

from __future__ import annotations

from mae_dist.run import events

from .launching import Launched, assert_equal_runs


def test_requeue_at_the_time_limit_repeats_and_loses_no_step(time_limited: Launched, reference: Launched) -> None:
    time_limited.finish(500)
    requeues = [event for event in time_limited.task_events()[0] if event["event"] == "requeue"]
    assert requeues
    assert {event["reason"] for event in events.of(time_limited.run, "requeue")} <= {"saved", "time_limit"}
    resumed = [start["step"] for start in time_limited.starts()]
    assert len(set(resumed)) >= 2  # each start made progress
    assert_equal_runs(time_limited, reference, elastic=True)  # on one rank instead of two
