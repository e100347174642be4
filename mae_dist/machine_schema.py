"""The sections of settings that may change at every start: where and how a run is computed, saved and recorded.

`schema` has those that decide its result, and all verbs. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from mae_dist.setting import setting

PRETRAIN = ("pretrain",)
CPU_MICRO_BATCH = 256
"""What `machine.micro_batch=auto` means on CPUs, where there is no memory limit to try."""


@dataclass(frozen=True)
class MachineConfig:
    """How a run is computed; none of it changes the result beyond the order of float sums."""

    processes: int | None = setting(
        None, "ranks on this machine; none: one per GPU, or one (ignored under torchrun)", at_least=1, at_most=4096
    )
    micro_batch: int | str = setting(
        256, "most images that a rank computes at once; auto: as many as fit into memory (on a CPU 256)", at_least=1
    )
    workers: int = setting(4, "data loading processes per rank (unused for data in memory)", at_least=0, at_most=1024)
    strategy: Literal["ddp", "fsdp", "hsdp"] = setting(
        "ddp", "ddp: every rank holds the whole model; fsdp: all ranks shard it (FSDP2); hsdp: groups of ranks each "
        "shard a copy of it",
    )  # fmt: skip
    shards: int | None = setting(None, "ranks in a group of hsdp; none: the ranks of one machine", at_least=1)
    activation_checkpointing: int = setting(
        0, "recompute the activations of every k-th block in the backward pass, to save memory; 0: off", at_least=0
    )
    compile: bool = setting(False, "compile each block with torch.compile")
    cuda_graphs: bool = setting(
        False, "launch a micro-batch's kernels together, as a CUDA graph, where the GPU would wait for the host, as "
        "with a small model or few images at once; one rank with a GPU",
    )  # fmt: skip
    short_attention: bool = setting(
        False, "compute attention of at most 128 tokens in 16 bits by kernels made for it; an NVIDIA GPU, Ampere or "
        "newer",
    )  # fmt: skip
    deterministic: bool = setting(
        False, "take only algorithms whose sums have a fixed order, so that a run that is resumed on the same GPUs has "
        "the same bits; slower",
    )  # fmt: skip
    timeout: float = setting(600.0, "seconds without progress after which a rank is hung", above=0, at_most=10**8)
    restarts: int = setting(
        3, "how often all ranks are started again after one was lost (under torchrun: --max-restarts)", at_least=0
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and kept, and how many non-finite steps a run may have."""

    every: int = setting(1000, "steps between checkpoints", at_least=1)
    minutes: float | None = setting(None, "most minutes between checkpoints; none: no such limit", above=0)
    keep: int = setting(2, "number of newest checkpoints that are kept", at_least=1)
    keep_every: int | None = setting(
        None, "steps between checkpoints that are kept for good; none: only the newest are kept", at_least=1
    )
    keep_best: Literal[
        "test_loss", "knn_top1", "ridge_top1", "rankme", "test_top1", "test_top5", "held_out_top1"
    ] | None = setting(
        None, "number of the evaluations by which the best checkpoint is kept, too: losses are better when lower, the "
        "others when higher; none: none is", unless=("knn",),
    )  # fmt: skip
    rewind_after: int = setting(3, "non-finite steps in a row before a rewind to the last checkpoint", at_least=1)
    max_skipped: int = setting(30, "total of non-finite steps above which the run fails", at_least=0)


@dataclass(frozen=True)
class TrackConfig:
    """What is recorded, and how often."""

    every: int = setting(20, "steps between log flushes, the only host-device syncs but the first step's", at_least=1)
    evaluate_every: float | None = setting(None, "epochs between evaluations; none: only at the end", above=0)
    online: tuple[Literal["knn", "ridge", "rankme"], ...] = setting(
        (), "what evaluations measure of the features; knn: nearest neighbours, as the verb knn; ridge: a linear probe "
        "in closed form, as the verb probe with heads.ridge; rankme: their effective rank", verbs=PRETRAIN,
    )  # fmt: skip
    online_images: int | None = setting(
        None, "training images, evenly spread, whose features track.online takes; none: all", verbs=PRETRAIN, at_least=1
    )
    band: tuple[tuple[float, ...], ...] = setting(
        (), "rows [epoch, low, high]: mean training loss of a right run from the row before to that epoch, outside of "
        "which a run warns; empty: not known", verbs=PRETRAIN,
    )  # fmt: skip
    ids: bool = setting(False, "write ids.jsonl: the ids of the samples of each step")
    wandb: Literal["off", "online", "offline"] | None = setting(None, "mirror on wandb; none: WANDB_MODE, else off")
    project: str | None = setting(None, "project on Weights & Biases; none: WANDB_PROJECT, else mae_dist")
    entity: str | None = setting(None, "user or team on Weights & Biases; none: WANDB_ENTITY")
    group: str | None = setting(None, "group of runs on Weights & Biases; none: WANDB_RUN_GROUP")
    tags: tuple[str, ...] = setting((), "tags on Weights & Biases; none: WANDB_TAGS")
    notes: str | None = setting(None, "notes on Weights & Biases; none: WANDB_NOTES")

    def __post_init__(self) -> None:
        """Rows are tuples, however they were read."""
        rows = (tuple(row) if isinstance(row, list) else row for row in self.band)
        object.__setattr__(self, "band", tuple(rows))
