"""Time and memory of the order of samples, measured in a process that imports only data/order.py: one line of JSON.

`python -m mae_dist.verify.bench_order SAMPLES SHARDS WINDOW POSITION BATCH`. Needs Linux: peak resident memory is
VmHWM of /proc, because getrusage's ru_maxrss starts at that of the parent process.
"""

import json
import re
import sys
import time
from pathlib import Path

from mae_dist.data import order


def resident_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def main(num_samples: int, num_shards: int, window: int, position: int, batch: int) -> None:
    """Make an Order over simulated shards of about equal sizes, take a batch at `position`, print seconds and MB."""
    imported = resident_mb()
    began = time.perf_counter()
    ends = order.np.arange(num_shards + 1, dtype=order.np.int64) * num_samples // num_shards
    stream = order.Order(seed=0, counts=order.np.diff(ends), window=window)
    stream.at(position, position + batch)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "resident_mb": resident_mb(), "increase_mb": resident_mb() - imported}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
