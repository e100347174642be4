"""What a run will take, before it is started: memory, speed, time, disk, and what limits it. Imports no torch.

Memory and checkpoints follow in closed form from the settings. The speed is that which `stages.trial` has measured on a
device at hand, else that of the committed table of `bench step --record`, else an assumed share of the peak of the data
sheet; `Rate.how` says which. Times are those of steps and evaluations, without waits for a queue.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mae_dist import config as configuration
from mae_dist import cost, environment, gpus, heads_settings, track_settings
from mae_dist.cost import FP32
from mae_dist.machine_schema import CPU_MICRO_BATCH
from mae_dist.model_sizes import grid_of, sides, size_of
from mae_dist.schema import MaeConfig, PretrainConfig, ProbeConfig, RunConfig, SupervisedConfig, TrainingConfig

TABLE = Path(__file__).with_name("configs") / "steps.jsonl"
"""Speeds of steps by device and settings, as `mae-dist bench step --record` writes them."""
SHARES = {2: 0.25, 4: 0.5}
"""Bytes of a number -> the share of the data sheet's peak that is assumed where no step was measured."""
PRODUCTS = 0.78
"""Share of a data sheet's peak that matrix products reach, of which the rows of TABLE are shares: an H100's in bf16."""
LAUNCH_SECONDS = 2.5e-3
"""Time that the host needs to launch the kernels of a block, forward and backward, without a CUDA graph: beside an H100
45 ms for the 20 blocks of a ViT-B with its decoder, 105 ms for the 40 of a ViT-H.
"""
GRAPH_SECONDS = 0.2e-3
"""Assumed time of a block's kernels of the smallest size in a CUDA graph: some 75, each 2 to 3 microseconds."""
SCALING = 0.95
"""Share of the speed of separate ranks that is assumed of ranks that train together."""
RESERVE = 0.1
"""Share of a device's memory for what is not foreseen, as machine.micro_batch=auto leaves it."""
KEPT_BYTES = {2: 2.25, 4: 4.0}
"""Bytes of a number of `Cost.kept` under autocast to 16 bits, where norms keep fp32 (4 of 17 parts of a block), and in
fp32.
"""
FEW = 8
"""Images at once below which recomputing activations, a third more work, is the better choice."""
MOMENTS = {"adamw": 2, "lars": 1, "muon": 1}
"""Numbers that an optimizer keeps of each parameter, at least of those of blocks."""


class Rate(NamedTuple):
    """Images a second of one rank, how that is known, whether it was extrapolated rather than measured, and whether the
    host, which launches the kernels of a GPU, is expected to be the limit.
    """

    value: float
    how: str
    extrapolated: bool
    by_host: bool = False


class Loading(NamedTuple):
    """Images a second that one rank's loader gave here, with how many cores busy; ``serial``: it computes where the
    step is computed, before it (images in memory, or no workers).
    """

    value: float
    cores: int
    serial: bool


@dataclass(frozen=True)
class Place:
    """Where a run is computed: nodes, ranks and cores of each, and the device of a rank: its name, whether it is a GPU,
    its memory in bytes (of a CPU: the machine's share of a rank). None or "": not known. ``limit``: seconds of a job,
    of which `unused` are start and stop; ``lose_at_most``: minutes between checkpoints; ``threads``: those of a rank
    that computes on CPUs (None: all ranks together keep all cores busy).
    """

    nodes: int = 1
    ranks_per_node: int = 1
    cores: int = 1
    device: str = ""
    is_gpu: bool = False
    memory: float | None = None
    limit: float | None = None
    unused: float = 0.0
    lose_at_most: float | None = None
    threads: int | None = None

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on CPUs like this machine's."""
        return bool(self.device) and not self.is_gpu

    @property
    def fast_precisions(self) -> tuple[str, ...]:
        """The 16-bit precisions that the device has instructions for, as far as its name says."""
        return gpus.fast_precisions(self.device) if self.is_gpu else environment.fast_precisions()


