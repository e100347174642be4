"""MAE: masks belong to samples, hidden pixels stay hidden, and the loss is that of a plain reading of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mae_dist.batch import Batch
from mae_dist.models.backbone import patchify, take
from mae_dist.models.vit import ViT
from mae_dist.objectives import masks
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.masks import Mask
from mae_dist.schema import Mae


def tiny(norm_pix: bool = True, mask_ratio: float = 0.75) -> MAE:
    """MAE of 4 x 4 patches in float64 whose trainable parameters are all random."""
    backbone = ViT(patch=4, dim=24, depth=2, num_heads=3, image_size=16)
    settings = Mae(mask_ratio=mask_ratio, norm_pix=norm_pix, decoder_dim=16, decoder_depth=2, decoder_heads=2)
    objective = MAE(backbone, settings, seed=4).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    return objective


def batch_of(num: int, epoch: int = 0, first: int = 0) -> Batch:
    images = torch.randn(num, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(first, first + num)
    return Batch(images, torch.full((num,), -1), ids, torch.full((num,), epoch), torch.zeros(num, dtype=torch.bool))


def random_mask(seed: int, epochs: torch.Tensor, ids: torch.Tensor, grid: tuple[int, int], num_visible: int) -> Mask:
    return masks.draw("random", seed, epochs, ids, grid, num_visible)


def ids_of(num: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((num,), epoch), torch.arange(num)


def test_visible_and_masked_are_all_patches() -> None:
    mask = random_mask(0, *ids_of(50, 0), (14, 14), 49)
    assert mask.visible.shape == (50, 49)
    assert mask.masked.shape == (50, 147)
    both = torch.cat([mask.visible, mask.masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(196).expand(50, -1))


def test_masks_differ_between_samples_epochs_and_seeds_and_repeat_when_replayed() -> None:
    masks = [random_mask(seed, *ids_of(30, epoch), (8, 8), 16).visible for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    rows = {tuple(row) for mask in masks for row in mask.tolist()}
    assert len(rows) == 90
    epochs, ids = ids_of(30, 1)
    again = random_mask(0, epochs[7:9], ids[7:9], (8, 8), 16).visible
    assert torch.equal(again, masks[1][7:9])


def test_every_patch_is_equally_often_visible() -> None:
    visible = random_mask(0, *ids_of(4000, 0), (4, 4), 4).visible
    counts = visible.flatten().bincount(minlength=16)
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(("size", "patch", "ratio", "num"), [(224, 16, 0.75, 49), (32, 4, 0.75, 16), (32, 4, 0.9, 6)])
def test_number_of_visible_patches(size: int, patch: int, ratio: float, num: int) -> None:
    with torch.device("meta"):
        backbone = ViT(patch=patch, dim=8, depth=1, num_heads=1, image_size=size)
    objective = MAE(backbone, Mae(mask_ratio=ratio, decoder_dim=8, decoder_depth=1, decoder_heads=1), seed=0)
    assert objective.num_visible == num
    assert objective.mask(batch_of(2)).visible.shape == (2, num)


def test_ratio_that_leaves_nothing_to_see_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mae\.mask_ratio=0\.99: of 16 patches some must be hidden and some visible"):
        tiny(mask_ratio=0.99)


def test_hidden_pixels_change_no_prediction() -> None:
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


def attend(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence (n, d), head by head."""
    q, k, v = attn.qkv(x).chunk(3, -1)  # pyright: ignore
    width = x.shape[1] // attn.num_heads  # pyright: ignore
    heads = []
    for head in range(attn.num_heads):  # pyright: ignore
        part = slice(head * width, (head + 1) * width)
        weights = (q[:, part] @ k[:, part].T / width**0.5).softmax(-1)
        heads.append(weights @ v[:, part])
    return attn.proj(torch.cat(heads, -1))  # pyright: ignore


def through(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = x + attend(block.attn, block.norm1(x))  # pyright: ignore
        x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))  # pyright: ignore
    return x


def papers_loss(objective: MAE, image: torch.Tensor, visible: list[int]) -> torch.Tensor:
    """He et al. 2022, section 3, for one image (3, 16, 16): decode the full grid, then average over masked patches."""
    vit = objective.backbone
    assert isinstance(vit, ViT)
    tokens = vit.patch_embed.proj(image[None])[0].flatten(1).T + vit.pos_embed[0, 1:]
    encoded = vit.norm(through(vit.blocks, torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], tokens[visible]])))
    latent = objective.decoder_embed(encoded)
    full = objective.mask_token[0].repeat(17, 1)
    full[0] = latent[0]
    for place, patch in enumerate(visible):
        full[1 + patch] = latent[1 + place]
    decoded = through(objective.decoder_blocks, full + objective.decoder_pos_embed[0])
    prediction = objective.decoder_pred(objective.decoder_norm(decoded))[1:]
    losses = []
    for patch in range(16):
        row, column = patch // 4 * 4, patch % 4 * 4
        target = image[:, row : row + 4, column : column + 4].permute(1, 2, 0).flatten()
        if objective.settings.norm_pix:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        losses.append((prediction[patch] - target).square().mean())
    hidden = torch.tensor([patch not in visible for patch in range(16)]).double()
    return (torch.stack(losses) * hidden).sum() / hidden.sum()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_papers(norm_pix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # the loss is taken in fp32; here all stays float64
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


def test_gradient_reaches_every_trainable_parameter() -> None:
    objective = tiny()
    objective(batch_of(3)).loss.sum().backward()
    still = {name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"backbone.pos_embed", "decoder_pos_embed"}
    assert not any(objective.get_parameter(name).requires_grad for name in still)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures(norm_pix: bool) -> None:
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


def test_decoder_names_are_the_official_ones() -> None:
    """facebookresearch/mae, models_mae.py; the encoder's names are timm's and tested there."""
    names = {name for name in tiny().state_dict() if not name.startswith("backbone.")}
    block = {f"{part}.{leaf}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for leaf in ("weight", "bias")}  # fmt: skip
    expected = {f"decoder_blocks.{i}.{name}" for i in range(2) for name in block} | {"mask_token", "decoder_pos_embed"}
    expected |= {f"decoder_{part}.{leaf}" for part in ("embed", "norm", "pred") for leaf in ("weight", "bias")}
    assert names == expected
