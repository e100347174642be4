"""What a run can do on the device at hand, by trying: a few steps and some seconds of loading, as the run does them.

The objective, the optimizer, the loader and `train_step` are those of the run, from random weights and at lr 0; nothing
is kept. Without the run's other ranks: a rank's share of a step is computed alone.
"""

import dataclasses
import importlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mae_dist import config as configuration
from mae_dist import cost, devices, environment, forecast, launcher, parallel
from mae_dist.batch import Batch
from mae_dist.cli import VERBS
from mae_dist.data.loader import CHUNK, TarSource
from mae_dist.forecast import Forecast, Loading, Place, Rate
from mae_dist.model_sizes import size_of
from mae_dist.schema import RANDOM, ModelConfig
from mae_dist.stages.setup import Setup, build_setup
from mae_dist.train import graphed, new_state, train_step
from mae_dist.verify.data_benchmark import rate_of
from mae_dist.verify.step_benchmark import clocked

log = logging.getLogger(__name__)

STEP_SECONDS = 5.0
"""Expected time of a step above which fewer images at once are timed."""
SECONDS, FEWEST, MOST = 10.0, 3, 20
"""Seconds for which steps are repeated, at least and at most how often."""
LOADING_SECONDS, TURNS = 4.0, 10
"""For which loading is timed; chunks of each worker, all of which may end at the same time, that are timed at least."""
EXPECTED = {"cpu": 5e10, "cuda": 5e13}
"""Floating point operations a second of a core, or of a GPU, from which the time of a step is expected."""


def place_here(processes: int | None) -> Place:
    """This machine, with as many ranks as `processes` says, else one a GPU."""
    ranks, device = launcher.processes_here(processes), devices.of_rank(0)
    is_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if is_gpu else environment.memory() / ranks
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() else None
    return Place(1, ranks, environment.cores(), devices.name_of(device), is_gpu, memory, threads=threads)


