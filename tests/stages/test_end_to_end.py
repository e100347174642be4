"""The promises of whole runs, with real processes: resume, other world sizes, damaged checkpoints, user errors."""

import json
import os
import shutil
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from running import (
    MAE,
    SETTINGS,
    finish_ranks,
    losses,
    refused,
    start,
    start_forked,
    start_ranks,
    weights,
)  # fmt: skip
from safetensors.torch import load_file

from mae_dist import dist, rendezvous
from mae_dist.__main__ import main
from mae_dist.errors import RankLost
from mae_dist.models.vit import class_and_grid
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir
from mae_dist.schema import SCHEMAS
from mae_dist.verify import compare


@pytest.fixture(scope="session")
def pretrained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining run of 2 steps."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    words = ["pretrain", f"data.path={tiny_data}", f"out={out}", *SETTINGS, *MAE, "train.steps=2", "checkpoint.every=1"]
    assert main(words) == 0
    return out


def meet_nobody() -> None:
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    rendezvous.LEAST_RENDEZVOUS = timedelta(seconds=1)
    with pytest.raises(RankLost, match="^rank 1 did not meet the others within 1 s of its start"):
        dist.setup(timeout=0.5)


def test_a_rank_that_meets_nobody_says_so() -> None:
    alone = start_forked(meet_nobody)
    alone.join(60)
    assert alone.exitcode == 0


def test_precision_auto_is_recorded_and_a_finished_run_keeps_it(
    tiny_data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for word in SETTINGS if not word.startswith("train.precision")]
    words = ["knn", f"data.path={tiny_data}", f"init_from={pretrained}", f"out={tmp_path / 'knn'}", *settings]
    assert main(words) == main([*words, "train.precision=auto"]) == main([*words, "train.precision=fp32"]) == 0
    assert RunDir(tmp_path / "knn").settings()[2].train.precision == "fp32"
    assert main([*words, "train.precision=bf16"]) == 2
    assert "(train.precision: fp32 -> bf16); choose another out=" in capsys.readouterr().err


def test_a_probe_is_the_same_on_any_world(tiny_data: Path, pretrained: Path, tmp_path: Path) -> None:
    shared = [
        "probe",
        f"data.path={tiny_data}",
        f"init_from={pretrained}",
        *SETTINGS,
        "train.steps=3",
        "optim.base_lr=30",
    ]
    assert main([*shared, f"out={tmp_path / 'one'}", "machine.micro_batch=3"]) == 0
    log = tmp_path / "log"
    finish_ranks(start_ranks(3, *shared, f"out={tmp_path / 'three'}", log=log), log)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    for name in ("model.norm.running_mean", "model.norm.running_var", "model.head.weight"):
        torch.testing.assert_close(three[name], one[name], rtol=1e-4, atol=1e-6)


EVERYTHING = [
    "view.crop=pad", "view.randaugment=rand-m9-mstd0.5-inc1", "view.random_erasing=0.5", "mix.mixup=0.8",
    "mix.cutmix=1", "train.label_smoothing=0.1", "model.drop_path=0.2", "train.ema=0.9", "train.clip_grad=1",
    "optim.base_lr=1e-2", "data.aug_repeats=3", "track.ids=true",
    "train.global_batch=22", "train.steps=2", "machine.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def augmented(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning with every augmentation on one rank."""
    out = tmp_path_factory.mktemp("augmented") / "one"
    assert main(["finetune", f"data.path={tiny_data}", "init_from=random", *SETTINGS, *EVERYTHING, f"out={out}"]) == 0
    return out


def assert_like(run: Path, one: Path) -> None:
    """The same losses, and the planned samples, of which some are three times in a batch."""
    planned = compare.planned_samples(compare.planned_order(RunDir(one).settings()[2]), 22, range(1, 3))
    assert max(Counter(id_ for samples in planned.values() for _, id_ in samples).values()) >= 3
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)
    for each in (run, one):
        assert compare.read_evidence(each).samples == planned


