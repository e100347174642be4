"""ViT and `build`: names, shapes and outputs equal timm's, and any subset of the patches can be encoded."""

from __future__ import annotations

import itertools
import math
import re
from inspect import unwrap
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_dist import model_sizes, models
from mae_dist.models.backbone import patchify, take, unpatchify
from mae_dist.models.layers import AttentionBlock, depth_scale, initialise, sincos_positions
from mae_dist.models.vit import ViT, resize_positions


def small(pool: str = "cls", position: str = "sincos") -> ViT:
    """A ViT of 4 x 4 patches in float64 whose parameters are all random."""
    vit = ViT(patch=4, dim=24, depth=3, num_heads=3, image_size=16, pool=pool, position=position).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return vit


def pixels(num: int, size: int = 16) -> torch.Tensor:
    return torch.randn(num, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_vit_names_shapes_and_outputs_equal_timm(pool: str) -> None:
    ours = small(pool).eval()
    timms = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0,
        global_pool="token" if pool == "cls" else "avg",
    ).double().eval()  # fmt: skip
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in timms.state_dict().items()}
    timms.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(5)
    with torch.no_grad():
        assert (ours(images) - timms(images)).abs().max() < 1e-12
        assert (ours.encode(images) - timms.forward_features(images)).abs().max() < 1e-12


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize(
    ("patch", "size", "channels", "qkv_bias"),
    [
        (4, (8, 20), 3, True),
        (8, (32, 16), 1, True),
        (14, (28, 42), 4, True),
        (2, (6, 4), 3, False),
        (16, (32, 32), 1, False),
    ],
)
def test_vit_all_parameter_shapes_equal_timm(
    patch: int, size: tuple[int, int], channels: int, qkv_bias: bool, pool: str
) -> None:
    """Rectangular images, other numbers of channels, other patches, no bias of queries, keys and values."""
    shape = {"patch": patch, "image_size": size, "channels": channels, "qkv_bias": qkv_bias}
    ours = ViT(dim=24, depth=2, num_heads=3, pool=pool, **shape).double().eval()
    timms = VisionTransformer(
        img_size=size, patch_size=patch, in_chans=channels, qkv_bias=qkv_bias, embed_dim=24, depth=2, num_heads=3,
        num_classes=0, global_pool="token" if pool == "cls" else "avg",
    ).double().eval()  # fmt: skip
    initialise(ours, 0)
    assert (ours.pos_embed[0, 1:] == sincos_positions(24, size[0] // patch, size[1] // patch)).all()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    timms.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(images) - timms(images)).abs().max() < 1e-12
        assert (ours.encode(images) - timms.forward_features(images)).abs().max() < 1e-12
        index = torch.stack([torch.randperm(ours.num_patches) for _ in range(2)])
        assert (ours.encode(images, index)[:, 1:] - take(ours.encode(images)[:, 1:], index)).abs().max() < 1e-12


@pytest.mark.parametrize("name", models.BACKBONES)
def test_build_makes_every_backbone(name: str) -> None:
    with torch.device("meta"):
        backbone = models.BACKBONES[name]()
    if isinstance(backbone, ViT):
        assert backbone.pos_embed.shape == (1, backbone.num_patches + 1, backbone.dim)
        assert backbone.dim % backbone.blocks[0].attn.num_heads == 0  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "num"),
    [("vit_ti16", 5_524_416), ("vit_s16", 21_665_664), ("vit_b16", 85_798_656), ("vit_l16", 303_301_632),
     ("vit_h14", 630_764_800)],
)  # fmt: skip
def test_model_sizes_are_the_published_ones(name: str, num: int) -> None:
    """What timm's models of these names have without their heads."""
    with torch.device("meta"):
        assert num_parameters(models.BACKBONES[name]()) == num


def test_build_accepts_overrides_and_initialises() -> None:
    backbone = models.build("vit_demo4", seed=1, image_size=16, pool="avg", position="learned")
    assert (backbone.grid, backbone.pool, backbone.get_parameter("pos_embed").requires_grad) == ((4, 4), "avg", True)
    positions = backbone.get_parameter("pos_embed")
    assert torch.equal(positions[0, 1:], sincos_positions(128, 4, 4))
    assert not positions[0, 0].any()
    again, other = models.build("vit_demo4", seed=1), models.build("vit_demo4", seed=2)
    for name, parameter in models.build("vit_demo4", seed=1).named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(again.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_b_16", "did you mean vit_b16?"),
        ("ViT-B/16", "did you mean vit_b16?"),
        ("vti_b16", "did you mean vit_b16?"),
        ("vit_base_patch16_224", "did you mean vit_b16?"),
        ("vit_huge_patch14_224", "did you mean vit_h14?"),
        ("mixer_s16_224", "did you mean mixer_s16?"),
        ("vit_demo5", "did you mean one of vit_demo4, vit_demo2?"),
        ("vitb", "did you mean one of vit_b2, vit_b4, vit_b8, vit_b14, vit_b16, vit_b32?"),
        ("vit_tiny", "did you mean one of vit_ti2, vit_ti4, vit_ti8, vit_ti14, vit_ti16, vit_ti32?"),
        ("mixer_base", "did you mean one of mixer_b16, mixer_b32?"),
        ("resnet", "`mae-dist models` lists them"),
        ("", "`mae-dist models` lists them"),
    ],
)
def test_build_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"model.name={name}: no such model; {hint}") + "$"):
        models.build(name)


