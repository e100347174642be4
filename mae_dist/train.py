"""The one loop: TrainState, Task, train_step and fit. A stage brings a Task; it never writes a loop of its own.

The position of a run is one integer, `step`; learning rate, sample order, crops and masks follow from it. The global
batch, not the number of ranks, enters the mathematics: each rank's loss counts by its number of samples.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_dist import clock, cost, devices, dist, hints, optim, parallel, resolutions, rewind, watchdog
from mae_dist import config as configuration
from mae_dist.batch import Batch
from mae_dist.clock import Mark, Spans
from mae_dist.cuda_graphs import GraphedPasses
from mae_dist.model_sizes import sides
from mae_dist.objectives import Objective
from mae_dist.printed import counted
from mae_dist.run import checkpoint, layout, tracker
from mae_dist.run.async_checkpoint import AsyncSaver
from mae_dist.run.directory import RunDir
from mae_dist.run.tracker import Tracker
from mae_dist.schema import DataConfig, TrainConfig, TrainingConfig
from mae_dist.signals import StopFlag, Stopped

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a checkpoint holds; all else of a run follows from `step`, the number of steps made."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    loss_scale: optim.LossScale
    ema: optim.EMA
    step: int = 0

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer trains, in the order of its groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: `model.*`, `optimizer.*` (moments of each parameter) and, where the run has them, `ema.*`
        (the average of each parameter) and `scaler.*`. Tensors or DTensors, not copies.
        """
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.objective.named_parameters()}
        state = {f"{checkpoint.MODEL}{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for parameter, moments in self.optimizer.state.items():
            state |= {f"{checkpoint.OPTIMIZER}{names[parameter]}.{key}": moment for key, moment in moments.items()}
        state |= {f"{checkpoint.EMA}{name}": tensor for name, tensor in self.ema.tensors().items()}
        return state | {f"{checkpoint.LOSS_SCALE}{name}": tensor for name, tensor in self.loss_scale.tensors().items()}

    def restore(self, run: RunDir) -> bool:
        """Fill the state in place from the run's newest undamaged checkpoint; False when the run has none."""
        self.step = run.restore(self.tensors())
        return self.step > 0


@dataclass(frozen=True)
class Task:
    """What a stage brings to `fit`. ``batches(steps)`` yields `num_micro` micro-batches of this rank for each step;
    ``num_samples`` make an epoch; ``evaluate(step)`` gives numbers, called by all ranks together while the objective
    has the averaged weights, if the run averages; ``sample_name(id)`` is for people; all ranks together call
    ``log_changes()`` (see `data.changes`); ``no_decay_tokens``: see `optim.param_groups`.
    """

    verb: str
    objective: Objective
    batches: Callable[[range], Iterator[Batch]]
    num_micro: int
    num_samples: int
    evaluate: Callable[[int], dict[str, Any]]
    sample_name: Callable[[int], str]
    load_initial_weights: Callable[[], None] = lambda: None
    log_changes: Callable[[], None] = lambda: None
    no_decay_tokens: bool = True


@dataclass
class StepMetrics:
    """What a step measured: tensors of the whole batch on the device, and the times in which it waited."""

    lr: float
    loss: Tensor
    loss_scale: Tensor
    seconds: dict[str, Spans] = field(default_factory=lambda: {"data_wait": [], "communication": []})
    samples: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    grad_norm: Tensor | None = None

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Take a micro-batch, and note its samples and how long the device waited for it."""
        began = clock.mark(self.loss.device)
        batch = next(batches)
        self.seconds["data_wait"].append((began, clock.mark(self.loss.device)))
        self.samples.append((batch.bad, batch.ids, batch.epochs))
        return batch

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, and note how long this rank, done with its own, waited for those of the others."""
        done: list[Mark] = []
        if dist.world() > 1:
            parallel.when_computed(loss, lambda: done.append(clock.mark(loss.device)))
        loss.backward()
        self.seconds["communication"] += [(mark, clock.mark(loss.device)) for mark in done]

    def tensors(self) -> dict[str, Tensor]:
        """What the tracker keeps until its next flush: of all ranks `loss`, `grad_norm` and `loss_scale`; of this rank
        `bad` (its number of unreadable samples), `ids` and `epochs`.
        """
        assert self.grad_norm is not None
        bad, ids, epochs = (torch.cat(parts) for parts in zip(*self.samples, strict=True))
        shared = {"loss": self.loss, "grad_norm": self.grad_norm, "loss_scale": self.loss_scale}
        return shared | {"bad": bad.sum().to(self.loss), "ids": ids, "epochs": epochs}


class Wanted(NamedTuple):
    """What any rank wants to happen after a step; all ranks agree on it."""

    stop: bool
    save: bool


def due(step: int, every: float | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens after `step` steps."""
    return step == last or (every is not None and int(step // every) > int((step - 1) // every))


def evaluation_interval(config: TrainingConfig, num_samples: int) -> float | None:
    """Steps between evaluations of a run over `num_samples` images an epoch; None: only at the end."""
    epochs = config.track.evaluate_every
    return epochs and epochs * num_samples / config.train.global_batch


def fit(task: Task, run: RunDir, config: TrainingConfig, device: torch.device) -> dict[str, float]:
    """Train from the newest checkpoint of `run`, or else from initial weights, to the end; give the final numbers.
    Raises, having saved, Stopped when any rank was signalled to stop, and ValueError when too many samples cannot be
    read; RankLost when a rank does not answer.
    """
    total, batch = configuration.total_steps(config.train, task.num_samples), config.train.global_batch
    lr = optim.schedule(config.optim, config.optim.peak_lr(batch), total * batch / task.num_samples)
    module, state, graphs = prepare(task, run, config, device)
    run.record_launch(first := state.step, device)
    announce(task, run, config, state, total, peak := peak_flops(config, device))
    with (
        dist.name_lost_ranks(lambda: f"step {state.step + 1}"),
        StopFlag() as stop,
        Tracker(run.path, config, task.verb, state.step, total, task.num_samples, peak) as tracking,
        AsyncSaver(run, config.checkpoint, pinned=device.type == "cuda") as saver,
    ):
        state.optimizer.register_step_pre_hook(lambda *_: saver.wait_for_copies())
        refusal = over_budget(run, tracking, state.step, config, task.num_samples)
        batches = parallel.warm_up_ddp(module, task.batches(range(state.step, total)), config.train.precision, device)
        while state.step < total and not refusal:
            metrics = train_step(module, state, batches, lr(state.step / total), task.num_micro, config.train, graphs)
            step = state.step
            tracking.step(step, metrics.lr, metrics.seconds | saver.take_stall(), saver.busy, metrics.tensors())
            wanted = agree(stop, saver, last=step == total)
            evaluating = due(step, evaluation_interval(config, task.num_samples), total)
            saving = wanted.save or due(step, config.checkpoint.every, total)
            flushing = step == first + 1 or due(step, config.track.every, total)  # the first: soon there is a line
            if not (wanted.stop or evaluating or saving or flushing):
                continue  # a quiet step: the host waits for nobody
            tracking.flush()
            task.log_changes()
            refusal = over_budget(run, tracking, step, config, task.num_samples)
            if nonfinite := rewind.consecutive(tracking.skipped, config.checkpoint.rewind_after):
                batches = go_back(task, run, state, config, tracking, saver, nonfinite, total)
                continue
            if wanted.stop:  # before anything slow: little time may be left
                saver.save(step, state.tensors())
                saver.wait()
            if evaluating:  # also when stopping: a resume begins after this step and would never make up for it
                saving |= evaluate(task, run, state, tracking, saver, config, device)
            if step == total or (not wanted.stop and (refusal or (saving and step not in tracking.skipped))):
                saver.save(step, state.tensors())  # not of a skipped step: a rewind needs what was before it
            if evaluating or saving:
                tracking.restart_clock()
            if wanted.stop:
                raise Stopped(f"{task.verb} stopped and saved at step {step:,} of {total:,}; the same command resumes")
        saver.wait()
    if refusal:
        raise ValueError(refusal)
    return dist.run_on_rank0(lambda: tracker.summary(run.path / "metrics.jsonl"))


def train_step(
    module: nn.Module, state: TrainState, batches: Iterator[Batch], lr: float, num_micro: int, train: TrainConfig,
    graphs: GraphedPasses | None = None,
) -> StepMetrics:  # fmt: skip
    """One update from a global batch. Nothing leaves the device, so the host does not wait for it. Where the loss or
    the gradient of any rank is not finite, weights, moments and average stay as they are on all ranks.
    """
    optim.set_lr(state.optimizer, lr)
    scale = state.loss_scale.scale
    metrics = StepMetrics(lr, torch.zeros((), device=scale.device), scale.clone())
    passes = graphs or partial(forward_backward, module, state.loss_scale, train, metrics.backward)
    for micro in range(num_micro):
        batch = metrics.next_batch(batches)
        with parallel.sync_gradients(module, when=micro == num_micro - 1):
            metrics.loss += passes(batch)
    norm = parallel.gradient_norm(state.trained)
    # what one rank has, all must know
    norm = torch.where(dist.all_reduce_sum(metrics.loss).isfinite(), norm, torch.nan)
    metrics.grad_norm = optim.update(
        state.optimizer, state.trained, norm, train.clip_grad, state.loss_scale, dist.world()
    )
    state.ema.update(metrics.grad_norm.isfinite())
    state.step += 1
    return metrics


def forward_backward(
    module: nn.Module, scale: optim.LossScale, train: TrainConfig, backward: Callable[[Tensor], None], batch: Batch
) -> Tensor:  # fmt: skip
    """The loss of a micro-batch, as its share of the global batch's; `backward` computes its gradients."""
    # gradients are averaged over ranks and meant as their sum; in fp16 that is made up for in the update, or else they
    # would overflow the sooner the more ranks there are
    factor = scale.scale if scale.enabled else dist.world()
    with parallel.autocast(train.precision, batch.images.device):
        output = module(batch)
    loss = output.loss.sum() / train.global_batch
    backward(loss * factor)
    return loss.detach()


def graphed(module: nn.Module, state: TrainState, train: TrainConfig) -> GraphedPasses:
    """`forward_backward` as CUDA graphs."""
    passes = partial(forward_backward, module, state.loss_scale, train, Tensor.backward)
    return GraphedPasses(passes, state.objective, state.trained)


def prepare(
    task: Task, run: RunDir, config: TrainingConfig, device: torch.device
) -> tuple[nn.Module, TrainState, GraphedPasses | None]:
    """(The module to call, on the device; the state, restored from the run or with the task's initial weights; the
    module's passes as CUDA graphs, if wanted).
    """
    module, state = new_state(task.objective, config, device, task.no_decay_tokens)
    if not state.restore(run):
        task.load_initial_weights()
        state.ema.reset()
    task.objective.train()
    gc.collect()
    gc.freeze()  # a full collection would stop all threads for as long as it takes to visit what there is by now
    return module, state, graphed(module, state, config.train) if config.machine.cuda_graphs else None


def new_state(
    objective: Objective, config: TrainingConfig, device: torch.device, no_decay_tokens: bool
) -> tuple[nn.Module, TrainState]:
    """(The module to call, on the device; the state at step 0). ``no_decay_tokens``: see `optim.param_groups`."""
    module = parallel.parallelize(objective, config.machine, config.train, device)
    groups = objective.groups(config.optim) or optim.param_groups(
        objective, config.optim, objective.backbone.depth, no_decay_tokens
    )
    optimizer = optim.build(config.optim, groups)
    optim.init_optimizer_state(optimizer)
    loss_scale = optim.LossScale(device, enabled=config.train.precision == "fp16")
    return module, TrainState(objective, optimizer, loss_scale, optim.EMA(objective, config.train.ema))


def agree(stop: StopFlag, saver: AsyncSaver, last: bool) -> Wanted:
    """What any rank wants, in one exchange between the ranks' CPUs: no rank waits for its device. Nothing after the
    last step, which is saved anyway.
    """
    code = 0 if last else dist.all_reduce_max(2 * stop.requested + saver.overdue)
    if code >= 2:
        watchdog.answered()
    return Wanted(stop=code >= 2, save=code == 1)


def evaluate(
    task: Task, run: RunDir, state: TrainState, tracking: Tracker, saver: AsyncSaver, config: TrainingConfig,
    device: torch.device,
) -> bool:  # fmt: skip
    """Record the task's numbers and pictures of this step, with the averaged weights if the run averages; whether it is
    the best so far by checkpoint.keep_best, and so to be saved.
    """
    saver.wait(last=False)  # forking loader workers beside its thread can hang them (cpython#112275)
    with state.ema.swapped_in(), parallel.autocast(config.train.precision, device):
        tracking.numbers(state.step, task.evaluate(state.step))
    task.log_changes()
    for file in sorted((run.path / "pictures").glob(f"*-{state.step:09d}.png")):
        tracking.picture(file)
    if (by := config.checkpoint.keep_best) is None:
        return False
    step, value = dist.run_on_rank0(lambda: layout.best(run.path, by, also=state.step)) or (0, 0.0)
    if step == state.step and dist.is_main():
        log.info("step %d: %s %.4g is the best so far; %s@%d is kept once it is saved", step, by, value, run.path, step)
    return step == state.step


def go_back(
    task: Task, run: RunDir, state: TrainState, config: TrainingConfig, tracking: Tracker, saver: AsyncSaver,
    nonfinite: list[int], total: int,
) -> Iterator[Batch]:  # fmt: skip
    """Rewind the run to its last checkpoint before these non-finite steps; give the batches from there on."""
    saver.wait(last=False)
    rewind.rewind(run, task.objective, nonfinite, state.step, config.train.precision, task.batches, task.sample_name)
    state.restore(run)
    tracking.rewind(state.step)
    return task.batches(range(state.step, total))


def peak_flops(config: TrainingConfig, device: torch.device) -> float:
    """The most operations that the devices of all ranks together make in a second."""
    dtype = parallel.DTYPES.get(config.train.precision, torch.float32)
    return sum(dist.gather_objects(devices.peak_flops(device, dtype)))


def announce(task: Task, run: RunDir, config: TrainingConfig, state: TrainState, total: int, peak: float) -> None:
    """Log once what runs on what: steps, shape of the batch, peak learning rate, model, devices, data, time, folder.
    ``peak``: operations of all devices a second.
    """
    if not dist.is_main():
        return
    train, world, model = config.train, dist.world(), config.model
    batch, micro = train.global_batch, math.ceil(train.global_batch / (world * task.num_micro))
    strategy = "" if world == 1 else f" ({config.machine.strategy})"
    lr, shape = config.optim.peak_lr(batch), f"batch {batch:,} = {counted(world, 'rank')}{strategy} x {micro:,} "
    shape += f"{'image' if micro == 1 else 'images'} x {counted(task.num_micro, 'micro-batch')}"
    log.info("%s: %s of %s, lr %.3g, %s", task.verb, counted(total, "step"), shape, lr, train.precision)
    parameters = sum(parameter.numel() for parameter in task.objective.parameters()) / 1e6
    rest = range(state.step, total)
    flops, parts = cost.training_flops(config, rest, total), resolutions.spans(train, model.image_size, rest, total)
    size = ", then ".join(" x ".join(map(str, dict.fromkeys(sides(at)))) for _, at in parts)
    mean = ", the mean of these sizes" if len(parts) > 1 else ""
    work = f", {flops / 1e9:.3g} GFLOPs an image and step{mean}" if flops else ""
    device = devices.name_of(state.loss_scale.scale.device)
    device += "" if state.loss_scale.scale.is_cuda else f" ({counted(torch.get_num_threads(), 'thread')})"
    log.info("%s at %s px: %.4g M parameters%s, on %d x %s", model.name, size, parameters, work, world, device)
    epoch = f"an epoch is {task.num_samples / batch:,.4g} steps"
    log.info("%s from data.path=%s: %s", counted(task.num_samples, "image"), hints.shown(config.data.path), epoch)
    if state.step and (speed := tracker.last_speed(run.path)):
        seconds = cost.seconds_left(config, state.step, total, speed)
        log.info("expected time: %s at the last speed", timedelta(seconds=round(seconds)))
    elif flops and peak:
        least = timedelta(seconds=round(len(rest) * batch * flops / peak))
        log.info("least time: %s at %.3g TFLOP/s, the most of %s", least, peak / 1e12, counted(world, "device"))
    log.info("%s run in %s", f"resumed at step {state.step:,} of the" if state.step else "new", run.path)


def over_budget(run: RunDir, tracking: Tracker, step: int, config: TrainingConfig, num_samples: int) -> str:
    """Why a run over `num_samples` must end, as too many of them are unreadable; empty where it goes on. Raises
    ValueError when more steps were not finite than checkpoint.max_skipped allows.
    """
    if skipped := len(tracking.skipped):
        dist.run_on_rank0(lambda: rewind.refuse_too_many(run.path, skipped, config.checkpoint.max_skipped))
    data, seen = config.data, (step - tracking.data_since) * config.train.global_batch
    if not too_many_bad(tracking.num_bad, seen, num_samples, data):
        return ""
    return (
        f"{tracking.num_bad} of {seen} samples could not be read: more than data.max_bad={data.max_bad:g} of all "
        f"{num_samples}; the run is saved. To go on: raise data.max_bad; or run `mae-dist data check {data.path} "
        f"--quarantine`, then the same command with data.accept_change=true"
    )


def too_many_bad(num_bad: int, seen: int, num_samples: int, data: DataConfig) -> bool:
    """Whether `num_bad` unreadable ones of `seen` samples prove that of all `num_samples` more than data.max_bad are.

    A pass over the data meets each sample once (data.aug_repeats times in a row). So more than data.max_bad of all
    samples in as many passes as were begun are proof, in whatever order they came: a run over data that are within the
    bound is never ended, and one whose share is r times the bound is, after 1/r of a pass. One sample is never too
    many, unless data.max_bad is 0.
    """
    allowed = max(1, data.max_bad * num_samples) if data.max_bad else 0
    return num_bad > allowed * data.aug_repeats * math.ceil(seen / (num_samples * data.aug_repeats))