def test_fine_tuning_with_every_augmentation_is_the_same_in_micro_batches(
    tiny_data: Path, augmented: Path, tmp_path: Path
) -> None:
    """Pairs are mixed whole though 4 and 4 are computed at once."""
    shared = ["finetune", f"data.path={tiny_data}", "init_from=random", *SETTINGS, *EVERYTHING]
    assert main([*shared, f"out={tmp_path / 'parts'}", "machine.micro_batch=5", "machine.workers=0"]) == 0
    assert_like(tmp_path / "parts", augmented)
    one, parts = weights(augmented), weights(tmp_path / "parts")
    for name in ("ema.head.weight", "ema.backbone.patch_embed.proj.weight"):
        torch.testing.assert_close(parts[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_fine_tuning_with_every_augmentation_is_the_same_on_hsdp_ranks(
    tiny_data: Path, augmented: Path, tmp_path: Path
) -> None:
    """Pairs are mixed whole though shares are 6, 6, 6 and 4."""
    shared = ["finetune", f"data.path={tiny_data}", "init_from=random", *SETTINGS, *EVERYTHING]
    hsdp, log = ["machine.strategy=hsdp", "machine.shards=2"], tmp_path / "log"
    finish_ranks(start_ranks(4, *shared, f"out={tmp_path / 'four'}", *hsdp, log=log), log)
    assert_like(tmp_path / "four", augmented)
    whole, sharded = (RunDir(run).checkpoints()[-1] for run in (augmented, tmp_path / "four"))
    assert checkpoint.names_in(sharded) == checkpoint.names_in(whole)
    assert num_values(sharded) == num_values(whole)  # two copies, of which one is written


def test_deterministic_algorithms_exist_for_everything(tiny_data: Path, tmp_path: Path) -> None:
    """torch raises an error where one is missing, and the next run of a process takes any again."""
    shared = ["finetune", f"data.path={tiny_data}", "init_from=random", *SETTINGS, *EVERYTHING, "train.steps=1"]
    for name, enabled in (("yes", True), ("no", False)):
        assert main([*shared, f"out={tmp_path / name}", f"machine.deterministic={enabled}", "machine.workers=0"]) == 0
        assert torch.are_deterministic_algorithms_enabled() == enabled
    assert losses(tmp_path / "yes") == losses(tmp_path / "no")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_runs_on_a_gpu_have_the_same_bits(
    precision: str, compiled: bool, tiny_data: Path, tmp_path: Path
) -> None:
    shared = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE, "train.steps=6", f"train.precision={precision}"]
    for run in ("first", "second"):
        start(*shared, f"out={tmp_path / run}", "machine.deterministic=true", f"machine.compile={compiled}")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def num_values(folder: Path) -> int:
    """Numbers in the files of a checkpoint."""
    return sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def test_the_stages_follow_each_other(tiny_data: Path, pretrained: Path, tmp_path: Path) -> None:
    shared = [f"data.path={tiny_data}", *SETTINGS]
    training = ["train.steps=1"]
    alone = ["machine.strategy=hsdp", "machine.shards=1"]
    half = [*training, "train.precision=bf16", "model.image_size=16"]  # slow where a CPU has no such numbers
    for verb, settings in {"knn": alone, "probe": half, "finetune": [*training, "model.drop_path=0.1"]}.items():
        out = tmp_path / verb
        assert main([verb, *shared, *settings, "model.pool=avg", f"init_from={pretrained}", f"out={out}"]) == 0
        result = json.loads((out / "result.json").read_text())
        assert result["verb"] == verb
        assert result["num_test_images"] == 40
        assert 0 <= result["top1"] <= result["top5"] <= 100
    moved, fresh, probed = (weights(run) for run in (tmp_path / "finetune", pretrained, tmp_path / "probe"))
    backbone = "model.backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(probed[backbone], fresh[backbone]), "a probe must not move the backbone"
    assert not torch.equal(moved[backbone], fresh[backbone])
    assert sorted((pretrained / "pictures").glob("reconstruction-*.png"))
    assert main(["report", str(pretrained), str(tmp_path / "probe")]) == 0


def test_another_image_size_resizes_learned_positions_and_computes_fixed_ones(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    shared, small = [f"data.path={tiny_data}", *SETTINGS, "train.steps=1"], tmp_path / "small"
    assert main(["pretrain", *shared, *MAE, "train.ema=0.5", "model.image_size=16", f"out={small}"]) == 0
    learned = ["finetune", *shared, f"init_from={small}", "model.position=learned", "optim.base_lr=1e-9"]
    assert main([*learned, f"out={tmp_path / 'large'}"]) == 0
    assert f"init_from={small}: its averaged weights" in caplog.text
    assert f"init_from={small}: positions of 4 x 4 patches resized (bicubic) for 8 x 8" in caplog.text
    old, new = weights(small), weights(tmp_path / "large")
    grid = old["model.backbone.pos_embed"][:, 1:].reshape(1, 4, 4, 128).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    expected = torch.cat([old["model.backbone.pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(new["model.backbone.pos_embed"], expected, rtol=0, atol=1e-6)
    name = "backbone.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(new[f"model.{name}"], old[f"ema.{name}"], rtol=0, atol=1e-6)
    assert not torch.equal(old[f"model.{name}"], old[f"ema.{name}"])

    for earlier, how in ((small, "computed"), (tmp_path / "large", "resized (bicubic)")):
        wanted = [f"init_from={earlier}", "model.image_size=24"]
        assert main(["probe", *shared, *wanted, f"out={tmp_path / earlier.name}-probe"]) == 0
        side = 4 if earlier == small else 8
        assert f"init_from={earlier}: positions of {side} x {side} patches {how} for 6 x 6" in caplog.text
    found = weights(tmp_path / "small-probe")["model.backbone.pos_embed"]
    assert torch.equal(found, class_and_grid(128, (6, 6)))

    mixer = ["model.name=mixer_demo4", "train.global_batch=8"]
    assert main(["pretrain", *shared, *MAE, *mixer, f"out={tmp_path / 'mixer'}"]) == 0
    line = refused(
        capsys, "knn", *shared, *mixer, f"init_from={tmp_path / 'mixer'}", "model.image_size=16", "out=/nowhere"
    )
    assert "model.image_size=16" in line
    assert "mixer_demo4 is bound to its grid; set model.image_size=32" in line


def test_a_finished_run_says_so_and_stays_as_it_is(
    tiny_data: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    words = [
        "pretrain",
        f"data.path={tiny_data}",
        f"out={pretrained}",
        *SETTINGS,
        *MAE,
        "train.steps=2",
        "checkpoint.every=1",
    ]
    assert main(words) == 0
    assert "pretrain is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


def test_mistakes_end_with_one_line_and_nothing_written(
    tiny_data: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shared = [*SETTINGS, f"out={out}", "train.steps=2"]
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    unlabelled = tmp_path / "unlabelled"
    shutil.copytree(tiny_data, unlabelled)
    description = json.loads((unlabelled / "dataset.json").read_text())
    for shard in description["splits"]["train"]:
        shard["num_labelled"] = 0
    (unlabelled / "dataset.json").write_text(json.dumps(description))
    here = f"data.path={tiny_data}"
    cases = [
        (["pretrain", "data.path=/nowhere"], ["data.path=/nowhere", "no such folder"]),
        (["pretrain", f"data.path={tmp_path}/*.tar"], ["not indexed yet", "mae-dist data index"]),
        (["pretrain", f"data.path={tmp_path}/none-*.tar"], ["no file matches"]),
        (["pretrain", here, "data.split=dev"], ["no split 'dev'", "test, train"]),
        (["pretrain", here, "model.image_size=30"], ["model.image_size=30", "patch size 4", "28 or 32"]),
        (["pretrain", here, "model.name=vit_tii4"], ["model.name=vit_tii4", "vit_ti4"]),
        (["pretrain", here, "train.global_batch=1", "machine.processes=2"], ["2 processes", "train.global_batch=1"]),
        (
            ["probe", f"data.path={unlabelled}", f"init_from={pretrained}"],
            ["160 of 160 samples have no label", "probe"],
        ),
        (["probe", here, "init_from=/nowhere"], ["init_from=/nowhere", "no such folder"]),
        (["knn", here, f"init_from={tiny_data}"], [f"init_from={tiny_data}", "no run"]),
        (["finetune", here, f"init_from={pretrained}", "model.name=vit_ti4"], ["model.name=vit_ti4", "vit_demo4"]),
        (
            ["finetune", here, f"init_from={pretrained}", "model.train_blocks=5"],
            ["model.train_blocks=5", "the model's 4"],
        ),
        (["pretrain", here, "mae.masking=grid", "mae.mask_ratio=0.6"], ["mae.masking=grid", "0.75 (not 0.6)"]),
        (["finetune", here, "init_from=random", "view.randaugment=strong"], ["view.randaugment=strong", "rand-m9"]),
        (
            ["finetune", here, "init_from=random", "model.name=mixer_demo4", "model.position=learned"],
            ["mixer_demo4 has no such setting"],
        ),
        (["data", "index", f"{tmp_path}/empty.tar"], ["empty.tar", "no samples"]),
        (["pretrian"], ["no such verb", "pretrain"]),
    ]
    for words, expected in cases:
        verb, *rest = words
        line = refused(capsys, verb, *(shared if verb in SCHEMAS else []), *rest)
        for part in expected:
            assert part in line, (line, part)
    assert not out.exists()


def test_other_settings_are_refused_with_the_fields_named(
    tiny_data: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pretrained / "config.yaml").read_bytes()
    words = [
        "pretrain",
        f"data.path={tiny_data}",
        f"out={pretrained}",
        *SETTINGS,
        *MAE,
        "train.steps=7",
        "train.seed=3",
    ]
    line = refused(capsys, *words)
    assert "train.steps: 2 -> 7" in line
    assert "train.seed: 0 -> 3" in line
    assert (pretrained / "config.yaml").read_bytes() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pretraining_on_a_gpu_resumes(tiny_data: Path, tmp_path: Path, precision: str) -> None:
    words = [
        "pretrain",
        f"data.path={tiny_data}",
        *SETTINGS,
        *MAE,
        f"train.precision={precision}",
        "checkpoint.every=3",
    ]
    assert main([*words, f"out={tmp_path / 'run'}", "train.steps=6"]) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tiny_data: Path,
    pretrained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(pretrained, run)
    (run / "result.json").unlink()
    (file,) = (run / "checkpoints" / "step-000000002").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    words = ["pretrain", f"data.path={tiny_data}", f"out={run}", *SETTINGS, *MAE, "train.steps=2", "checkpoint.every=1"]
    assert main(words) == 0
    assert "step-000000002 is damaged" in caplog.text
    assert losses(run) == losses(pretrained)
    first, second = weights(run), weights(pretrained)
    assert all(torch.equal(first[name], second[name]) for name in second)

    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    assert "all 2 checkpoints are damaged" in refused(capsys, *words)
