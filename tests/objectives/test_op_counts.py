"""Operations of a step, counted as torch dispatches them: on a GPU each is a launch of a kernel, or more.

The meta device stands for a GPU: it has shapes and no values, so a step that runs there reads nothing back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from shared_types import Tars
from torch import Tensor, nn
from torch._inductor import config, metrics
from torch.utils._python_dispatch import TorchDispatchMode

from mae_dist import models, optim, parallel, rng, schema
from mae_dist.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from mae_dist.data import augment, resample
from mae_dist.data.resident import ResidentSource
from mae_dist.data.views import View
from mae_dist.objectives import masks
from mae_dist.objectives.mae import MAE
from mae_dist.train import StepMetrics, TrainState, train_step

CPU, META = torch.device("cpu"), torch.device("meta")
NO_KERNEL = {"_unsafe_view", "detach", "_record_function_enter_new", "_record_function_exit"}


class Kernels(TorchDispatchMode):
    """Counts operations that compute or copy, by name, and copies from the CPU to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.counts[name] += 1
            sent = name in ("_to_copy", "copy_") and isinstance(result, Tensor) and result.is_meta
            self.copies += sent and any(isinstance(part, Tensor) and not part.is_meta for part in args)
        return result


def count(action: Callable[[], object]) -> Kernels:
    with Kernels() as kernels:
        action()
    return kernels


def total(action: Callable[[], object]) -> int:
    return sum(count(action).counts.values())


def batch_of(num: int, device: torch.device = CPU) -> Batch:
    ids = torch.arange(num, device=device)
    return Batch(torch.zeros(num, 3, 32, 32, device=device), ids, ids, ids, ids < 0)


def mae(depth: int, device: torch.device = CPU, **settings: Any) -> MAE:
    with torch.device(device):
        backbone = models.build("vit_demo4", dim=48, num_heads=3, depth=depth)
        return MAE(backbone, schema.MaeConfig(decoder_dim=32, decoder_depth=1, decoder_heads=2, **settings), seed=0)


def passes(depth: int, precision: str) -> tuple[Kernels, Kernels]:
    objective, batch, found = mae(depth), batch_of(2), []

    def forward() -> None:
        with parallel.autocast(precision, CPU):
            found.append(objective(batch).loss.sum())

    return count(forward), count(lambda: found[0].backward())


@pytest.mark.parametrize(("precision", "forward", "backward"), [("fp32", 10, 19), ("bf16", 20, 31)])
def test_op_count_of_attention_block(precision: str, forward: int, backward: int) -> None:
    """Forward: 2 norms, 4 linear layers, attention, GELU, 2 additions. Backward: 8 products, 4 sums for biases, 2
    norms, attention, its gradients put side by side, GELU, 2 additions. In 16 bits: casts of weights, biases, norms.
    """
    shallow, deep = passes(1, precision), passes(2, precision)
    found = [sum((b.counts - a.counts).values()) for a, b in zip(shallow, deep, strict=True)]
    assert found == [forward, backward]


def test_op_count_of_mae_outside_its_encoder() -> None:
    """With the decoder's last block. The pixels of visible and of predicted patches are gathered once each."""
    shallow, deep = passes(1, "fp32"), passes(2, "fp32")
    forward, backward = (a.counts - (b.counts - a.counts) for a, b in zip(shallow, deep, strict=True))
    ids = torch.arange(2)
    draw = total(lambda: masks.draw("random", 0, ids, ids, (8, 8), 16))
    assert sum(forward.values()) - draw <= 41
    assert sum(backward.values()) <= 50
    assert forward["gather"] == forward["embedding"] == 2


@pytest.mark.parametrize(("kind", "most"), [("random", 107), ("block", 257), ("grid", 228)])
def test_op_count_of_mask_draw(kind: str, most: int) -> None:
    """Of which a draw of any number of words is 106 at most."""
    ids = torch.arange(4)
    assert total(lambda: rng.bits(0, rng.Purpose.MASK, ids, ids, 64)) <= 106
    assert total(lambda: masks.draw(kind, 0, ids, ids, (8, 8), 16)) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("random", 2), ("block", 12), ("grid", 6)])
