"""What every stage does first: join the ranks, find data and initial weights, open the run's folder; and its Task."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from mae_dist import config as configuration
from mae_dist import devices, dist, environment, models, parallel, resolutions, rewind, starts, track_settings
from mae_dist.batch import Batch
from mae_dist.data import decoding, loader, views
from mae_dist.data.cache import Cache
from mae_dist.data.changes import Changes
from mae_dist.data.index import ShardIndex
from mae_dist.data.order import Order, mixed, num_micro, plan
from mae_dist.models import short_attention
from mae_dist.models.backbone import Backbone
from mae_dist.objectives import Objective
from mae_dist.printed import counted
from mae_dist.run import identity, jsonl, layout, log_file, unreadable, warned
from mae_dist.run.directory import RunDir
from mae_dist.run.warned import Warned
from mae_dist.schema import C, MachineConfig, RunConfig
from mae_dist.stages import initial_weights, warn
from mae_dist.stages.images import check_first_images, with_statistics
from mae_dist.stages.imports import with_imported
from mae_dist.stages.passes import reported
from mae_dist.stages.splits import check_splits, open_splits, refuse_unlabelled
from mae_dist.train import Task

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Setup(Generic[C]):
    """Everything a stage needs: resolved config, run folder, device, data splits, and the backbone. Only a run that
    `needs_labels` has a `test_split` for certain.
    """

    verb: str
    config: C
    run: RunDir
    device: torch.device
    train_split: ShardIndex
    test_split: ShardIndex | None
    needs_labels: bool
    backbone: Backbone
    initial_weights: initial_weights.InitialWeights | None
    micro_batch: int
    changes: Changes = field(default_factory=Changes)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context of all work of the run: an exception that ends it is recorded in events.jsonl, lost ranks by name."""
        with (
            log_file.kept(self.run.path, dist.rank()),
            unreadable.recorded(self.run.path),
            self.run.record_end(),
            dist.name_lost_ranks(lambda: f"the work of {self.verb} outside its training loop"),
        ):
            yield

    def view(self, training: bool) -> views.View:
        """How samples become images: augmented in training, else the test crop."""
        data = self.config.data
        assert data.mean is not None  # `build_setup` fills them in
        assert data.std is not None
        size = self.config.model.image_size
        return views.View(self.config.view, size, data.mean, data.std, self.config.train.seed, training)

    def source(self, split: ShardIndex, training: bool = False) -> loader.ResidentSource | loader.TarSource:
        """The images of a split, kept in memory if the view (that of `training` or that of tests) allows it."""
        workers, view = self.config.machine.workers, self.view(training)
        return loader.open_source(
            split, self.device, workers, view.needs_pil, not dist.is_main(), decoding.decoding(self.config),
            self.changes,
        )  # fmt: skip

    def with_micro_batch(self, objective: Objective) -> Setup[C]:
        """A copy with `micro_batch` resolved where machine.micro_batch=auto. Does not change what a step computes."""
        machine, train, group = self.config.machine, self.config.train, configuration.group(self.config)
        share = group * -(-train.global_batch // (group * dist.world()))

        def example(count: int) -> Batch:
            largest = max([self.backbone.image_size, *((side, side) for side in resolutions.sides(self.config))])
            images = torch.zeros(count, self.backbone.channels, *largest, device=self.device)
            zero = torch.zeros(count, dtype=torch.int64, device=self.device)
            return Batch(images, zero, torch.arange(count, device=self.device), zero, zero.bool())

        with parallel.autocast(train.precision, self.device):
            found = parallel.micro_batch(objective, machine, share, group, example, self.device, train.ema is not None)
        if machine.micro_batch == "auto" and dist.is_main():
            log.info("machine.micro_batch=auto: %d images at once", found)
        return dataclasses.replace(self, micro_batch=found)

    @property
    def num_micro(self) -> int:
        """Micro-batches a step of this rank."""
        group = configuration.group(self.config)
        return num_micro(self.config.train.global_batch, dist.world(), self.micro_batch, group)

    @property
    def data_fingerprint(self) -> str:
        """Identifies the content of the splits on which the result depends."""
        tested = self.test_split if self.needs_labels else None
        used = (self.train_split,) if tested is None else (self.train_split, tested)
        return "-".join(split.fingerprint for split in used)

    def task(
        self, objective: Objective, source: loader.Source, num_micro: int, evaluate: Callable[[int], dict[str, float]],
        no_decay_tokens: bool = True,
    ) -> Task:  # fmt: skip
        """The task of training `objective` on the images of `source`, from this run's initial weights."""
        return Task(
            verb=self.verb, objective=objective, num_micro=num_micro, num_samples=len(self.train_split),
            batches=lambda steps: self.training_batches(source, num_micro, steps, self.left_out()), evaluate=evaluate,
            sample_name=self.train_split.sample_name, no_decay_tokens=no_decay_tokens,
            load_initial_weights=lambda: self.load_initial_weights(objective), log_changes=self.changes.log_new,
        )  # fmt: skip

    def left_out(self) -> dict[int, int]:
        """Sample id -> position in the stream from which on this run's rewinds leave the sample out."""
        batch = self.config.train.global_batch
        return dict(dist.run_on_rank0(lambda: [*rewind.left_out(self.run.path, batch).items()]))

    def order(self, left_out: dict[int, int]) -> Order:
        """The order of training. Raises ValueError for impossible data.weights."""
        data, parts = self.config.data, self.train_split.counts_of_parts
        return mixed(self.config.train.seed, parts, data.weights, data.shuffle_window, left_out, data.aug_repeats)

    def training_batches(
        self, source: loader.Source, num_micro: int, steps: range, left_out: dict[int, int],
        share: tuple[int, int] | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """This rank's micro-batches of these steps, or those of `share` = (rank, world), at their resolutions."""
        config, (rank, world) = self.config, share or (dist.rank(), dist.world())
        order, group, view = self.order(left_out), configuration.group(config), self.view(training=True)
        total = configuration.total_steps(config.train, len(self.train_split))
        parts = resolutions.spans(config.train, config.model.image_size, steps, total)

        def batches(part: range, size: int | tuple[int, int]) -> Iterator[Batch]:
            places = plan(order, part, config.train.global_batch, num_micro, rank, world, group)
            return source.batches(places, dataclasses.replace(view, image_size=size))

        first = batches(*parts[0])  # reads ahead from now on, the others from the change of resolution on
        return itertools.chain(first, itertools.chain.from_iterable(batches(*part) for part in parts[1:]))

    def evaluation_batches(self, source: loader.Source, ids: np.ndarray | None = None) -> Iterator[Batch]:
        """This rank's part of a split, or of these samples of it, each sample once, not augmented."""
        ids = np.arange(len(source.index)) if ids is None else ids
        places = loader.evaluation_plan(len(ids), self.micro_batch, dist.rank(), dist.world())
        batches = source.batches(((epochs, ids[chosen]) for epochs, chosen in places), self.view(training=False))
        return reported(batches, len(ids), "training split" if source.index is self.train_split else "test split")

    def warn(self, found: Iterable[Warned]) -> None:
        """Log and record, once in a run, what is `found`."""
        if dist.is_main():
            warned.warn(self.run.path, jsonl.last_step(self.run.path / layout.METRICS), found)

    def load_initial_weights(self, objective: Objective) -> None:
        """Fill the backbone, and the decoder of an MAE, from `init_from`: see `initial_weights.load`. Does nothing
        where init_from=random.
        """
        if self.initial_weights is not None:
            initial_weights.load(objective, self.initial_weights, self.config)


def prepare_run(verb: str, config: C, needs_labels: bool, build: Callable[[Setup[C]], T]) -> tuple[Setup[C], T] | None:
    """Check all that can be wrong before work starts, `build` included, and only then open the run's folder: (the
    setup, what `build` made of it), or None when the folder holds a finished run. Raises ValueError on every rank
    alike.
    """
    with dist.name_lost_ranks(lambda: f"the start of {verb} with data.path={config.data.path}"):
        try:
            setup = build_setup(verb, config, needs_labels)
            built = build(setup)
        except ValueError as error:
            if not identity.finished(Path(config.out), verb, config):
                raise
            if dist.is_main():
                log.warning(
                    "out=%s: is finished; its data and initial weights were not compared (%s)", config.out, error
                )
            return None
        total = 0 if verb == "knn" else configuration.total_steps(setup.config.train, len(setup.train_split))
        start = None if setup.initial_weights is None else setup.initial_weights.path
        if not setup.run.open(verb, setup.config, setup.data_fingerprint, total, start):
            return None
        setup.run.record_classes(setup.train_split.dataset.classes if needs_labels else None)
        setup.warn(warned.of_settings(verb, setup.config, len(setup.train_split), on_cpu=setup.device.type == "cpu"))
        if needs_labels or track_settings.needs_labels(setup.config):
            setup.warn(warn.of_labels(setup.train_split))
        return setup, built


def build_setup(verb: str, config: C, needs_labels: bool) -> Setup[C]:
    """Join the ranks, find data, initial weights and statistics, and build the backbone; nothing is written, but a
    checkpoint of others that init_from names is imported beside the run.

    ``needs_labels``: the verb needs a label on every sample, and a test split; track.online may do so, too. Raises
    ValueError in one sentence.
    """
    devices.set_deterministic(config.machine.deterministic)
    device = dist.setup(config.machine.timeout)
    configuration.check_world(config, dist.world())
    check_device(config.machine, device)
    run, labelled = RunDir(config.out), needs_labels or track_settings.needs_labels(config)
    before = run.settings()[2] if (run.path / "config.yaml").is_file() else None  # a run keeps what it began with
    began = identity.started_from(run.path)
    cache = Cache.of(config.data.cache, config.data.cache_size)
    config, train_split, test_split = open_splits(config, before, labelled, cache)
    config = with_imported(config)
    initial = initial_weights.find(config.origin, began) if config.origin is not None else None
    for split, name in ((train_split, config.data.split), (test_split, config.data.test_split)) if labelled else ():
        refuse_unlabelled(split, name, verb if needs_labels else "track.online")
    if initial is not None:
        starts.check_same_model(config, initial.config)
    if test_split is not None:
        train_split = check_splits(config, train_split, test_split, labelled)
    origin = initial.config if initial else None
    config = with_precision(config, before, origin, device)
    config = with_statistics(
        decoding.completed(config, before, train_split.dataset, origin), before or origin, train_split
    )
    if test_split is not None and (differs := decoding.differing(config, test_split.dataset)):
        raise ValueError(f"{differs}, which the test split is of; pack it like the training split")
    with parallel.meta_init(config.machine):
        chosen = {name: getattr(config.model, name) for name in ("pool", "position")}
        given = {name: value for name, value in chosen.items() if value is not None}
        given |= {"image_size": config.model.image_size, "channels": config.data.channels}
        backbone = models.build(config.model.name, seed=config.train.seed, **given)
    if config.model.train_blocks is not None:
        backbone.train_last(config.model.train_blocks)
    micro = config.machine.micro_batch if isinstance(config.machine.micro_batch, int) else parallel.CPU_MICRO_BATCH
    setup = Setup(verb, config, run, device, train_split, test_split, needs_labels, backbone, initial, micro)
    setup.order({})  # raises now what is impossible in data.weights
    check_cache(train_split, config.data.shuffle_window)
    if test_split is not None:
        check_cache(test_split, 1)
    setup.view(training=True).augment()  # raises now what timm does not understand in view.randaugment
    for split in filter(None, (train_split, test_split)):
        dist.run_together(partial(check_first_images, split, decoding.decoding(config)))
    return setup


def with_precision(config: C, before: RunConfig | None, origin: RunConfig | None, device: torch.device) -> C:
    """The config with train.precision=auto replaced, see `identity.precision_for`, alike on all ranks."""
    chosen = dist.run_on_rank0(lambda: identity.precision_for(before, origin, devices.fast_precisions(device)))
    if config.train.precision == identity.AUTO and dist.is_main():
        log.info("train.precision=auto: %s", chosen)
    return identity.with_precision(config, chosen)


def check_device(machine: MachineConfig, device: torch.device) -> None:
    """Refuse settings that a device cannot follow (ValueError)."""
    if machine.cuda_graphs and device.type != "cuda":
        raise ValueError("machine.cuda_graphs=true: one rank with a GPU can do so, but this computes on the CPU")
    if machine.short_attention and not short_attention.fits(device):
        raise ValueError(
            "machine.short_attention=true: its kernels need Triton and an NVIDIA GPU, Ampere or newer, which "
            f"{device} is not; leave it out"
        )
    if machine.compile:
        environment.prepare_compiler(device.type)


def check_cache(index: ShardIndex, window: int) -> None:
    """Log where remote tars are kept, and warn where those that are shuffled together do not fit there. Raises
    ValueError where one of them does not.
    """
    sizes, cache = sorted((remote.size for remote in index.remotes if remote is not None), reverse=True), index.cache
    if not sizes:
        return
    given, needed = f"data.cache_size={cache.limit / 1e9:g}GB", sum(sizes[:window])
    if sizes[0] > cache.limit:
        raise ValueError(f"{given}: the largest tar has {sizes[0] / 1e9:g} GB; raise it to that of {window} tars")
    if dist.is_main():
        log.info("%s of %.4g GB, fetched into %s", counted(len(sizes), "tar"), sum(sizes) / 1e9, cache.folder)
    if dist.is_main() and needed > cache.limit:
        log.warning(
            "%s: is less than %.4g GB, the tars that data.shuffle_window=%d shuffles together: each is fetched again "
            "and again; raise it, or lower data.shuffle_window",
            given, needed / 1e9, window,
        )  # fmt: skip


def num_classes(*indexes: ShardIndex) -> int:
    """Classes of the labels: as dataset.json says."""
    known = [index.dataset.num_classes for index in indexes if index.dataset.num_classes is not None]
    if not known:
        raise ValueError(
            f"{indexes[0].tars[0].parent}: no dataset.json says how many classes there are; run `mae-dist data index`"
        )
    return max(known)
