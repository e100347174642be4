"""The one loop. A stage brings an objective, a source of batches and an evaluation; it never writes a loop of its own.

The position of a run is one integer, `step`; learning rate, sample order, crops and masks follow from it. A
checkpoint is the objective, the optimizer's moments and, for fp16, the loss scale. The global batch, not the number
of ranks, enters the mathematics: each rank's loss counts by its number of samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist import config as configuration
from mae_dist import dist, optim, parallel, stop, track
from mae_dist.batch import Batch
from mae_dist.checkpoint import RunDir

log = logging.getLogger(__name__)


def due(step: int, every: float | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens after `step` steps."""
    return step == last or (every is not None and int(step // every) > int((step - 1) // every))


def fit(
    *,
    run: RunDir,
    verb: str,
    config: Any,
    objective: nn.Module,
    groups: list[dict[str, Any]],
    batches: Callable[[range], Iterator[Batch]],
    num_micro: int,
    num_samples: int,
    evaluate: Callable[[int], dict[str, float]],
    device: torch.device,
) -> dict[str, float]:
    """Train from the newest checkpoint of `run`, or from the start, to the end; give the final numbers.

    ``batches(steps)`` yields `num_micro` micro-batches a step; ``num_samples`` make an epoch; ``evaluate(step)`` gives
    numbers, called by all ranks together. Raises Stopped, having saved, when any rank was told to stop.
    """
    train, total = config.train, configuration.total_steps(config.train, num_samples)
    module = parallel.place(objective, device)
    optimizer = optim.build(config.optim, groups)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    optim.prime(optimizer)
    step = restore(run, objective, optimizer, scaler)
    run.note_start(step, device)
    peak = optim.peak_lr(config.optim, train.global_batch)
    schedule = optim.schedule(config.optim, peak, total * train.global_batch / num_samples)
    evaluate_every = config.track.evaluate_every and config.track.evaluate_every * num_samples / train.global_batch
    parameters = [parameter for group in groups for parameter in group["params"]]
    announce(run, verb, config, step, total, num_micro, peak)
    stream = batches(range(step, total))
    objective.train()
    with stop.Flag() as flag, track.Tracker(run.path, config, verb, step, total, num_samples) as tracker:
        while step < total:
            lr = schedule(step / total)
            optim.set_lr(optimizer, lr)
            loss, bad, wait = torch.zeros((), device=device), torch.zeros((), device=device), 0.0
            for part in range(num_micro):
                began = time.perf_counter()
                batch = next(stream)
                wait += time.perf_counter() - began
                with parallel.accumulate(module, last=part == num_micro - 1):
                    with parallel.precision(train.precision, device):
                        output = module(batch)
                    weighted = output.loss.sum() / train.global_batch
                    scaler.scale(weighted * dist.world()).backward()  # DDP averages gradients over ranks
                loss += weighted.detach()
                bad += batch.bad.sum()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, train.clip or torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            tracker.step(step, lr, wait, {"loss": loss, "bad": bad, "grad_norm": norm})
            look, save = due(step, evaluate_every, total), due(step, config.checkpoint.every, total)
            if due(step, config.track.every, total) or look or save:
                tracker.flush()
                refuse_bad_data(tracker.num_bad, step, config)
            if look:
                with parallel.precision(train.precision, device):
                    tracker.numbers(step, evaluate(step))
                for file in sorted((run.path / "pictures").glob(f"*-{step:09d}.png")):
                    tracker.picture(file)
            if save:
                run.save(step, tensors(objective, optimizer, scaler), config.checkpoint.keep)
            if look or save:
                tracker.restart_clock()
            if step < total and dist.any_of(flag.requested):
                tracker.flush()
                if not save:
                    run.save(step, tensors(objective, optimizer, scaler), config.checkpoint.keep)
                raise stop.Stopped(
                    f"{verb} was stopped and saved at step {step:,} of {total:,}; the same command goes on"
                )
    return dist.on_main(lambda: track.summary(run.path / "metrics.jsonl"))


def tensors(objective: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The state of a run by name: `model.*`, `optimizer.*` (moments per parameter) and, for fp16, `scaler.*`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    state = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
    for parameter, moments in optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": tensor for key, tensor in moments.items()}
    numbers = scaler.state_dict()
    return state | {
        f"scaler.{k}": torch.tensor(float(numbers[k])) for k in ("scale", "_growth_tracker") if k in numbers
    }


def restore(run: RunDir, objective: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Fill the state from the newest undamaged checkpoint; the step it was saved at, or 0."""
    state = tensors(objective, optimizer, scaler)
    step = run.restore(state)
    if step and scaler.is_enabled():
        growth = {"_growth_tracker": int(state["scaler._growth_tracker"]), "scale": float(state["scaler.scale"])}
        scaler.load_state_dict(scaler.state_dict() | growth)
    return step


def announce(run: RunDir, verb: str, config: Any, step: int, total: int, num_micro: int, peak: float) -> None:
    """Say what is going to happen, once."""
    if not dist.is_main():
        return
    batch, world = config.train.global_batch, dist.world()
    shape = f"{batch} images = {world} ranks x {num_micro} micro-batches"
    log.info("%s: %s steps of %s, lr %.3g, %s", verb, f"{total:,}", shape, peak, config.train.precision)
    log.info("%s run in %s", f"resumed at step {step:,} of the" if step else "new", run.path)


def refuse_bad_data(num_bad: int, step: int, config: Any) -> None:
    """End the run when more samples were unreadable than data.max_bad allows (ValueError)."""
    seen = step * config.train.global_batch
    if num_bad > max(1, config.data.max_bad * seen):
        raise ValueError(
            f"{num_bad} of {seen} samples could not be read, more than data.max_bad={config.data.max_bad:g} allows; "
            f"the warnings above name them"
        )
