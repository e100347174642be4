"""Costs: counts equal the papers' tables, explicit formulas, and what a real forward pass keeps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mae_dist import models
from mae_dist.__main__ import main
from mae_dist.commands.models import finetuning, one, pretraining
from mae_dist.models import cost
from mae_dist.models.backbone import Backbone
from mae_dist.models.layers import CrossAttention
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MaeConfig

TIMMS = {
    "vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224", "vit_s32": "vit_small_patch32_224",
    "vit_b8": "vit_base_patch8_224", "vit_b16": "vit_base_patch16_224", "vit_b32": "vit_base_patch32_224",
    "vit_l16": "vit_large_patch16_224", "vit_l32": "vit_large_patch32_224", "vit_h14": "vit_huge_patch14_224",
    "mixer_s32": "mixer_s32_224", "mixer_s16": "mixer_s16_224", "mixer_b32": "mixer_b32_224",
    "mixer_b16": "mixer_b16_224", "mixer_l16": "mixer_l16_224",
}  # fmt: skip


def empty(name: str) -> Backbone:
    with torch.device("meta"):
        return models.build(name)


def head(dim: int) -> int:
    """Parameters of a linear head of 1000 classes."""
    return 1000 * dim + 1000


@pytest.mark.parametrize(("ours", "timms"), TIMMS.items())
def test_cost_names_shapes_and_counts_equal_timm(ours: str, timms: str) -> None:
    backbone = empty(ours)
    with torch.device("meta"):
        theirs = timm.create_model(timms, num_classes=1000)
    expected = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    assert {name: value.shape for name, value in backbone.state_dict().items()} == expected
    assert cost.num_parameters(backbone) + head(backbone.dim) == cost.num_parameters(theirs)


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [("vit_ti16", True, 5.7), ("vit_s16", True, 22), ("vit_b16", False, 86), ("vit_l32", True, 307),
     ("vit_h14", True, 632), ("mixer_s32", False, 19), ("mixer_s16", False, 18), ("mixer_b32", False, 60),
     ("mixer_b16", False, 59), ("mixer_l16", False, 207)],
)  # fmt: skip
def test_cost_parameters_equal_the_papers(name: str, classes: bool, millions: float) -> None:
    """Touvron et al. 2021, table 1; Dosovitskiy et al. 2021, table 1; Tolstikhin et al. 2021, table 1.

    What they count differs: Ti, S and H with a head of 1000 classes, B/16 and all Mixers without one. No patch size is
    printed for ViT-L: its 307 M are those of L/32 with a head (L/16 has 304 M).
    """
    backbone = empty(name)
    num = cost.num_parameters(backbone) + (head(backbone.dim) if classes else 0)
    assert round(num / 1e6, 1 if millions < 10 else 0) == millions


@pytest.mark.parametrize(
    ("name", "giga", "digits"),
    [("vit_ti16", 1.3, 1), ("vit_s16", 4.6, 1), ("vit_b16", 17.6, 1), ("mixer_b16", 12.6, 1), ("mixer_s32", 1.0, 1)],
)
def test_cost_flops_equal_the_papers(name: str, giga: float, digits: int) -> None:
    """DeiT's and timm's tables."""
    assert round(finetuning(name).multiply_adds / 1e9, digits) == giga


@pytest.mark.parametrize(("name", "giga"), [("vit_b16", 17.58), ("vit_l16", 61.60), ("vit_h14", 167.40)])
def test_cost_flops_equal_mmpretrain(name: str, giga: float) -> None:
    """Its table comes from fvcore, which also counts a head and 5 operations for each number that a norm is given."""
    backbone = empty(name)
    norms = (2 * backbone.depth + 1) * (backbone.num_patches + 1) * backbone.dim
    total = finetuning(name).multiply_adds + 5 * norms + 1000 * backbone.dim
    assert total / 1e9 == pytest.approx(giga, abs=0.0051)


def vit_block(tokens: int, dim: int) -> int:
    """qkv, two products of attention, projection, MLP of 4 dim."""
    return 3 * tokens * dim**2 + 2 * tokens**2 * dim + tokens * dim**2 + 8 * tokens * dim**2


@pytest.mark.parametrize(
    ("name", "decoder", "table"),
    [("vit_s16", (512, 8), (1.09, 5.36, 6.51, 4.60)), ("vit_b16", (512, 8), (4.29, 5.37, 9.78, 17.56)),
     ("vit_l16", (512, 8), (15.22, 5.38, 20.76, 61.55)), ("vit_h14", (512, 8), (41.24, 7.13, 48.56, 167.3)),
     ("vit_b16", (512, 1), (4.29, 0.76, 5.17, 17.56)), ("vit_ti4", (192, 4), (0.092, 0.123, 0.215, 0.365))],
)  # fmt: skip
def test_cost_of_pretraining_equals_the_formula(
    name: str, decoder: tuple[int, int], table: tuple[float, float, float, float]
) -> None:
    """`table`: encoder on a quarter and the class token, decoder, the official MAE, full encoder, in 10^9.

    Ours is the official code's without what it computes for nothing: embeddings of hidden patches, and in the last
    block of the decoder and after it all but the hidden patches.
    """
    backbone = empty(name)
    dim, patches, pixels = backbone.dim, backbone.num_patches, 3 * backbone.patch**2
    seen, (width, depth) = patches // 4 + 1, decoder
    encoder = backbone.depth * vit_block(seen, dim)
    decoding = seen * dim * width + depth * vit_block(patches + 1, width) + (patches + 1) * width * pixels
    official = patches * pixels * dim + encoder + decoding
    full = patches * pixels * dim + backbone.depth * vit_block(patches + 1, dim)
    for number, rounded in zip((encoder, decoding, official, full), table, strict=True):
        assert number / 1e9 == pytest.approx(rounded, rel=0.006)
    assert finetuning(name).multiply_adds == full
    saved = (patches - seen + 1) * pixels * dim
    saved += seen * (10 * width**2 + 2 * (patches + 1) * width) + seen * width * pixels
    settings = MaeConfig(decoder_dim=width, decoder_depth=depth)
    assert pretraining(name, settings).multiply_adds == official - saved


@pytest.mark.parametrize("name", ["mixer_s32", "mixer_b16", "mixer_l16"])
def test_cost_of_mixer_equals_the_formula(name: str) -> None:
    """Of a quarter of the tokens too: all that a block does is done for visible tokens only."""
    backbone = empty(name)
    dim, patches, pixels = backbone.dim, backbone.num_patches, 3 * backbone.patch**2
    sizes = models.BACKBONES[name].keywords  # pyright: ignore

    def encoder(tokens: int) -> int:
        block = 2 * tokens * dim * sizes["token_hidden"] + 2 * tokens * dim * sizes["channel_hidden"]
        return tokens * pixels * dim + backbone.depth * block

    assert finetuning(name).multiply_adds == encoder(patches)
    seen, width = patches // 4, 512
    last = (patches + patches - seen) * width * 256 + 8 * (patches - seen) * width**2
    decoding = seen * dim * width + last + (patches - seen) * width * pixels
    settings = MaeConfig(decoder_dim=width, decoder_depth=1)
    assert pretraining(name, settings).multiply_adds == encoder(seen) + decoding


def test_cost_counts_attention() -> None:
    """Queries of 5 tokens, keys and values of 7, both products, projection; what a fused kernel keeps."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = CrossAttention(24, 40, 3)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.attn(x, context)

    with torch.device("meta"):
        found = cost.count(Cross(), torch.zeros(1, 5, 24), torch.zeros(1, 7, 40))
    assert found.multiply_adds == 5 * 24 * 24 + 7 * 40 * 48 + 2 * 5 * 7 * 24 + 5 * 24 * 24
    assert found.activations == 4 * (5 * 24 + 7 * 40 + 5 * 24 + 7 * 48 + 5 * 24 + 3 * 5)  # x, context, q, kv, result


