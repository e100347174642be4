"""What a run says before its first step: splits of which nothing can be read, settings that are seldom meant."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from shared_types import Tars

from mae_dist import environment
from mae_dist.data.pixels import Decoding
from mae_dist.schema import DataConfig, OptimConfig, PretrainConfig, TrainConfig
from mae_dist.stages.images import check_first_images
from mae_dist.stages.setup import warn

CPU = torch.device("cpu")


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
def test_start_says_that_warmup_outlasts_the_run(
    steps: int | None, epochs: int, warmup: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    train = TrainConfig(steps=steps, epochs=epochs, global_batch=10, precision="fp32")
    warn(PretrainConfig(data=DataConfig("x"), train=train, optim=OptimConfig(warmup_epochs=warmup)), CPU, 100)
    assert ("its lr does not reach its peak before the end" in caplog.text) == said


@pytest.mark.parametrize(("images", "said"), [(7, "an epoch of 7 images is 0.7 steps"), (29, "is 2.9 steps"), (30, "")])
def test_start_says_that_an_epoch_has_few_steps(images: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    train = TrainConfig(epochs=800, global_batch=10, precision="fp32")
    warn(PretrainConfig(data=DataConfig("x"), train=train), CPU, images)
    assert (said in caplog.text) if said else not caplog.text


@pytest.mark.parametrize(("precision", "fast", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp16", True, 1),
                                                         ("fp32", False, 0)])  # fmt: skip
def test_start_says_once_that_16_bits_are_slow_on_a_cpu(
    precision: str, fast: bool, said: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_bf16", lambda: fast)
    config = PretrainConfig(data=DataConfig("x"))
    with caplog.at_level(logging.WARNING):
        warn(replace(config, train=replace(config.train, precision=precision)), CPU, 10**6)
    assert caplog.text.count(f"train.precision={precision}: this CPU has no instructions for it") == said
