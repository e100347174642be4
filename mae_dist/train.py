"""The one loop. A stage brings an objective, a source of batches and an evaluation; it never writes a loop of its own.

The position of a run is one integer, `step`; learning rate, sample order, crops and masks follow from it. A
checkpoint is the objective, the optimizer's moments and, where there are such, the average of the weights and the loss
scale. The global batch, not the number of ranks, enters the mathematics: each rank's loss counts by its number of
samples.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist import config as configuration
from mae_dist import dist, optim, parallel, rewind, signals
from mae_dist.batch import Batch
from mae_dist.objectives import Objective
from mae_dist.run import tracker
from mae_dist.run.async_checkpoint import AsyncSaver
from mae_dist.run.directory import RunDir

log = logging.getLogger(__name__)


def due(step: int, every: float | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens after `step` steps."""
    return step == last or (every is not None and int(step // every) > int((step - 1) // every))


def fit(
    *,
    run: RunDir,
    verb: str,
    config: Any,
    objective: Objective,
    no_decay_tokens: bool,
    begin: Callable[[], None],
    batches: Callable[[range], Iterator[Batch]],
    num_micro: int,
    num_samples: int,
    describe: Callable[[int], str],
    evaluate: Callable[[int], dict[str, float]],
    device: torch.device,
) -> dict[str, float]:
    """Train from the newest checkpoint of `run`, or from what `begin()` sets, to the end; give the final numbers.

    ``batches(steps)`` yields `num_micro` micro-batches a step; ``num_samples`` make an epoch; ``describe(id)`` names a
    sample; ``evaluate(step)`` gives numbers, called by all ranks together while the objective has the averaged weights,
    if there are such; ``no_decay_tokens``: see `optim.param_groups`.
    Raises Stopped, having saved, when any rank was told to stop, and RankLostError when one does not answer.
    """
    train, total = config.train, configuration.total_steps(config.train, num_samples)
    module = parallel.parallelize(objective, config.machine, train, device)
    groups = objective.groups(config.optim)
    groups = groups or optim.param_groups(objective, config.optim, objective.backbone.depth, no_decay_tokens)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = optim.build(config.optim, groups)
    scale = optim.LossScale(device, enabled=train.precision == "fp16")
    optim.init_optimizer_state(optimizer)
    average = optim.EMA(objective, train.ema)
    step = restore(run, objective, optimizer, scale, average)
    if step == 0:
        begin()
        average.reset()
    run.record_launch(step, device)
    peak = optim.peak_lr(config.optim, train.global_batch)
    schedule = optim.schedule(config.optim, peak, total * train.global_batch / num_samples)
    evaluate_every = config.track.evaluate_every and config.track.evaluate_every * num_samples / train.global_batch
    announce(run, verb, config, step, total, num_micro, peak)
    stream = batches(range(step, total))
    objective.train()
    gc.collect()
    gc.freeze()  # a full collection would stop all threads for as long as it takes to look at what is there by now
    with (
        run.record_end(),
        dist.name_lost_ranks(lambda: f"step {step + 1}"),
        signals.StopFlag() as flag,
        tracker.Tracker(run.path, config, verb, step, total, num_samples) as tracking,
        AsyncSaver(run, config.checkpoint, pinned=device.type == "cuda") as saver,
    ):
        stream = parallel.warm_up_ddp(module, stream, train.precision, device)
        while step < total:
            lr = schedule(step / total)
            optim.set_lr(optimizer, lr)
            loss, seconds, parts = torch.zeros((), device=device), {"data_wait": 0.0}, []
            for part in range(num_micro):
                began = time.perf_counter()
                batch = next(stream)
                seconds["data_wait"] += time.perf_counter() - began
                with parallel.sync_gradients(module, last=part == num_micro - 1):
                    with parallel.autocast(train.precision, device):
                        output = module(batch)
                    weighted = output.loss.sum() / train.global_batch
                    (weighted * (scale.scale * dist.world())).backward()  # gradients are averaged over ranks
                loss += weighted.detach()
                parts.append((batch.bad, batch.ids, batch.epochs))
            used = scale.scale.clone()
            norm = parallel.gradient_norm(parameters)
            norm = torch.where(
                dist.all_reduce_sum(loss).isfinite(), norm, torch.nan
            )  # what one rank has, all must know
            norm = optim.step(optimizer, parameters, norm, train.clip_grad, scale)
            average.update(norm.isfinite())
            step += 1
            bad, ids, epochs = (torch.cat(part) for part in zip(*parts, strict=True))
            seconds |= {"stall": saver.take_stall()} if saver.stall else {}
            tensors_ = {"loss": loss, "bad": bad.sum().to(loss), "ids": ids, "epochs": epochs}
            tracking.step(step, lr, seconds, saver.busy, tensors_ | {"grad_norm": norm, "loss_scale": used})
            asked = dist.all_reduce_max(2 * flag.requested + saver.overdue) if step < total else 0
            told, overdue = asked >= 2, asked == 1
            look, save = due(step, evaluate_every, total), overdue or due(step, config.checkpoint.every, total)
            if due(step, config.track.every, total) or look or save or told:
                tracking.flush()
                refuse_bad_data(tracking.num_bad, step, config)
                refuse_skipping(run, tracking.skipped, config)
                if nonfinite := rewind.in_a_row(tracking.skipped, config.checkpoint.rewind_after):
                    saver.wait(last=False)
                    rewind.go_back(
                        run=run, config=config, objective=objective, nonfinite=nonfinite, step=step, batches=batches,
                        describe=describe, device=device,
                    )  # fmt: skip
                    step = restore(run, objective, optimizer, scale, average)
                    tracking.go_back(step)
                    stream = batches(range(step, total))
                    continue
            if told:  # before anything that takes long: little time may be left
                saver.save(step, tensors(objective, optimizer, scale, average))
                saver.wait()
            if look:
                saver.wait(last=False)  # forking workers beside its thread can hang them (cpython#112275)
                with average.swapped_in(), parallel.autocast(train.precision, device):
                    tracking.numbers(step, evaluate(step))
                for file in sorted((run.path / "pictures").glob(f"*-{step:09d}.png")):
                    tracking.picture(file)
            # a rewind must find what was before its steps
            if step == total or (save and not told and step not in tracking.skipped):
                saver.save(step, tensors(objective, optimizer, scale, average))
            if look or save:
                tracking.restart_clock()
            if told:
                raise signals.Stopped(
                    f"{verb} was stopped and saved at step {step:,} of {total:,}; the same command goes on"
                )
        saver.wait()
    return dist.run_on_rank0(lambda: tracker.summary(run.path / "metrics.jsonl"))


def tensors(
    objective: nn.Module, optimizer: torch.optim.Optimizer, scale: optim.LossScale, average: optim.EMA
) -> dict[str, Tensor]:
    """The state of a run by name: `model.*`, `optimizer.*` (moments per parameter) and, where there are such, `ema.*`
    (the average per parameter) and `scaler.*`.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    state = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
    for parameter, moments in optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": tensor for key, tensor in moments.items()}
    state |= {f"ema.{name}": tensor for name, tensor in average.tensors().items()}
    return state | {f"scaler.{name}": tensor for name, tensor in scale.tensors().items()}


def restore(
    run: RunDir, objective: nn.Module, optimizer: torch.optim.Optimizer, scale: optim.LossScale, average: optim.EMA
) -> int:
    """Fill the state from the newest undamaged checkpoint; the step it was saved at, or 0."""
    return run.restore(tensors(objective, optimizer, scale, average))


def announce(run: RunDir, verb: str, config: Any, step: int, total: int, num_micro: int, peak: float) -> None:
    """Say what is going to happen, once."""
    if not dist.is_main():
        return
    batch, world, machine = config.train.global_batch, dist.world(), config.machine
    how = "" if world == 1 else f" ({machine.strategy})"
    shape = f"{batch} images = {world} ranks{how} x {num_micro} micro-batches"
    log.info("%s: %s steps of %s, lr %.3g, %s", verb, f"{total:,}", shape, peak, config.train.precision)
    log.info("%s run in %s", f"resumed at step {step:,} of the" if step else "new", run.path)


def refuse_skipping(run: RunDir, skipped: list[int], config: Any) -> None:
    """End the run when more steps were not finite than checkpoint.max_skipped allows (ValueError)."""
    if skipped:
        dist.run_on_rank0(lambda: rewind.refuse_too_many(run.path, len(skipped), config.checkpoint.max_skipped))


def refuse_bad_data(num_bad: int, step: int, config: Any) -> None:
    """End the run when more samples were unreadable than data.max_bad allows (ValueError)."""
    seen = step * config.train.global_batch
    if num_bad > max(1, config.data.max_bad * seen):
        raise ValueError(
            f"{num_bad} of {seen} samples could not be read, more than data.max_bad={config.data.max_bad:g} allows; "
            f"the warnings above name them"
        )
