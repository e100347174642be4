"""Time and memory of opening a data set of many tars, measured in a process that imports only data/index.py: one line
of JSON. The tars are simulated: files of the right names and sizes, without content.

`python -m mae_dist.verify.bench_open FOLDER`.
"""

import json
import sys
import time
from pathlib import Path

from mae_dist.data import index
from mae_dist.verify.bench_order import resident_mb

NUM_BYTES = 10**9
"""Size of a simulated tar, of which the disk holds nothing."""


def simulate(folder: Path, num_samples: int, num_shards: int) -> None:
    """Make a data set of empty tars and indexes, and a dataset.json that says that they hold samples."""
    folder.mkdir(parents=True)
    shards, count = [], num_samples // num_shards
    for number in range(num_shards):
        tar = folder / f"train-{number:06d}.tar"
        with tar.open("wb") as stream:
            stream.truncate(NUM_BYTES)
        tar.with_suffix(".idx").touch()
        shards.append(index.Shard(tar.name, count, count, NUM_BYTES, f"{number:064x}"))
    index.Dataset("simulated", {"train": shards}, num_classes=1000).save(folder)


def main(folder: str) -> None:
    """Open the training split, and print seconds, seconds of the processor, and MB."""
    imported, began, computed = resident_mb(), time.perf_counter(), time.process_time()
    num_samples = len(index.open_split(folder, "train"))
    seconds, cpu = time.perf_counter() - began, time.process_time() - computed
    costs = {"seconds": seconds, "cpu_seconds": cpu, "resident_mb": resident_mb(), "imported_mb": imported}
    print(json.dumps(costs | {"num_samples": num_samples}))


if __name__ == "__main__":
    main(sys.argv[1])
