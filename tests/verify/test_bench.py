"""`mae-dist bench`: benches with small numbers, their files, and mistakes."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from running import refused
from shared_types import Tars

from mae_dist import config, schema
from mae_dist.__main__ import main
from mae_dist.data import loader
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.data.views import View
from mae_dist.run import jsonl
from mae_dist.verify import benchmarks, data_benchmark, gpu_benchmark, step_benchmark
from mae_dist.verify.other_maes import others


def test_bench_order_measures_and_writes_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--samples", "100000", "--shards", "100", "--rounds", "1", "data.shuffle_window=8", "--out", str(tmp_path)]
    assert main(["bench", "order", *words]) == 0
    assert "100,000 samples in 100 shards" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench-order.json").read_text())
    assert found["provenance"]["versions"]["torch"]
    assert found["provenance"]["command"]
    assert found["provenance"]["time"]
    assert found["provenance"]["cores"] >= 1
    assert "data.shuffle_window=8" in found["settings"]
    assert all(measure["value"] > 0 for measure in found["measurements"])
    assert {measure["at_most"] for measure in found["measurements"]} == {None, 1.0, 300.0}
    for position in ("0", str(benchmarks.FAR_POSITION)):
        (costs,) = found["raw"]["by_position"][position]
        assert 0 < costs["increase_mb"] < costs["resident_mb"] < 150, "the memory of another process was measured"


def test_bench_open_simulates_tars_and_leaves_none(tmp_path: Path) -> None:
    assert main(["bench", "open", "--rounds", "1", "--samples", "60", "--shards", "20", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-open.json").read_text())
    assert found["raw"]["rounds"][0]["num_samples"] == 60
    assert [row["at_most"] for row in found["measurements"]] == [2.0, None, 300.0]
    assert not list((tmp_path / "open").glob("shards*"))


@pytest.mark.parametrize(
    ("bench", "model", "at_most"), [("mixer", "mixer_demo4", 1 / 2), ("decoder", "vit_demo4", 1 / 1.5)]
)
def test_bench_of_model_steps_writes_seconds_and_their_ratio(
    bench: str, model: str, at_most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.name={model}", "model.image_size=32", "mae.decoder_dim=64", "mae.decoder_depth=2", "--rounds", "2"]
    assert main(["bench", bench, *words, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "round 2" in output
    assert f"{model}, 4 images a step, fp32" in output
    found = json.loads((tmp_path / f"bench-{bench}.json").read_text())
    one, other = found["raw"]["seconds"].values()
    assert len(one) == len(other) == 2
    ratio, times = found["measurements"][2]["value"], found["measurements"][3]["value"]
    assert found["measurements"][2]["at_most"] == at_most
    assert ratio * times == pytest.approx(1)
    assert (
        min(a / b for a, b in zip(one, other, strict=True))
        <= ratio
        <= max(a / b for a, b in zip(one, other, strict=True))
    )


@pytest.mark.slow
def test_bench_heads_measures_steps_and_whole_commands(tmp_path: Path) -> None:
    pack(from_synthetic(200, 20), tmp_path / "set", shard_size=100)
    words = [f"data.path={tmp_path / 'set'}", "train.steps=8", "train.global_batch=64", "machine.workers=0"]
    assert main(["bench", "heads", *words, "--rounds", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-heads.json").read_text())
    steps, whole = found["raw"]["step"], found["raw"]["whole"]
    assert list(steps) == list(whole) == ["one head", "30 heads", "30 heads, stored features"]
    assert all(0 < steps[name][0] < whole[name][0] for name in steps)
    ratios = {measure["name"]: measure["value"] for measure in found["measurements"] if measure["at_most"] == 1.2}
    for what, seconds in (("step", steps), ("whole command", whole)):
        expected = seconds["30 heads"][0] / seconds["one head"][0]
        assert ratios[f"{what}: 30 heads, ratio to one head"] == pytest.approx(expected)


def test_bench_resume_copies_a_run_to_a_far_step(tmp_path: Path) -> None:
    origin, far = tmp_path / "origin", tmp_path / "far"
    saved = origin / "checkpoints" / "step-000000002"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"step": 2, "files": {}}))
    (origin / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    benchmarks.copy_to_far_step(origin, far)
    benchmarks.fill_metrics(far / "metrics.jsonl")
    moved = far / "checkpoints" / f"step-{benchmarks.FAR_STEP:09d}"
    assert json.loads((moved / "manifest.json").read_text()) == {"step": benchmarks.FAR_STEP, "files": {}}
    lines = (far / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == benchmarks.FAR_STEP
    assert json.loads(lines[-1]) == {"step": benchmarks.FAR_STEP, "loss": 0.5}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["speed"], ["bench speed", "resume, order, open, save, scaling, heads, mixer, decoder"]),
        (["order", "--shards", "0"], ["--shards 0", "1 or more"]),
        (["order", "--shards", "many"], ["--shards", "many"]),
        (["save", "--shards", "5"], ["--shards"]),
        (["save", "checkpoint.evry=3"], ["checkpoint.evry", "checkpoint.every"]),
        (["save", "config.yaml"], ["config.yaml", "no such file"]),
        (["resume", "data.path=/nowhere"], ["data.path=/nowhere", "no such folder"]),
    ],
)
def test_bench_refuses_mistakes_in_one_line(
    argv: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "bench", *argv, "--out", tmp_path / "out")
    for part in parts:
        assert part in message


def test_bench_loaders_compares_ours_with_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "RESIDENT_BYTES", 0)
    pack(from_synthetic(40, 10), tmp_path / "set", shard_size=20)
    words = [str(tmp_path / "set"), "model.image_size=16", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["bench", "loaders", *words]) == 0
    output = capsys.readouterr().out
    rates = json.loads((tmp_path / "bench-loaders.json").read_text())["raw"]["rates"]
    assert {"torchvision v2 on tensors", "decoding alone (simplejpeg)"} < rates.keys()
    assert all(len(values) == 1 and values[0] > 0 for values in rates.values())
    assert next(iter(rates)).startswith("mae_dist")
    assert ("DALI on the CPU" in rates) != ("left out: DALI on the CPU (" in output)
    assert main(["bench", "loaders", *words, "view.randaugment=rand-m9", "view.random_erasing=0.5"]) == 0
    rates = json.loads((tmp_path / "bench-loaders.json").read_text())["raw"]["rates"]
    assert list(rates) == ["mae_dist, normalised on the CPU", "timm's create_transform"]


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_bench_loaders_of_small_images_compares_with_cifar100(crop: str, tiny_data: Path, tmp_path: Path) -> None:
    words = [str(tiny_data), "model.image_size=32", f"view.crop={crop}", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["bench", "loaders", *words]) == 0
    rates = json.loads((tmp_path / "bench-loaders.json").read_text())["raw"]["rates"]
    assert list(rates) == ["mae_dist, images in memory", "torchvision's CIFAR100, DataLoader"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_bench_data_names_parts_loader_step_and_what_to_change(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "RESIDENT_BYTES", 2**31 if in_memory else 0)
    pack(from_synthetic(40, 10), tmp_path / "set", shard_size=20)
    words = [f"data.path={tmp_path / 'set'}", "model.name=vit_demo4", "model.image_size=32", "machine.workers=1"]
    small = ["train.precision=fp32", "--rounds", "1", "--images", "64"]
    assert main(["bench", "data", *words, *small, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-data.json").read_text())
    assert found["conclusion"] in capsys.readouterr().out
    assert ("fast enough" in found["conclusion"]) == (found["measurements"][-1]["value"] >= data_benchmark.ENOUGH)
    parts = found["raw"]["seconds"]
    assert (parts == {}) == in_memory
    assert in_memory or {"read", "decode", "normalise, erase"} <= parts.keys()


@pytest.mark.parametrize(
    ("rate", "step", "side", "workers", "expected"),
    [(120, 100, 64, 1, "1.2 times the rate"), (50, 100, 64, 1, "machine.workers=2 "),
     (50, 100, 64, 2, "--short-side 16"), (50, 1e5, 64, 1, "--short-side 16"), (50, 1e5, 16, 1, "--format npy")],
)  # fmt: skip
def test_bench_data_advice(rate: float, step: float, side: int, workers: int, expected: str, tars: Tars) -> None:
    index = tars([4], size=(side, side + 8))
    view = View(schema.ViewConfig(), 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0, True)
    assert expected in data_benchmark.advice(rate, step, 60, index, view, workers)


@pytest.mark.parametrize("name", ["data", "loaders"])
def test_bench_of_loading_needs_images(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"`mae-dist bench {name} DATA`" in refused(capsys, "bench", name, "--out", tmp_path)
    assert "one DATA, not also b; quote a glob" in refused(capsys, "bench", name, "a", "b", "--out", tmp_path)


def test_bench_step_measures_parts_and_others_and_compares_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_benchmark, "TABLE", tmp_path / "steps.jsonl")
    words = ["bench", "step", "train.global_batch=4", "--eager", "--rounds", "1", "--out", str(tmp_path)]
    assert main([*words, "--record"]) == 0
    found = {row["name"]: row for row in json.loads((tmp_path / "bench-step.json").read_text())["measurements"]}
    assert all(row["value"] > 0 for row in found.values())
    assert {"eager: forward", "eager: backward", "eager: update", "draw of masks", "draw of crops"} < found.keys()
    assert {f"{name}: forward and backward" for name in ("timm's blocks", "transformers' ViTMAE")} < found.keys()
    assert {"eager, 2 at once", "eager, 1 at once"} < found.keys()
    (row,) = jsonl.read(tmp_path / "steps.jsonl")
    assert row["share"] == pytest.approx(found["eager: of the peak"]["value"], abs=1e-4)
    jsonl.write_atomic(tmp_path / "steps.jsonl", json.dumps(row | {"share": 1000.0}) + "\n")
    assert main(words) == 0
    assert "at least 950 MISSED" in capsys.readouterr().out
    assert main([*words, "mae.decoder=cross", "--record"]) == 0, "another model: a row beside the first, without others"
    assert "timm" not in capsys.readouterr().out
    assert [row["decoder"][:5] for row in jsonl.read(tmp_path / "steps.jsonl")] == ["full ", "cross"]


def test_bench_step_of_a_recipe_takes_fewer_images_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_benchmark, "MOST_WORK", {"cpu": 3e9})  # the batch is 256, an image 0.7 GFLOPs
    words = ["bench", "step", "configs/pretrain/cifar100_vit_ti4.yaml", "train.precision=fp32", "mae.decoder=cross"]
    assert main([*words, "--eager", "--rounds", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    found = re.search(r"a step of (\d) images instead of the recipe's 256; train.global_batch=N takes N", said)
    assert found
    assert f"vit_ti4, {found[1]} images of 32 px" in " ".join(said.split())


def test_bench_step_compares_with_maes_of_equally_many_parameters() -> None:
    settings = config.load("pretrain", None, ["model.name=vit_demo4", "model.image_size=32", "data.path=x", "out=y"])
    ours, images = step_benchmark.mae_of(settings), torch.randn(2, 3, 32, 32)
    sizes, losses = [], []
    for _, module, loss in others(settings):
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
        losses.append(loss(images).item())
    assert sizes == [sum(parameter.numel() for parameter in ours.parameters())] * 2
    assert all(0.5 < loss < 3 for loss in losses)


def test_bench_gpu_keeps_every_row_and_goes_on_after_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel for this device\nat line 7")

    monkeypatch.setattr(gpu_benchmark, "quiet_step", broken)
    monkeypatch.setattr(gpu_benchmark, "RESIDENT_IMAGES", 40)
    pack(from_synthetic(40, 10), tmp_path / "set", shard_size=20)
    assert main(["bench", "gpu", str(tmp_path / "set"), "--rounds", "1", "--images", "40", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu" / "rows.jsonl").read_text().splitlines()]
    assert {"part": "step without a wait", "left_out": "no kernel for this device"} in rows
    measured = {row["part"]: row["value"] for row in rows if "value" in row}
    assert measured.keys() == {"vit_demo4", "loading", "images in memory"}
    assert all(value > 0 for value in measured.values())
    kept = json.loads((tmp_path / "bench-gpu.json").read_text())["measurements"]
    assert [row["value"] for row in kept] == [row["value"] for row in rows if "value" in row]


def test_bench_gpu_starts_no_part_after_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 1000.0)
    monkeypatch.setattr(gpu_benchmark.time, "monotonic", lambda: next(clock))
    pack(from_synthetic(40, 10), tmp_path / "set", shard_size=20)
    assert main(["bench", "gpu", str(tmp_path / "set"), "--minutes", "1", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu" / "rows.jsonl").read_text().splitlines()]
    assert rows
    assert all("minutes were used up" in row["left_out"] for row in rows)
