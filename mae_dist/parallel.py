"""Parallelism from outside the model: autocast, activation checkpointing, compilation, DDP, FSDP2, HSDP.

The order is written once, in `parallelize`: activation checkpointing inside, compile around it, then shard or
replicate. Weights, moments and the sums of gradients are fp32 (`train.reduce_dtype` says otherwise for the sums). Under
autocast the matrices of a block are used in 16 bits, so FSDP2 gathers them in 16 bits, while norms, tokens and
positions stay fp32 as they do under DDP: every strategy computes the same numbers but for the order of float sums.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mae_dist import dist
from mae_dist.batch import Batch
from mae_dist.machine_schema import CPU_MICRO_BATCH
from mae_dist.models.layers import Attention, Block
from mae_dist.objectives import Objective
from mae_dist.schema import MachineConfig, TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WAYS = "try machine.activation_checkpointing=1, or machine.strategy=fsdp with machine.micro_batch=N"
"""What helps where a model is too large for machine.micro_batch=auto."""


def sharded(machine: MachineConfig) -> bool:
    """Whether the model is sharded over ranks (FSDP2 or HSDP)."""
    return machine.strategy != "ddp" and dist.world() > 1


def meta_init(machine: MachineConfig) -> AbstractContextManager:
    """Context to build the objective in: the meta device if it will be sharded, so no rank ever holds all of it."""
    return torch.device("meta") if sharded(machine) else nullcontext()


def parallelize(objective: Objective, machine: MachineConfig, train: TrainConfig, device: torch.device) -> nn.Module:
    """Checkpoint activations, compile, and shard or replicate the objective on the device, as `machine` says. Returns
    the module to call; the objective keeps the parameters.

    An objective on the meta device gets the same initial bits that it would have had with storage.
    """
    if machine.short_attention:
        use_short_attention(objective)
    checkpoint_activations(objective, machine.activation_checkpointing)
    if machine.compile:
        compile_blocks(objective, sharded(machine))
    if sharded(machine):
        shard(objective, mesh(machine, device), train)
        objective.to_empty(device=device)
        objective.initialise(copy_into)
        return objective
    objective.to(device)
    if dist.world() == 1:
        return objective
    ids = [device] if device.type == "cuda" else None
    replica = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
    if train.reduce_dtype == "bf16":
        replica.register_comm_hook(None, bf16_compress_hook)
    return replica


def when_computed(loss: Tensor, action: Callable[[], None]) -> None:
    """Call `action` once the backward pass from `loss` has this rank's gradients, before it waits for other ranks'.

    Callbacks of autograd run in the order in which they were queued, and those of DDP and FSDP2 that wait come later.
    """
    loss.register_hook(lambda _: Variable._execution_engine.queue_callback(action))


def blocks_of(objective: nn.Module) -> list[Block]:
    """Blocks of backbone and decoder, in order."""
    return [module for module in objective.modules() if isinstance(module, Block)]


def matrices_of(block: Block) -> list[nn.Module]:
    """The parts of a block that autocast computes in 16 bits: attention or mixing, and MLP, without the norms."""
    return [part for part in block.children() if not isinstance(part, nn.LayerNorm)]


def use_short_attention(objective: nn.Module) -> None:
    """Compute attention of few tokens by kernels made for them, on a device that has them."""
    for module in objective.modules():
        if isinstance(module, Attention):
            module.short = True


def checkpoint_activations(objective: nn.Module, every: int) -> None:
    """Recompute every `every`-th block in the backward pass (Chen et al. 2016); 0: none."""
    for number, block in enumerate(blocks_of(objective)):
        if every and number % every == 0:
            block.forward = recomputed(block.forward)


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` with its activations recomputed: a function, since torch.compile starts at none that is a `partial`."""

    def checkpointed(*arguments: Any) -> Tensor:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return checkpointed


def compile_blocks(objective: nn.Module, is_sharded: bool) -> None:
    """Compile the draws of an objective, and each block, or where it is sharded the parts of it that FSDP gathers: the
    hooks that do so would break the graph of a block in pieces.
    """
    # blocks share their code: encoder, decoder and its last block, each in training and evaluation, for full and
    # partial batches, are more variants than the 8 after which torch stops compiling
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # would split a block where a bucket of gradients ends
    if isinstance(objective, Objective):
        objective.compile_draws()
    for block in blocks_of(objective):
        for part in matrices_of(block) if is_sharded else [block]:
            part.compile()


