"""What limited a run between two flushes: the record `interval` in metrics.jsonl, and its sentence. Imports no torch.

Ranks train in step, so all take the time of the slowest, and the rank that waits least for the others is the slowest.
What it spends beside computing is what the run could save. Communication counts where a rank has its own gradients and
waits for those of others; what FSDP waits for within a pass counts as computing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mae_dist.run import jsonl

NOTICEABLE = 0.1
"""Share of the time from which on something else than computing limits a run."""


class RankTime(NamedTuple):
    """One rank's interval: seconds, and those of them that it waited for images, for the gradients of other ranks and
    for a checkpoint; bytes of memory at most so far.
    """

    seconds: float
    data: float
    communication: float
    checkpoint: float
    memory: float

    def share(self, part: str) -> float:
        """The share of the time that went into `data`, `communication`, `checkpoint` or, the rest, `compute`."""
        if part == "compute":
            return 1 - sum(self.share(other) for other in WAITS)
        return min(getattr(self, part) / max(self.seconds, 1e-9), 1.0)


WAITS = ("data", "communication", "checkpoint")
PARTS = (*WAITS, "compute")


def added(rows: Sequence[RankTime], others: Sequence[RankTime]) -> list[RankTime]:
    """The times of each rank over two intervals, or over one where there is no other."""
    if not others:
        return list(rows)
    both = zip(rows, others, strict=True)
    return [RankTime(*map(sum, zip(a[:-1], b[:-1], strict=True)), memory=max(a.memory, b.memory)) for a, b in both]


def record(step: int, ranks: Sequence[RankTime], hosts: Sequence[str], mfu: float | None) -> dict[str, Any]:
    """The record of an interval that ends with `step`: mean shares of the ranks' time, the most memory of a rank in GB,
    MFU where it is known, and what was the limit (`limit`: one of PARTS) on which rank of which host. ``waited``: the
    share of the time that went into it there, or that others waited for that rank to compute.
    """
    slowest = min(range(len(ranks)), key=lambda n: (ranks[n].share("communication"), -ranks[n].share("data")))
    means = {part: sum(rank.share(part) for rank in ranks) / len(ranks) for part in PARTS}
    limit = max(WAITS, key=ranks[slowest].share)
    waited = ranks[slowest].share(limit)
    if waited < NOTICEABLE:
        limit, waited = "compute", max(means["communication"] - ranks[slowest].share("communication"), 0.0)
    numbers = {part: round(share, 4) for part, share in means.items()}
    numbers |= {"memory": round(max(rank.memory for rank in ranks) / 1e9, 3)} | ({"mfu": round(mfu, 4)} if mfu else {})
    where = {"limit": limit, "rank": slowest, "host": hosts[slowest], "waited": round(waited, 4)}
    seconds = round(max(rank.seconds for rank in ranks), 3)
    return {"kind": jsonl.INTERVAL, "step": step, "seconds": seconds} | numbers | where


def describe(interval: Mapping[str, Any], num_ranks: int) -> str:
    """What limited an interval of a run on so many ranks, in one sentence, from its record."""
    rank = f"rank {interval['rank']} on {interval['host']}" if num_ranks > 1 else "the run"
    waited = f"{interval['waited']:.0%} of the time"
    match interval["limit"]:
        case "data":
            return f"limited by data: {rank} waited {waited} for images"
        case "checkpoint":
            return f"limited by checkpoints: {rank} waited {waited} for a save"
        case "communication":
            return f"limited by communication: even {rank}, the slowest, waited {waited} for the others' gradients"
    if interval["waited"] >= NOTICEABLE:
        return f"limited by one rank: the others waited {waited} for {rank} to compute"
    mfu = f", MFU {interval['mfu']:.0%}" if "mfu" in interval else ""
    return f"limited by computing: {interval['compute']:.0%} of the time{mfu}"


def advice(limit: str, workers: int) -> str:
    """What to do about a limit, as the end of its sentence; empty where a setting would hardly change it."""
    if limit == "data":
        return f" (machine.workers={workers}); `mae-dist bench data` with this run's settings says what to change"
    return "; see checkpoint.every and the speed of the disk" if limit == "checkpoint" else ""
