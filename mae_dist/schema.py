"""Every knob of mae_dist: frozen dataclasses with their units, and which verb has which sections.

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
"""What `from=` says for a backbone that starts from random initialisation."""


def knob(default: T, text: str) -> T:
    """A field with its default and the sentence that `--help` shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Data:
    path: str = knob("???", "folder with a dataset.json, or a glob of indexed tars")
    split: str = knob("train", "split to train on (of a folder)")
    test_path: str | None = knob(None, "where the test split lies, if not in path (needed with a glob)")
    test_split: str = knob("test", "split to evaluate on (of a folder)")
    shuffle_window: int = knob(64, "shards whose samples are shuffled together")
    max_bad: float = knob(0.001, "share of unreadable samples at which the run ends (0 to 1)")
    accept_change: bool = knob(False, "go on although the data are not those that the run began with")
    mean: tuple[float, float, float] | None = knob(
        None, "channel means in 0..1; none: from the start, else dataset.json"
    )
    std: tuple[float, float, float] | None = knob(None, "channel deviations in 0..1; none: likewise")


@dataclass(frozen=True)
class View:
    crop: Literal["resized", "resized_clamped", "pad", "center"] = knob(
        "resized",
        "trained on torchvision's RandomResizedCrop; one clamped to the image (MAE's probe); a shift; the test crop",
    )
    scale: tuple[float, float] = knob((0.2, 1.0), "area of a resized crop, as a share of the image")
    ratio: tuple[float, float] = knob((3 / 4, 4 / 3), "aspect ratio (width / height) of a resized crop")
    pad: int = knob(4, "pixels by which crop=pad shifts the image")
    flip: float = knob(0.5, "probability of a horizontal flip")
    randaugment: str | None = knob(None, "RandAugment by timm's string, rand-m9-mstd0.5-inc1 for example; none: none")
    erase: float = knob(0.0, "probability of a box of noise (random erasing)")
    test_crop: float = knob(0.875, "side of the centre crop at test time, as a share of the shorter side")


@dataclass(frozen=True)
class Model:
    name: str = knob("???", "a name of mae_dist.models.BACKBONES")
    image_size: int = knob(224, "pixels a side")
    pool: Literal["cls", "avg"] | None = knob(
        None, "the head reads the class token, or the mean of patch tokens; none: a ViT's cls, a Mixer's avg"
    )
    position: Literal["sincos", "learned"] | None = knob(
        None, "fixed sin-cos positions, or trained ones that start there; none: sincos (a Mixer has neither)"
    )
    drop_path: float = knob(0.0, "stochastic depth of the last block; grows linearly from 0")
    train_blocks: float | None = knob(
        None, "last blocks that finetune trains, beside last norm and head; 0.5: the last MLP alone; none: everything"
    )


@dataclass(frozen=True)
class Mae:
    mask_ratio: float = knob(0.75, "share of patches hidden")
    masking: Literal["random", "block", "grid"] = knob(
        "random", "hidden are any patches; rectangles (BEiT's); all but one of every 2 x 2"
    )
    hidden: Literal["drop", "token"] = knob(
        "drop", "hidden patches are absent from the encoder, or a learned token is in their places (SimMIM)"
    )
    norm_pix: bool = knob(True, "predict pixels normalised per patch")
    decoder: Literal["full", "cross"] = knob(
        "full", "blocks as the backbone's over visible and predicted patches; or predicted ones look at visible only"
    )
    predict: float = knob(1.0, "share of the hidden patches that is decoded, drawn anew each time")
    decoder_dim: int = knob(512, "width of the decoder")
    decoder_depth: int = knob(8, "blocks of the decoder")
    decoder_heads: int = knob(16, "attention heads of the decoder (a Mixer's full one has none)")


@dataclass(frozen=True)
class Train:
    epochs: float = knob(100.0, "passes over the training split")
    steps: int | None = knob(None, "optimizer steps; replaces epochs when given")
    global_batch: int = knob(1024, "images a step, over all ranks and micro-batches")
    seed: int = knob(0, "the seed of everything random")
    precision: Literal["fp32", "bf16", "fp16"] = knob("bf16", "arithmetic of the forward pass; weights stay fp32")
    reduce: Literal["fp32", "bf16"] = knob("fp32", "arithmetic in which gradients are summed over ranks")
    clip: float | None = knob(None, "largest gradient norm; none: no clipping")
    ema: float | None = knob(
        None, "decay a step of the weights' moving average, which is what is evaluated and started from; none: none"
    )
    label_smoothing: float = knob(0.0, "share of the target spread over all classes")
    loss: Literal["softmax", "sigmoid"] = knob("softmax", "cross-entropy over classes, or of each class by itself")


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "lars"] = knob("adamw", "optimizer")
    base_lr: float = knob(1.5e-4, "lr for 256 images; lr = base_lr * global_batch / 256")
    min_lr: float = knob(0.0, "lr at the end (absolute)")
    decay: Literal["cosine", "linear"] = knob("cosine", "how lr falls from its peak after warmup to min_lr")
    warmup_epochs: float = knob(0.0, "epochs of linear warmup from 0")
    weight_decay: float = knob(0.05, "decoupled weight decay; biases and norms are spared")
    betas: tuple[float, float] = knob((0.9, 0.95), "AdamW's moments")
    momentum: float = knob(0.9, "LARS's momentum")
    layer_decay: float = knob(1.0, "lr factor from one block to the one below it")


