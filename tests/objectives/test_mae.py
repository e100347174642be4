"""MAE: hidden pixels have no influence, and loss and decoders equal plain implementations of the papers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from modules import randomised
from torch import nn

from mae_dist import models
from mae_dist.batch import Batch
from mae_dist.models.backbone import patchify, take
from mae_dist.models.layers import initialise
from mae_dist.models.mixer import Mixer
from mae_dist.models.vit import ViT
from mae_dist.objectives.mae import MAE, normalise_patches
from mae_dist.schema import MaeConfig


def tiny(norm_pix: bool = True, mask_ratio: float = 0.75, **others: Any) -> MAE:
    """MAE of 4 x 4 patches in float64 whose trainable parameters are all random."""
    backbone = ViT(patch=4, dim=24, depth=2, num_heads=3, image_size=16)
    shape: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    settings = MaeConfig(mask_ratio=mask_ratio, norm_pix=norm_pix, **(shape | others))
    return randomised(MAE(backbone, settings, seed=4).double())


def batch_of(num: int, epoch: int = 0, first: int = 0) -> Batch:
    images = torch.randn(num, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(first, first + num)
    return Batch(images, torch.full((num,), -1), ids, torch.full((num,), epoch), torch.zeros(num, dtype=torch.bool))


@pytest.mark.parametrize(("size", "patch", "ratio", "num"), [(224, 16, 0.75, 49), (32, 4, 0.75, 16), (32, 4, 0.9, 6)])
def test_mask_number_of_visible_patches(size: int, patch: int, ratio: float, num: int) -> None:
    with torch.device("meta"):
        backbone = ViT(patch=patch, dim=8, depth=1, num_heads=1, image_size=size)
    objective = MAE(backbone, MaeConfig(mask_ratio=ratio, decoder_dim=8, decoder_depth=1, decoder_heads=1), seed=0)
    batch = batch_of(2)._replace(images=torch.zeros(2, 3, size, size))
    assert objective.mask(batch).visible.shape == (2, num)


def test_mask_ratio_that_leaves_no_visible_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mae\.mask_ratio=0\.99: of 16 patches some must be hidden and some visible"):
        tiny(mask_ratio=0.99)


@pytest.mark.parametrize("decoder", ["full", "cross"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"decoder_heads": 3}, "mae.decoder_dim=16: must be divisible by mae.decoder_heads=3 and by 4"),
        ({"decoder_dim": 18}, "mae.decoder_dim=18: must be divisible by mae.decoder_heads=2 and by 4"),
        ({"decoder_heads": 0}, "mae.decoder_heads=0: must be at least 1"),
        ({"decoder_depth": -1}, "mae.decoder_depth=-1: must be at least 0"),
        ({"predict": 1.5}, "mae.predict=1.5: must be greater than 0 and at most 1"),
    ],
)
def test_mae_refuses_impossible_decoders(shape: dict[str, Any], message: str, decoder: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        tiny(decoder=decoder, **shape)


def test_mae_predictions_ignore_hidden_pixels() -> None:
    objective, batch = tiny(), batch_of(3)
    mask = objective.mask(batch)
    patches = patchify(batch.images, 4)
    index = mask.masked[..., None].expand(-1, -1, 48)
    other = patches.scatter(1, index, 100 * torch.randn_like(take(patches, mask.masked)))
    images = other.reshape(3, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 16, 16)
    assert not torch.equal(images, batch.images)
    changed = batch._asdict() | {"images": images}
    with torch.no_grad():
        assert torch.equal(objective(batch).prediction, objective(Batch(**changed)).prediction)
        visible_too = batch._asdict() | {"images": batch.images + 1}
        assert not torch.equal(objective(batch).prediction, objective(Batch(**visible_too)).prediction)


def heads(num: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of queries (m, d) to keys and values (n, d), head by head."""
    width, found = q.shape[1] // num, []
    for head in range(num):
        part = slice(head * width, (head + 1) * width)
        weights = (q[:, part] @ k[:, part].T / width**0.5).softmax(-1)
        found.append(weights @ v[:, part])
    return torch.cat(found, -1)


