"""Fine-tuning from standardised features: what the head reads at the start, and on ranks that share the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import SETTINGS, finish_ranks, start_ranks, weights

from mae_dist import config, evaluate
from mae_dist.__main__ import main
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir
from mae_dist.stages import finetune
from mae_dist.stages.setup import build_setup

STILL = [
    "init_from=random", *SETTINGS, "model.image_size=16", "train.steps=1", "optim.base_lr=1e-12", "optim.min_lr=0",
    "model.standardise=true",
]  # fmt: skip
"""A fine-tuning whose weights stay as they began."""


@pytest.mark.parametrize(("name", "pool"), [("vit_demo4", "avg"), ("vit_demo4", "cls"), ("mixer_demo4", "avg")])
def test_finetune_from_standardised_features_begins_with_mean_0_and_deviation_1(
    name: str, pool: str, tiny_data: Path, tmp_path: Path
) -> None:
    words = [f"data.path={tiny_data}", *STILL, f"model.name={name}", f"model.pool={pool}", f"out={tmp_path / 'run'}"]
    assert main(["finetune", *words]) == 0
    setup = build_setup("finetune", config.load("finetune", None, words), needs_labels=True)
    objective = finetune.build(setup)
    trained = {key.removeprefix("model."): value for key, value in weights(tmp_path / "run").items()}
    objective.load_state_dict({key: trained[key] for key in objective.state_dict()})
    images = setup.evaluation_batches(setup.source(setup.train_split))
    mean, deviation = evaluate.input_statistics(objective.head, objective, images, setup.device)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=0, atol=1e-3)
    assert RunDir(tmp_path / "run").result()


def test_finetune_from_standardised_features_is_the_same_on_ranks_that_shard_the_model(
    tiny_data: Path, tmp_path: Path
) -> None:
    words = ["finetune", f"data.path={tiny_data}", *STILL, "model.pool=avg"]
    assert main([*words, f"out={tmp_path / 'one'}"]) == 0
    log = tmp_path / "log"
    finish_ranks(start_ranks(2, *words, f"out={tmp_path / 'two'}", "machine.strategy=fsdp", log=log), log)
    one = weights(tmp_path / "one")
    two = {key: torch.empty_like(value) for key, value in one.items()}
    checkpoint.load(RunDir(tmp_path / "two").checkpoints()[-1], two)
    assert not torch.equal(one["model.backbone.fc_norm.weight"], torch.ones(128))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
