"""Optimizers: rates, decay groups and layer scales are the papers'; LARS by hand; priming moves nothing."""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim.lars import Lars
from torch import nn

from mae_dist import models, optim
from mae_dist.models.backbone import Backbone
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MaeConfig, OptimConfig

PRETRAIN = OptimConfig(base_lr=1.5e-4, min_lr=0.0, warmup_epochs=40.0)


def test_lr_of_vit_b_pretraining() -> None:
    """He et al. 2022, table 8: base 1.5e-4, batch 4096, 800 epochs, 40 of them warmup; 312 steps an epoch."""
    peak, steps = PRETRAIN.peak_lr(4096), 312
    assert peak == pytest.approx(2.4e-3)
    total = 800 * steps
    lr = optim.schedule(PRETRAIN, peak, 800.0)
    for step in (0, 1, 20 * steps, 40 * steps - 1, 40 * steps, 41 * steps, 400 * steps, 420 * steps, total - 1):
        epoch = step / steps
        factor = epoch / 40 if epoch < 40 else 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))
        assert lr(step / total) == pytest.approx(2.4e-3 * factor, rel=1e-6, abs=1e-12)
    assert lr(0.0) == 0
    assert lr(420 / 800) == pytest.approx(1.2e-3)


@pytest.mark.parametrize(("base", "peak", "epochs"), [(5e-4, 2e-3, 100), (1e-3, 4e-3, 50)])
def test_lr_of_finetuning(base: float, peak: float, epochs: int) -> None:
    """He et al. 2022, table 9, with the official code's rates of B, then of L and H: batch 1024, 5 epochs of warmup,
    half a cosine to 1e-6; 1251 steps an epoch.
    """
    settings, steps = OptimConfig(base_lr=base, min_lr=1e-6, warmup_epochs=5.0), 1251
    assert settings.peak_lr(1024) == pytest.approx(peak)
    lr = optim.schedule(settings, peak, float(epochs))
    for step in (0, 1, 2 * steps, 5 * steps - 1, 5 * steps, 6 * steps, 27 * steps, epochs * steps - 1):
        epoch = step / steps
        down = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / (epochs - 5)))
        assert lr(step / (epochs * steps)) == pytest.approx(peak * epoch / 5 if epoch < 5 else down, rel=1e-6)
    assert lr(1 / epochs) == pytest.approx(peak / 5)  # an epoch is a fifth of the way up


def test_lr_ends_at_min_lr_and_starts_at_the_peak_without_warmup() -> None:
    lr = optim.schedule(OptimConfig(min_lr=1e-6), 1e-3, 100.0)
    assert lr(0.0) == pytest.approx(1e-3)
    assert lr(0.5) == pytest.approx((1e-3 + 1e-6) / 2)
    assert lr(1 - 1e-9) == pytest.approx(1e-6)


def test_warmup_longer_than_the_run_is_all_warmup() -> None:
    lr = optim.schedule(OptimConfig(warmup_epochs=40.0), 1.0, 10.0)
    assert [lr(p) for p in (0.0, 0.5, 0.999)] == pytest.approx([0, 0.5, 0.999])


def test_linear_decay_of_mixer_b_from_scratch() -> None:
    """big_vision's mlp_mixer_i1k.py: 1e-3 at batch 4096, 10,000 steps of warmup, a straight line to 1e-5 of it."""
    steps = 1_281_167 / 4096
    settings = OptimConfig(base_lr=6.25e-5, min_lr=1e-8, schedule="linear", warmup_epochs=10_000 / steps)
    peak, total = settings.peak_lr(4096), round(300 * steps)
    assert peak == pytest.approx(1e-3)
    lr = optim.schedule(settings, peak, total / steps)
    for step in (0, 5_000, 10_000, 50_000, total - 1):
        down = (step - 10_000) / (total - 10_000)
        expected = 1e-3 * step / 10_000 if step < 10_000 else 1e-3 - (1e-3 - 1e-8) * down
        assert lr(step / total) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def vit_b() -> Backbone:
    with torch.device("meta"):
        return models.BACKBONES["vit_b16"](position="learned", pool="avg")


