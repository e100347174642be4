"""Settings: what is refused and with which sentence, what a resume compares, and that every file in configs/ loads."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae_dist import config
from mae_dist.__main__ import settings_help
from mae_dist.schema import ModelConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NEEDED = ["data.path=d", "out=o", "model.name=vit_ti4"]


def load(verb: str, *overrides: str, file: Path | None = None) -> Any:
    start = ["init_from=random"] if verb != "pretrain" else []
    return config.load(verb, file, [*NEEDED, *start, *overrides])


def load_file(verb: str, name: str, folder: str | None = None) -> Any:
    start = ["init_from=random"] if verb != "pretrain" else []
    return config.load(verb, ROOT / f"configs/{folder or verb}/{name}.yaml", ["data.path=d", "out=o", *start])


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_file_loads_and_its_header_has_command_hardware_and_expectation(file: Path) -> None:
    verb = {"scratch": "finetune"}.get(file.parent.name, file.parent.name)
    header = "\n".join(line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#"))
    commands = [shlex.split(line) for line in header.replace("\\\n", " ").splitlines() if line.startswith("   ")]
    runs = [words[words.index(verb) :] for words in commands if verb in words]
    assert len(runs) == 1
    given, overrides = config.split_words(verb, runs[0][1:])
    assert given == str(file.relative_to(ROOT))
    config.load(verb, file, overrides)
    assert not any(word.startswith("model.") for word in overrides), "the file says which model"
    assert {words[0] for words in commands} <= {"mae-dist", "torchrun"}
    assert "Hardware:" in header
    assert "Expected" in header


@pytest.mark.parametrize("file", {file.parent.name: file for file in FILES}.values(), ids=lambda p: p.parent.name)
def test_config_that_was_written_is_read_back(file: Path) -> None:
    verb = {"scratch": "finetune"}.get(file.parent.name, file.parent.name)
    loaded = load_file(verb, file.stem, file.parent.name)
    assert config.from_dict(verb, yaml.safe_load(config.dump(loaded)), "dump", "") == loaded


@pytest.mark.parametrize("name", ["vit_b16", "vit_l16", "vit_h14"])
def test_pretrain_recipe_on_imagenet_has_the_papers_values(name: str) -> None:
    """He et al. 2022, table 8: 1600 epochs of batch 4096 at 2.4e-3 after 40 epochs of warmup."""
    loaded = load_file("pretrain", f"imagenet_{name}")
    assert loaded.model.name == name
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(2.4e-3)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.optim.warmup_epochs) == (1600, 4096, 40)
    assert (loaded.optim.betas, loaded.optim.weight_decay, loaded.optim.min_lr) == ((0.9, 0.95), 0.05, 0)
    assert (loaded.mae.mask_ratio, loaded.mae.norm_pix, loaded.mae.predict) == (0.75, True, 1)
    assert (loaded.mae.decoder_dim, loaded.mae.decoder_depth, loaded.mae.decoder_heads) == (512, 8, 16)
    assert (loaded.view.crop, loaded.view.scale, loaded.model.drop_path) == ("resized", (0.2, 1), 0)
    assert (loaded.train.clip_grad, loaded.train.ema) == (None, None)


@pytest.mark.parametrize(("name", "epochs"), [("vit_b16", 90), ("vit_l16", 50), ("vit_h14", 50)])
def test_probe_recipe_on_imagenet_has_the_papers_values(name: str, epochs: int) -> None:
    """He et al. 2022, table 10: LARS at 6.4 for batch 16384, no weight decay."""
    loaded = load_file("probe", f"imagenet_{name}")
    assert (loaded.model.name, loaded.model.pool) == (name, "cls")
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(6.4)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.optim.warmup_epochs) == (epochs, 16384, 10)
    assert (loaded.optim.name, loaded.optim.momentum, loaded.optim.weight_decay) == ("lars", 0.9, 0)
    assert (loaded.view.crop, loaded.view.scale) == ("resized_clamped", (0.08, 1))


@pytest.mark.parametrize(
    ("name", "size", "peak", "decay", "drop", "epochs"),
    [
        ("vit_b16", 224, 2e-3, 0.65, 0.1, 100),
        ("vit_l16", 224, 4e-3, 0.75, 0.2, 50),
        ("vit_h14", 224, 4e-3, 0.75, 0.3, 50),
        ("vit_h14_448", 448, 4e-3, 0.75, 0.3, 50),
    ],
)
def test_finetune_recipe_on_imagenet_has_the_official_codes_values(
    name: str, size: int, peak: float, decay: float, drop: float, epochs: int
) -> None:
    """Its FINETUNE.md, and the augmentation of He et al. 2022, table 9."""
    loaded = load_file("finetune", f"imagenet_{name}")
    assert (loaded.model.name, loaded.model.image_size) == (name.removesuffix("_448"), size)
    assert (loaded.model.pool, loaded.model.position, loaded.model.drop_path) == ("avg", "learned", drop)
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(peak)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.optim.warmup_epochs) == (epochs, 1024, 5)
    assert (loaded.optim.betas, loaded.optim.weight_decay, loaded.optim.min_lr) == ((0.9, 0.999), 0.05, 1e-6)
    assert loaded.optim.layer_decay == decay
    assert (loaded.view.randaugment, loaded.view.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (loaded.mix.mixup, loaded.mix.cutmix, loaded.mix.prob, loaded.mix.switch) == (0.8, 1.0, 1.0, 0.5)
    assert (loaded.train.loss, loaded.train.label_smoothing) == ("softmax", 0.1)


@pytest.mark.parametrize(
    ("name", "epochs", "drop"), [("vit_b16", 300, 0.1), ("vit_l16", 200, 0.2), ("vit_h14", 200, 0.2)]
)
def test_scratch_recipe_on_imagenet_has_the_papers_values(name: str, epochs: int, drop: float) -> None:
    """He et al. 2022, table 11: 1.6e-3 at batch 4096, weight decay 0.3, averaged weights."""
    loaded = load_file("finetune", f"imagenet_{name}", "scratch")
    assert (loaded.model.name, loaded.model.drop_path) == (name, drop)
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(1.6e-3)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.optim.warmup_epochs) == (epochs, 4096, 20)
    assert (loaded.optim.betas, loaded.optim.weight_decay, loaded.optim.layer_decay) == ((0.9, 0.95), 0.3, 1)
    assert (loaded.view.randaugment, loaded.train.label_smoothing, loaded.train.ema) == (
        "rand-m9-mstd0.5-inc1", 0.1, 0.9999,
    )  # fmt: skip
    assert (loaded.mix.mixup, loaded.mix.cutmix) == (0.8, 1.0)


def test_mixer_scratch_recipe_has_big_visions_values() -> None:
    """mlp_mixer_i1k.py: lr 1e-3, a straight line to 1e-5 of it after 10,000 steps, sigmoid loss."""
    loaded = load_file("finetune", "imagenet_mixer_b16", "scratch")
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(1e-3)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.train.clip_grad) == (300, 4096, 1)
    assert loaded.optim.warmup_epochs * 1_281_167 / 4096 == pytest.approx(10_000, rel=1e-3)
    assert (loaded.optim.schedule, loaded.optim.min_lr, loaded.optim.weight_decay) == ("linear", 1e-8, 0.1)
    assert (loaded.train.loss, loaded.mix.mixup, loaded.mix.cutmix) == ("sigmoid", 0.5, 0)
    assert loaded.view.randaugment == "rand-m15-n2-mmax15-p1"
    assert (loaded.model.drop_path, loaded.optim.layer_decay) == (0.1, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=3"], ["train.epoch:", "did you mean train.epochs?"]),
        (["trian.epochs=3"], ["trian.epochs:", "use train.epochs"]),
        (["frm=x"], ["frm", "no such setting"]),
        (["train.epochs=many"], ["train.epochs", "many"]),
        (["train.global_batch=2.5"], ["train.global_batch", "2.5"]),
        (["train.precision=fp8"], ["train.precision=fp8: must be one of auto, fp32, bf16, fp16"]),
        (["view.scale=[1,2,3]"], ["view.scale", "3"]),
        (["view.scale=[0.9,0.1]"], ["view.scale", "greater than the second"]),
        (["train.epochs=0"], ["train.epochs=0", "greater than 0"]),
        (["mae.mask_ratio=1"], ["mae.mask_ratio", "less than 1"]),
        (["mae.decoder_dim=100"], ["mae.decoder_dim", "mae.decoder_heads"]),
        (["optim.warmup_epochs=200"], ["optim.warmup_epochs", "longer than the run", "try"]),
        (["train.global_batch=2", "machine.processes=3"], ["train.global_batch=2", "3 processes"]),
        (["train"], ["section.key=value"]),
        (["data=3"], ["data: is a section", "use data.path"]),
        (["mae=3"], ["mae: is a section", "mae.KEY=value"]),
        (["train.seed=-1"], ["train.seed"]),
        (["train.ema=1"], ["train.ema", "less than 1"]),
        (["model.pool=avg"], ["model.pool=avg", "last norm", "probe, knn or finetune"]),
    ],
)
def test_config_error_is_one_sentence_with_field_and_hint(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        load("pretrain", *overrides)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("verb", "word", "allowed"),
    [
        ("pretrain", "optim.layer_decay=-1", "greater than 0 and at most 1"),
        ("finetune", "optim.layer_decay=0", "greater than 0 and at most 1"),
        ("finetune", "optim.layer_decay=1.5", "greater than 0 and at most 1"),
        ("pretrain", "optim.betas=[0.9,1]", "at least 0 and less than 1"),
        ("pretrain", "optim.betas=[-0.1,0.95]", "at least 0 and less than 1"),
        ("probe", "optim.momentum=1", "at least 0 and less than 1"),
        ("pretrain", "optim.weight_decay=-0.1", "at least 0"),
        ("pretrain", "data.mean=[120,115,104]", "at least 0 and at most 1"),
        ("pretrain", "data.std=[58,57,57]", "greater than 0 and at most 1"),
        ("pretrain", "data.max_bad=2", "at least 0 and at most 1"),
        ("pretrain", "data.shuffle_window=0", "at least 1"),
        ("pretrain", "mae.predict=1.5", "greater than 0 and at most 1"),
        ("finetune", "model.drop_path=1", "at least 0 and less than 1"),
        ("finetune", "train.label_smoothing=1.1", "at least 0 and at most 1"),
        ("finetune", "mix.mixup=2", "at least 0 and at most 1"),
        ("finetune", "view.random_erasing=-1", "at least 0 and at most 1"),
        ("pretrain", "train.clip_grad=0", "greater than 0"),
        ("pretrain", "machine.activation_checkpointing=-1", "at least 0"),
        ("pretrain", "checkpoint.keep=0", "at least 1"),
        ("pretrain", "track.evaluate_every=0", "greater than 0"),
        ("probe", "heads.held_out=1", "greater than 0 and less than 1"),
        ("knn", "knn.k=0", "at least 1"),
        ("knn", "knn.temperature=inf", "finite"),
        ("pretrain", "train.epochs=inf", "finite"),
        ("pretrain", "optim.base_lr=nan", "finite"),
        ("pretrain", "optim.betas=[0.9,nan]", "finite"),
        ("pretrain", "machine.timeout=inf", "finite"),
        ("probe", "heads.lars=[0.1,inf]", "finite"),
        ("pretrain", "train.seed=4294967296", "at least 0 and at most 4294967295"),
        ("pretrain", "machine.micro_batch=0", "at least 1"),
        ("pretrain", "view.scale=[0.5,1.5]", "greater than 0 and at most 1"),
        ("pretrain", "view.ratio=[0,1]", "greater than 0"),
    ],
)
def test_range_of_a_setting_is_enforced_and_named(verb: str, word: str, allowed: str) -> None:
    name = word.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{name}=.*: must .*{allowed}$"):
        load(verb, word)


@pytest.mark.parametrize("verb", ["pretrain", "probe", "knn"])
@pytest.mark.parametrize(
    "word", ["model.drop_path=0.1", "model.train_blocks=0.5", "train.label_smoothing=0.1", "train.loss=sigmoid"]
)
def test_finetune_only_setting_is_refused_by_other_verbs(verb: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word}: is for finetune; leave it out$"):
        load(verb, word)
    load("finetune", word)


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("probe", ["optim.layer_decay=0.5"], "optim.layer_decay=0.5: is for pretrain, finetune;"),
        ("knn", ["view.flip=0"], "view.flip=0.0: is for pretrain, probe, finetune;"),
        ("knn", ["view.scale=[0.1,1]"], "view.scale=[0.1, 1.0]: is for pretrain, probe, finetune;"),
        ("probe", ["data.aug_repeats=3"], "data.aug_repeats=3: is for pretrain, finetune;"),
        ("knn", ["train.ema=0.9"], "train.ema=0.9: is for pretrain, probe, finetune;"),
        ("probe", ["heads.blocks=[6]"], "heads.blocks=[6]: there is no head to try it on; give for example heads."),
        (
            "probe",
            ["heads.lars=[1]", "optim.name=adamw"],
            "optim.name=adamw: several heads have their own (heads.lars,",
        ),
        (
            "probe",
            ["heads.lars=[1]", "optim.weight_decay=1"],
            "optim.weight_decay=1.0: several heads have their own (heads.weight_decay)",
        ),
        (
            "probe",
            ["heads.adamw=[1]", "optim.base_lr=7"],
            "optim.base_lr=7.0: several heads have their own (heads.lars,",
        ),
    ],
)
def test_unused_setting_is_refused(verb: str, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        load(verb, *words)


@pytest.mark.parametrize("verb", config.SCHEMAS)
def test_help_lists_the_settings_that_the_verb_reads_and_defaults_are_accepted(verb: str) -> None:
    assert load(verb, "model.drop_path=0", "train.loss=softmax") == load(verb)
    listed = {line.split()[0] for line in settings_help(verb).splitlines()}
    assert ("model.drop_path" in listed) == (verb == "finetune")
    assert ("view.crop" in listed) == (verb != "knn")
    assert {"model.name", "train.precision", "view.test_crop"} <= listed


@pytest.mark.parametrize(
    ("verb", "word", "message"),
    [
        ("pretrain", "seed=1", "seed: there is no such setting; use train.seed (seed of everything random)"),
        ("probe", "decoder=cross", "decoder: there is no such setting; mae.decoder is for pretrain; leave it out"),
        (
            "pretrain",
            "drop_path=0.1",
            "drop_path: there is no such setting; model.drop_path is for finetune; leave it out",
        ),
        ("pretrain", "mix.mixup=0.8", "mix.mixup=0.8: is for finetune; leave it out"),
        ("finetune", "mae.mask_ratio=0.8", "mae.mask_ratio=0.8: is for pretrain; leave it out"),
        ("pretrain", "heads.features=[gap]", "heads.features=[gap]: is for probe; leave it out"),
        ("knn", "optim.name=lars", "optim.name=lars: is for pretrain, probe, finetune; leave it out"),
        ("knn", "mixed.mixup=0.8", "mixed.mixup: there is no such setting; mix.mixup is for finetune; leave it out"),
    ],
)
def test_setting_in_the_wrong_section_or_verb_is_answered_with_the_right_one(
    verb: str, word: str, message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        load(verb, word)


def test_help_shows_the_choices_of_a_setting() -> None:
    """In the line of the setting, within an optional one and a tuple too, and nowhere else."""
    lines = {line.split()[0]: line for verb in config.SCHEMAS for line in settings_help(verb).splitlines()}
    assert " one of resized, resized_clamped, pad, center: " in lines["view.crop"]
    assert " one of cls, avg: " in lines["model.pool"]
    assert " any of cls, mean, both: " in lines["heads.features"]
    assert " one of drop, token: " in lines["mae.hidden"]
    free = ("train.clip_grad", "machine.micro_batch", "view.scale", "data.path", "heads.blocks")
    assert not any(" one of " in lines[name] or " any of " in lines[name] for name in free)


def test_color_jitter_beside_randaugment_is_refused_where_timm_would_ignore_it() -> None:
    message = "view.color_jitter=0.4: is not applied beside view.randaugment=rand-m9, whose .* or take a 3a policy"
    with pytest.raises(ValueError, match=message):
        load("finetune", "view.color_jitter=0.4", "view.randaugment=rand-m9")
    load("finetune", "view.color_jitter=0.4", "view.randaugment=rand-m9-t3a")
    load("finetune", "view.color_jitter=0.4", "view.randaugment=none")


def test_avg_pooling_is_refused_only_for_vit_pretraining() -> None:
    """A Mixer has one norm whatever its pooling, and other verbs train or use avg's own."""
    assert load("pretrain", "model.name=mixer_ti4", "model.pool=avg").model.pool == "avg"
    assert load("pretrain", "model.pool=cls").model.pool == "cls"
    for verb in ("probe", "finetune", "knn"):
        assert load(verb, "model.pool=avg").model.pool == "avg"


