"""Lines in the log that say how far a pass over a split is: features, kNN, probes and test losses have no other."""

import logging
import time
from collections.abc import Iterator
from datetime import timedelta

from mae_dist import dist, printed
from mae_dist.batch import Batch
from mae_dist.run.tracker import SECONDS_BETWEEN_LINES

log = logging.getLogger(__name__)

SHORT = 1.0
"""Seconds of a pass that needs no line."""


def reported(batches: Iterator[Batch], total: int, what: str) -> Iterator[Batch]:
    """This rank's batches of a pass of all ranks over `total` images. Rank 0 logs now and then how far it is, and at
    its end what it took.
    """
    began = last = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done = min(total, done + dist.world() * batch.size)
        now = time.perf_counter()
        if dist.is_main() and done < total and now - last > SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - began)
            left = timedelta(seconds=round((total - done) / rate))
            log.info("%s: %d/%d images  %s images/s  %s left", what, done, total, printed.rate(rate), left)
    seconds = time.perf_counter() - began
    if dist.is_main() and seconds > SHORT:
        log.info("%s: %d images in %.3g s  %s images/s", what, total, seconds, printed.rate(total / seconds))