@config.patch(force_disable_caches=True)  # what is found there counts no kernels
def test_compiled_draw_of_masks_has_the_same_bits_and_few_kernels(kind: Any, most: int) -> None:
    """Beside its sorts, of which a random mask has one and the others have two."""
    objective = mae(1, masking=kind)
    batches = [batch_of(num)._replace(ids=torch.arange(num) * 7919 + 2**33) for num in (8, 3)]
    expected = [objective.mask(batch) for batch in batches]
    objective.compile_draws()
    metrics.reset()
    for batch, masks_of_batch in zip(batches, expected, strict=True):
        before, found = metrics.generated_kernel_count, objective.mask(batch)
        assert all(torch.equal(*pair) for pair in zip(found, masks_of_batch, strict=True))
        assert 0 < metrics.generated_kernel_count - before <= most


def test_op_count_of_random_erasing_is_one_per_erased_image() -> None:
    ids, images = np.arange(32), torch.zeros(32, 3, 16, 16)
    boxes = augment.erased_boxes(0.25, 0, ids, ids, (16, 16))
    augment.erase(images, 0.25, 0, ids, ids)  # draws the noise once and for all
    found = count(lambda: augment.erase(images, 0.25, 0, ids, ids))
    assert found.counts == {"copy_": np.count_nonzero(boxes[:, 2])}


def test_op_count_of_resident_batch_copies_ids_and_epochs_alone(tars: Tars) -> None:
    view = View(schema.ViewConfig(crop="pad", pad=4), 32, IMAGENET_MEAN, IMAGENET_STD, seed=0, training=True)
    source, ids = ResidentSource(tars([4, 4]), META, quiet=True), np.arange(8)
    list(source.batches([(ids, ids)], view))  # the view's constants
    found = count(lambda: list(source.batches([(ids, ids)], view)))
    assert found.copies == 2
    view = replace(view, settings=schema.ViewConfig(crop="resized"))
    places, sizes = torch.arange(8, device=META), torch.full((8, 2), 40, device=META)
    found = count(lambda: resample.resize_matrices(*view.boxes(places, places, sizes), 40, 40, view.size))
    assert found.copies == 0
    assert sum(found.counts.values()) <= 340


def test_train_step_reads_nothing_from_its_device() -> None:
    """Neither loss, gradients nor clipping. LARS, as torch's fused AdamW does not run there."""
    objective, train = mae(1, META), schema.TrainConfig(global_batch=8, precision="fp32", clip_grad=1.0, ema=0.9)
    settings = schema.OptimConfig(name="lars")
    optimizer = optim.build(settings, optim.param_groups(objective, settings, 1, no_decay_tokens=False))
    optim.init_optimizer_state(optimizer)
    scale = optim.LossScale(META, enabled=False)
    state = TrainState(objective, optimizer, scale, optim.EMA(objective, train.ema))
    found: list[StepMetrics] = []
    counted = count(lambda: found.append(train_step(objective, state, iter([batch_of(4, META)] * 2), 1e-3, 2, train)))
    assert counted.copies == 0
    assert all(tensor.is_meta for tensor in found[0].tensors().values())


def test_op_count_of_update_is_independent_of_the_number_of_parameters() -> None:
    def update(count: int) -> int:
        linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        settings = schema.OptimConfig()
        optimizer = optim.build(settings, optim.param_groups(linears, settings, 1, no_decay_tokens=False))
        optim.init_optimizer_state(optimizer)
        parameters = [*linears.parameters()]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        scale = optim.LossScale(CPU, enabled=False)
        norm = torch.tensor(1.0)
        return total(lambda: optim.update(optimizer, parameters, norm, 1.0, scale))

    assert update(2) == update(9) <= 24