def attend(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of one sequence (n, d)."""
    return attn.proj(heads(attn.num_heads, *attn.qkv(x).chunk(3, -1)))  # pyright: ignore


def through(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = x + attend(block.attn, block.norm1(x))  # pyright: ignore
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))  # pyright: ignore
    return x


def encoded(objective: MAE, image: torch.Tensor, visible: list[int]) -> torch.Tensor:
    """The encoder's tokens for one image (3, 16, 16)."""
    vit = objective.backbone
    assert isinstance(vit, ViT)
    tokens = vit.patch_embed.proj(image[None])[0].flatten(1).T + vit.pos_embed[0, 1:]
    return vit.norm(through(vit.blocks, torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], tokens[visible]])))


def patch_loss(objective: MAE, image: torch.Tensor, patch: int, prediction: torch.Tensor) -> torch.Tensor:
    row, column = patch // 4 * 4, patch % 4 * 4
    target = image[:, row : row + 4, column : column + 4].permute(1, 2, 0).flatten()
    if objective.settings.norm_pix:
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
    return (prediction - target).square().mean()


def papers_loss(objective: MAE, image: torch.Tensor, visible: list[int]) -> torch.Tensor:
    """He et al. 2022, section 3, for one image (3, 16, 16): decode the full grid, then average over masked patches."""
    latent = objective.decoder_embed(encoded(objective, image, visible))
    full = objective.mask_token[0].repeat(17, 1)
    full[0] = latent[0]
    for place, patch in enumerate(visible):
        full[1 + patch] = latent[1 + place]
    decoded = through(objective.decoder_blocks, full + objective.decoder_pos_embed[0])
    prediction = objective.decoder_pred(objective.decoder_norm(decoded))[1:]
    losses = [patch_loss(objective, image, patch, prediction[patch]) for patch in range(16)]
    hidden = torch.tensor([patch not in visible for patch in range(16)]).double()
    return (torch.stack(losses) * hidden).sum() / hidden.sum()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss_equals_the_paper(norm_pix: bool) -> None:
    objective, batch = tiny(norm_pix), batch_of(4, epoch=2, first=2**33)
    losses = objective(batch).loss
    visible = objective.mask(batch).visible.tolist()
    expected = torch.stack([papers_loss(objective, batch.images[i], visible[i]) for i in range(4)])
    assert losses.dtype == torch.float64
    assert (losses - expected).abs().max() < 1e-12
    assert losses.std() > 1e-3
    parameters = [p for p in objective.parameters() if p.requires_grad]
    ours, papers = (torch.autograd.grad(loss.sum(), parameters) for loss in (losses, expected))
    assert max((a - b).abs().max().item() for a, b in zip(ours, papers, strict=True)) < 1e-11


def cross_prediction(objective: MAE, latent: torch.Tensor, patch: int) -> torch.Tensor:
    """Fu et al. 2024, section 3.2, for one hidden patch, alone: a query that reads the encoder's tokens."""
    x = objective.mask_token[0] + objective.decoder_pos_embed[0, 1 + patch : 2 + patch]
    for block in objective.decoder_blocks:
        attn = block.attn
        read = heads(attn.num_heads, attn.q(block.norm1(x)), *attn.kv(latent).chunk(2, -1))  # pyright: ignore
        x = x + attn.proj(read)  # pyright: ignore
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))  # pyright: ignore
    return objective.decoder_pred(objective.decoder_norm(x))[0]


