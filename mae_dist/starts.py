"""What `init_from` names: a run, RUN@STEP for an older checkpoint of it, or a checkpoint of others. No torch."""

from __future__ import annotations

from pathlib import Path

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the file with the tensors in a checkpoint that is a folder."""
INDEX = ".index.json"
"""End of the name of the file that lists the parts of a sharded checkpoint, as transformers writes it."""


def run_and_step(text: str) -> tuple[Path, int | None]:
    """The folder of the run, and the step of RUN@STEP, None without. A folder whose own name ends so is that folder."""
    folder, _, step = text.rpartition("@")
    if folder and step.isascii() and step.isdigit() and not Path(text).exists():
        return Path(folder), int(step)
    return Path(text), None


def is_of_others(path: Path) -> bool:
    """Whether a file, or a folder with a file of weights, lies there: a checkpoint that is no run of mae_dist."""
    if (path / "config.yaml").is_file():
        return False
    return path.is_file() or any((path / (name + end)).is_file() for name in WEIGHT_FILES for end in ("", INDEX))


def imported(out: str) -> Path:
    """The run to which the run in the folder `out` imports the checkpoint of others that its init_from names."""
    return Path(f"{out.rstrip('/')}-init")