@dataclass(frozen=True)
class Forecast:
    """The answers, each a property. ``num_test``: images of an evaluation; ``step`` and ``loading``: None where not
    known; ``reading``: images a second of one rank whose features a probe stores before its steps; ``kept_images``:
    bytes of a split that the device keeps; ``done``: steps that the run has made already;
    ``measured``: bytes of memory that a trial step took; ``most_tried``: images at once that fitted by trial; ``free``:
    bytes of disk.
    """

    verb: str
    config: TrainingConfig
    place: Place
    num_samples: int
    num_test: int = 0
    step: Rate | None = None
    loading: Loading | None = None
    reading: float | None = None
    kept_images: float = 0.0
    done: int = 0
    measured: float | None = None
    most_tried: int | None = None
    free: float | None = None

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return configuration.total_steps(self.config.train, self.num_samples)

    @property
    def share(self) -> int:
        """Images of a step that the busiest rank computes."""
        group = configuration.group(self.config)
        return group * math.ceil(self.config.train.global_batch / (group * self.place.ranks))

    @property
    def micro(self) -> int:
        """Images that a rank computes at once."""
        given = self.config.machine.micro_batch
        return min(self.share, given if isinstance(given, int) else (self.best or (1, 0))[0])

    def memory(self, micro: int, every: int) -> dict[str, float]:
        """Bytes that a rank takes with so many images at once, by part, where every `every`-th block is recomputed."""
        total, trained = cost.parameters(self.config)
        train, machine = self.config.train, self.config.machine
        per_rank = {"ddp": 1, "fsdp": self.place.ranks, "hsdp": machine.shards or self.place.ranks_per_node}
        part = 4 / per_rank[machine.strategy]
        size, image = bytes_of(self.config), cost.of_run(self.config) or cost.Cost()
        kept = image.kept
        if every:
            deepest = image.recomputable / max(1, min(depths(self.config)))  # of one block, while it is recomputed
            kept += deepest - image.recomputable / every
        pixels = math.prod(sides(self.config.model.image_size)) * (self.config.data.channels or 3)
        return {
            "weights": part * total + (2 * total if size == 2 else 0),
            "gradients": part * trained,
            "moments": MOMENTS[self.config.optim.name] * part * trained,
            "EMA": part * trained if train.ema else 0.0,
            "activations": micro * kept * KEPT_BYTES[size],
            "images": self.kept_images + micro * pixels * 4,
        }

    def fits_with(self, micro: int, every: int) -> bool:
        """Whether so many images at once fit into a rank's memory; True where that is not known."""
        if self.place.memory is None:
            return True
        return sum(self.memory(micro, every).values()) <= (1 - RESERVE) * self.place.memory

    def most(self, every: int) -> int:
        """The most images at once that fit: a rank's share, halved as machine.micro_batch=auto does; 0: not even one
        group.
        """
        if self.most_tried and every == self.config.machine.activation_checkpointing:
            return self.most_tried
        micro = self.share if self.place.is_gpu else min(self.share, CPU_MICRO_BATCH)
        group = configuration.group(self.config)
        while not self.fits_with(micro, every):
            if micro <= group:
                return 0
            micro = group * math.ceil(micro / group / 2)
        return micro

    @cached_property
    def best(self) -> tuple[int, int] | None:
        """(machine.micro_batch, machine.activation_checkpointing) that are best, None where nothing fits."""
        plain, recomputed = self.most(0), self.most(1)
        if plain >= min(FEW, self.share) or plain == recomputed:
            return (plain, 0) if plain else None
        return recomputed, 1

    @property
    def fits(self) -> bool:
        """Whether the run fits as it is set."""
        return self.fits_with(self.micro, self.config.machine.activation_checkpointing)

    @property
    def step_ceiling(self) -> float | None:
        """Images a second of all ranks, where no loader keeps them waiting."""
        if self.step is None:
            return None
        return self.step.value * self.place.ranks * (SCALING if self.place.ranks > 1 else 1.0)

    @property
    def loader_ceiling(self) -> float | None:
        """Images a second of the loaders of all ranks, on cores like those of this machine."""
        if self.loading is None:
            return None
        if self.loading.serial:
            return self.loading.value * self.place.ranks
        busy = min(self.config.machine.workers * self.place.ranks_per_node, self.place.cores)
        return self.loading.value / self.loading.cores * busy * self.place.nodes

    @property
    def speed(self) -> float | None:
        """Images a second of all ranks: the lower ceiling, or, where loader and step take turns on the same device or
        the same cores, what their times add up to, shared by as many cores as there are.
        """
        step, loader = self.step_ceiling, self.loader_ceiling
        if step is None or loader is None or self.loading is None:
            return step
        if self.loading.serial:
            return 1 / (1 / step + 1 / loader)
        if self.place.is_gpu:
            return min(step, loader)
        place, of_a_core = self.place, self.loading.value / self.loading.cores
        busy = min(place.cores, (place.threads or place.cores) * place.ranks_per_node)  # by steps, where none waits
        return min(step, loader, place.cores * place.nodes / (busy * place.nodes / step + 1 / of_a_core))

    @property
    def seconds(self) -> float | None:
        """Time of the steps that are left, of evaluations, and of features that a probe stores before its steps."""
        if not self.speed:
            return None
        left, epochs = self.steps - self.done, self.config.track.evaluate_every
        images = left * self.config.train.global_batch
        evaluations = max(1, min(left, int(images / self.num_samples / epochs))) if epochs else 1
        if stored_features(self.config, 1):
            passes = 0.0 if not self.reading else (self.num_samples + self.num_test) / (self.reading * self.place.ranks)
            return images / self.speed + passes
        image, (_, online) = cost.of_run(self.config), online_features(self.config, self.num_samples, self.num_test)
        forward = 1 / 3 if image is None else image.forward / (image.forward + image.backward)
        if image is not None:  # as many images at model.image_size as take the same time
            images *= cost.training_flops(self.config, range(self.done, self.steps), self.steps) / image.training_flops
        return (images + evaluations * (self.num_test * forward + online)) / self.speed

    @property
    def step_seconds(self) -> float | None:
        """Time of a step."""
        return self.config.train.global_batch / self.speed if self.speed else None

    @property
    def disk(self) -> int:
        """Bytes that the run takes on the disk at most: checkpoints, and the features that a probe stores."""
        checkpoints = checkpoint_bytes(self.config) * num_checkpoints(self.config, self.steps)
        return checkpoints + stored_features(self.config, self.num_samples)

    @property
    def between_saves(self) -> float | None:
        """Seconds between checkpoints."""
        minutes = self.config.checkpoint.minutes or self.place.lose_at_most
        limits = [60 * minutes] if minutes else []
        if self.step_seconds:
            limits.append(min(self.config.checkpoint.every, self.steps) * self.step_seconds)
        return min(limits, default=None)

    @property
    def requeues(self) -> int | None:
        """How often the time limit stops the run, which then is requeued; None where limit or time are not known."""
        if self.place.limit is None or self.seconds is None:
            return None
        useful = max(self.place.limit - self.place.unused, 1.0)
        return math.ceil(self.seconds / useful) - 1