def full_prediction(objective: MAE, latent: torch.Tensor, visible: list[int], predicted: list[int]) -> torch.Tensor:
    """Visible and predicted patches alone through all of every block, in that order."""
    positions, seen = objective.decoder_pos_embed[0], objective.decoder_embed(latent)
    tokens = [seen[0] + positions[0]]
    tokens += [seen[1 + place] + positions[1 + patch] for place, patch in enumerate(visible)]
    tokens += [objective.mask_token[0, 0] + positions[1 + patch] for patch in predicted]
    decoded = through(objective.decoder_blocks, torch.stack(tokens))
    return objective.decoder_pred(objective.decoder_norm(decoded))[1 + len(visible) :]


@pytest.mark.parametrize("predict", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("decoder", ["cross", "full"])
def test_mae_decoders_equal_plain_loops(decoder: str, predict: float) -> None:
    """Loss, predictions and every gradient of one image against the decoder read plainly."""
    objective, batch = tiny(decoder=decoder, predict=predict), batch_of(1, epoch=3, first=11)
    output, mask = objective(batch), objective.mask(batch)
    visible, predicted = mask.visible[0].tolist(), mask.masked[0, : round(12 * predict)].tolist()
    latent = encoded(objective, batch.images[0], visible)
    if decoder == "cross":
        expected = torch.stack([cross_prediction(objective, latent, patch) for patch in predicted])
    else:
        expected = full_prediction(objective, latent, visible, predicted)
    losses = [patch_loss(objective, batch.images[0], p, x) for p, x in zip(predicted, expected, strict=True)]
    loss = torch.stack(losses).mean()
    assert output.prediction.shape == (1, len(predicted), 48)
    assert (output.prediction[0] - expected).abs().max() < 1e-12
    assert (output.loss[0] - loss).abs() < 1e-12
    parameters = [p for p in objective.parameters() if p.requires_grad]
    ours, plain = (torch.autograd.grad(x, parameters) for x in (output.loss[0], loss))
    assert max((a - b).abs().max().item() for a, b in zip(ours, plain, strict=True)) < 1e-11


@pytest.mark.parametrize("decoder", ["cross", "full"])
def test_mae_predictions_depend_on_other_predicted_patches_only_in_a_full_decoder(decoder: str) -> None:
    objective, batch = tiny(decoder=decoder), batch_of(3)
    mask = objective.mask(batch)
    with torch.no_grad():
        together = objective.predict(batch.images, mask)
        objective.settings = replace(objective.settings, predict=4 / mask.masked.shape[1])
        some = objective.predict(batch.images, mask._replace(masked=mask.masked.flip(1)))
    gap = (some - together[:, -4:].flip(1)).abs().max()
    assert gap < 1e-12 if decoder == "cross" else gap > 1e-3


@pytest.mark.parametrize("kind", ["vit", "mixer"])
def test_block_num_out_equals_the_end_of_the_full_output(kind: str) -> None:
    """A last block computes the `last` tokens only; they, and all gradients, are those of the block in full."""
    backbone = (
        tiny().backbone
        if kind == "vit"
        else Mixer(patch=4, dim=8, depth=1, token_hidden=4, channel_hidden=8, image_size=16)
    )
    block = backbone.decoder_block(16, 2).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    present = torch.stack([torch.randperm(16, generator=generator)[:7] for _ in range(2)])
    whole, part = block(x, None, present)[:, -3:], block(x, None, present, 3)
    assert (whole - part).abs().max() < 1e-12
    inputs = [x, *block.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (whole, part)), strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predict": 0.25},
        {"decoder": "cross"},
        {"decoder": "cross", "predict": 0.5},
        {"hidden": "token"},
        {"hidden": "token", "decoder_depth": 0},
        {"hidden": "token", "decoder": "cross", "predict": 0.5},
    ],
    ids=str,
)
def test_mae_gradient_reaches_every_trainable_parameter(settings: dict[str, Any]) -> None:
    """Else ranks would wait for each other (DDP) for what never comes."""
    objective = tiny(**settings)
    objective(batch_of(3)).loss.sum().backward()
    still = {name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"backbone.pos_embed", "decoder_pos_embed"}
    assert not any(objective.get_parameter(name).requires_grad for name in still)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("masking", ["random", "block", "grid"])
