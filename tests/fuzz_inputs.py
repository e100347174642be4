"""Good inputs of every kind that a verb reads, tiny, and the commands that read them. For `fuzz`."""

from __future__ import annotations

import io
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic

RECIPE = {
    "model": {"name": "vit_demo4", "image_size": 32},
    "view": {"test_crop": 1},
    "data": {"path": "data"},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4},
    "optim": {"base_lr": 1e-2},
    "train": {"steps": 2, "global_batch": 8, "precision": "fp32"},
    "checkpoint": {"every": 1},
    "track": {"every": 1},
    "machine": {"processes": 1, "restarts": 0, "workers": 0},
}
PROBE = {name: RECIPE[name] for name in ("model", "data", "train", "machine")}


class Command(NamedTuple):
    """A command, the top entries of the good inputs that it reads, and patterns of the files that are damaged."""

    argv: tuple[str, ...]
    reads: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is, for a table."""
        return " ".join(self.argv[: 2 if self.argv[0] in ("data", "ckpt", "submit") else 1])


def _command(argv: str, reads: str, damaged: str) -> Command:
    return Command(tuple(argv.split()), tuple(reads.split()), tuple(damaged.split()))


RUN_FILES = "run/config.yaml run/events.jsonl run/metrics.jsonl run/checkpoints/*/*"
DATA_FILES = "data/dataset.json data/*.idx data/*.tar"
COMMANDS = [
    _command("data show data", "data", DATA_FILES),
    _command("data check data --workers 1", "data", DATA_FILES),
    _command("data check labelled --workers 1", "labelled", "labelled/dataset.json labelled/*.idx labelled/*.npy"),
    _command("data index tars/x.tar", "tars", "tars/x.tar"),
    _command("data index tars/x.tar --labels labels.csv", "tars labels.csv", "labels.csv"),
    _command("data index tars/x.tar --labels labels.json", "tars labels.json", "labels.json"),
    _command("data index tars/x.tar --labels json:label", "tars", "tars/x.tar"),
    _command("data index tars/x.tar --classes classes.txt", "tars classes.txt", "classes.txt"),
    _command("data index data/train-000000.tar --split train", "data", "data/dataset.json"),
    _command("data pack folder --source folder --out new --workers 1", "folder", "folder/*/*"),
    _command("data pack folder --source folder --labels list.csv --out new --workers 1", "folder list.csv", "list.csv"),
    _command("data pack cifar100 --source cifar.tar.gz --out new --workers 1", "cifar.tar.gz", "cifar.tar.gz"),
    _command("data pack tars --source data --out new --workers 1", "data", DATA_FILES),
    _command("pretrain recipe.yaml out=new", "data recipe.yaml", f"recipe.yaml {DATA_FILES}"),
    _command("pretrain recipe.yaml out=new data.path=labelled", "labelled recipe.yaml", "labelled/*"),
    _command("pretrain recipe.yaml out=half", "data recipe.yaml half", RUN_FILES.replace("run/", "half/")),
    _command("probe probe.yaml out=new init_from=run", "data probe.yaml run", RUN_FILES),
    _command("report run", "run", f"{RUN_FILES} run/result.json run/pictures/*"),
    _command("runs .", "run", f"{RUN_FILES} run/result.json"),
    _command("runs . --results new.md", "run", f"{RUN_FILES} run/result.json"),
    _command("logs run", "run", "run/events.jsonl run/config.yaml run/jobs/*"),
    _command("ckpt verify run", "run", "run/checkpoints/*/*"),
    _command("ckpt list run", "run", "run/checkpoints/*/*"),
    _command("ckpt inspect run", "run", "run/checkpoints/*/*"),
    _command("replay run --step 1", "data run", RUN_FILES),
    _command("export run --to timm --out new.pth", "run", RUN_FILES),
    _command("import ex.pth --out new", "ex.pth", "ex.pth"),
    _command("import ex.npz --out new", "ex.npz", "ex.npz"),
    _command("import st --out new", "st", "st/*"),
    _command("import hf --out new", "hf", "hf/*"),
    _command("submit pretrain recipe.yaml --cluster cluster.yaml out=new --dry-run", "data recipe.yaml cluster.yaml",
             "recipe.yaml cluster.yaml data/dataset.json"),
    _command("submit pretrain recipe.yaml --cluster cluster.yaml out=new --dry-run --sweep train.seed=0,1",
             "data recipe.yaml cluster.yaml", "recipe.yaml cluster.yaml"),
    _command("submit pipeline pipeline.yaml --cluster cluster.yaml --dry-run",
             "data recipe.yaml probe.yaml cluster.yaml pipeline.yaml", "pipeline.yaml cluster.yaml"),
]  # fmt: skip


def make(folder: Path, names: set[str], run: Callable[[Sequence[str]], None]) -> None:
    """Write the good inputs into a folder, in which `run` runs `mae-dist ARGV`; of exports those with these names."""
    pack(from_synthetic(24, 8), folder / "data", shard_size=12)
    _make_tars(folder)
    _make_folder(folder)
    _make_cifar(folder / "cifar.tar.gz")
    pipeline = {"out": "pipe", "stages": {
        "first": {"run": "pretrain recipe.yaml train.steps=1", "nodes": 1},
        "then": {"run": "probe probe.yaml init_from={first}", "sweep": "train.seed=0,1", "at_once": 2},
        "report": {"run": "report {first} {then} --out {out}/r.html"}}}  # fmt: skip
    cluster = {"partition": "gpu", "nodes": "2", "gpus_per_node": 1, "memory": 4, "time": "1:00:00",
               "setup": ["module load x"], "env": {"A": "b"}, "sbatch": {"mail-type": "FAIL"}}  # fmt: skip
    for name, plain in (("recipe", RECIPE), ("probe", PROBE), ("pipeline", pipeline), ("cluster", cluster)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    for argv in (
        "data index labelled/x.tar --labels txt", "pretrain recipe.yaml out=run",
        "export run --to timm --out ex.pth", "export run --to npz --out ex.npz", "export run --to fb --out fb.pth",
        "export run --to hf --out hf", "export run --to safetensors --out st",
    ):  # fmt: skip
        if not argv.startswith("export") or argv.split()[-1] in names:
            run(argv.split())
    shutil.copytree(folder / "run", folder / "half")
    (folder / "half" / "result.json").unlink()
    shutil.rmtree(folder / "half" / "checkpoints" / "step-000000002")
    jobs = folder / "run" / "jobs"
    jobs.mkdir()
    (jobs / "7_0.jsonl").write_text('{"event": "start", "start": 0, "time": "2026-01-01T00:00:00+0000", "host": "a"}\n')
    (jobs / "7_0_log.out").write_text("== start 0 of job 7, task 0 on a\nmae-dist: failed\n")
    with (folder / "run" / "events.jsonl").open("a") as stream:
        stream.write('{"time": "2026-01-01T00:00:00+0000", "event": "submit", "job": "7", "logs": "jobs", ')
        stream.write('"nodes": "1", "tasks_per_node": 1}\n')


def image(number: int, kind: str = "png", side: int = 32) -> bytes:
    """A file with a picture of noise."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind.upper().replace("JPG", "JPEG"))
    return stream.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    """A tar of these members."""
    with tarfile.open(file, mode) as archive:  # pyright: ignore
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _make_tars(folder: Path) -> None:
    members, texts = [], []
    for number, kind in enumerate(["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm", "npy"] * 2):
        key, content = f"a/{number:03d}", image(number, kind) if kind != "npy" else _npy(number)
        members += [(f"{key}.{kind}", content), (f"{key}.cls", str(number % 3).encode())]
        members += [(f"{key}.json", b'{"label": %d, "more": {"a": [1, 2]}}' % (number % 3))]
        texts += [(f"{key}.{kind}", content), (f"{key}.txt", b"name%d" % (number % 3))]
    for name, content in (("tars", members), ("labelled", texts)):
        (folder / name).mkdir()
        write_tar(folder / name / "x.tar", content)
    rows = [(f"{number:03d}", str(number % 3)) for number in range(16)]
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    (folder / "labels.json").write_text(str(dict(rows)).replace("'", '"'))
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")


def _npy(number: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    return stream.getvalue()


def _make_folder(folder: Path) -> None:
    names = []
    for number, kind in enumerate(["jpg", "png", "tiff", "gif", "webp", "ppm"] * 2):
        place = folder / "folder" / ("cat", "dog")[number % 2] / f"{number}.{kind}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image(number, kind))
        names.append(f"{place.relative_to(folder / 'folder')},{number % 2}\n")
    (folder / "list.csv").write_text("".join(names))


def _make_cifar(file: Path) -> None:
    chance = random.Random(0)
    members = [("cifar-100-python/meta", pickle.dumps({"fine_label_names": ["a", "b"]}, 2))]
    for split in ("train", "test"):
        data = np.frombuffer(chance.randbytes(4 * 3072), np.uint8).reshape(4, 3072)
        members.append((f"cifar-100-python/{split}", pickle.dumps({"data": data, "fine_labels": [0, 1, 1, 0]}, 2)))
    write_tar(file, members, "w:gz")
