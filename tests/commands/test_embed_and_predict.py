"""`embed` and `predict`: the same bytes on any number of ranks and after a kill; classes matched by name; refusals."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import SETTINGS, finish_ranks, kill_ranks_when, refused, start_rank
from shared_types import Tars

import mae_dist
from mae_dist.__main__ import main
from mae_dist.commands import feature_pass
from mae_dist.data.features import Features
from mae_dist.data.index import Dataset

RANDOM = ["init_from=random", "train.steps=1"]


@pytest.fixture(scope="module")
def tuned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is fine-tuned for one step on the ten classes of `tiny_data`."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main(["finetune", f"data.path={tiny_data}", f"out={out}", *SETTINGS, *RANDOM, "machine.workers=0"]) == 0
    return out


def rows(file: Path) -> list[dict[str, str]]:
    """The lines of a table."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def small_parts() -> None:
    """Have this process compute parts of 20 samples."""
    feature_pass.SHARD = 20


def slow_small_parts() -> None:
    """The same, with time to kill it between two parts."""
    small_parts()
    write = Features._write

    def late(self: Features, name: str, array: np.ndarray) -> None:
        write(self, name, array)
        time.sleep(0.3)

    Features._write = late


def start_ranks(argv: list[str], log: Path, before: Callable[[], object]) -> list[BaseProcess]:
    """Start two ranks of a verb that has no settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [start_rank(argv, place | {"RANK": r, "LOCAL_RANK": r}, log, before) for r in ("0", "1")]


def test_embed_is_bit_identical_on_two_ranks_and_after_sigkill(
    tuned: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    common = ["embed", str(tuned), str(tiny_data), "--features", "tokens", "--block", "3", "--workers", "0", "--out"]
    ranks = start_ranks([*common, str(two)], log, slow_small_parts)
    parts = two / "parts"
    kill_ranks_when(ranks, lambda: (parts / "00000.npy").is_file() and (parts / "00001.npy").is_file(), log)
    assert not (two / "features.npy").exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*[0-9].npy") if not path.name.startswith(".")}
    assert 2 <= len(kept) < 8
    finish_ranks(start_ranks([*common, str(two)], log, small_parts), log)
    monkeypatch.setattr(feature_pass, "SHARD", 20)
    assert main([*common, str(one)]) == 0
    names = sorted(path.name for path in one.iterdir())
    assert names == ["computed.json", "features.npy", "samples.csv"] == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    values, listed = np.load(one / "features.npy", mmap_mode="r"), rows(one / "samples.csv")
    assert values.shape == (160, 65, 128)
    m = mae_dist.load(tuned)
    batch = torch.from_numpy(np.zeros((1, 3, 32, 32), dtype=np.float32))
    assert m.features(batch, "tokens", 3).shape == (1, 65, 128)
    assert [row["key"] for row in listed[::159]] == ["train_000000", "train_000159"]
    assert {row["class"] for row in listed} == {*m.classes}
    before = (one / "features.npy").stat().st_mtime_ns
    assert main([*common, str(one)]) == 0
    assert (one / "features.npy").stat().st_mtime_ns == before
    assert "holds another computation (shape: [65, 128] -> [128]; features: tokens -> cls" in refused(
        capsys, "embed", tuned, tiny_data, "--block", 3, "--out", one
    )


def test_embed_rows_are_the_features_of_load(tuned: Path, tmp_path: Path, tars: Tars) -> None:
    index = tars([3, 4], size=None, broken={2})
    out = tmp_path / "out"
    assert main(["embed", str(tuned), str(index.tars[0].parent), "--out", str(out), "--workers", "0"]) == 0
    values, listed = np.load(out / "features.npy"), rows(out / "samples.csv")
    m, images = mae_dist.load(tuned), []
    for number in range(7):
        images.append(tmp_path / f"{number}.png")
        images[-1].write_bytes(index.read(number).image)
    readable = [number for number in range(7) if number != 2]
    expected = m.features([images[number] for number in readable]).numpy()
    np.testing.assert_allclose(values[readable], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(values[2]).all()
    assert [row["readable"] for row in listed] == [*"1101111"]
    assert [row["label"] for row in listed] == [str(number % 3) for number in range(7)]
    assert listed[4] == {"key": "s0004", "tar": "x-1.tar", "file": "", "label": "1", "class": "", "readable": "1"}


def test_predict_gives_the_accuracy_of_the_run_and_counts_by_class(
    tuned: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(tuned), str(tiny_data), "--out", str(out), "--workers", "0"]) == 0
    own, found = (json.loads((folder / "result.json").read_text()) for folder in (tuned, out))
    assert [found[name] for name in ("top1", "top5", "num_test_images")] == [own["top1"], own["top5"], 40]
    logits, listed = np.load(out / "logits.npy"), rows(out / "predictions.csv")
    assert [row["predicted_1"] for row in listed] == [found["classes"][n] for n in logits.argmax(1)]
    assert float(listed[0]["probability_1"]) == pytest.approx(float(torch.tensor(logits[0]).softmax(0).max()), rel=1e-4)
    by_class, pairs = rows(out / "classes.csv"), rows(out / "confusion.csv")
    assert sum(int(row["images"]) for row in by_class) == sum(int(pair["count"]) for pair in pairs) == 40
    right = sum(int(pair["count"]) for pair in pairs if pair["label"] == pair["predicted"])
    assert 100 * right / 40 == found["top1"]
    assert sum(int(row["images"]) * float(row["top1"]) for row in by_class) / 40 == pytest.approx(found["top1"])


def with_classes(data: Path, folder: Path, names: list[str] | None) -> Path:
    """The data set in another folder, with other names of its classes."""
    shutil.copytree(data, folder)
    dataset = Dataset.load(folder)
    plain = json.loads((folder / "dataset.json").read_text()) | {"classes": names}
    (folder / "dataset.json").write_text(json.dumps(plain))
    assert dataset.classes != names
    return folder


def test_predict_matches_classes_by_name(
    tuned: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = Dataset.load(tiny_data).classes or []
    turned = with_classes(tiny_data, tmp_path / "turned", names[::-1])
    assert main(["predict", str(tuned), str(turned), "--out", str(tmp_path / "a"), "--workers", "0"]) == 0
    listed, found = rows(tmp_path / "a/predictions.csv"), json.loads((tmp_path / "a/result.json").read_text())
    assert found["classes"] == names
    hits = [row["label"] == row["predicted_1"] for row in listed]
    assert found["top1"] == 100 * sum(hits) / 40
    words = ["embed", str(tuned), str(turned), "--split", "test", "--out", str(tmp_path / "e"), "--workers", "0"]
    assert main(words) == 0
    assert [row["class"] for row in rows(tmp_path / "e/samples.csv")] == [row["label"] for row in listed]

    odd = with_classes(tiny_data, tmp_path / "odd", [*names[:8], "owl", "yak"])
    line = refused(capsys, "predict", tuned, odd, "--out", tmp_path / "b")
    assert "2 of its classes are none of the 10 of" in line
    assert "(owl, yak)" in line
    assert not (tmp_path / "b").exists()
    words = ["predict", str(tuned), str(odd), "--ignore-labels", "--out", str(tmp_path / "b"), "--workers", "0"]
    assert main(words) == 0
    assert {row["label"] for row in rows(tmp_path / "b/predictions.csv")} == {""}
    assert "top1" not in json.loads((tmp_path / "b/result.json").read_text())
    assert np.array_equal(np.load(tmp_path / "a/logits.npy"), np.load(tmp_path / "b/logits.npy"))

    unnamed = with_classes(tiny_data, tmp_path / "unnamed", None)
    assert main(["predict", str(tuned), str(unnamed), "--out", str(tmp_path / "c"), "--workers", "0"]) == 0
    assert "labels are compared by their numbers" in caplog.text
    own = json.loads((tuned / "result.json").read_text())
    assert json.loads((tmp_path / "c/result.json").read_text())["top1"] == own["top1"]


def test_embed_and_predict_refusals_are_one_line(
    tuned: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    arrays = tmp_path / "arrays"
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    cases: list[tuple[list[object], list[str]]] = [
        (["embed", tuned, tiny_data, "--out", tmp_path / "mine"], ["mine: is not empty"]),
        (
            ["embed", tuned, tiny_data, "--out", tmp_path / "o", "--block", "9"],
            ["block 9: vit_demo4 has blocks 1 to 4"],
        ),
        (["embed", tuned, tiny_data, "--out", tmp_path / "o", "--features", "all"], ["invalid choice: 'all'"]),
        (["embed", tuned, tiny_data, "--out", tmp_path / "o", "--split", "dev"], ["'dev'"]),
        (["embed", tuned, tiny_data, "--out", tmp_path / "o", "--processes", "0"], ["0: must be a whole number, 1"]),
        (["embed", tmp_path / "none", tiny_data, "--out", tmp_path / "o"], ["none: no such file or folder"]),
        (["embed", tuned, arrays, "--out", tmp_path / "o"], ["arrays"]),
        (["predict", tmp_path / "x.npz", tiny_data, "--out", tmp_path / "o"], ["x.npz"]),
        (["embed", tuned], ["--out"]),
    ]
    for argv, words in cases:
        line = refused(capsys, *argv)
        assert all(word in line for word in words), line
    assert not (tmp_path / "o").exists()


def test_embed_refuses_arrays_of_other_channels(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        np.save(folder / f"{number}.npy", np.zeros((8, 8, 5), dtype=np.uint8))
    source: list[Any] = ["data", "pack", "folder", "--source", folder, "--out", tmp_path / "packed", "--channels", 5]
    assert main([str(word) for word in source]) == 0
    line = refused(capsys, "embed", tuned, tmp_path / "packed", "--out", tmp_path / "o")
    assert "takes images of 3 channels: " in line
    assert not (tmp_path / "o").exists()
