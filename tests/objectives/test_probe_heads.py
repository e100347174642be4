"""Several probe heads: together as each alone, one as the paper's probe; stored features. Runs: test_several_heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from mae_dist import evaluate, models, optim, schema
from mae_dist.batch import Batch
from mae_dist.data.features import Features
from mae_dist.data.index import open_split
from mae_dist.data.pack import pack
from mae_dist.data.resident import ResidentSource
from mae_dist.data.sources import from_synthetic
from mae_dist.data.views import View
from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import initialise
from mae_dist.models.vit import ViT
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Probe
from mae_dist.objectives.probe_heads import ATTENTIVE, LIMIT, AttentivePool, ProbeHeads, attend, held_out

CPU = torch.device("cpu")
OPTIM = schema.OptimConfig(name="lars", base_lr=0.1, weight_decay=0.0)
GRID: dict[str, Any] = {"lars": (0.5, 2.0), "sgd": (0.1, 0.4), "adamw": (1e-3, 1e-2), "weight_decay": (0.0, 0.05)}


def vit(pool: str = "cls") -> ViT:
    backbone = ViT(patch=4, dim=24, depth=3, num_heads=3, image_size=16, pool=pool)
    initialise(backbone, 0)
    return backbone.double()


def batch_of(num: int, first: int = 0) -> Batch:
    images = torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(first + 1), dtype=torch.float64)
    ids = torch.arange(first, first + num)
    return Batch(images, ids % 5, ids, torch.zeros_like(ids), torch.zeros(num, dtype=torch.bool))


def heads(share: float = 0.25, **grid: Any) -> ProbeHeads:
    return ProbeHeads(vit(), 5, schema.HeadsConfig(held_out=share, **grid), chunk=7, seed=3).double().train()


def trained(objective: Objective, steps: int = 6, settings: schema.OptimConfig = OPTIM) -> list[float]:
    """Train as `train.fit` does; the loss of each step."""
    groups = objective.groups(settings) or optim.param_groups(objective, settings, 3, no_decay_tokens=True)
    optimizer, found = optim.build(settings, groups), []
    parameters = [parameter for group in groups for parameter in group["params"]]
    optim.init_optimizer_state(optimizer)
    scale = optim.LossScale(CPU, enabled=False)
    for step in range(steps):
        optim.set_lr(optimizer, settings.base_lr * (1 - step / steps))
        loss = objective(batch_of(20, first=20 * step)).loss.sum() / 20
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        assert norm.isfinite()
        optim.update(optimizer, parameters, norm, None, scale)
        found.append(loss.item())
    return found


def test_probe_heads_one_lars_head_equals_the_probe_of_the_paper() -> None:
    probe = Probe(vit(), 5, chunk=4, seed=3).double().train()
    settings = schema.OptimConfig(name="lars", base_lr=0.3, weight_decay=0.0)
    alone = heads(share=0.0, lars=(0.3,))
    expected, found = trained(probe, settings=settings), trained(alone, settings=settings)
    assert found == pytest.approx(expected, rel=1e-12)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    torch.testing.assert_close(alone.linears[0].weight, probe.head.weight, rtol=1e-12, atol=1e-14)
    norm = alone.norms["cls_3"]
    torch.testing.assert_close(norm.running_var, probe.norm.running_var, rtol=1e-12, atol=1e-14)


def test_probe_heads_together_equal_each_alone() -> None:
    many = heads(**GRID, features=("cls", "mean", "both"), blocks=(1, 3), attentive=True)
    trained(many)
    assert len(many.heads) == 2 * 3 * 6 * 2 + 4
    assert len({head.name for head in many.heads}) == len(many.heads)
    many.eval()
    together = many(batch_of(9)).prediction
    for number in (0, 13, 30, 55, 72, 75):
        head = many.heads[number]
        kind = ("cls",) if head.features == ATTENTIVE else (head.features,)
        one: dict[str, Any] = {
            head.method: (head.base_lr,), "weight_decay": (head.weight_decay,), "features": kind,
            "blocks": (head.block,), "attentive": head.features == ATTENTIVE,
        }  # fmt: skip
        single = heads(**one)
        trained(single)
        assert single.heads[-1] == head
        alone = single.eval()(batch_of(9)).prediction[:, -1]
        torch.testing.assert_close(together[:, number], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("attentive", [False, True])
def test_probe_heads_diverged_head_does_not_affect_others(attentive: bool) -> None:
    """Weight decay times rate above 2 makes SGD's weights grow without end."""
    calm, wild = heads(sgd=(0.2,), weight_decay=(0.1,)), heads(sgd=(0.2, 1e9), weight_decay=(0.1,))
    if attentive:
        calm = heads(sgd=(0.2,), adamw=(1e-3,), weight_decay=(0.1,), attentive=True)
        wild = heads(sgd=(0.2, 1e9), adamw=(1e-3, 1e30), weight_decay=(0.1,), attentive=True)
    trained(calm, steps=12)
    trained(wild, steps=12)
    names = {head.name: number for number, head in enumerate(wild.heads)}
    rates = [head.base_lr or 0 for head in wild.heads]
    assert wild.dead.tolist() == [rate >= 1e9 for rate in rates]
    for number, head in enumerate(calm.heads):
        pairs = zip(calm.parameters_of(number), wild.parameters_of(names[head.name]), strict=True)
        for (_, mine), (_, other) in pairs:
            torch.testing.assert_close(other, mine, rtol=1e-9, atol=1e-12)
    assert not calm.dead.any()


