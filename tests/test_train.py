"""The loop without a stage: one training step, and fit over a task made by hand."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mae_dist import config, dist, models, optim, train
from mae_dist.batch import Batch
from mae_dist.objectives.classify import Finetune
from mae_dist.run.directory import RunDir
from mae_dist.schema import DataConfig, FinetuneConfig, MixConfig, TrainConfig
from mae_dist.signals import Stopped

CPU = torch.device("cpu")
BATCH, SAMPLES = 8, 16


def batches(steps: range, num_micro: int = 1) -> Iterator[Batch]:
    """Micro-batches of random images, a pure function of the step."""
    for step in steps:
        ids = torch.arange(step * BATCH, (step + 1) * BATCH) % SAMPLES
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        batch = Batch(images, ids % 3, ids, torch.zeros_like(ids), torch.zeros(BATCH, dtype=torch.bool))
        yield from batch.split(BATCH // num_micro)


def objective() -> Finetune:
    return Finetune(
        models.build("vit_demo4", image_size=32, seed=0), 3, drop_path=0.0, mix=MixConfig(), label_smoothing=0.0, seed=0
    )


def state() -> train.TrainState:
    module = objective()
    optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=0.0, fused=True)
    optim.init_optimizer_state(optimizer)
    return train.TrainState(module, optimizer, optim.LossScale(CPU, enabled=False), optim.EMA(module, 0.5))


def task(**changes: object) -> train.Task:
    module = objective()
    values = {
        "verb": "finetune", "objective": module, "batches": batches, "num_micro": 1, "num_samples": SAMPLES,
        "evaluate": lambda step: {"steps": float(step)}, "sample_name": str,
    } | changes  # fmt: skip
    return train.Task(**values)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def settings(tmp_path: Path) -> FinetuneConfig:
    overrides = [
        f"out={tmp_path / 'run'}", "data.path=x", "init_from=random", "model.name=vit_demo4", "train.precision=fp32",
        f"train.global_batch={BATCH}", "train.steps=6", "checkpoint.every=2", "track.every=4", "optim.base_lr=1e-2",
    ]  # fmt: skip
    return config.load("finetune", None, overrides)


def opened(settings: FinetuneConfig) -> RunDir:
    run = RunDir(settings.out)
    run.open("finetune", settings, "abc")
    return run


def test_train_step_with_micro_batches_equals_the_whole_batch() -> None:
    whole, parts = state(), state()
    settings = TrainConfig(precision="fp32", global_batch=BATCH)
    one = train.train_step(whole.objective, whole, batches(range(1)), 1e-3, 1, settings)
    four = train.train_step(parts.objective, parts, batches(range(1), 4), 1e-3, 4, settings)
    assert whole.step == parts.step == 1
    torch.testing.assert_close(one.loss, four.loss)
    assert torch.equal(one.tensors()["ids"], four.tensors()["ids"])
    for first, second in zip(whole.trained, parts.trained, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_step_on_many_ranks_sums_gradients_that_fp16_computes_as_one_rank_does(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of 64 ranks have the same images: a loss times 64 would overflow six scales of fp16 sooner."""
    largest, norms = [], []
    for world in (1, 64):
        subject = state()
        subject.loss_scale = optim.LossScale(CPU, enabled=precision == "fp16")
        head = subject.objective.head.weight  # pyright: ignore[reportAttributeAccessIssue]
        head.register_hook(lambda gradient: largest.append(gradient.abs().max()))  # pyright: ignore
        monkeypatch.setattr(dist, "world", lambda world=world: world)
        monkeypatch.setattr(dist, "all_reduce_sum", lambda tensor: tensor)
        settings = TrainConfig(precision=precision, global_batch=BATCH)  # pyright: ignore[reportArgumentType]
        norms.append(train.train_step(subject.objective, subject, batches(range(1)), 0.0, 1, settings).grad_norm)
    assert largest[1] / largest[0] == (1 if precision == "fp16" else 64)
    torch.testing.assert_close(norms[1], 64 * norms[0])


def test_train_step_that_is_not_finite_changes_neither_weights_nor_moments_nor_ema() -> None:
    subject = state()
    before = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    (batch,) = batches(range(1))
    broken = batch._replace(images=batch.images.index_fill(0, torch.tensor([3]), torch.nan))
    metrics = train.train_step(
        subject.objective, subject, iter([broken]), 1e-3, 1, TrainConfig(precision="fp32", global_batch=BATCH)
    )
    assert not metrics.tensors()["grad_norm"].isfinite()
    after = subject.tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert subject.step == 1


