"""Every setting of mae_dist: its default, its unit, its range and the verbs that read it, as frozen dataclasses.

The sections `machine`, `checkpoint` and `track`, in `machine_schema`, say where and how a run is computed, and may
change at every start; all others (RESULT_SECTIONS) change its result, and a resumed run must have the values that it
began with. Reading, checking and comparing settings is done in `config`. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

from mae_dist.machine_schema import CheckpointConfig, MachineConfig, TrackConfig
from mae_dist.setting import section, setting

C = TypeVar("C", bound="RunConfig")
"""A config of a certain verb."""

RESULT_SECTIONS = ("data", "view", "model", "mae", "train", "optim", "mix", "knn", "heads")
"""Sections whose values decide the result of a run."""

FREE_DATA = ("path", "test_path", "accept_change", "allow_outside", "max_bad", "cache", "cache_size")
"""Fields of `data` that may change at every start: the content of the data is compared by the fingerprint."""

PATHS = ("out", "init_from", "data.path", "data.test_path", "data.cache")
"""Settings that are paths (see `paths`)."""

RANDOM = "random"
"""The value of `init_from` for a randomly initialised backbone."""

IMPORTED = "imported"
"""What runs that `mae-dist import` has made have in the place of the fingerprint of their data."""

KNN, FINETUNE, TRAINED = ("knn",), ("finetune",), ("pretrain", "finetune")


@dataclass(frozen=True)
class DataConfig:
    """Which samples a run is trained and evaluated on."""

    path: str = setting("???", "folder with a dataset.json, or indexed tars: a quoted glob, a {0..9} range, [A, B]")
    split: str = setting("train", "split of the folder to train on; tars have no splits")
    test_path: str | None = setting(None, "folder or tars of the test split; none: the folder in data.path")
    test_split: str = setting("auto", "split of the folder to evaluate on; auto: val, else test")
    weights: tuple[float, ...] = setting(
        (), "how often each data set of data.path=[A, B] is drawn, for example [2, 1]; an epoch stays as many draws as "
        "there are images; empty: all are one data set", unless=KNN, above=0,
    )  # fmt: skip
    merge_labels: Literal["names", "apart", "numbers"] = setting(
        "names", "classes of several data sets; names: those of one name are one class; apart: each set has its own; "
        "numbers: equal numbers are one class",
    )  # fmt: skip
    cache: str | None = setting(
        None, "folder for tars that are URLs, on a disk of this machine; none: $XDG_CACHE_HOME/mae_dist or "
        "~/.cache/mae_dist",
    )  # fmt: skip
    cache_size: str = setting("100GB", "most bytes of tars in data.cache, for example 500MB or 2TB")
    shuffle_window: int = setting(64, "number of shards whose samples are shuffled together", at_least=1)
    aug_repeats: int = setting(
        1, "repeated augmentation: how often an image is drawn in a row; an epoch shows 1 / aug_repeats of them",
        verbs=TRAINED, at_least=1,
    )  # fmt: skip
    channels: int | None = setting(
        None, "channels of the images that the model gets; none: those of packing, else those of init_from, else 3",
        at_least=1, at_most=4096,
    )  # fmt: skip
    white: float | None = setting(
        None, "value that is white above 8 bits; none: that of packing, else that of init_from, else 65535, or 1 for "
        "floats", above=0,
    )  # fmt: skip
    max_pixels: int = setting(178_956_970, "pixels above which an image counts as unreadable", at_least=1)
    max_bad: float = setting(
        0.001, "fraction of the training samples above which unreadable ones end the run", at_least=0, at_most=1
    )
    accept: tuple[Literal["unseen_classes", "overlap"], ...] = setting(
        (), "what is wrong with the test split and accepted; unseen_classes: classes that training lacks, whose images "
        "count as errors; overlap: tars of the training split",
    )  # fmt: skip
    accept_change: bool = setting(False, "resume the run although its data have changed since it began")
    allow_outside: bool = setting(False, "read tars outside the data set's folder that its dataset.json or links name")
    mean: tuple[float, ...] | None = setting(
        None, "channel means; none: those of init_from, else of dataset.json, else ImageNet's", at_least=0, at_most=1
    )
    std: tuple[float, ...] | None = setting(None, "channel standard deviations; none: as data.mean", above=0, at_most=1)


@dataclass(frozen=True)
class ViewConfig:
    """How a stored image becomes the input of the model: crop and augmentation."""

    crop: Literal["resized", "resized_clamped", "pad", "center"] = setting(
        "resized", "training crop; resized: torchvision's RandomResizedCrop; resized_clamped: its sides are cut to the "
        "image, as in MAE's linear probe; pad: the whole image, shifted at random; center: the test crop", unless=KNN,
    )  # fmt: skip
    scale: tuple[float, float] = setting(
        (0.2, 1.0), "smallest and largest area of a resized crop, as a fraction of the image", unless=KNN,
        above=0, at_most=1,
    )  # fmt: skip
    ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "smallest and largest aspect ratio (width / height) of a resized crop", unless=KNN, above=0
    )
    pad: int = setting(4, "largest shift of view.crop=pad in each direction, in pixels", unless=KNN, at_least=0)
    flip: float = setting(0.5, "probability of a horizontal flip", unless=KNN, at_least=0, at_most=1)
    randaugment: str | None = setting(
        None, "RandAugment policy in timm's notation, for example rand-m9-mstd0.5-inc1; none: off", unless=KNN
    )
    color_jitter: float = setting(
        0.0, "colour jitter: brightness, contrast and saturation change by factors within 1 +- color_jitter; 0: off; "
        "as in timm not beside RandAugment, but for a 3a policy (rand-m9-t3a)", unless=KNN, at_least=0,
    )  # fmt: skip
    random_erasing: float = setting(
        0.0, "random erasing: probability that a box is replaced by noise", unless=KNN, at_least=0, at_most=1
    )
    test_crop: float = setting(
        0.875, "side of the centre crop for evaluation, as a fraction of the image's shorter side", above=0, at_most=1
    )
    exif: bool = setting(False, "turn images as their EXIF orientation says")


@dataclass(frozen=True)
class ModelConfig:
    """The backbone."""

    name: str = setting(
        "???", "model, for example vit_b16; `mae-dist models` lists all (default: name, size and pooling of init_from)"
    )
    image_size: int | tuple[int, int] = setting(
        224, "pixels of the model's input: the side of a square, or [height, width]", at_least=1, at_most=2**15
    )
    pool: Literal["cls", "avg"] | None = setting(
        None, "what the head reads; cls: class token; avg: mean of the patch tokens; none: cls (ViT) or avg (Mixer)"
    )
    position: Literal["sincos", "learned"] | None = setting(
        None, "position embeddings of a ViT; sincos: fixed; learned: trained, initialised with sincos; none: sincos"
    )
    drop_path: float = setting(
        0.0, "stochastic depth rate of the last block; linear from 0 at the first", verbs=FINETUNE, at_least=0, below=1
    )
    train_blocks: float | None = setting(
        None, "last blocks to train, beside the last norm and the head (0.5: only a block's MLP); none: all", FINETUNE
    )
    standardise: bool = setting(
        False,
        "begin with features of mean 0 and deviation 1 over training images (folded into the last norm)",
        FINETUNE,
    )

    def __post_init__(self) -> None:
        """A square given as [N, N] is N, so that both are one size wherever sizes are compared."""
        if isinstance(self.image_size, tuple) and len({*self.image_size}) == 1:
            object.__setattr__(self, "image_size", self.image_size[0])


@dataclass(frozen=True)
class MaeConfig:
    """Masked autoencoding: the mask and the decoder."""

    mask_ratio: float = setting(0.75, "fraction of patches that are hidden", above=0, below=1)
    masking: Literal["random", "block", "grid"] = setting(
        "random",
        "patches that are hidden; random: any; block: random rectangles (BEiT); grid: all but one of every 2 x 2",
    )
    hidden: Literal["drop", "token"] = setting(
        "drop", "what the encoder sees of hidden patches; drop: nothing (MAE); token: a learned mask token (SimMIM)"
    )
    norm_pix: bool = setting(True, "the target is each patch's pixels normalised to mean 0 and variance 1")
    decoder: Literal["full", "cross"] = setting(
        "full", "decoder blocks; full: the backbone's, over visible and predicted patches; cross: the latter attend to "
        "the former",
    )  # fmt: skip
    predict: float = setting(
        1.0, "fraction of the hidden patches that is decoded, chosen at random for each image", above=0, at_most=1
    )
    decoder_dim: int = setting(512, "width of the decoder", at_least=1)
    decoder_depth: int = setting(8, "number of decoder blocks", at_least=0)
    decoder_heads: int = setting(16, "attention heads of the decoder (a Mixer's full decoder has none)", at_least=1)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and arithmetic of training."""

    epochs: float = setting(100.0, "passes over the training split (data.aug_repeats=k: over 1/k of it)", above=0)
    steps: int | None = setting(None, "optimizer steps; none: as many as train.epochs need", at_least=1, at_most=10**12)
    global_batch: int = setting(
        1024, "images per optimizer step, over all ranks and micro-batches", at_least=1, at_most=2**24
    )
    resolutions: tuple[tuple[float, ...], ...] = setting(
        (), "resolution schedule of a ViT: pairs [share of the steps from which on, pixels a side], for example "
        "[[0,160],[0.6,192],[0.8,224]], the last as model.image_size; empty: model.image_size always", verbs=TRAINED,
    )  # fmt: skip
    seed: int = setting(0, "seed of everything random", at_least=0, at_most=2**32 - 1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "mixed precision of forward and backward pass; weights and optimizer stay in fp32; auto: that of "
        "init_from, else bf16, but fp32 on a device without instructions for these"
    )  # fmt: skip
    reduce_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "data type in which gradients are summed over ranks", unless=KNN
    )
    clip_grad: float | None = setting(None, "largest norm of the gradient; none: no clipping", unless=KNN, above=0)
    ema: float | None = setting(
        None, "decay per step of the weights' exponential moving average, which is then evaluated and given to runs "
        "that start from this one; none: no average", unless=KNN, above=0, below=1,
    )  # fmt: skip
    label_smoothing: float = setting(
        0.0, "share of the target that is spread over all classes", verbs=FINETUNE, at_least=0, at_most=1
    )
    loss: Literal["softmax", "sigmoid"] = setting(
        "softmax", "softmax: cross-entropy over classes; sigmoid: binary cross-entropy of each class", verbs=FINETUNE
    )

    def __post_init__(self) -> None:
        """Pairs are tuples, however they were read."""
        pairs = (tuple(pair) if isinstance(pair, list) else pair for pair in self.resolutions)
        object.__setattr__(self, "resolutions", tuple(pairs))


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["adamw", "lars", "muon"] = setting(
        "adamw", "optimizer; muon: Muon for the matrices of blocks, AdamW for all else, both with the same lr and decay"
    )
    base_lr: float = setting(1.5e-4, "lr per 256 images; the peak is base_lr * train.global_batch / 256", above=0)
    min_lr: float = setting(0.0, "lr at the end of the run, absolute (not per 256 images)", at_least=0)
    schedule: Literal["cosine", "linear"] = setting("cosine", "how the lr falls from its peak to min_lr after warmup")
    warmup_epochs: float = setting(0.0, "epochs in which the lr rises linearly from 0 to its peak", at_least=0)
    weight_decay: float = setting(0.05, "decoupled weight decay; biases and norms have none", at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay of its two moments", at_least=0, below=1)
    momentum: float = setting(0.9, "momentum of LARS and Muon (its authors': 0.95)", at_least=0, below=1)
    layer_decay: float = setting(
        1.0, "factor on the lr from each block to the one below it", unless=("probe",), above=0, at_most=1
    )

    def peak_lr(self, global_batch: int) -> float:
        """The linear scaling rule (Goyal et al. 2017): base_lr * global_batch / 256."""
        return self.base_lr * global_batch / 256


@dataclass(frozen=True)
class MixConfig:
    """Mixup and CutMix."""

    mixup: float = setting(0.0, "alpha of mixup; 0: off", at_least=0, at_most=1)
    cutmix: float = setting(0.0, "alpha of CutMix; 0: off", at_least=0, at_most=1)
    prob: float = setting(1.0, "probability that a pair of images is mixed", at_least=0, at_most=1)
    switch: float = setting(0.5, "probability of CutMix where mixup is on too", at_least=0, at_most=1)

    @property
    def enabled(self) -> bool:
        """Whether any images are mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class KnnConfig:
    """Nearest neighbours."""

    k: int = setting(20, "number of neighbours that vote", at_least=1)
    temperature: float = setting(0.07, "a neighbour's vote weighs exp(cosine similarity / temperature)", above=0)


@dataclass(frozen=True)
class HeadsConfig:
    """Several probe heads on one frozen backbone: each method with each of its learning rates, weight decays, features
    and blocks.
    """

    lars: tuple[float, ...] = setting(
        (), "base_lr of each head trained by LARS, after batch norm as in the MAE paper", above=0
    )
    sgd: tuple[float, ...] = setting((), "base_lr of each head trained by SGD with optim.momentum", above=0)
    adamw: tuple[float, ...] = setting((), "base_lr of each head trained by AdamW with optim.betas", above=0)
    weight_decay: tuple[float, ...] = setting((0.0,), "weight decays to try with each base_lr", at_least=0)
    features: tuple[Literal["cls", "mean", "both"], ...] = setting(
        ("cls",), "inputs to try; cls: the class token; mean: the mean of the patch tokens; both: the two concatenated"
    )
    blocks: tuple[int, ...] = setting(
        (), "blocks whose outputs are tried, 1 for the first; empty: the last block", at_least=1
    )
    attentive: bool = setting(False, "for each AdamW head, also one that pools patches by a learned attention query")
    ridge: bool = setting(False, "also try ridge regression in closed form")
    knn: bool = setting(False, "also try nearest neighbours, with the defaults of the verb knn")
    held_out: float = setting(
        0.1, "fraction of the training split on which heads are compared; none is trained on it", above=0, below=1
    )

    @property
    def active(self) -> bool:
        """Whether several heads are tried; otherwise a probe trains the one head that `optim` describes."""
        return bool(self.lars or self.sgd or self.adamw or self.attentive or self.ridge or self.knn)


@dataclass(frozen=True)
class RunConfig:
    """The settings of every verb that makes a run."""

    out: str = setting("???", "folder of the run; the same command again resumes it")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    train: TrainConfig = section(TrainConfig)
    machine: MachineConfig = section(MachineConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    track: TrackConfig = section(TrackConfig)
    view: ViewConfig = section(ViewConfig)

    @property
    def origin(self) -> str | None:
        """The run that `init_from` names; None for random initialisation."""
        origin = getattr(self, "init_from", RANDOM)
        return None if origin == RANDOM else origin


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Masked autoencoding (He et al. 2022)."""

    init_from: str = setting(
        RANDOM, "run, RUN@STEP or file of others whose backbone gives the initial weights, in pretraining with its "
        "decoder where it fits, and where they are not given model.* and mae.*; or random",
    )  # fmt: skip
    mae: MaeConfig = section(MaeConfig)
    optim: OptimConfig = section(OptimConfig)


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """The settings that probe and finetune share."""

    init_from: str = setting(
        "???", "run, RUN@STEP or file of others whose backbone gives the initial weights, or random"
    )
    optim: OptimConfig = section(OptimConfig)


@dataclass(frozen=True)
class ProbeConfig(SupervisedConfig):
    """A linear head on a frozen backbone, or several heads of which the best is chosen."""

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
    """Weighted nearest neighbours on the features of a frozen backbone."""

    init_from: str = setting("???", "run, RUN@STEP or file of others whose backbone is evaluated, or random")
    knn: KnnConfig = section(KnnConfig)


TrainingConfig = PretrainConfig | SupervisedConfig
"""Settings of the verbs that train."""

SCHEMAS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig, "probe": ProbeConfig, "finetune": FinetuneConfig, "knn": KnnRunConfig,
}  # fmt: skip
"""The schema of each verb that takes a CONFIG.yaml."""
