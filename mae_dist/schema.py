"""Every setting of mae_dist: frozen dataclasses with their units, and which verb has which sections.

The sections are grouped by effect. `machine`, `checkpoint` and `track` say where and how, and may change at every
start; all others (RESULT_SECTIONS) change the result and are what a resumed run is held against. How settings are read,
checked and compared is `config`'s business. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

RESULT_SECTIONS = ("data", "view", "model", "mae", "train", "optim", "mix", "knn", "board")
"""Sections whose values decide the result of a run."""

WHERE_DATA_LIES = ("path", "test_path", "accept_change")
"""Fields of `data` that say where, not what: the content itself is compared by the index's fingerprint."""

RANDOM = "random"
"""What `init_from=` says for a backbone that starts from random initialisation."""


def setting(default: T, text: str) -> T:
    """A field with its default and the sentence that `--help` shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataConfig:
    path: str = setting("???", "folder with a dataset.json, or a glob of indexed tars")
    split: str = setting("train", "split to train on (of a folder)")
    test_path: str | None = setting(None, "where the test split lies, if not in path (needed with a glob)")
    test_split: str = setting("test", "split to evaluate on (of a folder)")
    shuffle_window: int = setting(64, "shards whose samples are shuffled together")
    max_bad: float = setting(0.001, "share of unreadable samples at which the run ends (0 to 1)")
    accept_change: bool = setting(False, "go on although the data are not those that the run began with")
    mean: tuple[float, float, float] | None = setting(
        None, "channel means in 0..1; none: from the start, else dataset.json"
    )
    std: tuple[float, float, float] | None = setting(None, "channel deviations in 0..1; none: likewise")


@dataclass(frozen=True)
class ViewConfig:
    crop: Literal["resized", "resized_clamped", "pad", "center"] = setting(
        "resized",
        "trained on torchvision's RandomResizedCrop; one clamped to the image (MAE's probe); a shift; the test crop",
    )
    scale: tuple[float, float] = setting((0.2, 1.0), "area of a resized crop, as a share of the image")
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "aspect ratio (width / height) of a resized crop")
    pad: int = setting(4, "pixels by which crop=pad shifts the image")
    flip: float = setting(0.5, "probability of a horizontal flip")
    randaugment: str | None = setting(
        None, "RandAugment by timm's string, rand-m9-mstd0.5-inc1 for example; none: none"
    )
    random_erasing: float = setting(0.0, "probability of a box of noise (random erasing)")
    test_crop: float = setting(0.875, "side of the centre crop at test time, as a share of the shorter side")


@dataclass(frozen=True)
class ModelConfig:
    name: str = setting("???", "a name of mae_dist.models.BACKBONES")
    image_size: int = setting(224, "pixels a side")
    pool: Literal["cls", "avg"] | None = setting(
        None, "the head reads the class token, or the mean of patch tokens; none: a ViT's cls, a Mixer's avg"
    )
    position: Literal["sincos", "learned"] | None = setting(
        None, "fixed sin-cos positions, or trained ones that start there; none: sincos (a Mixer has neither)"
    )
    drop_path: float = setting(0.0, "stochastic depth of the last block; grows linearly from 0")
    train_blocks: float | None = setting(
        None, "last blocks that finetune trains, beside last norm and head; 0.5: the last MLP alone; none: everything"
    )


@dataclass(frozen=True)
class MaeConfig:
    mask_ratio: float = setting(0.75, "share of patches hidden")
    masking: Literal["random", "block", "grid"] = setting(
        "random", "hidden are any patches; rectangles (BEiT's); all but one of every 2 x 2"
    )
    hidden: Literal["drop", "token"] = setting(
        "drop", "hidden patches are absent from the encoder, or a learned token is in their places (SimMIM)"
    )
    norm_pix: bool = setting(True, "predict pixels normalised per patch")
    decoder: Literal["full", "cross"] = setting(
        "full", "blocks as the backbone's over visible and predicted patches; or predicted ones look at visible only"
    )
    predict: float = setting(1.0, "share of the hidden patches that is decoded, drawn anew each time")
    decoder_dim: int = setting(512, "width of the decoder")
    decoder_depth: int = setting(8, "blocks of the decoder")
    decoder_heads: int = setting(16, "attention heads of the decoder (a Mixer's full one has none)")


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = setting(100.0, "passes over the training split")
    steps: int | None = setting(None, "optimizer steps; replaces epochs when given")
    global_batch: int = setting(1024, "images a step, over all ranks and micro-batches")
    seed: int = setting(0, "the seed of everything random")
    precision: Literal["fp32", "bf16", "fp16"] = setting("bf16", "arithmetic of the forward pass; weights stay fp32")
    reduce_dtype: Literal["fp32", "bf16"] = setting("fp32", "arithmetic in which gradients are summed over ranks")
    clip_grad: float | None = setting(None, "largest gradient norm; none: no clipping")
    ema: float | None = setting(
        None, "decay a step of the weights' moving average, which is what is evaluated and started from; none: none"
    )
    label_smoothing: float = setting(0.0, "share of the target spread over all classes")
    loss: Literal["softmax", "sigmoid"] = setting("softmax", "cross-entropy over classes, or of each class by itself")


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "lars"] = setting("adamw", "optimizer")
    base_lr: float = setting(1.5e-4, "lr for 256 images; lr = base_lr * global_batch / 256")
    min_lr: float = setting(0.0, "lr at the end (absolute)")
    schedule: Literal["cosine", "linear"] = setting("cosine", "how lr falls from its peak after warmup to min_lr")
    warmup_epochs: float = setting(0.0, "epochs of linear warmup from 0")
    weight_decay: float = setting(0.05, "decoupled weight decay; biases and norms are spared")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's moments")
    momentum: float = setting(0.9, "LARS's momentum")
    layer_decay: float = setting(1.0, "lr factor from one block to the one below it")


@dataclass(frozen=True)
class MixConfig:
    mixup: float = setting(0.0, "alpha of mixup, 0 to 1; 0: none")
    cutmix: float = setting(0.0, "alpha of CutMix, 0 to 1; 0: none")
    prob: float = setting(1.0, "share of pairs that are mixed")
    switch: float = setting(0.5, "share of CutMix where both are on")

    @property
    def enabled(self) -> bool:
        """Whether anything is mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class KnnConfig:
    k: int = setting(20, "neighbours that vote")
    temperature: float = setting(0.07, "of the votes' weights exp(cosine / temperature)")


