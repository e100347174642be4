"""Costs in closed form equal fvcore's and torch's counts, the papers' tables, and what a real forward pass keeps."""

from __future__ import annotations

import math
from typing import Any

import jaxtyping
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_dist import config, cost, model_sizes, models
from mae_dist.__main__ import main
from mae_dist.batch import Batch
from mae_dist.cost import Cost
from mae_dist.models.backbone import Backbone
from mae_dist.objectives import Objective
from mae_dist.objectives.classify import Finetune, Probe
from mae_dist.objectives.mae import MAE
from mae_dist.schema import MaeConfig

TIMMS = {
    "vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224", "vit_s32": "vit_small_patch32_224",
    "vit_b8": "vit_base_patch8_224", "vit_b16": "vit_base_patch16_224", "vit_b32": "vit_base_patch32_224",
    "vit_l16": "vit_large_patch16_224", "vit_l32": "vit_large_patch32_224", "vit_h14": "vit_huge_patch14_224",
    "mixer_s32": "mixer_s32_224", "mixer_s16": "mixer_s16_224", "mixer_b32": "mixer_b32_224",
    "mixer_b16": "mixer_b16_224", "mixer_l16": "mixer_l16_224",
}  # fmt: skip


SETTINGS: list[dict[str, Any]] = [
    {}, {"predict": 0.25}, {"mask_ratio": 0.4, "masking": "block"}, {"masking": "grid", "norm_pix": False},
    {"decoder": "cross", "predict": 0.5}, {"hidden": "token"}, {"hidden": "token", "decoder": "cross"},
    {"hidden": "token", "decoder_depth": 0}, {"decoder_depth": 1},
]  # fmt: skip
CLASSES = 10


def known(found: Cost | None) -> Cost:
    assert found is not None
    return found


def small_decoder(settings: dict[str, Any]) -> MaeConfig:
    sizes: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 3, "decoder_heads": 4}
    return MaeConfig(**(sizes | settings))


def empty(name: str) -> Backbone:
    with torch.device("meta"):
        return models.build(name)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def head(dim: int) -> int:
    """Parameters of a linear head of 1000 classes."""
    return 1000 * dim + 1000


def one(backbone: Backbone) -> Batch:
    """A batch of one image. Its id is on the CPU, where drawing masks is faster than on the meta device."""
    number = torch.zeros(1, dtype=torch.int64, device="cpu")
    return Batch(torch.zeros(1, backbone.channels, *backbone.image_size), number, number, number, number.bool())


class OnImages(nn.Module):
    """An objective as a function of images, which fvcore can trace."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective, self.batch = objective, one(objective.backbone)

    def forward(self, images: Tensor) -> Tensor:
        return self.objective(self.batch._replace(images=images)).loss


def shape(value: Any) -> list[int]:
    return get_shape(value) or []


def attention_products(inputs: list[Any], _: list[Any]) -> int:
    q, k, v = map(shape, inputs[:3])
    return math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1]


def batched_product(inputs: list[Any], _: list[Any]) -> int:
    return math.prod(shape(inputs[1])) * shape(inputs[2])[-1]


def fvcore_count(objective: Objective, norms: bool = False) -> float:
    """Multiply-adds by fvcore, which lacks attention and a product; with `norms` also 5 operations a number of each."""
    counter = FlopCountAnalysis(OnImages(objective), one(objective.backbone).images).unsupported_ops_warnings(False)
    counter.set_op_handle("aten::scaled_dot_product_attention", attention_products, "aten::baddbmm", batched_product)
    jaxtyping.config.update("jaxtyping_disable", True)  # sizes are tensors while torch traces
    try:
        found = counter.by_operator()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return found.total() if norms else found.total() - found["layer_norm"]


@pytest.mark.parametrize(("ours", "timms"), TIMMS.items())
def test_cost_names_shapes_and_counts_equal_timm(ours: str, timms: str) -> None:
    backbone = empty(ours)
    with torch.device("meta"):
        theirs = timm.create_model(timms, num_classes=1000)
    expected = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    assert {name: value.shape for name, value in backbone.state_dict().items()} == expected
    assert num_parameters(backbone) + head(backbone.dim) == num_parameters(theirs)


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
    num = num_parameters(backbone) + (head(backbone.dim) if classes else 0)
    assert round(num / 1e6, 1 if millions < 10 else 0) == millions


@pytest.mark.parametrize(
    ("name", "giga", "digits"),
    [("vit_ti16", 1.3, 1), ("vit_s16", 4.6, 1), ("vit_b16", 17.6, 1), ("mixer_b16", 12.6, 1), ("mixer_s32", 1.0, 1)],
)
def test_cost_flops_equal_the_papers(name: str, giga: float, digits: int) -> None:
    """DeiT's and timm's tables."""
    assert round(known(cost.finetuning(name, 224)).forward / 1e9, digits) == giga


@pytest.mark.parametrize(("name", "giga"), [("vit_b16", 17.58), ("vit_l16", 61.60), ("vit_h14", 167.40)])
def test_cost_flops_equal_mmpretrain(name: str, giga: float) -> None:
    """Its table comes from fvcore, which also counts a head and 5 operations for each number that a norm is given."""
    backbone = empty(name)
    norms = (2 * backbone.depth + 1) * (backbone.num_patches + 1) * backbone.dim
    total = known(cost.finetuning(name, 224, classes=1000)).forward + 5 * norms
    assert total / 1e9 == pytest.approx(giga, abs=0.0051)


@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
@pytest.mark.parametrize("settings", SETTINGS[2:7:2], ids=str)
def test_cost_of_pretraining_equals_fvcore(name: str, settings: dict[str, Any]) -> None:
    mae = small_decoder(settings)
    with torch.device("meta"):
        objective = MAE(models.build(name), mae, seed=0)
        assert known(cost.pretraining(name, mae, 32)).forward == fvcore_count(objective)


@pytest.mark.parametrize(("name", "size", "channels"), [("vit_demo4", (16, 40), 4), ("mixer_demo4", 48, 1)])
def test_cost_of_other_sizes_and_channels_equals_fvcore(name: str, size: Any, channels: int) -> None:
    mae = small_decoder({})
    with torch.device("meta"):
        objective = MAE(models.build(name, image_size=size, channels=channels), mae, seed=0)
        assert known(cost.pretraining(name, mae, size, channels)).forward == fvcore_count(objective)


LARGE = ["vit_b16", "mixer_b16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_l16", "vit_h14"))]


@pytest.mark.parametrize("name", LARGE)
def test_cost_of_large_models_is_within_one_percent_of_fvcore_with_norms(name: str) -> None:
    with torch.device("meta"):
        pretrain = fvcore_count(MAE(models.build(name), MaeConfig(), seed=0), norms=True)
        tuned = Finetune(models.build(name, pool="avg"), 1000, drop_path=0.0, label_smoothing=0.0, seed=0)
        finetune = fvcore_count(tuned, norms=True)
    assert known(cost.pretraining(name, MaeConfig(), 224)).forward == pytest.approx(pretrain, rel=0.01)
    assert known(cost.finetuning(name, 224, classes=1000)).forward == pytest.approx(finetune, rel=0.01)


def torch_count(objective: Objective) -> int:
    """Operations of a forward and a backward pass by torch's counter, which sees only attention that is not fused."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(one(objective.backbone)).loss.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cost_of_a_training_step_equals_torchs_counter(name: str, settings: dict[str, Any]) -> None:
    mae = small_decoder(settings)
    found = known(cost.pretraining(name, mae, 32))
    assert found.training_flops == torch_count(MAE(models.build(name), mae, seed=0))


