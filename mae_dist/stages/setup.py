"""What the verbs that make a run do first: join the ranks, find the data, load the start, open the folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from mae_dist import config as configuration
from mae_dist import dist, models, parallel, rewind, schema
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from mae_dist.data import loader, views
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.data.order import Order, num_micro, plan
from mae_dist.models.backbone import Backbone
from mae_dist.models.vit import ViT, class_and_grid, resize_positions
from mae_dist.objectives import Objective
from mae_dist.run import checkpoint
from mae_dist.run.directory import RunDir

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """Everything a verb needs: resolved config, run folder, device, data, and the backbone."""

    config: Any
    run: RunDir
    device: torch.device
    train: ShardIndex
    test: ShardIndex | None
    labels: bool
    backbone: Backbone
    start: InitialWeights | None
    micro_batch: int

    def view(self, training: bool) -> views.View:
        """How samples of this run are shown."""
        data = self.config.data
        size = self.config.model.image_size
        return views.View(self.config.view, size, data.mean, data.std, self.config.train.seed, training)

    def source(self, index: ShardIndex, training: bool = False) -> loader.InMemorySource | loader.TarSource:
        """The images of a split; how they are shown in training decides where they are kept."""
        workers, view = self.config.machine.workers, self.view(training)
        return loader.open_source(index, self.device, workers, view.needs_pil, quiet=not dist.is_main())

    def with_micro_batch(self, objective: Objective) -> Setup:
        """The same with a micro-batch that fits, where the settings leave it open; the step's mathematics stay."""
        batch, channels, size = self.config.train.global_batch, self.backbone.channels, self.config.model.image_size
        share, machine = -(-batch // dist.world()), self.config.machine

        def example(count: int) -> Batch:
            images = torch.zeros(count, channels, size, size, device=self.device)
            zero = torch.zeros(count, dtype=torch.int64, device=self.device)
            return Batch(images, zero, torch.arange(count, device=self.device), zero, zero.bool())

        with parallel.autocast(self.config.train.precision, self.device):
            found = parallel.micro_batch(objective, machine, share, example, self.device)
        if machine.micro_batch == "auto" and dist.is_main():
            log.info("machine.micro_batch=auto: %d images at once", found)
        return dataclasses.replace(self, micro_batch=found)

    @property
    def num_micro(self) -> int:
        """Micro-batches a step."""
        group = configuration.group(self.config)
        return num_micro(self.config.train.global_batch, dist.world(), self.micro_batch, group)

    @property
    def data_fingerprint(self) -> str:
        """What the data are that decide the result."""
        result_settings = (self.train, self.test) if self.labels and self.test is not None else (self.train,)
        return "-".join(index.fingerprint for index in result_settings)

    def training_batches(
        self, source: loader.Source, micro: int, steps: range, share: tuple[int, int] | None = None
    ) -> Iterator[Batch]:
        """This rank's micro-batches of these steps, or those of `share` = (rank, world)."""
        settings, (rank, world) = self.config, share or (dist.rank(), dist.world())
        out = dist.run_on_rank0(lambda: rewind.left_out(self.run.path, settings.train.global_batch))
        order = Order(settings.train.seed, self.train.counts, settings.data.shuffle_window, out)
        group = configuration.group(settings)
        places = plan(order, steps, settings.train.global_batch, micro, rank, world, group)
        return source.batches(places, self.view(training=True))

    def evaluation_batches(self, source: loader.Source, ids: np.ndarray | None = None) -> Iterator[Batch]:
        """This rank's part of a split, or of these samples of it, each sample once, not augmented."""
        ids = np.arange(len(source.index)) if ids is None else ids
        places = loader.evaluation_plan(len(ids), self.micro_batch, dist.rank(), dist.world())
        return source.batches(((epochs, ids[chosen]) for epochs, chosen in places), self.view(training=False))

    def begin(self, backbone: Backbone) -> None:
        """Load the start into the backbone, wherever its parts lie: its averaged weights where it has them. Only the
        norm that its pooling does not have stays as initialised. Nothing, when the run begins at random.

        A ViT for another image size than the start's gets the start's positions resized (`vit.resize_positions`); fixed
        sin-cos ones, where this run does not train them, are computed for its size instead.
        """
        if self.start is None:
            return
        there = checkpoint.names_in(self.start.path)
        wanted = {}
        for name, tensor in backbone.state_dict().items():
            stored = checkpoint.trained(there, f"backbone.{name}")
            if stored in there or not name.startswith(("norm.", "fc_norm.")):
                wanted[stored] = tensor
        old = (self.start.config.model.image_size // backbone.patch,) * 2
        positions = next((k for k in wanted if k.endswith(".pos_embed")), None) if old != backbone.grid else None
        if positions is not None:
            wanted[positions] = torch.empty(there[positions])
        checkpoint.load(self.start.path, wanted)
        if positions is not None:
            self._fit_positions(backbone, wanted[positions], old)
        if dist.is_main() and any(name.startswith("ema.") for name in wanted):
            log.info("init_from=%s: its averaged weights", self.config.init_from)

    def _fit_positions(self, backbone: Backbone, positions: torch.Tensor, old: tuple[int, int]) -> None:
        """Give a ViT the positions of another grid."""
        assert isinstance(backbone, ViT)
        fixed = torch.allclose(positions, class_and_grid(backbone.dim, old), atol=1e-6)
        compute = fixed and self.config.model.position != "learned"
        value = backbone.fixed()["pos_embed"] if compute else resize_positions(positions, old, backbone.grid)
        parallel.copy_into(backbone.pos_embed, value)
        if dist.is_main():
            how, grids = "computed" if compute else "resized (bicubic)", (*old, *backbone.grid)
            log.info(
                "init_from=%s: positions of %d x %d patches %s for %d x %d",
                self.config.init_from,
                *grids[:2],
                how,
                *grids[2:],
            )


def prepare_run(verb: str, config: Any, labels: bool, build: Callable[[Setup], T]) -> tuple[Setup, T] | None:
    """Do all that can go wrong before work starts, `build` too, and only then open the folder; None when it holds a
    finished run. ValueError in one sentence on every rank.
    """
    setup = build_setup(verb, config, labels)
    built = build(setup)
    return (setup, built) if setup.run.open(verb, setup.config, setup.data_fingerprint) else None


def build_setup(verb: str, config: Any, labels: bool) -> Setup:
    """The same without writing anything.

    `labels` says that the verb needs a label on every sample and a test split.
    """
    device = dist.setup(config.machine.timeout)
    configuration.check_world(config, dist.world())
    train = open_split(config.data.path, config.data.split)
    test = find_test(config, required=labels)
    init_from = getattr(config, "init_from", schema.RANDOM)
    start = None if init_from == schema.RANDOM else find_initial_weights(init_from)
    if labels:
        for index in (train, test):
            refuse_unlabelled(index, verb)
    if start is not None:
        configuration.check_same_model(config, start.config)
    run = RunDir(config.out)
    before = run.settings()[2] if (run.path / "config.yaml").is_file() else None  # a run keeps what it began with
    config = with_statistics(config, before or (start.config if start else None), train)
    with parallel.meta_init(config.machine):
        chosen = {name: getattr(config.model, name) for name in ("pool", "position")}
        given = {name: value for name, value in chosen.items() if value is not None}
        backbone = models.build(config.model.name, image_size=config.model.image_size, seed=config.train.seed, **given)
    if config.model.train_blocks is not None:
        backbone.train_last(config.model.train_blocks)
    micro = config.machine.micro_batch
    micro = micro if isinstance(micro, int) else parallel.CPU_MICRO_BATCH
    setup = Setup(config, run, device, train, test, labels, backbone, start, micro)
    setup.view(training=True).augment()  # what timm does not understand is said now
    return setup


@dataclass(frozen=True)
class InitialWeights:
    """An earlier run as a start: its settings and its newest undamaged checkpoint."""

    config: Any
    path: Any


def find_initial_weights(path: str) -> InitialWeights:
    """The run that `init_from=` names."""
    run = RunDir.existing(path, "init_from")
    newest = dist.run_on_rank0(run.newest)
    if newest is None:
        raise ValueError(f"init_from={path}: the run has no checkpoint; start from a pretrain, probe or finetune run")
    if dist.is_main() and run.result() is None:
        log.warning("init_from=%s: this run is not finished; starting from its checkpoint %s", path, newest.name)
    return InitialWeights(run.settings()[2], newest)


def with_statistics(config: Any, start: Any, index: ShardIndex) -> Any:
    """The config with mean and std: as given, else of `init_from`, else of the data set, else ImageNet's (logged)."""
    mean, std = config.data.mean, config.data.std
    if mean is None or std is None:
        origin = start.data if start is not None else index.dataset
        if origin.mean is None:
            if dist.is_main():
                log.info("the data set has no mean and std of its own: using ImageNet's (data.mean, data.std)")
            mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
        mean, std = mean or origin.mean, std or origin.std
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mean=mean, std=std))


def find_test(config: Any, required: bool) -> ShardIndex | None:
    """The test split, from data.test_path or beside the training split; None where there is none and none is needed."""
    data = config.data
    if data.test_path is not None:
        return open_split(data.test_path, data.test_split)
    try:
        if data.path.endswith(".tar"):
            raise ValueError(f"data.path={data.path}: a glob has no test split; give data.test_path=GLOB too")
        return open_split(data.path, data.test_split)
    except ValueError:
        if required:
            raise
        return None


def refuse_unlabelled(index: ShardIndex | None, verb: str) -> None:
    """Every sample must have a label."""
    assert index is not None
    missing = len(index) - index.num_labelled
    if missing:
        raise ValueError(
            f"{index.tars[0].parent}: {missing} of {len(index)} samples have no label (KEY.cls), which {verb} needs"
        )


def num_classes(*indexes: ShardIndex) -> int:
    """Classes of the labels: as dataset.json says."""
    known = [index.dataset.num_classes for index in indexes if index.dataset.num_classes is not None]
    if not known:
        raise ValueError(
            f"{indexes[0].tars[0].parent}: no dataset.json says how many classes there are; run `mae-dist data index`"
        )
    return max(known)
