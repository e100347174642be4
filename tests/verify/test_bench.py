"""Benches: the order's for real, with smaller numbers; the file is whole; mistakes end with one line."""

import json
from pathlib import Path

import pytest

from mae_dist.__main__ import main
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.verify import benchmarks


def test_the_order_bench_gives_numbers_and_a_whole_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--samples", "100000", "--shards", "100", "--rounds", "1", "data.shuffle_window=8", "--out", str(tmp_path)]
    assert main(["bench", "order", *words]) == 0
    assert "100,000 samples in 100 shards" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench-order.json").read_text())
    assert found["provenance"]["versions"]["torch"]
    assert found["provenance"]["command"]
    assert found["provenance"]["time"]
    assert found["provenance"]["cores"] >= 1
    assert "data.shuffle_window=8" in found["settings"]
    assert all(measure["value"] > 0 for measure in found["measures"])
    assert {measure["at_most"] for measure in found["measures"]} == {None, 1.0, 300.0}
    for position in ("0", str(benchmarks.FAR_POSITION)):
        (costs,) = found["samples"]["by_position"][position]
        assert 0 < costs["increase_mb"] < costs["resident_mb"] < 150, "the memory of another process was measured"


@pytest.mark.parametrize(
    ("bench", "model", "at_most"), [("mixer", "mixer_demo4", 1 / 2), ("decoder", "vit_demo4", 1 / 1.5)]
)
def test_the_benches_of_steps_give_times_and_a_ratio(
    bench: str, model: str, at_most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.name={model}", "model.image_size=32", "mae.decoder_dim=64", "mae.decoder_depth=2", "--rounds", "2"]
    assert main(["bench", bench, *words, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "round 2" in said
    assert f"{model}, 4 images a step, fp32" in said
    found = json.loads((tmp_path / f"bench-{bench}.json").read_text())
    one, other = found["samples"]["seconds"].values()
    assert len(one) == len(other) == 2
    ratio, times = found["measures"][2]["value"], found["measures"][3]["value"]
    assert found["measures"][2]["at_most"] == at_most
    assert ratio * times == pytest.approx(1)
    assert (
        min(a / b for a, b in zip(one, other, strict=True))
        <= ratio
        <= max(a / b for a, b in zip(one, other, strict=True))
    )


@pytest.mark.slow
def test_the_bench_of_the_board_compares_steps_and_whole_commands(tmp_path: Path) -> None:
    pack(from_synthetic(200, 20), tmp_path / "set", shard_size=100)
    words = [f"data.path={tmp_path / 'set'}", "train.steps=8", "train.global_batch=64", "machine.workers=0"]
    assert main(["bench", "board", *words, "--rounds", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-heads.json").read_text())
    steps, whole = found["samples"]["step"], found["samples"]["whole"]
    assert list(steps) == list(whole) == ["one head", "30 heads", "30 heads, features kept"]
    assert all(0 < steps[name][0] < whole[name][0] for name in steps)
    ratios = {measure["what"]: measure["value"] for measure in found["measures"] if measure["at_most"] == 1.2}
    for what, seconds in (("step", steps), ("whole command", whole)):
        expected = seconds["30 heads"][0] / seconds["one head"][0]
        assert ratios[f"{what}: 30 heads, ratio to one head"] == pytest.approx(expected)


def test_a_run_is_made_to_look_as_at_a_far_step(tmp_path: Path) -> None:
    origin, far = tmp_path / "origin", tmp_path / "far"
    saved = origin / "checkpoints" / "step-000000002"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"step": 2, "files": {}}))
    (origin / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    benchmarks.fake_position(origin, far)
    benchmarks.fill_metrics(far / "metrics.jsonl")
    moved = far / "checkpoints" / f"step-{benchmarks.FAR_STEP:09d}"
    assert json.loads((moved / "manifest.json").read_text()) == {"step": benchmarks.FAR_STEP, "files": {}}
    lines = (far / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == benchmarks.FAR_STEP
    assert json.loads(lines[-1]) == {"step": benchmarks.FAR_STEP, "loss": 0.5}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["speed"], ["bench speed", "resume, order, save, scaling, board, mixer, decoder"]),
        (["order", "--shards", "0"], ["--shards 0", "1 or more"]),
        (["order", "--shards", "many"], ["--shards", "many"]),
        (["save", "--shards", "5"], ["--shards"]),
        (["save", "checkpoint.evry=3"], ["checkpoint.evry", "checkpoint.every"]),
        (["save", "config.yaml"], ["config.yaml", "section.key=value"]),
        (["resume", "data.path=/nowhere"], ["data.path=/nowhere", "no such folder"]),
    ],
)
def test_mistakes_end_with_one_line(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    for part in parts:
        assert part in said[0]
