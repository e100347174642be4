"""What `init_from` names: a run, RUN@STEP for an older checkpoint of it, or a checkpoint of others; and the settings
that a run takes from there. No torch.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from mae_dist import hints, model_sizes, small_files
from mae_dist.schema import RANDOM, RunConfig

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the file with the tensors in a checkpoint that is a folder."""
UNKNOWN = "(that of init_from)"
"""Name of the model while it is that of a checkpoint of others which is not imported yet."""
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".pth.tar", ".distcp")
"""Ends of the names of checkpoint files."""
PARTS = ".metadata"
"""Name of the list of parts of a checkpoint of torch.distributed.checkpoint."""
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
    return path.is_file() or (not (path / "config.yaml").is_file() and bool(weight_files(path)))


def weight_files(folder: Path) -> list[Path]:
    """Files in a folder, or in a folder in it, that may hold weights of other software."""
    ends = (*SUFFIXES, PARTS, INDEX)
    return sorted(file for file in (*folder.glob("*"), *folder.glob("*/*")) if file.name.endswith(ends))


def imported(out: str) -> Path:
    """The run to which the run in the folder `out` imports the checkpoint of others that its init_from names."""
    return Path(f"{out.rstrip('/')}-init")


def describing(start: str, out: str) -> Path | None:
    """The config.yaml that has the settings which the run in the folder `out` takes from its `start`: its own once it
    has made a step, else that of the run it starts from. None where there is none (yet).
    """
    own, imports = Path(out) / "config.yaml", imported(out) / "config.yaml"
    written = (Path(out) / name for name in ("metrics.jsonl", "result.json"))
    if any(file.is_file() and file.stat().st_size for file in written):
        with suppress(ValueError, TypeError, AttributeError):
            began = small_files.read_yaml(own).get("init_from")
            if began and Path(began).absolute() in (Path(start).absolute(), imports.parent.absolute()):
                return own
    file = imports if is_of_others(Path(start)) else run_and_step(start)[0] / "config.yaml"
    return file if file.is_file() else None


def settings(start: str, out: str, masked: bool) -> dict[str, Any]:
    """Settings that a run takes from its `start` where they are not given: name, size and pooling of the model, and in
    pretraining (`masked`) its positions and the section `mae`. {} of random weights, and where no run lies there (yet).
    Raises ValueError where the run is damaged.
    """
    file = None if start == RANDOM else describing(start, out)
    if file is None:
        return {}
    try:
        plain = small_files.read_yaml(file)
        names = ("name", "image_size", "pool", *(("position",) if masked else ()))
        model = {name: plain["model"][name] for name in names if plain["model"].get(name) is not None}
        if masked and model.get("pool") == "avg":
            del model["pool"]  # takes away a ViT's last norm, which pretraining needs
        return {"model": model} | ({"mae": plain["mae"]} if masked and "mae" in plain else {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"init_from={start}: {file} is damaged ({text}); give model.name too") from error


def check_same_model(config: RunConfig, origin: RunConfig) -> None:
    """Refuse another model than that of `init_from`, whose settings are ``origin``, and for a Mixer, whose weights are
    bound to a grid, also another image size (ValueError).
    """
    model, other = config.model, origin.model
    if model.name != other.name:
        raise ValueError(
            f"model.name={model.name}: the run init_from={config.origin} has {other.name}; set model.name={other.name}"
        )
    if model.image_size != other.image_size and "num_heads" not in model_sizes.size_of(model.name):
        raise ValueError(
            f"{hints.given('model.image_size', model.image_size)}: the run init_from={config.origin} has "
            f"{hints.shown(other.image_size)}, and {model.name} is bound to its grid; set "
            f"{hints.given('model.image_size', other.image_size)}"
        )