def test_probe_heads_zero_gradients_beyond_the_limit_and_losses_of_dead_heads() -> None:
    objective = heads(sgd=(0.1, 0.2))
    big = torch.full((3,), 2 * LIMIT)
    assert not objective._zero_if_dead(0, big).any()
    assert objective._zero_if_dead(0, big / 10).all()
    whole = objective(batch_of(8)).loss
    objective.dead[0] = True
    assert not objective._zero_if_dead(0, torch.ones(3)).any()
    torch.testing.assert_close(2 * objective(batch_of(8)).loss, whole)  # both heads are still the same


def test_probe_heads_nonfinite_features_kill_no_head() -> None:
    """Then the loss is not finite, and the step is skipped as any other."""
    objective, batch = heads(**GRID), batch_of(8)
    batch.images[3, 0, 0, 0] = torch.nan
    assert not objective(batch).loss.sum().isfinite()
    assert not objective.dead.any()


def test_probe_heads_nonfinite_step_changes_no_head() -> None:
    objective = heads(**GRID)
    groups = objective.groups(OPTIM)
    assert {(g["rule"], g.get("trust", 0), g["lr_scale"]) for g in groups} == {
        *(("lars", 0, rate / 0.1) for rate in GRID["lars"]), *(("lars", None, rate / 0.1) for rate in GRID["sgd"]),
        *(("adamw", 0, rate / 0.1) for rate in GRID["adamw"]),
    }  # fmt: skip
    optimizer, scale = optim.build(OPTIM, groups), optim.LossScale(CPU, enabled=False)
    optim.init_optimizer_state(optimizer)
    optim.set_lr(optimizer, 0.1)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(optimizer.state) == 2 * len(objective.heads)

    def step(norm: float) -> list[torch.Tensor]:
        objective(batch_of(8)).loss.sum().backward()
        optim.update(optimizer, parameters, torch.tensor(norm), None, scale)
        moments = [moment for parameter in parameters for moment in optimizer.state[parameter].values()]
        return [tensor.detach().clone() for tensor in (*parameters, *moments)]

    before, skipped, after = step(1.0), step(math.nan), step(1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, skipped, strict=True))
    assert not any(torch.equal(old, new) for old, new in zip(skipped, after, strict=True))