@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
@pytest.mark.parametrize("trained", [None, 0.0, 0.5, 1.0, 4.0])
def test_cost_of_partial_finetuning_equals_torchs_counter(name: str, trained: float | None) -> None:
    """Frozen blocks have no backward pass, nor has a frozen patch embedding."""
    backbone = models.build(name, pool="avg")
    if trained is not None:
        backbone.train_last(trained)
    found = known(cost.finetuning(name, 32, classes=CLASSES, trained=trained))
    tuned = Finetune(backbone, CLASSES, drop_path=0.0, label_smoothing=0.0, seed=0)
    assert found.training_flops == torch_count(tuned)


def test_cost_of_steps_and_time_left_count_each_step_at_its_resolution() -> None:
    words = ["data.path=d", "out=o", "model.name=vit_b16", "train.resolutions=[[0,112],[0.5,224]]"]
    run = config.load("pretrain", None, [*words, "train.global_batch=10"])
    low, high = (known(cost.pretraining("vit_b16", run.mae, side)).training_flops for side in (112, 224))
    assert low < high / 3
    assert [cost.training_flops(run, steps, 8) for steps in (range(4), range(3, 8))] == [low, (low + 4 * high) / 5]
    assert cost.seconds_left(run, 2, 8, rate=5.0) == pytest.approx(2 * (2 + 4 * high / low))
    assert cost.seconds_left(run, 8, 8, rate=5.0) == 0
    plain = config.load("pretrain", None, words[:3])
    assert cost.training_flops(plain, range(3), 3) == high
    assert cost.seconds_left(plain, 2, 4, rate=1024.0) == 2


def test_cost_of_a_probe_is_that_of_a_forward_pass() -> None:
    found = known(cost.finetuning("vit_demo4", 32, classes=CLASSES, trained=0))
    counted = torch_count(Probe(models.build("vit_demo4"), CLASSES, chunk=1, seed=0))
    assert found.training_flops == pytest.approx(counted, rel=1e-3)  # torch needs no gradient of the features


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
def test_cost_activations_are_within_one_percent_of_a_real_forward_pass(name: str, settings: dict[str, Any]) -> None:
    """Of torch's own fused attention, on the CPU; the closed form leaves out indices of patches."""
    mae = small_decoder(settings)
    found = known(cost.pretraining(name, mae, 32))
    objective = MAE(models.build(name), mae, seed=0)
    assert found.activations == pytest.approx(really_kept(objective, one(objective.backbone)), rel=0.01)


@pytest.mark.parametrize("name", ["vit_demo4", "mixer_demo4"])
def test_cost_activations_of_finetuning_are_those_of_a_real_forward_pass(name: str) -> None:
    backbone = models.build(name, pool="avg")
    found = known(cost.finetuning(name, 32))
    assert found.activations == pytest.approx(really_kept(backbone, one(backbone).images), rel=0.001)


def test_models_command_lists_named_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vit_b16", "mixer_b16", "mae.decoder_depth=1"]) == 0
    output = capsys.readouterr().out
    (vit,) = [line.split() for line in output.splitlines() if "vit_b16" in line]
    assert vit[1::2] == ["vit_b16", "224", "85.80", "4.92", "17.6", "36.7", "117"]
    assert "mixer_b16" in output
    assert "multiply-adds" in output
    assert "decoder 512 wide and 1 deep" in output


def test_models_command_lists_every_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--image-size", "64"]) == 0
    table, _, without = capsys.readouterr().out.partition("Not possible with these images and settings: ")
    assert set(without.rstrip(".\n").split(", ")) == {name for name in model_sizes.SIZES if name.endswith("14")}
    assert all(f" {name} " in table for name in model_sizes.SIZES if name not in without)


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
