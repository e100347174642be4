"""What a run says before its first step: splits of which nothing can be read, settings that are seldom meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from shared_types import Tars

from mae_dist import environment, recipes
from mae_dist.config import load
from mae_dist.data.pixels import Decoding
from mae_dist.run import identity, warned
from mae_dist.schema import (
    DataConfig,
    OptimConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    SupervisedConfig,
    TrainConfig,
)
from mae_dist.stages.images import check_first_images


def warnings(config: RunConfig, num_samples: int, verb: str = "pretrain") -> dict[str, str]:
    """Sentence of each warning of settings, by what it is about."""
    return dict(warned.of_settings(verb, config, num_samples, on_cpu=True))


def test_start_refuses_a_split_of_which_the_first_images_are_all_unreadable(tars: Tars) -> None:
    data = tars([40], broken={*range(32)})
    with pytest.raises(ValueError, match="none of the first 32 images can be read, .*s0000.*; `mae-dist data check`"):
        check_first_images(data, Decoding())


def test_start_accepts_a_split_with_one_readable_image(tars: Tars) -> None:
    check_first_images(tars([9, 9], broken={*range(18)} - {12}), Decoding())


@pytest.mark.parametrize(
    ("steps", "epochs", "warmup", "said"),
    [(9, 800, 2.0, True), (10, 800, 1.0, True), (20, 800, 1.0, False), (None, 3, 2.0, False)],
)
def test_start_says_that_warmup_outlasts_the_run(steps: int | None, epochs: int, warmup: float, said: bool) -> None:
    train = TrainConfig(steps=steps, epochs=epochs, global_batch=10, precision="fp32")
    found = warnings(PretrainConfig(data=DataConfig("x"), train=train, optim=OptimConfig(warmup_epochs=warmup)), 100)
    assert ("its lr does not reach its peak before the end" in found.get("optim.warmup_epochs", "")) == said


@pytest.mark.parametrize(("images", "said"), [(7, "an epoch of 7 images is 0.7 steps"), (29, "is 2.9 steps"), (30, "")])
def test_start_says_that_an_epoch_has_few_steps(images: int, said: str) -> None:
    train = TrainConfig(epochs=800, global_batch=10, precision="fp32")
    found = warnings(PretrainConfig(data=DataConfig("x"), train=train), images)
    assert said in found.get("train.global_batch", "")
    assert ("shows images more than once" in found.get("train.global_batch", "")) == (images < 10)
    assert bool(found) == bool(said)


@pytest.mark.parametrize(("precision", "fast", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp16", True, 1),
                                                         ("fp32", False, 0)])  # fmt: skip
def test_start_says_once_that_16_bits_are_slow_on_a_cpu(
    precision: str, fast: bool, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "fast_precisions", lambda: ("bf16",) * fast)
    config = PretrainConfig(data=DataConfig("x"))
    found = warnings(replace(config, train=replace(config.train, precision=precision)), 10**6)
    assert str(found).count(f"train.precision={precision}: this CPU has no instructions for it") == said


@pytest.mark.parametrize(
    ("own", "start", "fast", "chosen"),
    [
        (None, None, ("bf16",), "bf16"), (None, None, (), "fp32"), (None, "auto", ("fp16", "bf16"), "bf16"),
        (None, "fp32", ("bf16",), "fp32"), (None, "bf16", (), "fp32"), (None, "fp16", ("bf16",), "fp32"),
        (None, "fp16", ("fp16", "bf16"), "fp16"), ("bf16", "fp32", (), "bf16"), ("auto", "fp32", ("bf16",), "fp32"),
    ],
)  # fmt: skip
def test_precision_auto_is_that_of_the_start_where_the_device_has_it(
    own: str | None, start: str | None, fast: tuple[str, ...], chosen: str
) -> None:
    """A run that has begun keeps its own; one that is typed is never replaced."""
    plain = PretrainConfig(data=DataConfig("x"))
    before, origin = (None if p is None else replace(plain, train=replace(plain.train, precision=p))
                      for p in (own, start))  # fmt: skip
    found = identity.precision_for(before, origin, fast)
    assert (found, identity.with_precision(plain, found).train.precision) == (chosen, chosen)
    typed = replace(plain, train=replace(plain.train, precision="fp16"))
    assert identity.with_precision(typed, found).train.precision == "fp16"


RECIPES = [
    (path, verb) for name, path in recipes.known().items()
    if (verb := name.partition("/")[0].replace("scratch", "finetune")) in ("pretrain", "probe", "finetune")
]  # fmt: skip


@pytest.mark.parametrize(("path", "verb"), RECIPES, ids=lambda value: getattr(value, "stem", value))
def test_start_says_that_the_lr_is_ten_times_off_but_not_of_a_recipe(path: Path, verb: str) -> None:
    words = ["out=x", "data.path=y", *(["init_from=random"] if verb != "pretrain" else [])]
    config = load(verb, path, words)
    assert "optim.base_lr" not in warnings(config, 10**6, verb)
    assert isinstance(config, PretrainConfig | SupervisedConfig)
    if isinstance(config, ProbeConfig) and config.heads.active:
        return
    high = replace(config, optim=replace(config.optim, base_lr=10 * config.optim.base_lr))
    assert "usually stays below" in warnings(high, 10**6, verb)["optim.base_lr"]


def test_start_says_that_the_lr_is_ten_times_too_low() -> None:
    config = load("pretrain", "imagenet_vit_b16", ["out=x", "data.path=y", "optim.base_lr=1.5e-5"])
    assert warnings(config, 10**6)["optim.base_lr"].endswith("set optim.base_lr=0.00015, the paper's")