@pytest.mark.parametrize("none", ["none", "None", "NONE", "null"])
def test_none_override_is_null_for_optional_settings(none: str) -> None:
    file = ROOT / "configs/finetune/imagenet_vit_b16.yaml"
    words = ("view.randaugment", "train.steps", "train.clip_grad", "model.pool", "data.mean")
    loaded = load("finetune", *(f"{word}={none}" for word in words), file=file)
    assert (loaded.view.randaugment, loaded.train.clip_grad, loaded.model.pool, loaded.data.mean) == (None,) * 4


def test_none_is_text_in_a_file_and_for_required_values(tmp_path: Path) -> None:
    """Neither in a file, which has YAML's word, nor for a setting that needs a value."""
    assert load("pretrain", "data.split=none").data.split == "none"
    for word in ("train.epochs=none", "train.precision=none"):
        with pytest.raises(ValueError, match=r"none"):
            load("pretrain", word)
    (tmp_path / "file.yaml").write_text("train: {clip_grad: none}")
    with pytest.raises(ValueError, match=r"train\.clip_grad: Value 'none'"):
        load("pretrain", file=tmp_path / "file.yaml")


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.path=\.\.\., init_from=\.\.\., out=\.\.\."):
        config.load("probe", None, ["model.name=vit_ti4"])