SETTINGS: list[dict[str, Any]] = [
    {}, {"predict": 0.25}, {"decoder": "cross", "predict": 0.5}, {"hidden": "token"},
    {"hidden": "token", "decoder": "cross"}, {"decoder_depth": 1}, {"norm_pix": False, "masking": "block"},
]  # fmt: skip


def really_kept(module: nn.Module, *inputs: object) -> int:
    """Bytes of different memory, not parameters, that autograd keeps of a real forward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cost_on_meta_equals_a_real_forward_pass(name: str, settings: dict) -> None:
    """Memory to the byte, of torch's own fused attention; and from shallow models as from the deep one."""
    shape: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 3, "decoder_heads": 4}
    mae = MaeConfig(**(shape | settings))
    backbone = models.build(name)
    assert pretraining(name, mae).activations == really_kept(MAE(backbone, mae, seed=0), one(backbone))
    tuned = models.build(name, pool="avg")
    assert finetuning(name).activations == really_kept(tuned, one(tuned).images)
    with torch.device("meta"):
        deep = models.build(name)
        assert cost.count(MAE(deep, mae, seed=0), one(deep)) == pretraining(name, mae)


def test_models_command_lists_named_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vit_b16", "mixer_b16", "mae.decoder_depth=1"]) == 0
    output = capsys.readouterr().out
    (vit,) = [line.split() for line in output.splitlines() if "vit_b16" in line]
    assert vit[1::2] == ["vit_b16", "224", "85.80", "4.92", "17.6", "36.3", "117"]
    assert "mixer_b16" in output
    assert "multiply-adds" in output
    assert "decoder 512 wide and 1 deep" in output


@pytest.mark.slow
def test_models_command_lists_every_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--image-size", "64"]) == 0
    table, _, without = capsys.readouterr().out.partition("Not possible with these images and settings: ")
    assert set(without.rstrip(".\n").split(", ")) == {name for name in models.BACKBONES if name.endswith("14")}
    assert all(f" {name} " in table for name in models.BACKBONES if name not in without)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vit_b_16"], "model.name=vit_b_16: no such model; did you mean vit_b16?"),
        (["vit_b16", "--image-size", "100"], "model.image_size=100: not divisible by the patch size 16"),
        (["vit_b32", "--image-size", "32"], "of 1 patches some must be hidden and some visible"),
        (["--image-size", "7"], "--image-size 7: no model can be pretrained on such images"),
        (
            ["vit_b16", "train.epochs=3"],
            "train.epochs=3: this table depends only on --image-size and on settings of mae",
        ),
        (["vit_b16", "train.epochs=3"], "for example mae.decoder_depth=4"),
        (
            ["vit_b16", "model.image_size=448"],
            "model.image_size=448: the image size is an option of this command; use --",
        ),
        (["image_size=384"], "image_size=384: the image size is an option of this command; use --image-size 384"),
        (["vit_b16", "mae.decodr=cross"], "did you mean mae.decoder?"),
        (["vit_b16", "mae.decoder_depth=0"], "mae.decoder_depth=0"),
        (["--image-size", "many"], "--image-size"),
    ],
)
def test_models_command_mistakes_print_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