@dataclass(frozen=True)
class HeadsConfig:
    """Many heads on the same frozen features: optimizers x rates x weight decays x features x blocks, and more."""

    lars: tuple[float, ...] = setting((), "base_lr of each head trained by LARS after batch norm (the paper's way)")
    sgd: tuple[float, ...] = setting((), "base_lr of each head trained by SGD with optim.momentum")
    adamw: tuple[float, ...] = setting((), "base_lr of each head trained by AdamW with optim.betas")
    weight_decay: tuple[float, ...] = setting((0.0,), "each rate is tried with each of these")
    features: tuple[Literal["cls", "mean", "both"], ...] = setting(
        ("cls",), "heads read the class token, the mean of the patch tokens, or one after the other"
    )
    blocks: tuple[int, ...] = setting((), "after which blocks, 1 for the first; none given: the last")
    attentive: bool = setting(
        False, "a learned query that attends to the last block's patches too, for each AdamW head"
    )
    ridge: bool = setting(False, "ridge regression in closed form, too")
    knn: bool = setting(False, "nearest neighbours as the verb knn's defaults, too")
    held_out: float = setting(0.1, "share of the training split on which the best is chosen; nothing is trained on it")

    @property
    def active(self) -> bool:
        """Whether there is a board at all; else a probe trains the one head that `optim` describes."""
        return bool(self.lars or self.sgd or self.adamw or self.attentive or self.ridge or self.knn)