def test_config_file_missing_or_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        config.load("pretrain", tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not YAML"):
        config.load("pretrain", tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected sections"):
        config.load("pretrain", tmp_path / "list.yaml")


def test_resume_compares_only_settings_that_change_the_result() -> None:
    old = load("finetune")
    assert config.differences(old, load("finetune", "machine.workers=1", "out=p", "data.path=e", "track.every=3")) == []
    changed = config.differences(old, load("finetune", "train.seed=7", "optim.base_lr=1"))
    assert changed == ["train.seed: 0 -> 7", "optim.base_lr: 0.0005 -> 1.0"]
    other = config.differences(old, config.load("finetune", None, [*NEEDED, "init_from=elsewhere"]))
    assert other == ["init_from: random -> elsewhere"]


def test_total_steps_cover_all_epochs() -> None:
    train = load("pretrain", "train.epochs=2", "train.global_batch=30").train
    assert config.total_steps(train, 100) == 7
    assert config.total_steps(load("pretrain", "train.steps=5").train, 100) == 5


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["pretrain", "train.epoch=3"]])
def test_help_and_config_errors_import_no_torch(words: list[str]) -> None:
    """Asserted by what is imported; the time itself is printed by -s, since machines differ. Help needs no parser."""
    unneeded = {"torch", *(("yaml", "json", "shutil") if "--help" in words else ())}
    code = (
        "import sys; from mae_dist.__main__ import main\n"
        f"status = main({words!r})\n"
        f"assert not {unneeded} & sys.modules.keys(), sys.modules.keys()\n"
        "sys.exit(status)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{words}: {time.perf_counter() - began:.2f} s")
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert len(done.stderr.strip().splitlines()) == (0 if "--help" in words else 1)


def test_model_of_the_run_init_from_is_the_default(tmp_path: Path) -> None:
    """Its name and size; what is given decides. A run that is not there, or is damaged, is named."""
    needed = ["data.path=d", "out=o", f"init_from={tmp_path}"]
    with pytest.raises(ValueError, match=f"^init_from={tmp_path}: no run lies there"):
        config.load("knn", None, needed)
    with pytest.raises(ValueError, match="^knn needs model.name=...; see"):
        config.load("knn", None, [*needed[:2], "init_from=random"])
    run = config.load("pretrain", None, ["data.path=d", "out=o", "model.name=vit_ti4", "model.image_size=[32,48]"])
    (tmp_path / "config.yaml").write_text(config.dump(run))
    assert config.load("knn", None, needed).model == ModelConfig("vit_ti4", (32, 48))
    assert config.load("probe", None, [*needed, "model.image_size=64"]).model.image_size == 64
    for text in ("model: 3", "- x", "model: {name: '${oc.env:HOME}'}", "{"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path}"):
            config.load("finetune", None, needed)