def test_probe_heads_held_out_samples_are_chosen_by_id_and_have_no_weight() -> None:
    ids = np.arange(20000)
    chosen = held_out(3, 0.25, ids)
    assert abs(chosen.mean() - 0.25) < 0.01
    assert torch.equal(held_out(3, 0.25, torch.from_numpy(ids)), torch.from_numpy(chosen))
    assert (held_out(4, 0.25, ids) != chosen).mean() > 0.3
    assert (chosen <= held_out(3, 0.5, ids)).all()
    objective, batch = heads(sgd=(0.1,)), batch_of(40)
    loss, mark = objective(batch).loss, held_out(3, 0.25, batch.ids)
    assert 0 < mark.sum() < 40
    assert torch.equal(loss == 0, mark)
    plain = nn.functional.cross_entropy(objective(batch).prediction[:, 0], batch.labels, reduction="none")
    torch.testing.assert_close(loss[~mark], plain[~mark] / 0.75, rtol=1e-6, atol=0)


def test_probe_heads_learn_nothing_from_held_out_samples() -> None:
    """Not even batch norm's statistics: held-out samples of other content leave losses and norms as they are."""
    first, second, batch = heads(lars=(0.3,)), heads(lars=(0.3,)), batch_of(40)
    mark = held_out(3, 0.25, batch.ids)
    other = batch._replace(images=torch.where(mark[:, None, None, None], 7.0 + batch.images, batch.images))
    assert torch.equal(first(batch).loss, second(other).loss)
    norms = [objective.norms["cls_3"].state_dict() for objective in (first, second)]
    assert all(torch.equal(norms[0][name], norms[1][name]) for name in ("running_mean", "running_var"))