@dataclass(frozen=True)
class MachineConfig:
    processes: int | None = setting(
        None, "ranks on this machine; none: one a GPU, or one without GPUs. torchrun overrules"
    )
    micro_batch: int | str = setting(256, "images that a rank computes at once, at most; auto: what fits (CPU: 256)")
    workers: int = setting(4, "decoding processes a rank (not used for data that stays in memory)")
    strategy: Literal["ddp", "fsdp", "hsdp"] = setting(
        "ddp", "each rank holds the model; ranks share it (FSDP2); groups of ranks share it, and there are copies"
    )
    shards: int | None = setting(None, "ranks that share one copy (hsdp); none: those of one machine")
    activation_checkpointing: int = setting(
        0, "recompute every k-th block in the backward pass to save memory; 0: none"
    )
    compile: bool = setting(False, "torch.compile each block")
    timeout: float = setting(600.0, "seconds without an answer after which a rank counts as hung")
    restarts: int = setting(3, "new starts after a rank was lost (torchrun has --max-restarts)")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = setting(1000, "steps between checkpoints")
    minutes: float | None = setting(None, "minutes of work to lose at most: saves between those of `every` too")
    keep: int = setting(2, "newest checkpoints kept")
    keep_every: int | None = setting(None, "steps between checkpoints that are never removed")
    rewind_after: int = setting(3, "non-finite steps in a row after which the run goes back to its last checkpoint")
    max_skipped: int = setting(30, "non-finite steps in all at which the run ends")


@dataclass(frozen=True)
class TrackConfig:
    every: int = setting(20, "steps between looks at the losses (the only host-device synchronisation)")
    evaluate_every: float | None = setting(None, "epochs between evaluations; none: only at the end")
    ids: bool = setting(False, "write ids.jsonl: which samples each step was trained on")
    wandb: Literal["off", "online", "offline"] = setting("off", "mirror of metrics.jsonl")
    project: str = setting("mae_dist", "wandb project")


def section(kind: type[T], **changes: Any) -> T:
    """A section whose defaults differ for one verb."""
    return field(default_factory=lambda: kind(**changes))


@dataclass(frozen=True)
class RunConfig:
    """What every verb that makes a run has."""

    out: str = setting("???", "folder of the run (the same command again goes on there)")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    train: TrainConfig = section(TrainConfig)
    machine: MachineConfig = section(MachineConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    track: TrackConfig = section(TrackConfig)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Masked autoencoding (He et al. 2022)."""

    view: ViewConfig = section(ViewConfig)
    mae: MaeConfig = section(MaeConfig)
    optim: OptimConfig = section(OptimConfig)


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """What probe and fine-tune share."""

    init_from: str = setting("???", "run whose backbone is the start, or 'random'")
    view: ViewConfig = section(ViewConfig)
    optim: OptimConfig = section(OptimConfig)


@dataclass(frozen=True)
class ProbeConfig(SupervisedConfig):
    """Linear probe of a frozen backbone, or a board of many."""

    view: ViewConfig = section(ViewConfig, scale=(0.08, 1.0), crop="resized_clamped")
    optim: OptimConfig = section(OptimConfig, name="lars", base_lr=0.1, weight_decay=0.0)
    heads: HeadsConfig = section(HeadsConfig)


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Training of backbone and head on labels."""

    view: ViewConfig = section(ViewConfig, scale=(0.08, 1.0))
    optim: OptimConfig = section(OptimConfig, base_lr=5e-4, betas=(0.9, 0.999), layer_decay=0.65, min_lr=1e-6)
    mix: MixConfig = section(MixConfig)


@dataclass(frozen=True)
class KnnRunConfig(RunConfig):
    """Weighted nearest neighbours on frozen features."""

    init_from: str = setting("???", "run whose backbone is measured, or 'random'")
    view: ViewConfig = section(ViewConfig)
    knn: KnnConfig = section(KnnConfig)


TrainingConfig = PretrainConfig | SupervisedConfig
"""Settings of the verbs that train."""

SCHEMAS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "finetune": FinetuneConfig,
    "knn": KnnRunConfig,
}
"""The schema of each verb that takes a CONFIG.yaml."""
