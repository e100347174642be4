"""A copy of the code in the run's folder, for its jobs, so that later edits change no queued job."""

import shutil
import time
from pathlib import Path

from mae_dist.run.layout import CODE, REVISION, revision

ROOT = Path(__file__).parents[1]
PACKAGES = ("mae_dist", "launch")


def new_snapshot_dir(folder: Path) -> Path:
    """The folder for the next copy of the code, which is not there yet: `folder`/code/TIME."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    wanted = (folder / CODE / name for name in (stamp, *(f"{stamp}-{i}" for i in range(1, 1000))))
    return next(path for path in wanted if not path.exists())


def copy_code(code: Path) -> None:
    """Copy the code to the folder `code`, with a file REVISION, from which the run records its commit."""
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()):
        part = file.relative_to(ROOT)
        if any(name == "__pycache__" or name.startswith(".") for name in part.parts):
            continue
        try:
            (code / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, code / part)  # without its mode, which not every file system sets
        except OSError as error:
            raise OSError(f"{code}: the code could not be copied: {error}") from error
    (code / REVISION).write_text(f"{revision()}\n")