def bytes_of(config: TrainingConfig) -> int:
    """Bytes of the numbers of matrix products."""
    return 4 if config.train.precision == "fp32" else 2


def depths(config: TrainingConfig) -> list[int]:
    """Blocks of the backbone, and of the decoder where there is one."""
    depth, decoder = size_of(config.model.name)["depth"], getattr(config, "mae", None)
    return [depth, decoder.decoder_depth] if decoder and decoder.decoder_depth else [depth]


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: parameters in fp32, the moments of those that are trained, and their EMA."""
    total, trained = cost.parameters(config)
    moments = MOMENTS[config.optim.name] if isinstance(config, PretrainConfig | SupervisedConfig) else 0
    return 4 * (total + trained * (moments + bool(config.train.ema)))


def num_checkpoints(config: RunConfig, steps: int) -> int:
    """Checkpoints on the disk at most: the newest, the best, those kept for good in so many steps, and a new one."""
    settings = config.checkpoint
    for_good = steps // settings.keep_every if settings.keep_every else 0
    return settings.keep + (settings.keep_best is not None) + for_good + 1


def stored_features(config: RunConfig, num_samples: int) -> int:
    """Bytes of the features, in fp32, of so many images that a probe computes once and stores; 0: none."""
    if not isinstance(config, ProbeConfig) or not heads_settings.stores_features(config):
        return 0
    size, heads = size_of(config.model.name), config.heads
    kinds = 2 if "both" in heads.features else len({*heads.features})
    patches = math.prod(grid_of(config.model.image_size, size["patch"])) if heads.attentive else 0
    return FP32 * num_samples * size["dim"] * (len({*heads.blocks} or {0}) * kinds + patches)


def online_features(config: TrainingConfig, num_samples: int, num_test: int) -> tuple[int, float]:
    """(Images whose features track.online takes at an evaluation of so many training and test images; how many images
    are trained on in the time that this takes).
    """
    if not (isinstance(config, PretrainConfig) and config.track.online):
        return 0, 0.0
    count = min(config.track.online_images or num_samples, num_samples)
    count += num_test if track_settings.needs_labels(config) else 0
    model, step = config.model, cost.of_run(config)
    image = cost.encoder(model.name, model.image_size, config.data.channels or 3)
    return count, count * image.forward / (step.forward + step.backward) if image and step else 0.0


def expected_rate(config: TrainingConfig, device: str, micro: int, rows: Iterable[Mapping[str, Any]]) -> Rate | None:
    """Images a second of a step with so many images at once on a GPU that is not at hand: from the nearest of the
    `rows` of TABLE of such a GPU, else from its data sheet; None for a GPU or a model that is not known.
    """
    image, gpu, size = cost.of_run(config), gpus.find(device), bytes_of(config)
    if image is None or gpu is None:
        return None
    wanted, peak = row_key(config), gpu.peak(size)
    alike = [row for row in rows if fits_row(row, device, config)]
    if alike:
        nearest = min(alike, key=lambda row: (row_distance(row, wanted, image), -row["images"]))
        extrapolated = any(nearest[name] != given for name, given in wanted.items()) or micro < nearest["images"] / 2
        value = nearest["share"] * PRODUCTS * peak / image.training_flops
        what = f"{nearest['model']}, {nearest['images']} images at once, on {nearest['device']}"
        how = f"not measured: as {what}" if extrapolated else f"measured: {what}"
    else:
        value, extrapolated = SHARES[size] * peak / image.training_flops, True
        how = f"not measured: {SHARES[size]:.0%} of the {peak / 1e12:g} TFLOP/s of {gpu.part}'s data sheet is assumed"
    launching = sum(depths(config)) * (GRAPH_SECONDS if config.machine.cuda_graphs else LAUNCH_SECONDS)
    if micro / value < launching:
        what = f"{micro} images at once are too few: a GPU like that waits for its host"
        return Rate(micro / launching, f"not measured: {what}", True, by_host=True)
    return Rate(value, how, extrapolated)


def row_key(config: TrainingConfig) -> dict[str, Any]:
    """What a row of TABLE says of the model."""
    mae = getattr(config, "mae", None)
    decoder = f"{mae.decoder} {mae.decoder_dim} x {mae.decoder_depth}, {mae.hidden}, {mae.mask_ratio:g}" if mae else ""
    return {"model": config.model.name, "image_size": [*sides(config.model.image_size)], "decoder": decoder}


def fits_row(row: Mapping[str, Any], device: str, config: TrainingConfig) -> bool:
    """Whether a row of TABLE is of such a device, in this precision, compiled or not as the run is."""
    machine = config.machine
    variant = "compiled" if machine.compile else "eager"
    if machine.compile and machine.short_attention and machine.cuda_graphs:
        variant = "compiled, short attention, CUDA graph"
    same = (row["precision"], row["variant"]) == (config.train.precision, variant)
    return same and gpus.are_alike(row["device"], device)


def row_distance(row: Mapping[str, Any], wanted: Mapping[str, Any], image: cost.Cost) -> float:
    """How far the model of a row is from that which is wanted: 0 for the same, else how their operations differ."""
    if all(row[name] == value for name, value in wanted.items()):
        return 0.0
    other = cost.pretraining(row["model"], MaeConfig(), (row["image_size"][0], row["image_size"][1])) or cost.Cost(1)
    return abs(math.log(other.training_flops / image.training_flops)) + (row["model"] != wanted["model"])
