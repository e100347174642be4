"""A resolution schedule: which steps see which size, what the model makes of it, and resumes across a change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import MAE, SETTINGS, copy_of_begun, finish_ranks, losses, start_ranks, weights

from mae_dist import config, models, resolutions
from mae_dist.__main__ import main
from mae_dist.models.layers import sincos_positions
from mae_dist.models.vit import ViT, resize_positions
from mae_dist.schema import TrainConfig

RISING = ["train.resolutions=[[0,16],[0.5,24],[0.75,32]]", "train.steps=4"]


def test_resolutions_are_a_function_of_the_step() -> None:
    train = TrainConfig(resolutions=((0, 160), (0.6, 192), (0.8, 224)))
    whole = [(range(6), 160), (range(6, 8), 192), (range(8, 10), 224)]
    assert resolutions.spans(train, 224, range(10), 10) == whole
    assert resolutions.spans(train, 224, range(7, 9), 10) == [(range(7, 8), 192), (range(8, 9), 224)]
    assert resolutions.spans(train, 224, range(10, 10), 10) == [(range(10, 10), 224)]
    assert resolutions.spans(train, 224, range(2), 2) == [(range(2), 160)]  # no step is left for the others
    assert resolutions.spans(TrainConfig(), (48, 32), range(3), 3) == [(range(3), (48, 32))]
    fifths = TrainConfig(resolutions=tuple((k / 5, 16) for k in range(5)))
    assert [len(part) for part, _ in resolutions.spans(fifths, 16, range(35), 35)] == [7] * 5  # 0.6 * 35 is above 21


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("[[0.1,16],[0.5,32]]", "must begin with 0 and rise"),
        ("[[0,16],[0.5,24],[0.5,32]]", "must begin with 0 and rise"),
        ("[[0,16],[1,32]]", "below 1"),
        ("[[0,16]]", "must end with model.image_size=32"),
        ("[[0,18],[0.5,32]]", "18 is not divisible by the patch size 4"),
        ("[[0,16,3],[0.5,32]]", "must be pairs"),
        ("[[0,16],[0.5,a]]", "must be pairs"),
        ("[[0,.inf],[.nan,32]]", "must be pairs"),
        ("[[0,0],[0.5,32]]", "must be pairs"),
        ("[0,32]", "train.resolutions"),
        ("[[0,16],[0.5,32]] model.name=mixer_demo4", "mixer_demo4 is bound to its grid"),
    ],
)
def test_resolutions_that_no_run_can_follow_are_refused(pairs: str, message: str) -> None:
    words = ["data.path=d", "out=o", *SETTINGS, *f"train.resolutions={pairs}".split()]
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        config.load("pretrain", None, words)


@pytest.mark.parametrize("position", ["sincos", "learned"])
def test_vit_at_another_size_computes_fixed_positions_and_resizes_learned_ones(position: str) -> None:
    model = models.build("vit_demo4", image_size=32, position=position)
    assert isinstance(model, ViT)
    small = models.build("vit_demo4", image_size=16)
    assert isinstance(small, ViT)
    expected = resize_positions(model.pos_embed, (8, 8), (4, 4)) if position == "learned" else small.pos_embed
    assert torch.equal(model.positions((4, 4)), expected)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), small(images)) == (position == "sincos")
    model.train_last(0.0)  # does not make learned positions fixed ones
    assert torch.equal(model.positions((4, 4)), expected)


def test_resume_across_a_change_of_resolution_is_bit_identical_and_elastic(tiny_data: Path, tmp_path: Path) -> None:
    """Until the first change a run is that of a smaller model; begun before it, it goes on alone; or on two ranks."""
    shared = ["pretrain", f"data.path={tiny_data}", *SETTINGS, *MAE]
    assert main([*shared, "model.image_size=16", *RISING[1:], f"out={tmp_path / 'small'}"]) == 0
    assert main([*shared, *RISING, "checkpoint.every=1", "checkpoint.keep=4", f"out={tmp_path / 'whole'}"]) == 0
    whole = losses(tmp_path / "whole")
    assert whole[:2] == losses(tmp_path / "small")[:2] != whole[2:]
    log, out = tmp_path / "log", copy_of_begun(tmp_path / "whole", tmp_path / "begun")
    ranks = start_ranks(2, *shared, *RISING, f"out={tmp_path / 'two'}", "machine.strategy=fsdp", log=log)
    assert main([*shared, *RISING, f"out={out}"]) == 0
    finish_ranks(ranks, log)
    ended, expected = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ended.items())
    assert losses(tmp_path / "two") == pytest.approx(whole, rel=1e-5)
    assert torch.equal(ended["model.decoder_pos_embed"][0, 1:], sincos_positions(32, 8, 8))
    assert main(["replay", str(out), "--step", "3"]) == 0


def test_finetune_with_resolutions_trains_resized_learned_positions_from_tars(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tars that workers decode, since RandAugment needs images one by one; the memory they share follows the size."""
    shared = ["finetune", f"data.path={tiny_data}", *SETTINGS, "train.steps=2", "train.resolutions=[[0,16],[0.5,32]]"]
    augmented = [*shared, "view.randaugment=rand-m9", "machine.workers=1", "model.position=learned"]
    learned = tmp_path / "learned"
    assert main([*augmented, "init_from=random", "optim.base_lr=0.1", f"out={learned}"]) == 0
    assert len(losses(learned)) == 2
    capsys.readouterr()
    assert main([*shared, f"init_from={learned}", f"out={tmp_path / 'fixed'}"]) == 2
    assert "were trained; set model.position=learned, or leave it out" in capsys.readouterr().err