def test_attentive_pooling_equals_cross_attention_of_one_query() -> None:
    pools = [AttentivePool(192).double() for _ in range(2)]
    for number, pool in enumerate(pools):
        initialise(pool, number)
        nn.init.normal_(pool.query, generator=torch.Generator().manual_seed(number))
    assert pools[0].num_heads == 3
    tokens = torch.randn(4, 11, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = attend(pools, tokens)
    for number, pool in enumerate(pools):
        q = rearrange(pool.query, "(h c) -> 1 h 1 c", h=3).expand(4, -1, -1, -1)
        k, v = (rearrange(layer(tokens), "b n (h c) -> b h n c", h=3) for layer in (pool.key, pool.value))
        expected = nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(found[:, number], rearrange(expected, "b h 1 c -> b (h c)"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_probe_heads_features_of_the_last_block_equal_the_backbones(pool: str) -> None:
    backbone, images = vit(pool), batch_of(5).images
    settings = schema.HeadsConfig(ridge=True, features=("cls", "mean"), blocks=(2, 3))
    objective = ProbeHeads(backbone, 5, settings, chunk=2, seed=0)
    rows = objective.features(batch_of(5))
    own = objective.columns[3, "cls" if pool == "cls" else "mean"]
    torch.testing.assert_close(rows[:, own], backbone(images))
    x = backbone.embed(images)
    for block in backbone.blocks[:2]:
        x = block(x)
    inner = (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rows[:, objective.columns[2, "cls"]], inner[:, 0])
    torch.testing.assert_close(rows[:, objective.columns[2, "both"]], torch.cat([inner[:, 0], inner[:, 1:].mean(1)], 1))


def test_backbone_layers_end_with_the_output_of_encode() -> None:
    for name in ("vit_demo4", "mixer_demo4"):
        backbone: Backbone = models.build(name)
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(backbone.layers(images, [1, 4])[-1], backbone.encode(images))


def test_ridge_equals_a_direct_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator) * torch.arange(1, 8) + 3
    labels = torch.randint(0, 4, (60,), generator=generator)
    ridge = evaluate.Ridge(7, 4, CPU)
    for part, marks in zip(x.split(13), labels.split(13), strict=True):
        ridge.add(part, marks)
    weight, bias = ridge.solve((1e-3, 0.5))
    wide, target = x.double(), nn.functional.one_hot(labels, 4).double()
    centred = wide - wide.mean(0)
    for number, penalty in enumerate((1e-3, 0.5)):
        strength = 60 * penalty * wide.var(0, unbiased=False).mean()
        rows = torch.cat([centred, strength.sqrt() * torch.eye(7, dtype=torch.float64)])
        goal = torch.cat([target - target.mean(0), torch.zeros(7, 4, dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, goal).solution
        torch.testing.assert_close(weight[number], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bias[number], target.mean(0) - wide.mean(0) @ expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("hits", "total"), [(500, 1000), (4500, 10000), (30, 400)])
def test_bootstrap_interval_is_near_the_normal_one(hits: int, total: int) -> None:
    share = hits / total
    half = 100 * 1.96 * math.sqrt(share * (1 - share) / total)
    low, high = evaluate.bootstrap(hits, total, seed=5)
    assert low == pytest.approx(100 * share - half, abs=0.15 * half)
    assert high == pytest.approx(100 * share + half, abs=0.15 * half)
    assert (low, high) == evaluate.bootstrap(hits, total, seed=5)
    assert (low, high) != evaluate.bootstrap(hits, total, seed=6)
    assert evaluate.bootstrap(total, total, seed=0) == (100, 100)


# features on disk


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 350 training and 60 test images."""
    folder = tmp_path_factory.mktemp("data") / "set"
    pack(from_synthetic(350, 60), folder, shard_size=150)
    return folder


def test_features_on_disk_are_bit_identical_for_any_number_of_ranks(data: Path, tmp_path: Path) -> None:
    index = open_split(str(data), "train")
    images = ResidentSource(index, CPU, quiet=True)
    view = View(
        schema.ViewConfig(crop="center", flip=0.0, test_crop=1.0),
        32,
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
        0,
        training=False,
    )
    backbone = models.build("vit_demo4", depth=1)
    objective = ProbeHeads(backbone, 10, schema.HeadsConfig(ridge=True, features=("both",)), chunk=50, seed=0)

    def filled(name: str, world: int) -> Features:
        features = Features(tmp_path / name, index, (objective.width,), CPU, shard=64)
        for rank in reversed(range(world)):
            features.fill(images, view, lambda batch: objective.rows(batch.images), rank, world)
        assert features.missing() == []
        return features

    one, three = filled("one", 1), filled("three", 3)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 12
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "three" / n).read_bytes() for n in files)
    ids = np.array([349, 3, 3, 128, 63, 64])
    plan = [(np.arange(6), ids)]
    (stored,), (shown,) = three.batches(plan, view), images.batches(plan, view)
    for name in ("labels", "ids", "epochs", "bad"):
        assert torch.equal(getattr(stored, name), getattr(shown, name))
    torch.testing.assert_close(stored.images, objective.features(shown), rtol=1e-5, atol=1e-5)
    assert torch.equal(objective.features(stored), stored.images)

    before = {n: (tmp_path / "one" / n).stat().st_mtime_ns for n in files}
    whole = (tmp_path / "one/00002.npy").read_bytes()
    for damaged in (b"", whole[:10] + b"(" * 60, whole.replace(b"<f4", b"<i4"), b"cut"):
        (tmp_path / "one/00002.npy").write_bytes(damaged)
        assert Features(tmp_path / "one", index, (objective.width,), CPU, shard=64).missing() == [2]
    one = filled("one", 2)
    assert (tmp_path / "one/00002.npy").read_bytes() == (tmp_path / "three/00002.npy").read_bytes()
    changed = [n for n in files if (tmp_path / "one" / n).stat().st_mtime_ns != before[n]]
    assert changed == ["00002.labels.npy", "00002.npy"]
    with pytest.raises(ValueError, match="its features are not finite; try precision fp32"):
        Features(tmp_path / "bad", index, (1,), CPU).fill(
            images, view, lambda batch: batch.images.flatten(1)[:, :1] / 0
        )
    assert one.num_bytes == 350 * 256 * 4
