"""Probe and fine-tuning: the losses, stochastic depth as a function of the sample, batch norm of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mae_dist.batch import Batch
from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import initialise
from mae_dist.models.mixer import Mixer
from mae_dist.models.vit import ViT
from mae_dist.objectives import mixing
from mae_dist.objectives.classify import Finetune, GlobalBatchNorm, Probe
from mae_dist.schema import MixConfig


def vit(depth: int = 2, pool: str = "avg") -> ViT:
    backbone = ViT(patch=4, dim=24, depth=depth, num_heads=3, image_size=16, pool=pool)
    initialise(backbone, 0)
    return backbone


def batch_of(num: int, epoch: int = 0, first: int = 0) -> Batch:
    images = torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(first, first + num)
    return Batch(images, ids % 5, ids, torch.full((num,), epoch), torch.zeros(num, dtype=torch.bool))


def finetune(drop_path: float = 0.0, label_smoothing: float = 0.0, depth: int = 2) -> Finetune:
    objective = Finetune(vit(depth), 5, drop_path=drop_path, label_smoothing=label_smoothing, seed=3)
    nn.init.normal_(objective.head.weight, generator=torch.Generator().manual_seed(0))
    return objective


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_finetune_loss_is_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    objective, batch = finetune(label_smoothing=smoothing), batch_of(6)
    loss, logits = objective(batch)
    assert torch.equal(logits, objective.head(objective.backbone(batch.images)))
    target = nn.functional.one_hot(batch.labels, 5) * (1 - smoothing) + smoothing / 5
    assert torch.allclose(loss, -(target * logits.log_softmax(1)).sum(1), atol=1e-6)


def test_finetune_sigmoid_loss_is_binary_cross_entropy_summed_over_classes() -> None:
    objective = Finetune(vit(), 5, drop_path=0.0, label_smoothing=0.1, seed=3, loss="sigmoid")
    assert torch.allclose(objective.head.bias, torch.full((5,), -math.log(5)))
    nn.init.normal_(objective.head.weight, generator=torch.Generator().manual_seed(0))
    batch = batch_of(6)
    loss, logits = objective(batch)
    p, target = logits.sigmoid(), nn.functional.one_hot(batch.labels, 5) * 0.9 + 0.02
    assert torch.allclose(loss, -(target * p.log() + (1 - target) * (1 - p).log()).sum(1), atol=1e-5)


def test_finetune_applies_mixup_to_images_and_targets_in_training_only() -> None:
    mix = MixConfig(mixup=0.8, cutmix=1.0)
    objective = Finetune(vit(), 5, drop_path=0.0, label_smoothing=0.1, seed=3, mix=mix)
    nn.init.normal_(objective.head.weight, generator=torch.Generator().manual_seed(0))
    batch = batch_of(6)
    images, targets = mixing.mix(batch, mixing.smoothed(batch.labels, 5, 0.1), mix, 3)
    loss, logits = objective(batch)
    assert torch.equal(logits, objective.head(objective.backbone(images)))
    assert torch.allclose(loss, -(targets * logits.log_softmax(1)).sum(1))
    assert torch.equal(objective.eval()(batch).prediction, objective.head(objective.backbone(batch.images)))


def scale_of(objective: Finetune, batch: Batch) -> torch.Tensor:
    scale = objective._scale(batch)
    assert scale is not None
    return scale


def test_drop_path_rate_grows_from_zero_and_keeps_the_expectation() -> None:
    objective = finetune(drop_path=0.4, depth=5).train()
    scale = scale_of(objective, batch_of(4000))
    assert scale.shape == (5, 2, 4000)
    assert (scale[0] == 1).all()
    dropped = (scale == 0).float().mean(-1)
    assert (dropped - torch.tensor([0, 0.1, 0.2, 0.3, 0.4])[:, None]).abs().max() < 0.03
    assert (scale.mean(-1) - 1).abs().max() < 0.05
    kept = [row[row > 0].unique().tolist() for row in scale]
    assert kept == [pytest.approx([1 / (1 - rate)]) for rate in (0, 0.1, 0.2, 0.3, 0.4)]
    flat = scale[1:].reshape(8, -1)
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.08  # branches are dropped independently


def test_drop_path_is_a_function_of_the_sample() -> None:
    objective = finetune(drop_path=0.5, depth=6).train()
    whole = scale_of(objective, batch_of(20))
    parts = torch.cat([scale_of(objective, part) for part in batch_of(20).split(7)], -1)
    assert torch.equal(parts, whole)
    assert not torch.equal(scale_of(objective, batch_of(20, epoch=1)), whole)
    assert torch.equal(scale_of(objective, batch_of(20, first=10))[..., :10], whole[..., 10:])
    logits = objective(batch_of(20)).prediction
    assert torch.allclose(torch.cat([objective(p).prediction for p in batch_of(20).split(7)]), logits, atol=1e-5)
    assert not torch.allclose(objective(batch_of(20, epoch=1)).prediction, logits, atol=1e-2)


def test_drop_path_is_off_in_evaluation_and_at_rate_zero() -> None:
    objective, batch = finetune(drop_path=0.5), batch_of(20)
    plain = objective.head(objective.backbone(batch.images))
    assert not torch.allclose(objective.train()(batch).prediction, plain, atol=1e-2)
    assert torch.equal(objective.eval()(batch).prediction, plain)
    assert finetune(drop_path=0.0).train()._scale(batch) is None


def test_global_batch_norm_equals_torch() -> None:
    ours, torchs = GlobalBatchNorm(7).double(), nn.BatchNorm1d(7, affine=False, eps=1e-6, momentum=0.1).double()
    generator = torch.Generator().manual_seed(0)
    for num in (6, 9, 2):
        x = 3 * torch.randn(num, 7, dtype=torch.float64, generator=generator) + 5
        assert (ours(x) - torchs(x)).abs().max() < 1e-12
    assert torchs.running_mean is not None
    assert torchs.running_var is not None
    assert (ours.running_mean - torchs.running_mean).abs().max() < 1e-12
    assert (ours.running_var - torchs.running_var).abs().max() < 1e-12
    before = ours.running_mean.clone()
    assert (ours.eval()(x) - torchs.eval()(x)).abs().max() < 1e-12
    assert torch.equal(ours.running_mean, before)


def test_probe_trains_the_head_and_keeps_the_backbone_frozen() -> None:
    objective = Probe(vit(pool="cls"), 5, chunk=4, seed=0).train()
    before = {k: v.clone() for k, v in objective.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    losses = []
    for _ in range(3):
        loss = objective(batch_of(10)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert not objective.backbone.training  # even after objective.train()
        objective.train()
    assert losses[0] > losses[1] > losses[2]
    assert all(torch.equal(v, before[k]) for k, v in objective.backbone.state_dict().items())
    assert {n for n, p in objective.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_probe_is_independent_of_the_chunk_size() -> None:
    outputs = [Probe(vit(), 5, chunk=chunk, seed=0).train()(batch_of(10)) for chunk in (1, 3, 10, 64)]
    for output in outputs:
        assert torch.allclose(output.prediction, outputs[0].prediction, atol=1e-4)
        assert torch.allclose(output.loss, outputs[0].loss, atol=1e-4)


def test_head_initial_weights_are_a_function_of_the_seed() -> None:
    head, same, other = (Probe(vit(), 900, chunk=4, seed=seed).head for seed in (5, 5, 6))
    assert torch.equal(head.weight, same.weight)
    assert not torch.equal(head.weight, other.weight)
    assert abs(head.weight.std().item() - 0.01) < 2e-4
    assert not head.bias.any()


def mixer(depth: int = 3) -> Mixer:
    backbone = Mixer(patch=4, dim=24, depth=depth, token_hidden=8, channel_hidden=48, image_size=16)
    initialise(backbone, 0)
    return backbone


@pytest.mark.parametrize("make", [lambda: vit(3, "cls"), lambda: vit(3, "avg"), lambda: mixer(3)])
@pytest.mark.parametrize("num_blocks", [0.0, 0.5, 1.0, 3.0])
def test_partial_finetune_trains_the_last_blocks_the_norm_and_the_head(
    make: Callable[[], Backbone], num_blocks: float
) -> None:
    """Every parameter that is to be trained gets a gradient (DDP asks for it), every other stays as it is."""
    backbone = make()
    backbone.train_last(num_blocks)
    objective = Finetune(backbone, 5, drop_path=0.0, label_smoothing=0.0, seed=3)
    nn.init.normal_(objective.head.weight)
    objective(batch_of(6)).loss.sum().backward()
    found = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    second = ("blocks.2.norm2", "blocks.2.mlp.", "blocks.2.mlp_channels")
    blocks = {0: (), 0.5: second, 1: ("blocks.2",), 3: ("blocks.",)}[num_blocks]
    wanted = tuple(f"backbone.{part}" for part in ("norm.", "fc_norm.", *blocks))
    assert found == {name for name, _ in objective.named_parameters() if name.startswith((*wanted, "head."))}
    assert backbone.num_frozen == {0: 3, 0.5: 2, 1: 2, 3: 0}[num_blocks]


def test_partial_finetune_frozen_blocks_have_no_drop_path() -> None:
    objective, whole = finetune(drop_path=0.4, depth=5).train(), finetune(drop_path=0.4, depth=5).train()
    objective.backbone.train_last(2.0)
    scale = scale_of(objective, batch_of(200))
    assert (scale[:3] == 1).all()
    assert torch.equal(scale[3:], scale_of(whole, batch_of(200))[3:])


@pytest.mark.parametrize("num_blocks", [-1.0, 0.3, 1.5, 4.0])
def test_partial_finetune_refuses_impossible_numbers_of_blocks(num_blocks: float) -> None:
    with pytest.raises(ValueError, match=r"model.train_blocks=.*: must be 0.5 or a whole number from 0 to .* 3$"):
        vit(3).train_last(num_blocks)