def names_by(objective: nn.Module, groups: list[dict], key: str) -> dict[str, float]:
    of = {id(parameter): group[key] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of)
    return {name: of[id(p)] for name, p in objective.named_parameters() if id(p) in of}


@pytest.mark.parametrize(
    ("name", "decay", "depth", "peak"),
    [("b16", 0.65, 12, 2e-3), ("l16", 0.75, 24, 4e-3), ("h14", 0.75, 32, 4e-3)],
)
def test_layer_decay_of_vits(name: str, decay: float, depth: int, peak: float) -> None:
    """decay ** (depth + 1 - layer): the embedding is layer 0, block i layer i + 1, what follows layer depth + 1."""
    with torch.device("meta"):
        backbone = models.BACKBONES[f"vit_{name}"](position="learned", pool="avg")
        objective = Finetune(backbone, 10, drop_path=0.0, label_smoothing=0.0, seed=0)
    groups = optim.param_groups(objective, OptimConfig(layer_decay=decay), backbone.depth, no_decay_tokens=True)
    scales = names_by(objective, groups, "lr_scale")
    assert set(scales) == {name for name, _ in objective.named_parameters()}
    last = depth + 1
    for parameter, scale in scales.items():
        parts = parameter.split(".")
        follows = parts[0] == "head" or parts[1] == "fc_norm"
        layer = int(parts[2]) + 1 if parts[1] == "blocks" else last if follows else 0
        assert scale == pytest.approx(decay ** (last - layer)), parameter
    optimizer = torch.optim.SGD(groups, lr=1.0)
    optim.set_lr(optimizer, peak)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([peak * decay**i for i in range(last, -1, -1)])


def test_weight_decay_of_pretraining_spares_biases_and_norms_only() -> None:
    """The official code decays class and mask token; its positions are fixed."""
    with torch.device("meta"):
        objective = MAE(models.BACKBONES["vit_b16"](), MaeConfig(), seed=0)
    groups = optim.param_groups(objective, OptimConfig(weight_decay=0.05), 12, no_decay_tokens=False)
    decay = names_by(objective, groups, "weight_decay")
    assert "backbone.pos_embed" not in decay
    assert "decoder_pos_embed" not in decay
    for name, value in decay.items():
        assert value == (0.0 if name.endswith("bias") or "norm" in name else 0.05), name
    assert decay["backbone.cls_token"] == decay["mask_token"] == 0.05
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert len(groups) == 2


def test_weight_decay_of_finetuning_spares_tokens_and_positions_too() -> None:
    with torch.device("meta"):
        objective = Finetune(vit_b(), 10, drop_path=0.0, label_smoothing=0.0, seed=0)
    groups = optim.param_groups(objective, OptimConfig(weight_decay=0.05, layer_decay=0.65), 12, no_decay_tokens=True)
    for name, value in names_by(objective, groups, "weight_decay").items():
        spared = name.endswith("bias") or "norm" in name or name in ("backbone.cls_token", "backbone.pos_embed")
        assert value == (0.0 if spared else 0.05), name


def test_a_probe_trains_its_head_only() -> None:
    with torch.device("meta"):
        objective = Probe(vit_b(), 10, chunk=1, seed=0)
    groups = optim.param_groups(objective, OptimConfig(weight_decay=0.0), 12, no_decay_tokens=True)
    assert set(names_by(objective, groups, "lr_scale")) == {"head.weight", "head.bias"}


