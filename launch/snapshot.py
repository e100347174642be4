"""A copy of the code that a job runs, in the run's folder, so that what is edited later changes no queued job."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from mae_dist.folder import CODE, REVISION, revision

ROOT = Path(__file__).parents[1]
PACKAGES = ("mae_dist", "launch")


def take(folder: Path) -> Path:
    """Copy the code to `folder`/code/TIME and give that folder; its REVISION is what provenance will say."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    wanted = (folder / CODE / name for name in (stamp, *(f"{stamp}-{i}" for i in range(1, 1000))))
    code = next(path for path in wanted if not path.exists())
    for package in PACKAGES:
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (code / REVISION).write_text(f"{revision()}\n")
    return code
