"""Configuration: what is refused and how it is said, what is kept, and that every file in configs/ loads."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_dist import config

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NEEDED = ["data.path=d", "out=o", "model.name=vit_ti4"]


def load(verb: str, *overrides: str, file: Path | None = None):
    start = ["from=random"] if verb != "pretrain" else []
    return config.load(verb, file, [*NEEDED, *start, *overrides])


def load_file(verb: str, name: str, folder: str | None = None):
    start = ["from=random"] if verb != "pretrain" else []
    return config.load(verb, ROOT / f"configs/{folder or verb}/{name}.yaml", ["data.path=d", "out=o", *start])


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_and_opens_with_its_command(file: Path) -> None:
    verb = file.parent.name
    loaded = config.load(verb, file, ["data.path=d", "out=o"] + ([] if verb == "pretrain" else ["from=r"]))
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert f"mae-dist {verb}" in text or f"mae_dist {verb}" in text
    assert str(file.relative_to(ROOT)) in text
    assert "Hardware:" in text
    assert "Expected" in text
    assert config.from_dict(verb, __import__("yaml").safe_load(config.dump(loaded)), "dump") == loaded


@pytest.mark.parametrize("name", ["vit_b16", "vit_l16", "vit_h14"])
def test_pretraining_on_imagenet_is_the_papers(name: str) -> None:
    """He et al. 2022, table 8: 1600 epochs of batch 4096 at 2.4e-3 after 40 epochs of warmup."""
    loaded = load_file("pretrain", f"imagenet_{name}")
    assert loaded.model.name == name
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(2.4e-3)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.optim.warmup_epochs) == (1600, 4096, 40)
    assert (loaded.optim.betas, loaded.optim.weight_decay, loaded.optim.min_lr) == ((0.9, 0.95), 0.05, 0)
    assert (loaded.mae.mask_ratio, loaded.mae.norm_pix, loaded.mae.predict) == (0.75, True, 1)
    assert (loaded.mae.decoder_dim, loaded.mae.decoder_depth, loaded.mae.decoder_heads) == (512, 8, 16)
    assert (loaded.view.crop, loaded.view.scale, loaded.model.drop_path) == ("resized", (0.2, 1), 0)
    assert (loaded.train.clip, loaded.train.ema) == (None, None)


@pytest.mark.parametrize(("name", "epochs"), [("vit_b16", 90), ("vit_l16", 50), ("vit_h14", 50)])
def test_probing_on_imagenet_is_the_papers(name: str, epochs: int) -> None:
    """He et al. 2022, table 10: LARS at 6.4 for batch 16384, no weight decay."""
    loaded = load_file("probe", f"imagenet_{name}")
    assert (loaded.model.name, loaded.model.pool) == (name, "cls")
    assert loaded.optim.base_lr * loaded.train.global_batch / 256 == pytest.approx(6.4)
    assert (loaded.train.epochs, loaded.train.global_batch, loaded.optim.warmup_epochs) == (epochs, 16384, 10)
    assert (loaded.optim.name, loaded.optim.momentum, loaded.optim.weight_decay) == ("lars", 0.9, 0)
    assert (loaded.view.crop, loaded.view.scale) == ("resized_clamped", (0.08, 1))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=3"], ["train.epoch:", "did you mean train.epochs?"]),
        (["trian.epochs=3"], ["trian", "did you mean train?"]),
        (["frm=x"], ["frm", "no such setting"]),
        (["train.epochs=many"], ["train.epochs", "many"]),
        (["train.global_batch=2.5"], ["train.global_batch", "2.5"]),
        (["train.precision=fp8"], ["fp8", "bf16"]),
        (["view.scale=[1,2,3]"], ["view.scale", "3"]),
        (["view.scale=[0.9,0.1]"], ["view.scale", "small then large"]),
        (["train.epochs=0"], ["train.epochs=0", "greater than 0"]),
        (["mae.mask_ratio=1"], ["mae.mask_ratio", "less than 1"]),
        (["mae.decoder_dim=100"], ["mae.decoder_dim", "mae.decoder_heads"]),
        (["optim.warmup_epochs=200"], ["optim.warmup_epochs", "longer than the run", "try"]),
        (["train.global_batch=2", "machine.processes=3"], ["train.global_batch=2", "3 processes"]),
        (["train"], ["section.key=value"]),
        (["data=3"], ["data"]),
        (["train.seed=-1"], ["train.seed"]),
        (["train.ema=1"], ["train.ema", "less than 1"]),
        (["model.train_blocks=1"], ["model.train_blocks=1", "finetune"]),
    ],
)
def test_mistakes_get_one_sentence(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        load("pretrain", *overrides)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.path=\.\.\., from=\.\.\., out=\.\.\."):
        config.load("probe", None, ["model.name=vit_ti4"])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        config.load("pretrain", tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not YAML"):
        config.load("pretrain", tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected sections"):
        config.load("pretrain", tmp_path / "list.yaml")


def test_only_what_changes_the_result_counts_as_different() -> None:
    old = load("finetune")
    assert config.differences(old, load("finetune", "machine.workers=1", "out=p", "data.path=e", "track.every=3")) == []
    changed = config.differences(old, load("finetune", "train.seed=7", "optim.base_lr=1"))
    assert changed == ["train.seed: 0 -> 7", "optim.base_lr: 0.0005 -> 1.0"]
    other = config.differences(old, config.load("finetune", None, [*NEEDED, "from=elsewhere"]))
    assert other == ["from: random -> elsewhere"]


def test_total_steps_cover_the_epochs() -> None:
    train = load("pretrain", "train.epochs=2", "train.global_batch=30").train
    assert config.total_steps(train, 100) == 7
    assert config.total_steps(load("pretrain", "train.steps=5").train, 100) == 5


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["pretrain", "train.epoch=3"]])
def test_answers_come_at_once_and_without_torch(words: list[str]) -> None:
    """Asserted by what is imported; the time itself is printed by -s, since machines differ."""
    code = (
        "import sys; from mae_dist.__main__ import main\n"
        f"status = main({words!r})\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{words}: {time.perf_counter() - began:.2f} s")
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert len(done.stderr.strip().splitlines()) == (0 if "--help" in words else 1)