@pytest.mark.parametrize("settings", [{}, {"decoder": "cross", "predict": 0.5}, {"hidden": "token"}], ids=str)
@pytest.mark.parametrize("kind", ["vit", "mixer"])
def test_mae_accepts_rectangular_images_and_any_number_of_channels(
    kind: str, settings: dict[str, Any], masking: Any, channels: int
) -> None:
    """Losses, gradients and pictures of 2 x 6 patches; the true target gives the true image back."""
    size: dict[str, Any] = {"patch": 4, "image_size": (8, 24), "channels": channels, "dim": 24, "depth": 2}
    backbone = ViT(num_heads=3, **size) if kind == "vit" else Mixer(token_hidden=8, channel_hidden=48, **size)
    initialise(backbone, 0)
    shape: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    objective = MAE(backbone, MaeConfig(masking=masking, **(shape | settings)), seed=4)
    images = torch.randn(3, channels, 8, 24, generator=torch.Generator().manual_seed(1))
    batch = batch_of(3)._replace(images=images)
    output, wanted = objective(batch), objective.predicted(objective.mask(batch))
    assert output.loss.isfinite().all()
    assert output.prediction.shape == (3, wanted.shape[1], 16 * channels)
    output.loss.sum().backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    target = normalise_patches(take(patchify(images, 4), wanted))
    original, hidden, filled = objective.pictures(batch, target)
    assert original.shape == hidden.shape == filled.shape == images.shape
    shown = take(patchify(filled, 4), wanted)
    assert (shown - take(patchify(images, 4), wanted)).abs().max() < 1e-5
    assert not take(patchify(hidden, 4), objective.mask(batch).masked).any()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_pictures_show_original_masked_and_reconstructed(norm_pix: bool) -> None:
    objective, batch = tiny(norm_pix), batch_of(3)
    mask, patches = objective.mask(batch), patchify(batch.images, 4)
    target = take(patches, mask.masked)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    original, hidden, filled = objective.pictures(batch, target)
    assert torch.equal(original, batch.images)
    assert (filled - batch.images).abs().max() < 1e-12  # the true target gives the true image back
    assert not take(patchify(hidden, 4), mask.masked).any()
    for picture in (hidden, objective.pictures(batch, torch.randn_like(target))[2]):
        assert torch.equal(take(patchify(picture, 4), mask.visible), take(patches, mask.visible))


def test_mae_decoder_names_equal_the_official_code() -> None:
    """facebookresearch/mae, models_mae.py; the encoder's names are timm's and tested there."""
    names = {name for name in tiny().state_dict() if not name.startswith("backbone.")}
    block = {f"{part}.{leaf}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for leaf in ("weight", "bias")}  # fmt: skip
    expected = {f"decoder_blocks.{i}.{name}" for i in range(2) for name in block} | {"mask_token", "decoder_pos_embed"}
    expected |= {f"decoder_{part}.{leaf}" for part in ("embed", "norm", "pred") for leaf in ("weight", "bias")}
    assert names == expected


@pytest.mark.parametrize(("decoder", "tokens"), [("full", {"stand_in"}), ("cross", {"stand_in", "mask_token"})])
def test_mae_checkpoint_name_of_the_encoder_mask_token_is_stand_in(decoder: Any, tokens: set[str]) -> None:
    """Checkpoints have this name, and it seeds the token's initial value, so it must not change."""
    objective = MAE(models.build("vit_demo4"), MaeConfig(hidden="token", decoder=decoder), seed=3)
    assert {name for name in objective.state_dict() if name.endswith(("stand_in", "mask_token"))} == tokens
    assert objective.stand_in.flatten()[:2].tolist() == pytest.approx([0.003146164, 0.006690014], rel=1e-6)
