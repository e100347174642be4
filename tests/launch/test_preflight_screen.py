"""`mae-dist preflight`: a trial on this machine, clusters with other devices, what limits a run, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import SMALL
from running import refused

from launch import preflight_screen, submit
from mae_dist import config
from mae_dist.__main__ import main
from mae_dist.data import loader
from mae_dist.forecast import Forecast, Loading, Place, Rate
from mae_dist.stages import trial

H100S = "nodes: 2\ngpus_per_node: 8\ngpu: H100\ncpus_per_task: 12\ntime: '1:00:00'\n"
TINY = [*SMALL, "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4", "machine.workers=1"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of as few steps and batches as there can be."""
    for name, value in {"SECONDS": 0.0, "FEWEST": 1, "LOADING_SECONDS": 0.0, "TURNS": 1}.items():
        monkeypatch.setattr(trial, name, value)


def facts_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What `mae-dist preflight WORDS --json` prints."""
    capsys.readouterr()
    assert main(["preflight", *map(str, words), "--json"]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_preflight_tries_the_run_here_and_the_run_then_starts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={data}", *TINY, f"out={tmp_path / 'run'}", "train.steps=2", "track.wandb=off"]
    assert main(["preflight", *words]) == 0
    screen = capsys.readouterr().out
    for part in ("pretrain of vit_demo4 at 32 px", "fits: ", "32 images, an epoch is 2 steps; 2 steps are 1 epoch",
                 "measured here, 16 images at once", "core-hours", "a checkpoint, 3 at most", "It fits, "):  # fmt: skip
        assert part in screen
    expected = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert expected["fits"]
    assert 0 < expected["images_per_second"] < min(expected["step_ceiling"], expected["loader_ceiling"])
    assert not expected["extrapolated"]
    assert main(["pretrain", *words]) == 0, "the file of a preflight is in the way of the run"
    assert "this run is finished" in refused(capsys, "preflight", *words)


@pytest.mark.parametrize(
    ("words", "in_memory"),
    [(["finetune", "init_from=random", "mix.mixup=0.8", "optim.name=muon"], False),
     (["probe", "init_from=random", "heads.adamw=[0.01]"], True),
     (["probe", "init_from=random", "heads.adamw=[0.01]", "view.crop=center", "view.flip=0"], True),
     (["pretrain", "machine.processes=2", "train.ema=0.9", *TINY], False)],
    ids=["finetune", "probe", "stored features", "pretrain"],
)  # fmt: skip
def test_preflight_of_other_verbs_and_tars(
    words: list[str], in_memory: bool, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "RESIDENT_BYTES", 2**31 if in_memory else 0)
    monkeypatch.setattr(trial, "STEP_SECONDS", 1e-9)  # fewest images at once
    found = facts_of(capsys, *words, f"data.path={data}", *SMALL, "machine.workers=1")
    assert found["verb"] == words[0]
    assert found["images_per_second"] <= found["step_ceiling"]
    at_once = 16 if "view.crop=center" in words else 2 if words[0] == "finetune" else 1  # of features: all
    assert f", {at_once} images at once" in found["step_known"]
    assert found["extrapolated"] == ("machine.processes=2" in words)


def test_preflight_for_gpus_elsewhere_says_what_is_extrapolated(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(H100S)
    words = ["pretrain", "imagenet_vit_b16", data, "--cluster", tmp_path / "c.yaml", "machine.workers=1"]
    found = facts_of(capsys, *words, "train.steps=600000", "machine.micro_batch=256")
    assert found["place"]["device"] == "H100"
    assert found["place"]["ranks"] == 16
    assert found["extrapolated"]
    assert found["images_per_second"] == pytest.approx(16 * 0.95 * 4173, rel=0.15), "as measured"
    assert found["loader_ceiling"] is None
    assert found["requeues"] > 5
    assert found["seconds_between_checkpoints"] <= 1800
    chosen = config.load("pretrain", None, [f"data.path={data}", "out=x", *SMALL])
    screen = preflight_screen.lines(preflight_screen.without_trial("pretrain", chosen, Place(is_gpu=True)))
    assert any("the device is neither here nor in a table" in line for line in screen)
    assert any(line.startswith("  memory    takes: ") for line in screen)
    assert (
        screen[-1]
        == "Whether it fits is not known, as the device's memory is not; what limits its speed is not known here."
    )


def test_preflight_names_what_does_not_fit_and_ends_with_status_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(H100S.replace("H100", "V100"))
    words = ["imagenet_vit_l16", data, "--cluster", tmp_path / "c.yaml", "train.steps=10", "machine.workers=1"]
    assert main(["preflight", *map(str, words), "machine.micro_batch=256"]) == 1
    screen = capsys.readouterr().out
    assert "does not fit: " in screen
    assert "of 16 GB" in screen
    last = " ".join(screen.splitlines()[-2:])
    assert last.endswith(
        "It does not fit into the memory of a rank: set machine.micro_batch=64 machine.activation_checkpointing=0."
    )


def forecast_of(
    *words: str, step: float, loader: float | None, is_gpu: bool = True, serial: bool = False, **facts: Any
) -> Forecast:
    chosen = config.load("pretrain", None, ["data.path=x", "out=y", "model.name=vit_b16", *words])
    loading = None if loader is None else Loading(loader, 1, serial)
    place = Place(1, 1, facts.pop("cores", 8), "H100", is_gpu, 80e9, facts.pop("limit", None), unused=240)
    num_samples = facts.pop("num_samples", 10**6)
    rate = Rate(step, "measured", False, facts.pop("by_host", False))
    return Forecast(
        "pretrain", preflight_screen.with_precision(chosen, place), place, num_samples, 0, rate, loading, **facts
    )


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (forecast_of(step=1000, loader=100), "takes 60% of its speed: pack the images once with `mae-dist"),
        (forecast_of(step=500, loader=100), "loading takes 20% of its speed: set machine.workers=6."),
        (forecast_of("machine.workers=0", step=500, loader=100, serial=True), "83% of its speed: set machine.workers"),
        (forecast_of(step=500, loader=500, serial=True), "view.crop=pad is faster"),
        (forecast_of("machine.micro_batch=64", step=400, loader=900), "computing limits it: machine.micro_batch=1024"),
        (forecast_of(step=9, loader=None, by_host=True), "kernels, limits it: machine.micro_batch=1024 or mac"),
        (forecast_of("machine.compile=true", step=9, loader=900, is_gpu=False), "computing limits it: more ranks may"),
        (forecast_of("train.precision=fp32", step=9, loader=None), "computing limits it: train.precision=bf16 or"),
        (forecast_of("train.precision=fp16", step=9, loader=9e9, is_gpu=False), "limits it: train.precision="),
        (forecast_of("checkpoint.keep=9", step=9, loader=None, free=10e9), "the disk: lower checkpoint.keep, or"),
        (forecast_of("checkpoint.keep_every=1", step=9, loader=None, free=10e9), "disk: raise checkpoint.keep_every"),
    ],
)  # fmt: skip
def test_preflight_limit_is_a_sentence_with_the_setting_to_change(found: Forecast, sentence: str) -> None:
    assert sentence in preflight_screen.limit(found)


@pytest.mark.parametrize(
    ("words", "facts", "warning"),
    [
        (["train.global_batch=512"], {"num_samples": 600}, "train.global_batch=512: an epoch of 600 images is 1.2"),
        (["optim.warmup_epochs=5", "train.steps=4"], {}, "optim.warmup_epochs=5: the run has 0.0041"),
        (["train.resolutions=[[0,112],[0.5,224]]"], {}, "those of the last resolution"),
        ([], {"limit": 600}, "time: 40% of each job is start and stop"),
        (["checkpoint.minutes=60"], {"limit": 3600}, "no checkpoint falls into a job"),
        (["train.global_batch=65536"], {"limit": 300}, "time: a step takes 10.9 min, longer than a job"),
    ],
)
def test_preflight_warns_of_what_is_seldom_meant(words: list[str], facts: dict[str, Any], warning: str) -> None:
    found = [*preflight_screen.warnings(forecast_of(*words, step=100, loader=None, **facts))]
    assert any(warning in sentence for sentence in found), found
    assert not [*preflight_screen.warnings(forecast_of(step=100, loader=None))]


def test_submit_prints_what_is_expected_and_warns_of_what_does_not_fit(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.yaml").write_text("nodes: 1\ngpus_per_node: 2\ngpu: H100\ntime: '1:00:00'\n")
    words = ["pretrain", "--cluster", str(tmp_path / "c.yaml"), f"data.path={data}", f"out={tmp_path / 'run'}", *SMALL]
    assert submit.main([*words, "--dry-run"]) == 0
    assert "#   memory    fits: " in capsys.readouterr().out
    assert "fit" not in caplog.text
    assert submit.main([*words, "train.steps=10000000", "checkpoint.keep_every=1"]) == 0
    assert "pretrain: Its checkpoints do not fit on the disk: raise checkpoint.keep_every" in caplog.text
    assert slurm.is_dir()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["knn", "data.path=DATA"], "preflight knn: trains nothing; give one of pretrain, probe, finetune"),
        (["imagenet_vit_b16", "a", "b"], "one CONFIG.yaml and one DATA, not also b; quote a glob"),
        (["imagnet_vit_b16", "DATA"], "did you mean the recipe imagenet_vit_b16?"),
        (["DATA", "model.name=vit_demo4", "--nodes", "2"], "--nodes: overrides a field of a cluster file"),
        (["imagenet_vit_b16"], "data.path=..."),
        (["DATA", "model.name=vit_demo4", "model.image_size=30"], "model.image_size=30: not divisible"),
        (["DATA", "model.name=vit_demo", "train.steps=1"], "model.name=vit_demo: no such model"),
        (["probe", "DATA", "model.name=vit_demo4", "init_from=random", "heads.ridge=true"], "train in no steps"),
    ],
)
def test_preflight_refuses_mistakes_in_one_line(
    words: list[str], part: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(capsys, "preflight", *(word.replace("DATA", str(data)) for word in words))


def test_preflight_takes_a_recipe_beside_a_model_and_data_and_refuses_what_the_run_would() -> None:
    recipe = "configs/pretrain/cifar100_vit_ti4.yaml"
    for words in ([recipe, "data.path=d"], ["d"], [recipe, "d"], ["cifar100_vit_ti4"]):
        _, file, settings = preflight_screen.read_words([*words, "model.name=vit_demo4"])
        assert (file is not None) == (words != ["d"])
        assert ("data.path=d" in settings) == (words != ["cifar100_vit_ti4"])
    settings = config.load("pretrain", recipe, ["data.path=d", "out=o", "machine.cuda_graphs=true"])
    with pytest.raises(ValueError, match="machine.cuda_graphs=true: one rank with a GPU"):
        config.check_world(settings, 2)