@pytest.mark.parametrize("name", [None, 16, ["vit_b16"]])
def test_build_refuses_names_that_are_no_strings(name: Any) -> None:
    """As users have it: without the checks of types that tests wrap around every function."""
    with pytest.raises(ValueError, match=rf"^model\.name={re.escape(repr(name))}: must be a name, vit_b16 for"):
        unwrap(model_sizes.size_of)(name)


@pytest.mark.parametrize(("size", "hint"), [(34, "try 32 or 36$"), (3, "try 4$")])
def test_build_refuses_image_sizes_not_divisible_by_the_patch(size: int, hint: str) -> None:
    with pytest.raises(ValueError, match=f"image_size={size}: not divisible by the patch size 4; {hint}"):
        models.build("vit_demo4", image_size=size)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"pool": "max"}, "model.pool=max: must be cls or avg"),
        ({"position": "abc"}, "model.position=abc: must be sincos or learned"),
        ({"image_size": "32"}, "model.image_size='32': must be pixels a side, or (height, width)"),
        ({"image_size": (32, 0)}, "model.image_size=(32, 0): must be pixels a side, or (height, width)"),
        ({"image_size": (32,)}, "model.image_size=(32,): must be pixels a side, or (height, width)"),
        ({"dim": None}, "model.dim=None: must be a whole number, 1 or more"),
        ({"depth": 0}, "model.depth=0: must be a whole number, 1 or more"),
        ({"channels": 1.5}, "model.channels=1.5: must be a whole number, 1 or more"),
        ({"dim": 130}, "model.dim=130: must be divisible by num_heads=4 and by 4"),
        ({"num_heads": 5}, "model.dim=128: must be divisible by num_heads=5 and by 4"),
        ({"num_heads": 2, "dim": 66}, "model.dim=66: must be divisible by num_heads=2 and by 4"),
        (
            {"num_classes": 10},
            "model.num_classes=10: vit_demo4 has no such setting; leave it out (it has patch, dim, depth, num_heads, "
            "image_size, channels, pool, position, qkv_bias)",
        ),
    ],
)
def test_build_refuses_impossible_models_in_one_sentence(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        models.build("vit_demo4", **override)


@pytest.mark.parametrize("override", [{"dim": None}, {"token_hidden": 0}, {"num_heads": 4}, {"pool": "max"}])
def test_build_refuses_impossible_mixers_in_one_sentence(override: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^model.{next(iter(override))}="):
        models.build("mixer_demo4", **override)


def test_patchify_has_the_order_of_mae() -> None:
    images = pixels(2, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    for row, column, y, x, channel in itertools.product(range(3), range(3), (0, 1, 3), (0, 2, 3), range(3)):
        flat = (y * 4 + x) * 3 + channel  # row, column, channel
        assert torch.equal(patches[:, row * 3 + column, flat], images[:, channel, row * 4 + y, column * 4 + x])
    assert torch.equal(unpatchify(patches, 4, 3), images)
    wide = pixels(1, 12)[..., :8]
    assert torch.equal(unpatchify(patchify(wide, 4), 4, 3), wide)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (2, 5)])
def test_sincos_positions_equal_the_official_code(height: int, width: int) -> None:
    """The official get_2d_sincos_pos_embed: first half from the column ("w goes first"), each half [sin, cos]."""
    dim = 16
    expected = torch.zeros(height * width, dim, dtype=torch.float64)
    for row, column, k in itertools.product(range(height), range(width), range(dim // 4)):
        omega = 1 / 10000 ** (k / (dim / 4))
        place = row * width + column
        expected[place, k] = math.sin(column * omega)
        expected[place, k + dim // 4] = math.cos(column * omega)
        expected[place, k + dim // 2] = math.sin(row * omega)
        expected[place, k + dim * 3 // 4] = math.cos(row * omega)
    assert (sincos_positions(dim, height, width) - expected).abs().max() < 1e-7


def test_vit_learned_positions_get_a_gradient_and_fixed_ones_do_not() -> None:
    for position in ("learned", "sincos"):
        vit = small(position=position)
        vit(pixels(2)).square().sum().backward()
        grad = vit.pos_embed.grad
        assert (grad is not None and bool((grad != 0).any(-1).all())) == (position == "learned")
        assert all(p.grad is not None for name, p in vit.named_parameters() if name != "pos_embed")


def test_vit_encoding_is_independent_of_the_order_of_visible_patches() -> None:
    vit, images = small().eval(), pixels(3)
    with torch.no_grad():
        tokens = vit.encode(images)
        index = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        permuted = vit.encode(images, index)
    assert (permuted[:, :1] - tokens[:, :1]).abs().max() < 1e-12
    assert (permuted[:, 1:] - take(tokens[:, 1:], index)).abs().max() < 1e-12


def test_vit_encoding_ignores_hidden_patches() -> None:
    vit, images = small().eval(), pixels(2)
    visible = torch.tensor([[3, 0, 9], [15, 2, 7]])
    patches = patchify(images, 4)
    kept = torch.zeros_like(patches).scatter(1, visible[..., None].expand(-1, -1, 48), take(patches, visible))
    with torch.no_grad():
        assert torch.equal(vit.encode(images, visible), vit.encode(unpatchify(kept, 4, 4), visible))


def test_initialisation_is_that_of_mae_and_a_function_of_seed_and_name() -> None:
    first, second = nn.Module(), nn.Module()
    parts = {"fc": lambda: nn.Linear(200, 600), "norm": lambda: nn.LayerNorm(50), "other": lambda: nn.Linear(200, 600)}
    for name in parts:
        first.add_module(name, parts[name]())
    for name in reversed(parts):
        second.add_module(name, parts[name]())
    initialise(first, 5)
    initialise(second, 5)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
    weight = first.get_parameter("fc.weight")
    assert not torch.equal(weight, first.get_parameter("other.weight"))
    bound = math.sqrt(6 / 800)
    assert abs(weight.std().item() - bound / math.sqrt(3)) < 0.01 * bound
    assert 0.99 * bound < weight.abs().max() <= bound
    assert not first.get_parameter("fc.bias").any()
    vit = models.build("vit_ti4")
    assert isinstance(vit, ViT)
    bound = math.sqrt(6 / (192 + 48))  # the patch embedding counts as a linear layer of 48 inputs
    assert 0.99 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    bound, bias = 1 / math.sqrt(48), vit.patch_embed.proj.bias  # and its bias as a convolution's
    assert bias is not None
    assert 0.95 * bound < bias.abs().max() <= bound
    assert abs(bias.std().item() - bound / math.sqrt(3)) < 0.1 * bound
    assert abs(vit.cls_token.std().item() - 0.02) < 0.004
    assert (vit.norm.weight == 1).all()  # pyright: ignore
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    holder = nn.Module()
    holder.add_module("vit", vit)
    holder.add_module("fc", nn.Linear(3, 3))
    initialise(holder, 6, skip=vit)
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())


def test_drop_path_of_a_branch_leaves_tokens_unchanged() -> None:
    block, x = small().blocks[0].eval(), torch.randn(2, 5, 24, dtype=torch.float64)
    assert isinstance(block, AttentionBlock)
    with torch.no_grad():
        scale = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
        out = block(x, scale)
        middle = x[1] + block.attn(block.norm1(x[1:]))[0]
        expected = middle + 2 * block.mlp(block.norm2(middle))
    assert torch.equal(out[0], x[0])
    assert (out[1] - expected).abs().max() < 1e-12


def test_drop_path_keeps_the_expectation() -> None:
    keep, rates = torch.tensor([[[True, False]], [[True, False]]]), torch.tensor([0.0, 0.2])
    assert depth_scale(keep.expand(2, 2, 2), rates)[:, 0].tolist() == [[1.0, 0.0], [1.25, 0.0]]


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((14, 14), (32, 32)), ((2, 3), (5, 4)), ((6, 6), (3, 3))])
def test_resize_positions_equals_the_official_code(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Its interpolate_pos_embed written out, channel by channel; the class token's stays."""
    positions = torch.randn(1, 1 + old[0] * old[1], 8, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(positions, old, new)
    assert torch.equal(resized[:, 0], positions[:, 0])
    for channel in range(8):
        plane = positions[0, 1:, channel].reshape(1, 1, *old)
        plane = nn.functional.interpolate(plane, size=new, mode="bicubic", align_corners=False)
        assert torch.equal(resized[0, 1:, channel], plane.flatten())