def test_lars_by_hand() -> None:
    """Two steps on a 1 x 2 matrix of norm 5 and a vector, trust 0.001, momentum 0.9, weight decay 0.1, lr 2."""
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 4.0]]).double()), nn.Parameter(torch.tensor([1.0]).double())
    lars = optim.LARS([{"params": [matrix, vector], "weight_decay": 0.1}], lr=2.0)
    matrix.grad, vector.grad = torch.tensor([[0.3, -0.4]]).double(), torch.tensor([0.5]).double()
    lars.step()
    # g + wd * w = (0.6, 0), of norm 0.6: scaled by 0.001 * 5 / 0.6 it is (0.005, 0)
    assert matrix[0].tolist() == pytest.approx([3 - 2 * 0.005, 4])
    assert vector.tolist() == pytest.approx([1 - 2 * 0.5])  # neither scaled nor decayed
    matrix.grad, vector.grad = torch.tensor([[-0.299, 1.6]]).double(), torch.tensor([1.0]).double()
    lars.step()
    # g + wd * w = (0, 2), |w| = |(2.99, 4)|: the scaled update is (0, 0.001 * |w|); momentum adds 0.9 of the first
    assert matrix[0].tolist() == pytest.approx([2.99 - 2 * 0.9 * 0.005, 4 - 2 * 0.001 * math.hypot(2.99, 4)])
    assert vector.tolist() == pytest.approx([0 - 2 * (0.9 * 0.5 + 1.0)])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_timms_but_for_weight_decay(decay: float) -> None:
    """timm scales what it is told to, and by |gradient| + decay |w| + 1e-8, which is |update| only without decay."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Linear(3, 4).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    first = optim.LARS([{"params": list(ours.parameters()), "weight_decay": decay}], lr=0.5)
    matrix = {"params": [theirs.weight], "weight_decay": decay, "always_adapt": True}
    second = Lars([matrix, {"params": [theirs.bias]}], lr=0.5, momentum=0.9)  # pyright: ignore  (timm says int)
    for _ in range(10):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, dtype=torch.float64, generator=generator)
            other.grad = mine.grad.clone()
        first.step()
        second.step()
    assert torch.equal(ours.bias, theirs.bias)
    gap = (ours.weight - theirs.weight).abs().max()
    assert gap < 1e-9 if decay == 0 else gap > 1e-5


def test_lars_scales_its_momentum_by_the_rate_of_the_step() -> None:
    """As the official code's: m <- 0.9 m + update, w <- w - lr m, so that a new rate also scales what is remembered."""
    matrix = nn.Parameter(torch.tensor([[3.0, 4.0]]).double())
    lars = optim.LARS([{"params": [matrix], "lr_scale": 1.0, "weight_decay": 0.0}])
    first, second = 0.001 * 5 / 2, 0.001 * math.hypot(3 - 6.4 * 0.001 * 5, 4) / 3
    for lr, gradient in ((6.4, [2.0, 0.0]), (3.2, [0.0, 3.0])):
        optim.set_lr(lars, lr)
        matrix.grad = torch.tensor([gradient]).double()
        lars.step()
    expected = [3 - 6.4 * first * 2 - 3.2 * 0.9 * first * 2, 4 - 3.2 * second * 3]
    assert matrix[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_lars_of_a_zero_matrix_or_gradient_is_not_scaled() -> None:
    zero, still = nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.ones(1, 2))
    lars = optim.LARS([zero, still], lr=1.0)
    zero.grad, still.grad = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    lars.step()
    assert zero.tolist() == [[-1, -2]]
    assert still.tolist() == [[1, 1]]


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_priming_moves_nothing_and_leaves_a_new_optimizer(name: str) -> None:
    """After it, training is what it would have been without it: the step count of AdamW starts at 0."""
    results = []
    for primed in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        before = [p.clone() for p in layer.parameters()]
        settings = OptimConfig(name=name, weight_decay=0.1)  # pyright: ignore
        optimizer = optim.build(settings, optim.param_groups(layer, settings, 0, no_decay_tokens=False))
        if primed:
            optim.init_optimizer_state(optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
            assert all(p.grad is None for p in layer.parameters())
            assert {frozenset(s) for s in optimizer.state.values()} == {
                frozenset({"step", "exp_avg", "exp_avg_sq"} if name == "adamw" else {"momentum"})
            }
        optim.set_lr(optimizer, 0.1)
        for _ in range(2):
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_torchs_and_only_for_matrices_of_blocks(decay: float) -> None:
    layer = nn.Linear(3, 5)
    model = nn.ModuleDict({"blocks": layer, "decoder_embed": nn.Linear(5, 2)})
    settings = OptimConfig(name="muon", weight_decay=decay, momentum=0.95)
    optimizer = optim.build(settings, optim.param_groups(model, settings, 0, no_decay_tokens=False))
    matrix = layer.weight
    expected = nn.Parameter(matrix.detach().clone())
    torchs = torch.optim.Muon([expected], 0.1, decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optim.set_lr(optimizer, 0.1)
    for seed in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        expected.grad = matrix.grad
        optimizer.step()
        torchs.step()
    torch.testing.assert_close(matrix, expected)
    rules = {frozenset(state): parameter for parameter, state in optimizer.state.items()}
    assert rules[frozenset({"momentum"})] is matrix
    assert sum("exp_avg" in state for state in optimizer.state.values()) == 3


@pytest.mark.parametrize("name", ["adamw", "lars", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    groups = [{"params": [weight], "lr_scale": 1.0, "weight_decay": 0.1}]
    optimizer = optim.build(OptimConfig(name=name), groups)  # pyright: ignore
    optim.init_optimizer_state(optimizer)
    optim.set_lr(optimizer, 0.1)
    scale = optim.LossScale(torch.device("cpu"), enabled=False)

    def state() -> list[torch.Tensor]:
        return [weight.detach().clone(), *(moment.clone() for moment in optimizer.state[weight].values())]

    def step(gradient: float) -> float:
        weight.grad = torch.full_like(weight, gradient)
        return float(optim.update(optimizer, [weight], torch.linalg.vector_norm(weight.grad), 1.0, scale))

    assert step(2.0) == pytest.approx(2.0 * 12**0.5)
    before = state()
    assert not math.isfinite(step(math.nan))
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    step(2.0)
    assert not any(torch.equal(a, b) for a, b in zip(state(), before, strict=True))


def test_the_loss_scale_halves_and_doubles_and_does_not_enter_the_update() -> None:
    scale = optim.LossScale(torch.device("cpu"), enabled=True)
    good, bad = torch.tensor(True), torch.tensor(False)
    for _ in range(1999):
        scale.update(good)
    assert scale.scale == 2.0**16
    scale.update(good)
    assert scale.scale == 2.0**17
    scale.update(bad)
    assert scale.scale == 2.0**16
    assert scale.good == 0
    moved = []
    for enabled in (False, True):
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = optim.build(OptimConfig(), [{"params": [weight], "lr_scale": 1.0, "weight_decay": 0.0}])
        optim.init_optimizer_state(optimizer)
        optim.set_lr(optimizer, 0.1)
        own = optim.LossScale(torch.device("cpu"), enabled)
        weight.grad = torch.arange(6.0).reshape(3, 2) * own.scale
        norm = optim.update(optimizer, [weight], torch.linalg.vector_norm(weight.grad), 0.5, own)
        moved.append((weight.detach().clone(), float(norm)))
    assert torch.equal(moved[0][0], moved[1][0])
    assert moved[0][1] == moved[1][1] == pytest.approx(55**0.5)


def test_the_average_follows_by_its_formula_and_stands_still_with_a_skipped_step() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    average = optim.EMA(layer, 0.9)
    assert list(average.tensors()) == ["weight"]
    with torch.no_grad():
        layer.weight.fill_(5.0)
    average.reset()
    expected = 5.0
    for value, finite in ((7.0, True), (7.0, False), (-1.0, True)):
        with torch.no_grad():
            layer.weight.fill_(value)
        before = average.tensors()["weight"].clone()
        average.update(torch.tensor(finite))
        if finite:
            expected = 0.9 * expected + 0.1 * value
        else:
            assert torch.equal(average.tensors()["weight"], before)
        assert average.tensors()["weight"][0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_averaged_weights_are_lent_and_come_back() -> None:
    layer = nn.Linear(3, 2)
    average, weight = optim.EMA(layer, 0.9), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    with average.swapped_in():
        assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight, weight + 1)
    assert torch.equal(average.tensors()["weight"], weight)


def test_without_a_decay_there_is_no_average() -> None:
    average = optim.EMA(nn.Linear(3, 2), None)
    average.update(torch.tensor(True))
    assert average.tensors() == {}
