"""On what the runs of a report ran: machine, device, ranks, commit and versions of each start, equal ones as one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mae_dist.monitor.records import Run

LONGEST = 80
"""Characters of a fact."""


class Environment(NamedTuple):
    """Facts that starts of `runs` have in common; `starts` is how many."""

    facts: dict[str, str]
    runs: list[Run]
    starts: int


def environments(runs: Sequence[Run]) -> list[Environment]:
    """The environments of all starts, in their order."""
    found: dict[tuple[tuple[str, str], ...], Environment] = {}
    for run in runs:
        for start in run.starts:
            facts = _facts(run, start)
            before = found.get((*facts.items(),), Environment(facts, [], 0))
            members = before.runs if run in before.runs else [*before.runs, run]
            found[(*facts.items(),)] = Environment(facts, members, before.starts + 1)
    return [*found.values()]


def _facts(run: Run, start: dict[str, Any]) -> dict[str, str]:
    machine, versions = run.config.machine, start.get("versions")
    found = {"host": start.get("hostname"), "device": start.get("device"), "ranks": start.get("ranks")}
    found |= {"strategy": machine.strategy, "precision": run.config.train.precision, "mae_dist": start.get("git")}
    found |= versions if isinstance(versions, dict) else {}
    return {str(name)[:LONGEST]: str(value)[:LONGEST] for name, value in [*found.items()][:16] if value is not None}
