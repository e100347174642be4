"""What the order of samples costs, measured by a process that imports nothing else of mae_dist: one line of JSON.

`python -m mae_dist.verify.bench_order SAMPLES SHARDS WINDOW POSITION BATCH`. Needs Linux: the largest resident
memory is VmHWM of /proc, because getrusage's ru_maxrss begins with that of the process which started this one.
"""

import json
import re
import sys
import time
from pathlib import Path

from mae_dist.data import order


def resident_mb() -> float:
    """The largest resident memory of this process so far, in MB."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def main(num_samples: int, num_shards: int, window: int, position: int, batch: int) -> None:
    """Make an Order over simulated shards of about equal sizes and ask it for a batch at `position`."""
    imported = resident_mb()
    began = time.perf_counter()
    ends = order.np.arange(num_shards + 1, dtype=order.np.int64) * num_samples // num_shards
    stream = order.Order(seed=0, counts=order.np.diff(ends), window=window)
    stream.at(position, position + batch)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "resident_mb": resident_mb(), "increase_mb": resident_mb() - imported}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
