"""What the verbs that make a run do first: join the ranks, find the data, load the start, open the folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mae_dist import checkpoint, dist, models
from mae_dist import config as configuration
from mae_dist.batch import Batch
from mae_dist.checkpoint import RunDir
from mae_dist.data import loader, views
from mae_dist.data.index import ShardIndex, open_split
from mae_dist.data.order import Order, num_micro, plan
from mae_dist.models.vit import ViT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """Everything a verb needs: resolved config, run folder (open unless `finished`), device, data, and the backbone."""

    config: Any
    run: RunDir
    finished: bool
    device: torch.device
    train: ShardIndex
    test: ShardIndex | None
    backbone: ViT

    def view(self, training: bool) -> views.View:
        """How samples of this run are shown."""
        data = self.config.data
        size = self.config.model.image_size
        return views.View(self.config.view, size, data.mean, data.std, self.config.train.seed, training)

    def source(self, index: ShardIndex) -> loader.Resident | loader.Streamed:
        """The images of a split."""
        return loader.open_source(index, self.device, self.config.machine.workers, quiet=not dist.is_main())

    def num_micro(self) -> int:
        """Micro-batches a step."""
        return num_micro(self.config.train.global_batch, dist.world(), self.config.machine.micro_batch)

    def training_batches(self, source: loader.Resident | loader.Streamed, micro: int, steps: range) -> Iterator[Batch]:
        """This rank's micro-batches of these steps."""
        order = Order(self.config.train.seed, self.train.counts, self.config.data.shuffle_window)
        places = plan(order, steps, self.config.train.global_batch, micro, dist.rank(), dist.world())
        return source.batches(places, self.view(training=True))

    def evaluation_batches(self, source: loader.Resident | loader.Streamed) -> Iterator[Batch]:
        """This rank's part of a split, each sample once, not augmented."""
        size = self.config.machine.micro_batch
        places = loader.evaluation_plan(len(source.index), size, dist.rank(), dist.world())
        return source.batches(places, self.view(training=False))


def open_run(verb: str, config: Any, labels: bool) -> Opening:
    """Do all that can go wrong before work starts; ValueError in one sentence, the same on every rank.

    `labels` says that the verb needs a label on every sample and a test split.
    """
    device = dist.setup()
    configuration.check_world(config, dist.world())
    train = open_split(config.data.path, config.data.split)
    test = find_test(config, required=labels)
    start = None if getattr(config, "start", configuration.RANDOM) == configuration.RANDOM else load_start(config.start)
    if labels:
        for index in (train, test):
            refuse_unlabelled(index, verb)
    if start is not None:
        refuse_other_model(start.config, config)
    config = with_statistics(config, start.config if start else None, train)
    backbone = models.build(
        config.model.name, image_size=config.model.image_size, pool=config.model.pool, position=config.model.position,
        seed=config.train.seed,
    )  # fmt: skip
    run = RunDir(config.out)
    content = f"{train.fingerprint}-{test.fingerprint}" if labels and test is not None else train.fingerprint
    finished = not run.open(verb, config, content)
    if start is not None and not finished:
        fill(backbone, start)
    return Opening(config, run, finished, device, train, test, backbone)


@dataclass(frozen=True)
class Start:
    """An earlier run as a start: its settings and its newest undamaged checkpoint."""

    config: Any
    path: Any


def load_start(path: str) -> Start:
    """The run that `from=` names."""
    run = RunDir.existing(path, "from")
    newest = dist.on_main(run.newest)
    if newest is None:
        raise ValueError(f"from={path}: the run has no checkpoint; start from a pretrain, probe or finetune run")
    if dist.is_main() and run.result() is None:
        log.warning("from=%s: this run is not finished; starting from its checkpoint %s", path, newest.name)
    return Start(run.settings()[2], newest)


def refuse_other_model(old: Any, config: Any) -> None:
    """The backbone that is asked for must be the one that was trained."""
    for name in ("name", "image_size"):
        was, wanted = getattr(old.model, name), getattr(config.model, name)
        if was != wanted:
            raise ValueError(f"model.{name}={wanted}: the run from={config.start} has {was}; set model.{name}={was}")


def fill(backbone: ViT, start: Start) -> None:
    """Load the start's backbone. Only the norm that its pooling does not have stays as initialised."""
    there = checkpoint.names_in(start.path)
    state = {f"model.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    other_pool = {name for name in state if ".fc_norm." in name or name.startswith("model.backbone.norm.")}
    checkpoint.load(start.path, {k: v for k, v in state.items() if k in there or k not in other_pool})


def with_statistics(config: Any, start: Any, index: ShardIndex) -> Any:
    """The config with mean and std settled: as given, else the start's, else the data set's, else ImageNet's (told)."""
    mean, std = config.data.mean, config.data.std
    if mean is None or std is None:
        origin = start.data if start is not None else index.dataset
        if origin.mean is None:
            if dist.is_main():
                log.info("the data set has no mean and std of its own: using ImageNet's (data.mean, data.std)")
            mean, std = mean or views.IMAGENET_MEAN, std or views.IMAGENET_STD
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
