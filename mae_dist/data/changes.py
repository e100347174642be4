"""What decoding changes in the images that a run reads: counted by each rank, and logged once for all of them."""

import logging
from collections.abc import Mapping

from mae_dist import dist
from mae_dist.data.index import ShardIndex
from mae_dist.printed import counted

log = logging.getLogger(__name__)


class Changes:
    """Kind of change -> (this rank's number of images so far, name of the first); and the kinds that were logged."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}
        self.logged: set[str] = set()

    def add(self, index: ShardIndex, met: Mapping[str, tuple[int, int]]) -> None:
        """Count what reading samples of an index has met (`crop.Met.changes`)."""
        for what, (count, sample) in met.items():
            before, first = self.found.get(what) or (0, index.sample_name(sample))
            self.found[what] = before + count, first

    def log_new(self) -> None:
        """Log the kinds that any rank has met since the last call, sorted, each once. All ranks call it together."""
        new = {what: found for what, found in self.found.items() if what not in self.logged}
        if not dist.all_reduce_max(len(new)):
            return
        ranks = dist.gather_objects(new)
        for what in sorted(set().union(*ranks)):
            found = [rank[what] for rank in ranks if what in rank]
            if dist.is_main():
                images = counted(sum(count for count, _ in found), "image")
                log.warning("%s so far, %s first: %s (logged once)", images, found[0][1], what)
            self.logged.add(what)
