"""Mixer: names, shapes and outputs equal timm's, and hidden patches have no influence."""

from __future__ import annotations

import math

import pytest
import torch
from modules import randomised
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from mae_dist import models
from mae_dist.batch import Batch
from mae_dist.models.backbone import patchify, take, unpatchify
from mae_dist.models.layers import Mlp
from mae_dist.models.mixer import Mixer
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MaeConfig


def small() -> Mixer:
    """A Mixer of 4 x 4 patches in float64 whose parameters are all random."""
    mixer = Mixer(patch=4, dim=24, depth=3, token_hidden=12, channel_hidden=48, image_size=16).double()
    randomised(mixer)
    return mixer


def mae(**settings: object) -> MAE:
    shape = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    objective = MAE(small(), MaeConfig(**(shape | settings)), seed=4).double()  # pyright: ignore
    randomised(objective)
    return objective


def pixels(num: int, size: int = 16) -> torch.Tensor:
    return torch.randn(num, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batch_of(num: int) -> Batch:
    ids = torch.arange(num)
    return Batch(pixels(num), torch.full((num,), -1), ids, torch.zeros_like(ids), torch.zeros(num, dtype=torch.bool))


def test_mixer_names_shapes_and_outputs_equal_timm() -> None:
    ours = small().eval()
    timms = MlpMixer(
        img_size=16, patch_size=4, embed_dim=24, num_blocks=3, mlp_ratio=(0.5, 2.0), num_classes=0
    ).double()  # fmt: skip
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in timms.state_dict().items()}
    timms.eval().load_state_dict(ours.state_dict(), strict=True)
    images = pixels(5)
    with torch.no_grad():
        assert (ours(images) - timms(images)).abs().max() < 1e-12
        assert (ours.encode(images) - timms.forward_features(images)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("patch", "size", "channels"), [(4, (8, 20), 3), (8, (32, 16), 1), (14, (28, 42), 4), (2, (6, 4), 3)]
)
def test_mixer_all_parameter_shapes_equal_timm(patch: int, size: tuple[int, int], channels: int) -> None:
    """Rectangular images, other numbers of channels, other patches."""
    ours = Mixer(
        patch=patch, image_size=size, channels=channels, dim=24, depth=2, token_hidden=12, channel_hidden=48
    ).double()  # fmt: skip
    randomised(ours)
    timms = MlpMixer(
        img_size=size,  # pyright: ignore  (timm says int, and takes both)
        patch_size=patch, in_chans=channels, embed_dim=24, num_blocks=2, mlp_ratio=(0.5, 2.0), num_classes=0,
    ).double()  # fmt: skip
    timms.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(images) - timms(images)).abs().max() < 1e-12
        assert (ours.encode(images) - timms.forward_features(images)).abs().max() < 1e-12


def test_mixer_hidden_tokens_equal_zeros_before_token_mixing() -> None:
    """Written out: a full grid in which hidden tokens are zero wherever positions are mixed, sums scaled."""
    mixer, images = small(), pixels(3)
    visible = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(3)])
    seen = torch.zeros(3, 16, 1, dtype=torch.float64).scatter(1, visible[..., None], 1.0)
    with torch.no_grad():
        x = mixer.stem(patchify(images, 4)) * seen
        for block in mixer.blocks:
            zeros = block.norm1(x) * seen  # pyright: ignore
            mlp: Mlp = block.mlp_tokens  # pyright: ignore
            hidden = zeros.transpose(1, 2) @ mlp.fc1.weight.T * math.sqrt(16 / 5) + mlp.fc1.bias
            x = x + mlp.fc2(nn.functional.gelu(hidden)).transpose(1, 2)  # pyright: ignore
            x = (x + block.mlp_channels(block.norm2(x))) * seen  # pyright: ignore
        expected = take(mixer.norm(x), visible)
        assert (mixer.encode(images, visible) - expected).abs().max() < 1e-12


def test_mixer_branches_keep_their_magnitude_with_a_quarter_of_the_patches() -> None:
    mixer = models.build("mixer_ti4", seed=1)
    sizes = []
    for block in mixer.blocks:
        block.mlp_tokens.register_forward_hook(lambda *hook: sizes.append(hook[2].std().item()))  # pyright: ignore
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    visible = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:16] for i in range(16)])
    with torch.no_grad():
        mixer.encode(images)
        mixer.encode(images, visible)
    whole, part = sizes[:12], sizes[12:]
    assert all(0.8 < a / b < 1.25 for a, b in zip(part, whole, strict=True))


def test_mixer_all_positions_in_any_order_equal_the_whole_grid() -> None:
    mixer, images = small(), pixels(3)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    with torch.no_grad():
        assert (mixer.encode(images, order) - take(mixer.encode(images), order)).abs().max() < 1e-12


SETTINGS = [
    {"hidden": "drop"},
    {"hidden": "drop", "predict": 0.25},
    {"hidden": "drop", "decoder": "cross"},
    {"hidden": "drop", "decoder": "cross", "predict": 0.5},
    {"hidden": "token"},
    {"hidden": "token", "decoder_depth": 0},
    {"hidden": "token", "decoder": "cross", "predict": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_mixer_predictions_ignore_hidden_pixels(settings: dict) -> None:
    objective, batch = mae(**settings), batch_of(3)
    mask, patches = objective.mask(batch), patchify(batch.images, 4)
    index = mask.masked[..., None].expand(-1, -1, 48)
    other = unpatchify(patches.scatter(1, index, 100 * torch.randn_like(take(patches, mask.masked))), 4, 4)
    seen = unpatchify(patches.scatter(1, mask.visible[..., None].expand(-1, -1, 48), 1.0), 4, 4)
    before = objective(batch).prediction
    assert torch.equal(before, objective(batch._replace(images=other)).prediction)
    assert not torch.equal(before, objective(batch._replace(images=seen)).prediction)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_mixer_every_trained_parameter_gets_a_gradient(settings: dict) -> None:
    """Else ranks would wait for each other (DDP) for what never comes."""
    objective = mae(**settings)
    objective(batch_of(3)).loss.sum().backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_mixer_has_no_class_token_and_no_positions() -> None:
    with pytest.raises(ValueError, match=r"model\.pool=cls: a Mixer has no class token"):
        models.build("mixer_ti4", pool="cls")
    with pytest.raises(ValueError, match=r"model\.position=learned: mixer_ti4 has no such setting; leave it out"):
        models.build("mixer_ti4", position="learned")