def test_fit_resumes_bit_identical_after_sigterm_and_evaluates_at_the_end(
    settings: FinetuneConfig, tmp_path: Path
) -> None:
    dist.setup()
    seen: list[int] = []
    stopping = False

    def stop_at_step_3() -> None:
        if stopping and seen[-1] == 2:
            signal.raise_signal(signal.SIGTERM)

    def recorded(steps: range) -> Iterator[Batch]:
        for number, batch in zip(steps, batches(steps), strict=True):
            seen.append(number)
            stop_at_step_3()
            yield batch

    run = opened(settings)
    numbers = train.fit(task(batches=recorded), run, settings, CPU)
    assert seen == list(range(6))
    assert numbers["steps"] == 6

    other = config.load("finetune", None, [f"out={tmp_path / 'stopped'}", *overrides_of(settings)])
    stopped = opened(other)
    stopping = True
    with pytest.raises(Stopped):
        train.fit(task(batches=recorded), stopped, other, CPU)
    stopping = False
    assert seen[6:] == [0, 1, 2]
    assert train.fit(task(batches=recorded), stopped, other, CPU)["steps"] == 6
    assert seen[9:] == [3, 4, 5]
    assert losses(stopped) == losses(run)


def test_fit_of_initial_weights_loads_them_only_at_the_first_launch(settings: FinetuneConfig) -> None:
    loads: list[int] = []
    run = opened(settings)
    train.fit(task(load_initial_weights=lambda: loads.append(1)), run, settings, CPU)
    train.fit(task(load_initial_weights=lambda: loads.append(1)), run, settings, CPU)
    assert loads == [1]


@pytest.mark.parametrize(("every", "expected"), [(None, [9]), (3, [3, 6, 9]), (2.5, [3, 5, 8, 9]), (100, [9])], ids=str)
def test_due_happens_every_so_many_steps_and_at_the_last(every: float | None, expected: list[int]) -> None:
    assert [step for step in range(1, 10) if train.due(step, every, last=9)] == expected


def test_evaluation_falls_on_the_exact_step_where_the_batch_does_not_divide_the_epoch() -> None:
    overrides = [
        "out=o", "data.path=d", "model.name=vit_ti4", "init_from=random", "train.global_batch=48",
        "track.evaluate_every=15",
    ]  # fmt: skip
    every = train.evaluation_interval(config.load("finetune", None, overrides), 50_000)
    assert [step for step in range(15_000, 47_000) if train.due(step, every, last=50_000)] == [15_625, 31_250, 46_875]


def overrides_of(settings: FinetuneConfig) -> list[str]:
    changed = config.changed(settings)
    return [f"{name}={value}" for name, value in changed.items() if name != "out"]


def losses(run: RunDir) -> list[Tensor]:
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize(("unreadable", "repeats"), [(4, 1), (1, 1), (4, 3)])
def test_budget_never_ends_a_run_within_it_however_early_the_unreadable_samples_come(
    unreadable: int, repeats: int
) -> None:
    """4 of 4,000 and data.max_bad=0.001, first in each of three passes."""
    data = DataConfig(aug_repeats=repeats)
    in_a_pass = unreadable * repeats
    for seen in range(1, 12_000 * repeats, 7):
        passes, within = divmod(seen, 4000 * repeats)
        assert not train.too_many_bad(passes * in_a_pass + min(within, in_a_pass), seen, 4000, data)


def test_budget_ends_a_run_after_the_part_of_a_pass_that_the_bound_is_of_its_share() -> None:
    def first_end(every: int, num_samples: int, data: DataConfig) -> int | None:
        """Samples seen when a run ends of which each `every`-th is unreadable."""
        passes = range(every, 3 * num_samples, every)
        return next((seen for seen in passes if train.too_many_bad(seen // every, seen, num_samples, data)), None)

    data = DataConfig()  # max_bad=0.001
    assert first_end(10, 4000, data) == 50
    assert first_end(100, 1_280_000, data) == 128_100
    assert first_end(500, 100_000, data) == 50_500
    assert first_end(1000, 100_000, data) is None
    assert first_end(40, 40, data) is None, "one sample is never too many"
    assert first_end(40, 40, DataConfig(max_bad=0)) == 40


def test_budget_saves_before_it_ends_the_run_which_goes_on_with_a_greater_one(settings: FinetuneConfig) -> None:
    """3 of 16 samples are unreadable, all in every other step."""
    dist.setup()

    def some_unreadable(steps: range) -> Iterator[Batch]:
        for batch in batches(steps):
            yield batch._replace(bad=(batch.ids > 3) & (batch.ids < 7))

    def attempt(*more: str) -> dict[str, float]:
        words = [f"out={settings.out}", *overrides_of(settings), "train.steps=3", *more]
        changed = config.load("finetune", None, words)
        return train.fit(task(batches=some_unreadable), opened(changed), changed, CPU)

    for _ in range(2):
        with pytest.raises(ValueError, match=r"3 of 8 samples could not be read: more than data.max_bad=0.1 of all 16"):
            attempt("data.max_bad=0.1", "track.every=1", "checkpoint.every=100")
        assert [path.name for path in RunDir(settings.out).checkpoints()] == ["step-000000001"]
    assert attempt("data.max_bad=0.2")["bad"] == 6
    assert len(losses(RunDir(settings.out))) == 3
