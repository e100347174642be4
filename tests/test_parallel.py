"""Placing: recomputation, compilation and precision change nothing but rounding; a micro-batch is found by trying."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mae_dist import dist, models, parallel
from mae_dist.batch import Batch
from mae_dist.models.layers import Block
from mae_dist.objectives import mixing
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MachineConfig, MaeConfig, MixConfig, TrainConfig

CPU = torch.device("cpu")


def mae(seed: int = 0) -> MAE:
    backbone = models.build("vit_demo4", image_size=32, seed=seed)
    return MAE(backbone, MaeConfig(decoder_dim=32, decoder_depth=2, decoder_heads=4), seed=seed)


def batch(size: int = 6) -> Batch:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(size)
    return Batch(images, ids % 3, ids, torch.zeros_like(ids), torch.zeros(size, dtype=torch.bool))


def gradients(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    objective(batch()).loss.sum().backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    plain = gradients(mae())
    for every in (1, 2, 3):
        objective = mae()
        parallel.checkpoint_activations(objective, every)
        changed = [i for i, block in enumerate(parallel.blocks_of(objective)) if "forward" in vars(block)]
        assert changed == list(range(0, 6, every))
        found = gradients(objective)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients_and_names() -> None:
    plain, objective = gradients(mae()), mae()
    parallel.parallelize(
        objective, MachineConfig(compile=True, activation_checkpointing=2), TrainConfig(precision="fp32"), CPU
    )
    found = gradients(objective)
    assert found.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-6)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).relu()


class TwoBranches(Block):
    """A block whose shapes no annotation checks, which would break its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(8), Branch(), Branch()

    def forward(self, x: torch.Tensor, num_out: int | None = None) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        x = x if num_out is None else x[:, -num_out:]
        return x + self.mlp(self.norm(x))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of operations of each graph that a module's `compile` makes; graphs are counted, not compiled."""
    found: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=count))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield found
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


class Blocks(nn.Sequential):
    """Blocks as an objective has them."""

    pooled = nn.Sequential.forward


@pytest.mark.parametrize(("every", "fsdp", "expected"), [(0, False, 1), (1, False, 1), (0, True, 1), (1, True, 1)])
def test_compile_makes_one_graph_of_a_block_and_one_of_its_parts_under_fsdp(
    every: int, fsdp: bool, expected: int, graphs: list[int]
) -> None:
    dist.setup()
    blocks = Blocks(TwoBranches(), TwoBranches())
    parallel.checkpoint_activations(blocks, every)
    parallel.compile_blocks(blocks, is_sharded=fsdp)
    if fsdp:
        parallel.shard(blocks, init_device_mesh("cpu", (1,)), TrainConfig(precision="bf16"))
    with parallel.autocast("bf16", CPU):
        blocks(torch.ones(2, 3, 8, requires_grad=True)).sum().backward()
    assert len(graphs) == expected
    assert all(parameter.grad is not None for parameter in blocks.parameters())


def test_compile_makes_a_graph_for_each_variant_of_a_block(graphs: list[int]) -> None:
    block = TwoBranches()
    parallel.compile_blocks(nn.Sequential(block), is_sharded=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        block.to(dtype)
        for num_out in (None, 1):
            for enabled in (True, False):
                with torch.set_grad_enabled(enabled):
                    block(torch.ones(2, 3, 8, dtype=dtype), num_out)
    assert len(graphs) == 12


def test_what_is_built_without_storage_gets_the_same_bits() -> None:
    def built() -> list[torch.nn.Module]:
        size = {"image_size": 32, "seed": 3}
        return [
            mae(3),
            Finetune(models.build("vit_demo4", pool="avg", **size), 5, drop_path=0.1, label_smoothing=0.1, seed=3),
            Probe(models.build("vit_demo4", **size), 5, chunk=4, seed=3),
        ]

    with torch.device("meta"):
        empty = built()
    for objective, expected in zip(empty, built(), strict=True):
        assert all(tensor.is_meta for tensor in objective.state_dict().values())
        objective.to_empty(device=CPU)
        for tensor in objective.state_dict().values():
            tensor.fill_(7)
        objective.initialise(parallel.copy_into)  # pyright: ignore
        state = expected.state_dict()
        assert objective.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in objective.state_dict().items())


@pytest.mark.parametrize(("limit", "found"), [(1000, 100), (100, 100), (99, 50), (13, 13), (12, 7), (1, 1)])
def test_the_micro_batch_is_halved_until_it_fits(limit: int, found: int) -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert parallel.most_that_fits(100, 1, attempt) == found
    assert tried == sorted(tried, reverse=True)


@pytest.mark.parametrize(("limit", "found"), [(342, 342), (341, 172), (100, 86), (2, 2)])
def test_the_micro_batch_of_mixed_images_is_of_whole_pairs(limit: int, found: int) -> None:
    def attempt(size: int) -> None:
        mixing.mix(batch(size), torch.zeros(size, 3), MixConfig(mixup=0.8), 0)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert parallel.most_that_fits(342, 2, attempt) == found
    with pytest.raises(ValueError, match="not even 2 images fit"):
        parallel.most_that_fits(342, 2, lambda _: attempt(1000))


def test_an_error_that_is_none_of_memory_remains() -> None:
    """cuBLAS has one of its own when there is no memory left for its handle."""

    def attempt(size: int) -> None:
        tried.append(size)
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    tried: list[int] = []
    with pytest.raises(RuntimeError, match="CUBLAS"):
        parallel.most_that_fits(4, 1, attempt)
    assert tried == [4, 2, 1]


def test_not_even_one_image_fits() -> None:
    def attempt(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match="machine.micro_batch=auto: not even one image fits"):
        parallel.most_that_fits(8, 1, attempt)


def test_auto_on_a_cpu_is_a_number() -> None:
    def example(_: int) -> Batch:
        raise AssertionError("nothing to try on a CPU")

    for wanted, share, expected in (("auto", 1000, 256), ("auto", 10, 10), (7, 1000, 7)):
        assert parallel.micro_batch(mae(), MachineConfig(micro_batch=wanted), share, 1, example, CPU, False) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_on_a_gpu_finds_a_size_that_works() -> None:
    device = torch.device("cuda")
    objective = mae()

    def example(size: int) -> Batch:
        one = Batch(*(part[:1].to(device) for part in batch()))
        return Batch(*(part.expand(size, *part.shape[1:]) for part in one))

    auto = MachineConfig(micro_batch="auto")
    found = parallel.micro_batch(copy.deepcopy(objective), auto, 2**20, 1, example, device, averaged=True)
    objective.to(device)(example(found)).loss.sum().backward()
    assert 1 <= found <= 2**20
