"""Parity in float64 with transformers' ViTMAE and timm's ViT and Mixer, with equal weights and images.

Losses, predictions and the gradient of every trained parameter agree within 1e-9, relative to the largest absolute
value of the tensor. For two biases on which nothing depends, so that their gradient is rounding (`USELESS`), it is
relative to the largest gradient in their layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_dist import models, optim
from mae_dist.batch import Batch
from mae_dist.models.backbone import Backbone, take
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MaeConfig, OptimConfig

TOLERANCE = 1e-9
USELESS = ("k_proj.bias", "mlp_tokens.fc2.bias")
"""Biases that change nothing: softmax takes no notice of what is added to all scores of a row, and in a Mixer every
norm takes away what is added to all channels of a token.
"""


def randomised(module: nn.Module) -> Any:
    """The module in float64, every trained parameter moved at random: no bias is 0 any more and no norm's weight 1."""
    generator = torch.Generator().manual_seed(0)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return module


def batch_of(num: int, size: int, epoch: int = 0) -> Batch:
    """Images of random waves."""
    generator = torch.Generator().manual_seed(epoch)
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) / size,) * 2, indexing="ij")
    waves = torch.randn(2, num, 3, 4, 1, 1, dtype=torch.float64, generator=generator)
    images = (20 * (waves[0] * y + waves[1] * x)).sin().sum(2)
    ids = torch.arange(num)
    return Batch(images, ids % 5, ids, torch.full_like(ids, epoch), torch.zeros(num, dtype=torch.bool))