@dataclass(frozen=True)
class Mix:
    mixup: float = knob(0.0, "alpha of mixup, 0 to 1; 0: none")
    cutmix: float = knob(0.0, "alpha of CutMix, 0 to 1; 0: none")
    prob: float = knob(1.0, "share of pairs that are mixed")
    switch: float = knob(0.5, "share of CutMix where both are on")

    @property
    def enabled(self) -> bool:
        """Whether anything is mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class Knn:
    k: int = knob(20, "neighbours that vote")
    temperature: float = knob(0.07, "of the votes' weights exp(cosine / temperature)")


@dataclass(frozen=True)
class Board:
    """Many heads on the same frozen features: optimizers x rates x weight decays x features x blocks, and more."""

    lars: tuple[float, ...] = knob((), "base_lr of each head trained by LARS after batch norm (the paper's way)")
    sgd: tuple[float, ...] = knob((), "base_lr of each head trained by SGD with optim.momentum")
    adamw: tuple[float, ...] = knob((), "base_lr of each head trained by AdamW with optim.betas")
    weight_decay: tuple[float, ...] = knob((0.0,), "each rate is tried with each of these")
    features: tuple[Literal["cls", "mean", "both"], ...] = knob(
        ("cls",), "heads read the class token, the mean of the patch tokens, or one after the other"
    )
    blocks: tuple[int, ...] = knob((), "after which blocks, 1 for the first; none given: the last")
    attentive: bool = knob(False, "a learned query that attends to the last block's patches too, for each AdamW head")
    ridge: bool = knob(False, "ridge regression in closed form, too")
    knn: bool = knob(False, "nearest neighbours as the verb knn's defaults, too")
    held_out: float = knob(0.1, "share of the training split on which the best is chosen; nothing is trained on it")

    @property
    def active(self) -> bool:
        """Whether there is a board at all; else a probe trains the one head that `optim` describes."""
        return bool(self.lars or self.sgd or self.adamw or self.attentive or self.ridge or self.knn)


@dataclass(frozen=True)
class Machine:
    processes: int | None = knob(
        None, "ranks on this machine; none: one a GPU, or one without GPUs. torchrun overrules"
    )
    micro_batch: int | str = knob(256, "images that a rank computes at once, at most; auto: what fits (CPU: 256)")
    workers: int = knob(4, "decoding processes a rank (not used for data that stays in memory)")
    parallel: Literal["ddp", "fsdp", "hsdp"] = knob(
        "ddp", "each rank holds the model; ranks share it (FSDP2); groups of ranks share it, and there are copies"
    )
    shards: int | None = knob(None, "ranks that share one copy (hsdp); none: those of one machine")
    recompute: int = knob(0, "recompute every k-th block in the backward pass to save memory; 0: none")
    compile: bool = knob(False, "torch.compile each block")
    timeout: float = knob(600.0, "seconds without an answer after which a rank counts as hung")
    restarts: int = knob(3, "new starts after a rank was lost (torchrun has --max-restarts)")


@dataclass(frozen=True)
class Checkpoint:
    every: int = knob(1000, "steps between checkpoints")
    minutes: float | None = knob(None, "minutes of work to lose at most: saves between those of `every` too")
    keep: int = knob(2, "newest checkpoints kept")
    keep_every: int | None = knob(None, "steps between checkpoints that are never removed")
    rewind_after: int = knob(3, "non-finite steps in a row after which the run goes back to its last checkpoint")
    max_skipped: int = knob(30, "non-finite steps in all at which the run ends")


@dataclass(frozen=True)
class Track:
    every: int = knob(20, "steps between looks at the losses (the only host-device synchronisation)")
    evaluate_every: float | None = knob(None, "epochs between evaluations; none: only at the end")
    ids: bool = knob(False, "write ids.jsonl: which samples each step was trained on")
    wandb: Literal["off", "online", "offline"] = knob("off", "mirror of metrics.jsonl")
    project: str = knob("mae_dist", "wandb project")


def section(kind: type[T], **changes: Any) -> T:
    """A section whose defaults differ for one verb."""
    return field(default_factory=lambda: kind(**changes))


@dataclass(frozen=True)
class RunConfig:
    """What every verb that makes a run has."""

    out: str = knob("???", "folder of the run (the same command again goes on there)")
    data: Data = section(Data)
    model: Model = section(Model)
    train: Train = section(Train)
    machine: Machine = section(Machine)
    checkpoint: Checkpoint = section(Checkpoint)
    track: Track = section(Track)


@dataclass(frozen=True)
class Pretrain(RunConfig):
    """Masked autoencoding (He et al. 2022)."""

    view: View = section(View)
    mae: Mae = section(Mae)
    optim: Optim = section(Optim)


@dataclass(frozen=True)
class Supervised(RunConfig):
    """What probe and fine-tune share."""

    start: str = knob("???", "run whose backbone is the start, or 'random'")
    view: View = section(View)
    optim: Optim = section(Optim)


@dataclass(frozen=True)
class Probe(Supervised):
    """Linear probe of a frozen backbone, or a board of many."""

    view: View = section(View, scale=(0.08, 1.0), crop="resized_clamped")
    optim: Optim = section(Optim, name="lars", base_lr=0.1, weight_decay=0.0)
    board: Board = section(Board)


@dataclass(frozen=True)
class Finetune(Supervised):
    """Training of backbone and head on labels."""

    view: View = section(View, scale=(0.08, 1.0))
    optim: Optim = section(Optim, base_lr=5e-4, betas=(0.9, 0.999), layer_decay=0.65, min_lr=1e-6)
    mix: Mix = section(Mix)


@dataclass(frozen=True)
class KnnRun(RunConfig):
    """Weighted nearest neighbours on frozen features."""

    start: str = knob("???", "run whose backbone is measured, or 'random'")
    view: View = section(View)
    knn: Knn = section(Knn)


SCHEMAS: dict[str, type[RunConfig]] = {"pretrain": Pretrain, "probe": Probe, "finetune": Finetune, "knn": KnnRun}
"""The schema of each verb that takes a CONFIG.yaml."""
