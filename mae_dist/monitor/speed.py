"""How fast a run was, what limited it, and what to do about that, from the intervals that it recorded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mae_dist import small_files
from mae_dist.errors import MachineFault
from mae_dist.monitor import records
from mae_dist.monitor.records import Run, finite
from mae_dist.run import interval, layout
from mae_dist.run.interval import PARTS

WORTH_SAYING = 0.1
"""Share of a run's time from which on what limited it is said."""
FIELDS = ("seconds", "memory", "waited", *PARTS)
"""Numbers that every interval has."""


class Speed(NamedTuple):
    """What the intervals of a run have in common: mean shares of the ranks' time, the most memory of a rank in GB, mean
    MFU where it is known, sentences about what limited it, the longest time first, and images a second: the median, and
    what a preflight expected where one was made.
    """

    shares: dict[str, float]
    memory: float
    mfu: float | None
    limits: list[str]
    rate: float | None
    expected: float | None


def of(run: Run) -> Speed | None:
    """The speed of a run, None where it has no intervals."""
    known = [line for line in run.intervals if _is_sound(line)]
    if not known:
        return None
    by_limit: dict[str, list[dict[str, Any]]] = {}
    for line in known:
        by_limit.setdefault(line["limit"], []).append(line)
    total, ranks = _sum(known, "seconds"), run.starts[-1].get("ranks", 1) if run.starts else 1
    limits = []
    for limit, lines in sorted(by_limit.items(), key=lambda item: -_sum(item[1], "seconds")):
        if (share := _sum(lines, "seconds") / total) >= WORTH_SAYING:
            advice = interval.advice(limit, run.config.machine.workers)
            when = "" if share > 0.995 else f"{share:.0%} of the time "
            limits.append(f"{when}{interval.describe(_merged(lines), ranks)}{advice}")
    mfus = [line for line in known if finite(line.get("mfu"))]
    return Speed(
        {part: _mean(known, part) for part in PARTS}, max(line["memory"] for line in known),
        _mean(mfus, "mfu") if mfus else None, limits, records.numbers(run)["images_per_second"], expected_rate(run),
    )  # fmt: skip


def expected_rate(run: Run) -> float | None:
    """Images a second that a preflight of the run expected; None where there was none, or its file is damaged."""
    file = run.path / layout.PREFLIGHT
    try:
        found = small_files.read_json(file).get("images_per_second") if file.is_file() else None
    except (ValueError, MachineFault):
        return None
    return found if finite(found) and found > 0 else None


def _is_sound(line: dict[str, Any]) -> bool:
    return (
        all(finite(line.get(name)) and line[name] >= 0 for name in FIELDS)
        and line["seconds"] > 0 and line.get("limit") in PARTS and {"rank", "host"} <= line.keys()
    )  # fmt: skip


def _sum(lines: Sequence[dict[str, Any]], name: str) -> float:
    return sum(line[name] for line in lines)


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    """The mean of a number over the time of these intervals."""
    return sum(line[name] * line["seconds"] for line in lines) / _sum(lines, "seconds")


def _merged(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One interval for several with the same limit, on the rank on which it was the limit for the longest time."""
    times: dict[tuple[str, str], float] = {}
    for line in lines:
        place = str(line["rank"]), str(line["host"])
        times[place] = times.get(place, 0.0) + line["seconds"]
    rank, host = max(times, key=lambda place: times[place])
    mfu = {"mfu": _mean(lines, "mfu")} if all(finite(line.get("mfu")) for line in lines) else {}
    shares = {name: _mean(lines, name) for name in ("waited", "compute")}
    return {"limit": lines[0]["limit"], "rank": rank, "host": host} | shares | mfu
