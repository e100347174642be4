"""`probe` with several heads: the best is chosen on held-out samples, on any ranks; stored features; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import finish_ranks, kill_ranks_when, losses, refused, start_ranks, weights

from mae_dist.__main__ import main
from mae_dist.data.pack import pack
from mae_dist.data.resident import ResidentSource
from mae_dist.data.sources import from_synthetic
from mae_dist.data.views import View
from mae_dist.objectives.probe_heads import held_out

SETTINGS = [
    "model.name=vit_demo4", "model.image_size=16", "view.test_crop=1", "train.global_batch=32", "train.precision=fp32",
    "track.every=1", "machine.restarts=0", "init_from=random", "heads.lars=[1,10]", "heads.sgd=[0.1]",
    "heads.adamw=[1e-2]", "heads.features=[cls,mean]",
]  # fmt: skip
FIXED = ["view.crop=center", "view.flip=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 350 training and 60 test images."""
    folder = tmp_path_factory.mktemp("data") / "set"
    pack(from_synthetic(350, 60), folder, shard_size=150)
    return folder


def read(run: Path, name: str = "heads.json") -> dict[str, Any]:
    return json.loads((run / name).read_text())


def argv(data: Path, out: Path, *more: str) -> list[str]:
    return ["probe", f"data.path={data}", f"out={out}", *SETTINGS, *more]


def test_probe_heads_best_is_chosen_on_held_out_samples_and_tested_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated: list[str] = []
    plain = ResidentSource.batches

    def watched(self: ResidentSource, plan: Any, view: View) -> Any:
        for batch in plain(self, plan, view):
            evaluated.extend([self.index.tars[0].parent.name] if len(self.index) == 60 else [])
            yield batch

    monkeypatch.setattr(ResidentSource, "batches", watched)
    out = tmp_path / "run"
    more = ["train.steps=8", "heads.sgd=[0.1,1e9]", "heads.weight_decay=[1]", "heads.ridge=true", "heads.knn=true"]
    assert main(argv(data, out, *more, "track.evaluate_every=0.1")) == 0
    assert len(evaluated) == 1, "the test split was read more than once"
    found, result = read(out), read(out, "result.json")
    assert len(found["rows"]) == 2 * (2 + 2 + 1) + 2 * 8 + 2
    best = max((row for row in found["rows"] if not row["diverged"]), key=lambda row: row["held_out_top1"])
    assert found["held_out_top1"] == result["held_out_top1"] == best["held_out_top1"]
    assert result["chosen"] in {row["name"] for row in found["rows"] if row["held_out_top1"] == best["held_out_top1"]}
    assert {row["base_lr"] for row in found["rows"] if row["diverged"]} == {1e9}
    assert result["diverged"] == 2
    assert result["num_held_out"] == held_out(0, 0.1, np.arange(350)).sum()
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]
    table = (out / "heads.md").read_text()
    assert result["chosen"] in table
    assert table.count("| diverged |") == 2
    output = capsys.readouterr().out
    assert result["chosen"] in output
    assert f"interval {result['interval'][0]:.4g} to {result['interval'][1]:.4g}" in output
    assert "heads.md" in output
    assert main(["report", str(out)]) == 0
    assert main(["replay", str(out), "--step", "8"]) == 0


def test_probe_heads_ridge_alone_needs_no_training(data: Path, tmp_path: Path) -> None:
    settings = [setting for setting in SETTINGS if not setting.startswith("heads.")]
    shared = ["probe", f"data.path={data}", *settings, "heads.ridge=true", "heads.features=[mean]"]
    for name, fixed in (("stored", FIXED), ("shown", [])):
        assert main([*shared, *fixed, "model.name=mixer_demo4", f"out={tmp_path / name}"]) == 0
    one, two = ([row["held_out_top1"] for row in read(tmp_path / n)["rows"]] for n in ("stored", "shown"))
    assert one == two
    assert len(one) == 8
    assert (tmp_path / "stored/features").is_dir()
    assert not (tmp_path / "shown/features").exists()


@pytest.mark.slow
def test_probe_heads_are_elastic_and_resume_after_sigkill(data: Path, tmp_path: Path) -> None:
    shared = [*FIXED, "heads.attentive=true", "train.steps=16", "checkpoint.every=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(argv(data, one, *shared, "machine.processes=1")) == 0
    log, full = tmp_path / "log", argv(data, two, *shared)
    saved = two / "checkpoints/step-000000004"  # written in the background, so it may be there later than step 6
    kill_ranks_when(start_ranks(2, *full, log=log), lambda: saved.is_dir() and len(losses(two)) >= 6, log)
    assert not (two / "result.json").exists()
    log.unlink()
    finish_ranks(start_ranks(2, *full, log=log), log)
    output = log.read_text()
    assert "resumed at step" in output
    assert "features:" not in output, "computed again"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for file in sorted((one / "features").rglob("*.npy")):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes()
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name in first:
        if name.startswith("model.linears"):
            torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)
    for mine, other in zip(read(one)["rows"], read(two)["rows"], strict=True):
        assert mine["name"] == other["name"]
        assert other["held_out_top1"] == pytest.approx(mine["held_out_top1"], abs=3)


def test_probe_heads_mistakes_print_one_line_and_write_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    cases = [
        (["model.name=mixer_demo4"], ["heads.features=[cls, mean]", "no class token", "heads.features=[mean]"]),
        (["heads.blocks=[2,5]"], ["heads.blocks=[2, 5]", "blocks 1 to 4"]),
        (["heads.blocks=[0]"], ["heads.blocks", "at least 1"]),
        (["heads.held_out=1"], ["heads.held_out=1", "less than 1"]),
        (["heads.held_out=0"], ["heads.held_out=0", "greater than 0"]),
        (["heads.held_out=1e-6"], ["heads.held_out=1e-06", "0 of the 350"]),
        (["heads.lars=[0]"], ["heads.lars", "greater than 0"]),
        (["heads.lars=[many]"], ["heads.lars", "must be a list of numbers"]),
        (["heads.features=[]"], ["heads.features=[]"]),
        (["heads.features=[token]"], ["heads.features", "cls"]),
        (["heads.weight_decay=[-1]"], ["heads.weight_decay", "at least 0"]),
        (["heads.adamw=[]", "heads.attentive=true"], ["heads.attentive", "heads.adamw"]),
        (["train.clip_grad=1"], ["train.clip_grad=1", "several heads"]),
    ]
    for more, expected in cases:
        line = refused(capsys, *argv(data, out, *more))
        for part in expected:
            assert part in line, (line, part)
        assert "VALUE" not in line
        assert not out.exists()


def test_features_of_another_checkpoint_of_init_from_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(argv(data, out, *FIXED, "train.steps=2")) == 0
    (out / "result.json").unlink()
    (out / "features/start.txt").write_text("another\n")
    assert "another checkpoint" in refused(capsys, *argv(data, out, *FIXED, "train.steps=2"))


def test_probe_without_heads_settings_has_one_linear_head(data: Path, tmp_path: Path) -> None:
    plain = [setting for setting in SETTINGS if not setting.startswith("heads.")]
    assert main(["probe", f"data.path={data}", f"out={tmp_path / 'run'}", *plain, "train.steps=2"]) == 0
    assert not (tmp_path / "run/heads.json").exists()
    assert {n for n in weights(tmp_path / "run") if "head" in n and n.startswith("model")} == {
        "model.head.weight", "model.head.bias",
    }  # fmt: skip