def gap(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference, relative to the largest absolute value of `scale`, or of `theirs`."""
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / (theirs if scale is None else scale).abs().max()).item()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    return {name: parameter.grad for name, parameter in trained.items()}  # pyright: ignore


def split_qkv(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, queries, keys and values apart."""
    for name, tensor in tensors.items():
        if ".qkv." in name:
            yield from (
                (name.replace("qkv", f"{part}_proj"), x) for part, x in zip("qkv", tensor.chunk(3), strict=True)
            )
        else:
            yield name, tensor


def assert_gradients_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Of every tensor of both, by name."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient
        if bias := next((bias for bias in USELESS if name.endswith(bias)), None):
            layer = name.removesuffix(bias)
            scale = torch.stack([g.abs().max() for other, g in theirs.items() if other.startswith(layer)])
            assert gradient.abs().max() < 1e-12 * scale.max(), "it is not rounding"
        assert gap(ours[name], gradient, scale) < TOLERANCE, name


NAMES = [
    (r"^decoder_blocks\.", "decoder.decoder_layers."), (r"^(decoder_|mask_token)", r"decoder.\1"),
    (r"^backbone\.patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^backbone\.pos_embed$", "vit.embeddings.position_embeddings"), (r"^backbone\.blocks\.", "vit.layers."),
    (r"^backbone\.cls_token$", "vit.embeddings.cls_token"), (r"^backbone\.norm\.", "vit.layernorm."),
    (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."), (r"\.attn\.", ".attention."),
]  # fmt: skip
"""Our names to transformers', once queries, keys and values are apart."""


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights or gradients as transformers' ViTMAE calls and cuts them."""
    renamed = {}
    for name, tensor in split_qkv(tensors):
        for pattern, other in NAMES:
            name = re.sub(pattern, other, name)
        renamed[name] = tensor
    return renamed


def transformers_mae(ours: MAE) -> Any:
    """transformers' ViTMAEForPreTraining with the weights of ours, positions included."""
    transformers = pytest.importorskip("transformers")
    vit, settings = ours.backbone, ours.settings
    config = transformers.ViTMAEConfig(
        hidden_size=vit.dim, num_hidden_layers=vit.depth, num_attention_heads=vit.blocks[0].attn.num_heads,  # pyright: ignore
        intermediate_size=4 * vit.dim, image_size=vit.image_size[0], patch_size=vit.patch, num_channels=vit.channels,
        decoder_hidden_size=settings.decoder_dim, decoder_num_hidden_layers=settings.decoder_depth,
        decoder_num_attention_heads=settings.decoder_heads, decoder_intermediate_size=4 * settings.decoder_dim,
        mask_ratio=settings.mask_ratio, norm_pix_loss=settings.norm_pix, layer_norm_eps=1e-6,
        attn_implementation="sdpa",  # the written-out one takes its softmax in fp32
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).double()
    theirs.load_state_dict(transformers_names(ours.state_dict()), strict=True)
    return theirs


def noise_of(ours: MAE, batch: Batch) -> Tensor:
    """Noise that makes transformers hide what we hide: each patch's place in our order."""
    mask = ours.mask(batch)
    return torch.cat([mask.visible, mask.masked], 1).argsort(1).double()


@pytest.mark.parametrize(
    ("name", "size", "norm_pix"), [("vit_ti4", 32, True), ("vit_ti4", 32, False), ("vit_ti16", 224, True)]
)
def test_mae_equals_transformers(name: str, size: int, norm_pix: bool) -> None:
    settings = MaeConfig(norm_pix=norm_pix, decoder_dim=96, decoder_depth=2, decoder_heads=3)
    ours: MAE = randomised(MAE(models.build(name, image_size=size, depth=3), settings, seed=3))
    theirs, batch = transformers_mae(ours), batch_of(2, size)
    output, expected = ours(batch), theirs(batch.images, noise=noise_of(ours, batch))
    mask = ours.mask(batch)
    assert not expected.mask.gather(1, mask.visible).any()
    assert expected.mask.gather(1, mask.masked).all()
    loss = output.loss.mean()
    assert gap(output.prediction, take(expected.logits, mask.masked)) < TOLERANCE
    assert gap(loss, expected.loss) < TOLERANCE
    loss.backward()
    expected.loss.backward()
    assert_gradients_agree(transformers_names(gradients(ours)), gradients(theirs))


def classifier_against_timm(backbone: Backbone, theirs: nn.Module, smoothing: float = 0.0) -> None:
    """Logits, cross-entropy and gradients of a fine-tuning step."""
    ours: Finetune = randomised(Finetune(backbone, 5, drop_path=0.0, label_smoothing=smoothing, seed=0))
    batch = batch_of(2, backbone.image_size[0])
    theirs.double().load_state_dict(
        {name.removeprefix("backbone."): value for name, value in ours.state_dict().items()}, strict=True
    )
    output, expected = ours(batch), theirs(batch.images)
    loss = nn.functional.cross_entropy(expected, batch.labels, label_smoothing=smoothing)
    assert gap(output.prediction, expected) < TOLERANCE
    assert gap(output.loss.mean(), loss) < TOLERANCE
    output.loss.mean().backward()
    loss.backward()
    found = {name.removeprefix("backbone."): gradient for name, gradient in split_qkv(gradients(ours))}
    assert_gradients_agree(found, dict(split_qkv(gradients(theirs))))


@pytest.mark.parametrize(
    ("name", "size", "pool"), [("vit_ti4", 32, "avg"), ("vit_ti4", 32, "cls"), ("vit_ti16", 224, "avg")]
)
def test_finetune_equals_timm(name: str, size: int, pool: str) -> None:
    backbone = models.build(name, image_size=size, pool=pool, position="learned", depth=3)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=backbone.patch, num_classes=5, depth=3,
        global_pool="token" if pool == "cls" else pool,
    )  # fmt: skip
    classifier_against_timm(backbone, theirs, smoothing=0.1)


@pytest.mark.parametrize(
    ("name", "size", "depth"), [("mixer_ti4", 32, 3), ("mixer_s32", 224, 3), ("mixer_b16", 224, 1)]
)
def test_mixer_equals_timm(name: str, size: int, depth: int) -> None:
    backbone = models.build(name, image_size=size, depth=depth)
    theirs = MlpMixer(num_classes=5, img_size=size, patch_size=backbone.patch, embed_dim=backbone.dim, num_blocks=depth)
    classifier_against_timm(backbone, theirs)


@pytest.mark.slow
def test_mae_hundred_steps_equal_transformers_and_torch() -> None:
    """Our groups, schedule, accumulation and step against AdamW with the paper's groups and rates written out."""
    steps, warmup, images, peak = 100, 10, 16, 3e-3
    backbone = models.build("vit_demo4", dim=48, depth=2, num_heads=3, seed=1)
    ours = MAE(backbone, MaeConfig(decoder_dim=32, decoder_depth=1, decoder_heads=2), seed=1).double()
    theirs = transformers_mae(ours)
    settings = OptimConfig(base_lr=peak * 256 / images, warmup_epochs=1.0, weight_decay=0.05)
    groups = optim.param_groups(ours, settings, backbone.depth, no_decay_tokens=False)
    optimizer = optim.build(settings, groups)
    optim.init_optimizer_state(optimizer)
    schedule = optim.schedule(settings, settings.peak_lr(images), steps / warmup)
    scale = optim.LossScale(torch.device("cpu"), enabled=False)
    parameters = [parameter for group in groups for parameter in group["params"]]
    decayed = [p for p in theirs.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in theirs.parameters() if p.requires_grad and p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses = []
    for step in range(steps):
        batch = batch_of(images, 32, epoch=step)
        optim.set_lr(optimizer, schedule(step / steps))
        loss = torch.zeros((), dtype=torch.float64)
        for part in batch.split(images // 2):
            weighted = ours(part).loss.sum() / images
            weighted.backward()
            loss += weighted.detach()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
        optim.update(optimizer, parameters, norm, None, scale)
        rate = peak * (
            step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        )
        for group in adamw.param_groups:
            group["lr"] = rate
        expected = theirs(batch.images, noise=noise_of(ours, batch)).loss
        expected.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append((loss.item(), expected.item()))
    gaps = [abs(a - b) / b for a, b in losses]
    print(f"largest relative gap of {steps} losses: {max(gaps):.1e}; loss {losses[0][0]:.3f} to {losses[-1][0]:.3f}")
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert max(gaps) < TOLERANCE


def test_probe_twenty_lars_steps_equal_the_paper() -> None:
    """Frozen class token, batch norm without affine, head, LARS and rates against torch's layers and LARS written out
    (He et al. 2022, table 10; You et al. 2017, algorithm 1).
    """
    steps, warmup, images, rate = 20, 4, 12, 0.1
    backbone = models.build("vit_demo4", dim=48, depth=2, num_heads=3, seed=1)
    ours: Any = Probe(randomised(backbone), 5, chunk=5, seed=2).double()
    theirs: Any = nn.Sequential(nn.BatchNorm1d(48, affine=False, eps=1e-6), nn.Linear(48, 5)).double()
    theirs[1].load_state_dict(ours.head.state_dict())
    assert 0.008 < ours.head.weight.std() < 0.012
    frozen = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=0
    )  # fmt: skip
    frozen.double().eval().load_state_dict(backbone.state_dict(), strict=True)
    settings = OptimConfig(name="lars", base_lr=rate * 256 / images, warmup_epochs=1.0, weight_decay=0.0)
    optimizer = optim.build(settings, optim.param_groups(ours, settings, backbone.depth, no_decay_tokens=False))
    optim.init_optimizer_state(optimizer)
    schedule = optim.schedule(settings, settings.peak_lr(images), steps / warmup)
    momentum = {name: torch.zeros_like(parameter) for name, parameter in theirs.named_parameters()}
    for step in range(steps):
        batch = batch_of(images, 32, epoch=step)
        optim.set_lr(optimizer, schedule(step / steps))
        loss = ours(batch).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            features = frozen(batch.images)
        expected = nn.functional.cross_entropy(theirs(features), batch.labels)
        theirs.zero_grad()
        expected.backward()
        fell = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        now = rate * (step / warmup if step < warmup else fell)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                gradient = parameter.grad
                if parameter.ndim > 1:
                    gradient = gradient * 0.001 * parameter.norm() / gradient.norm()
                momentum[name].mul_(0.9).add_(gradient)
                parameter.sub_(now * momentum[name])
        assert gap(loss, expected) < TOLERANCE
    ours.eval()
    theirs.eval()
    batch = batch_of(images, 32, epoch=steps)
    with torch.no_grad():
        assert gap(ours(batch).prediction, theirs(frozen(batch.images))) < TOLERANCE


class Coarse(TorchDispatchMode):
    """Collects operations that give floats of less than 64 bits (single numbers aside: they bend no tensor's type)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.ndim and part.dtype != torch.float64:
                self.found.add(str(func))
        return result


SMALL: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


@pytest.mark.parametrize(
    "make",
    [
        lambda: MAE(models.build("vit_demo4", depth=1), MaeConfig(masking="block", **SMALL), seed=0),
        lambda: MAE(
            models.build("vit_demo4", depth=1), MaeConfig(decoder="cross", predict=0.5, norm_pix=False, **SMALL), seed=0
        ),
        lambda: MAE(models.build("mixer_demo4", depth=1), MaeConfig(hidden="token", masking="grid", **SMALL), seed=0),
        lambda: MAE(models.build("mixer_demo4", depth=1), MaeConfig(**SMALL), seed=0),
        lambda: Finetune(models.build("vit_demo4", depth=1, pool="avg"), 5, drop_path=0.3, label_smoothing=0.1, seed=0),
        lambda: Probe(models.build("vit_demo4", depth=1), 5, chunk=2, seed=0),
    ],
)
def test_objectives_keep_float64(make: Any) -> None:
    objective, batch = make().double(), batch_of(4, 32)
    with Coarse() as coarse:
        output = objective(batch)
        output.loss.sum().backward()
    assert not coarse.found
    assert output.loss.dtype == output.prediction.dtype == torch.float64