def tried(found: Forecast, ranks_here: int, stepping: bool) -> Forecast:
    """The forecast of a run with what is measured of a rank's share of it, beside `ranks_here` of this machine; only of
    its loader unless `stepping`. Raises what the start of the run would: ValueError for what is wrong with settings,
    data or initial weights.
    """
    verb, config, ranks = found.verb, found.config, found.place.ranks
    log.info("timing the loader%s on this machine, up to a minute", " and steps" if stepping else "")
    launcher.limit_threads(ranks_here)
    group = configuration.group(config)
    share = group * -(-config.train.global_batch // (group * ranks))
    machine = dataclasses.replace(config.machine, processes=1, strategy="ddp", shards=None)
    train = dataclasses.replace(config.train, global_batch=share, resolutions=())
    config = dataclasses.replace(config, machine=machine, train=train)
    if not stepping:  # a small model of the same patches, which is built in no time
        model = ModelConfig(f"vit_ti{size_of(config.model.name)['patch']}", config.model.image_size)
        machine = dataclasses.replace(machine, compile=False, cuda_graphs=False)
        config = dataclasses.replace(config, model=model, init_from=RANDOM, machine=machine)
    setup = build_setup(verb, config, needs_labels=verb != "pretrain")
    source = setup.source(setup.train_split, training=True)
    kept = 0 if isinstance(source, TarSource) else source.images.nbytes
    found = dataclasses.replace(
        found, num_samples=len(setup.train_split), num_test=len(setup.test_split or ()), kept_images=kept
    )
    if not stepping:
        return dataclasses.replace(found, loading=load(setup, source, setup.num_micro))
    objective, most = importlib.import_module(VERBS[verb].module).build(setup), None
    if setup.device.type == "cuda":
        automatic = dataclasses.replace(config, machine=dataclasses.replace(machine, micro_batch="auto"))
        most = dataclasses.replace(setup, config=automatic).with_micro_batch(objective).micro_batch
    setup = setup.with_micro_batch(objective)
    num_micro = -(-share // timed_images(setup, share))
    loading = load(setup, source, num_micro)
    batch, reading = next(setup.training_batches(source, num_micro, range(1), {})), None
    if forecast.stored_features(config, 1):  # steps are made of features, which are loaded in no time
        batch, computing = features_of(setup, objective, batch, share)
        reading, loading, num_micro = 1 / (1 / computing + (1 / loading.value if loading else 0)), None, 1
    step = step_rate(setup, objective, batch, share, num_micro)
    return dataclasses.replace(
        found, step=step, loading=loading, reading=reading, measured=devices.memory_used(), most_tried=most
    )


def features_of(setup: Setup[Any], objective: Any, batch: Batch, share: int) -> tuple[Batch, float]:
    """(A batch of `share` features, images a second at which they are computed), from a batch of images."""
    objective.to(setup.device)

    def compute() -> Tensor:
        with parallel.autocast(setup.config.train.precision, setup.device):
            return objective.features(batch)

    rate = batch.size / repeated([lambda: clocked(compute, setup.device, time.perf_counter)])[0]
    rows = torch.arange(share, device=setup.device) % batch.size
    return Batch(*(part[rows] for part in batch._replace(images=compute()))), rate


def timed_images(setup: Setup[Any], share: int) -> int:
    """Images at once in the steps that are timed: those of the run, or fewer where a step would take too long."""
    config, group = setup.config, configuration.group(setup.config)
    images = min(share, setup.micro_batch)
    rate = EXPECTED[setup.device.type] * (environment.cores() if setup.device.type == "cpu" else 1)
    counted = cost.of_run(config)
    while counted and images > group and images * counted.training_flops / rate > STEP_SECONDS:
        images = group * -(-images // group // 2)
    return images


def load(setup: Setup[Any], source: Any, num_micro: int) -> Loading | None:
    """The rate of the run's own loader on its first steps, with no more workers than there are cores; None where the
    tars would have to be fetched first.
    """
    if any(file is not None for file in source.index.remotes):
        return None
    workers = source.workers = min(source.workers, environment.cores()) if isinstance(source, TarSource) else 0
    batches = setup.training_batches(source, num_micro, range(10**9), {})
    at_once = workers * min(CHUNK, -(-setup.config.train.global_batch // num_micro))
    value = rate_of(batches, LOADING_SECONDS, 1 + 2 * workers, least=TURNS * at_once)
    return Loading(value, max(1, workers), workers == 0)


def step_rate(setup: Setup[Any], objective: Any, batch: Batch, share: int, num_micro: int) -> Rate:
    """Images a second of `train_step` with a rank's share of a step in so many micro-batches, all of them `batch`. The
    time of more than two follows from that of one and of two.
    """
    module, state = new_state(objective, setup.config, setup.device, no_decay_tokens=setup.verb != "pretrain")
    graphs = graphed(module, state, setup.config.train) if setup.config.machine.cuda_graphs else None
    objective.train()

    def timed(count: int) -> float:
        train = setup.config.train
        step = partial(train_step, module, state, itertools.repeat(batch), 0.0, count, train, graphs)
        return clocked(step, setup.device, time.perf_counter)

    counts = (1,) if num_micro == 1 else (1, 2)
    one, *two = repeated([lambda count=count: timed(count) for count in counts])
    seconds = one + (num_micro - 1) * max(two[0] - one, 0.0) if two else one
    return Rate(share / seconds, f"measured here, {batch.size} images at once", False)


def repeated(actions: list[Callable[[], float]]) -> list[float]:
    """The median seconds of each action; they take turns, after one round that warms up."""
    for action in actions:
        action()
    found: list[list[float]] = [[] for _ in actions]
    deadline = time.perf_counter() + SECONDS
    while len(found[0]) < FEWEST or (len(found[0]) < MOST and time.perf_counter() < deadline):
        for action, values in zip(actions, found, strict=True):
            values.append(action())
    return [median(values) for values in found]