def mesh(machine: MachineConfig, device: torch.device) -> DeviceMesh:
    """The device mesh: (ranks,) for FSDP2; (copies, ranks that share a copy) for HSDP."""
    if machine.strategy == "fsdp":
        return with_timeout(init_device_mesh(device.type, (dist.world(),)))
    shards = machine.shards or dist.local_world()
    if dist.world() % shards:
        raise ValueError(f"machine.shards={shards}: {dist.world()} processes do not divide into groups of {shards}")
    shape = (dist.world() // shards, shards)
    return with_timeout(init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards")))


def with_timeout(where: DeviceMesh) -> DeviceMesh:
    """The mesh, whose groups wait for a rank as long as all others do."""
    for group in where.get_all_groups():
        dist.limit_wait(group)
    return where


def shard(objective: nn.Module, where: DeviceMesh, train: TrainConfig) -> None:
    """Apply FSDP2 (Zhao et al. 2023): one group for the matrices of each block, one for all the rest."""
    from torch.distributed import fsdp  # imports all of sympy, which other strategies do not need

    # of outputs that are views: nobody changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    reduce = torch.bfloat16 if train.reduce_dtype == "bf16" else torch.float32
    rest = fsdp.MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    matrices = fsdp.MixedPrecisionPolicy(DTYPES.get(train.precision), reduce, cast_forward_inputs=False)
    for block in blocks_of(objective):
        fsdp.fully_shard(matrices_of(block), mesh=where, mp_policy=matrices)  # pyright: ignore
    fsdp.fully_shard(objective, mesh=where, mp_policy=rest, reshard_after_forward=True)  # also after an evaluation
    fsdp.register_fsdp_forward_method(objective, "pooled")


@torch.no_grad()
def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Copy `value`, which every rank has in full, into a parameter; only this rank's shard where it is sharded."""
    parameter.copy_(part_of(value.to(parameter.device), parameter))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on every rank, gathered where it is sharded."""
    return tensor.full_tensor() if dist.is_sharded(tensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every rank has in full, sharded as `like` is."""
    if not dist.is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def warm_up_ddp(module: nn.Module, stream: Iterator[Batch], name: str, device: torch.device) -> Iterator[Batch]:
    """Make DDP arrange its buckets before the first step, by a forward and backward pass over the first batch without
    an update. Returns a stream with all batches, the first included.

    DDP sorts gradients into new buckets after its first backward pass. With more than two ranks it depends on the place
    in a bucket in which order ranks are summed, so the first step after a resume would differ in its last bits.
    """
    first = next(stream, None) if isinstance(module, DistributedDataParallel) else None
    if first is None:
        return stream
    before = [buffer.clone() for buffer in module.buffers()]
    with autocast(name, device):
        loss = module(first).loss.sum()
    loss.backward()
    module.zero_grad()
    for buffer, value in zip(module.buffers(), before, strict=True):
        buffer.copy_(value)
    return itertools.chain([first], stream)


def sync_gradients(module: nn.Module, when: bool) -> AbstractContextManager:
    """Context of a backward pass that averages gradients over ranks `when` true, which is on the last micro-batch of a
    step.
    """
    if set_sync := getattr(module, "set_requires_gradient_sync", None):  # of FSDP2
        set_sync(when)
    if isinstance(module, DistributedDataParallel) and not when:
        return module.no_sync()
    return nullcontext()


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """Context of a forward pass in this precision ("fp32", "bf16", "fp16"); weights and gradients stay fp32."""
    if name == "fp32":
        return nullcontext()
    # no cache: each weight is used once, and under FSDP2 a cached copy would outlive what it is a copy of
    return torch.autocast(device.type, DTYPES[name], cache_enabled=False)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients over all ranks, on the device; not finite where any rank's is not."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return whole(norm)


def micro_batch(
    objective: nn.Module, machine: MachineConfig, share: int, group: int, example: Callable[[int], Batch],
    device: torch.device, averaged: bool,
) -> int:  # fmt: skip
    """Images that a rank computes at once: machine.micro_batch, or for `auto` the most of its `share` that fits on
    every GPU, a multiple of `group`.

    Tried on a copy of the whole objective, beside as many bytes as its moments, gradients and, if the weights are
    `averaged`, their average will take, and a tenth of the GPU's memory for what is not foreseen; so what fits here
    also fits when ranks share the model. Only the number of micro-batches follows from it. Raises ValueError where the
    objective does not fit.
    """
    if isinstance(machine.micro_batch, int):
        return machine.micro_batch
    if device.type == "cpu":
        return min(share, CPU_MICRO_BATCH)
    try:
        trial = copy.deepcopy(objective).to_empty(device=device)
        trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
        size = (4 if averaged else 3) * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        size += torch.cuda.get_device_properties(device).total_memory // 10
        beside = torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise ValueError(f"machine.micro_batch=auto: the model and its optimizer do not fit on a GPU; {WAYS}") from None
    checkpoint_activations(trial, machine.activation_checkpointing)

    def attempt(size: int) -> None:
        trial.zero_grad()  # what a failed attempt has left
        torch.cuda.empty_cache()
        trial(example(size)).loss.sum().backward()

    found = most_that_fits(share, group, attempt)
    del trial, trained, beside
    torch.cuda.empty_cache()
    return -dist.all_reduce_max(-found)


def most_that_fits(share: int, group: int, attempt: Callable[[int], None]) -> int:
    """The share, halved to a multiple of `group` until `attempt` does not run out of memory (ValueError when even one
    group does). Any error of torch counts, since its libraries have others when there is no memory left for them; one
    that remains is raised.
    """
    size = share
    while True:
        try:
            attempt(size)
            return size
        except RuntimeError as error:
            if size > group:
                size = group * math.ceil(size / group / 2)
            elif isinstance(error, torch.OutOfMemoryError):
                what = "one image fits" if group == 1 else f"{group} images fit"
                raise ValueError(
                    f"machine.micro_batch=auto: not even {what} into the memory of a GPU; {WAYS}"
                ) from None
            else:
                raise
