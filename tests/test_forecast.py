"""What a run will take, in closed form: parameters, memory, checkpoints, speed, time; GPUs by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mae_dist import config, cost, forecast, gpus, models, optim, parallel
from mae_dist.batch import Batch
from mae_dist.forecast import Forecast, Loading, Place, Rate
from mae_dist.machine_schema import MachineConfig
from mae_dist.objectives.mae import MAE
from mae_dist.objectives.probe_heads import ProbeHeads
from mae_dist.run import jsonl
from mae_dist.schema import ProbeConfig
from mae_dist.train import TrainState

SMALL = ["data.path=x", "out=y", "model.image_size=32", "train.precision=fp32"]
DECODER = ["mae.decoder_dim=32", "mae.decoder_depth=3", "mae.decoder_heads=4"]


def small(*words: str, model: str = "vit_demo4") -> Any:
    return config.load("pretrain", None, [f"model.name={model}", *SMALL, *DECODER, *words])


def of_vit_b(*words: str, precision: str = "bf16", **facts: Any) -> Forecast:
    """ViT-B/16 of a million images, 4096 a step, on 8 H100s unless `place` says otherwise."""
    given = [f"train.precision={precision}", "train.global_batch=4096", "machine.micro_batch=auto", *words]
    chosen = config.load("pretrain", None, ["data.path=x", "out=y", "model.name=vit_b16", *given])
    place = Place(1, 8, 96, "H100", True, 80e9)
    return Forecast("pretrain", chosen, facts.pop("place", place), facts.pop("num_samples", 10**6), **facts)


@pytest.mark.parametrize("model", ["vit_demo4", "mixer_demo4"])
@pytest.mark.parametrize(
    "words", ["", "mae.decoder=cross", "mae.hidden=token", "mae.hidden=token mae.decoder=cross", "mae.decoder_depth=1"]
)
def test_forecast_parameters_and_checkpoint_equal_those_of_the_objective(model: str, words: str) -> None:
    chosen = small(*words.split(), "train.ema=0.9", model=model)
    objective = MAE(models.build(model), chosen.mae, seed=0)
    total = sum(parameter.numel() for parameter in objective.parameters())
    assert cost.parameters(chosen) == (total, total)
    optimizer = optim.build(chosen.optim, optim.param_groups(objective, chosen.optim, 4, no_decay_tokens=False))
    optim.init_optimizer_state(optimizer)
    ema = optim.EMA(objective, 0.9)
    state = TrainState(objective, optimizer, optim.LossScale(torch.device("cpu"), False), ema)
    saved = sum(tensor.nbytes for tensor in state.tensors().values())
    assert forecast.checkpoint_bytes(chosen) == pytest.approx(saved, rel=0.02)  # position embeddings have no moments


@pytest.mark.parametrize("words", [["train_blocks=none"], ["train_blocks=1"]])
def test_forecast_finetuning_trains_a_share_of_its_parameters(words: list[str]) -> None:
    settings = ["init_from=random", "model.name=vit_demo4", *SMALL, f"model.{words[0]}"]
    total, trained = cost.parameters(config.load("finetune", None, settings), classes=10)
    assert total == sum(p.numel() for p in models.build("vit_demo4").parameters()) + 1290
    assert (trained == total) == (words == ["train_blocks=none"])
    assert trained > total / 5


@pytest.mark.parametrize("model", ["vit_demo4", "mixer_demo4"])
def test_cost_recomputable_activations_are_those_that_checkpointing_does_not_keep(model: str) -> None:
    chosen = small(model=model)
    objective, number = MAE(models.build(model), chosen.mae, seed=0), torch.zeros(1, dtype=torch.int64)
    parallel.checkpoint_activations(objective, 1)
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(Batch(torch.zeros(1, 3, 32, 32), number, number, number, number.bool()))
    image = cost.of_run(chosen)
    assert image is not None
    really = sum(size for address, size in kept.items() if address not in own)
    assert 4 * (image.kept - image.recomputable) == pytest.approx(really, rel=0.1)


def test_forecast_memory_of_a_known_model() -> None:
    """111.9 M parameters: 16 bytes each in fp32, 2 more for the copy in 16 bits."""
    found = of_vit_b("machine.micro_batch=64")
    parts = found.memory(64, 0)
    assert parts["weights"] + parts["gradients"] + parts["moments"] == pytest.approx(18 * 111.9e6, rel=1e-3)
    assert parts["EMA"] == 0
    assert found.memory(64, 0)["activations"] == 2 * found.memory(32, 0)["activations"]
    assert found.memory(64, 1)["activations"] < 0.25 * parts["activations"]
    sharded = of_vit_b("machine.strategy=fsdp", "train.ema=0.999").memory(64, 0)
    assert sharded["moments"] == parts["moments"] / 8
    assert sharded["EMA"] == parts["gradients"] / 8
    assert of_vit_b(precision="fp32").memory(64, 0)["activations"] == pytest.approx(parts["activations"] * 4 / 2.25)
    assert of_vit_b(kept_images=1e9).memory(64, 0)["images"] - parts["images"] == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("gigabytes", "best"),
    [(80, (512, 0)), (16, (256, 0)), (3.2, (16, 0)), (2.65, (32, 1)), (2.2, None), (None, (512, 0))],
)
def test_forecast_best_micro_batch_is_the_share_halved_until_it_fits(
    gigabytes: float | None, best: tuple[int, int] | None
) -> None:
    place = Place(1, 8, 96, "H100", True, gigabytes and gigabytes * 1e9)
    found = of_vit_b(place=place)
    assert found.best == best
    assert found.fits == (best is not None and best[1] == 0)
    if best is not None:
        assert found.fits_with(*best)
        assert gigabytes in (80, None) or not found.fits_with(2 * best[0], best[1])


def test_forecast_micro_batch_that_a_trial_found_counts_more() -> None:
    assert of_vit_b(most_tried=300).best == (300, 0)
    assert of_vit_b("machine.micro_batch=64", most_tried=300).micro == 64


@pytest.mark.parametrize(
    ("step", "loading", "is_gpu", "expected"),
    [
        (1000.0, None, True, 8000 * 0.95), (1000.0, Loading(100.0, 2, False), True, 1600.0),
        (100.0, Loading(100.0, 2, False), True, 760.0), (100.0, Loading(100.0, 1, True), True, 1 / (1 / 760 + 1 / 800)),
        (100.0, Loading(100.0, 2, False), False, 1 / (1 / 760 + 1 / 4800)),
        (None, Loading(100.0, 2, False), True, None),
    ],
)  # fmt: skip
def test_forecast_speed_is_the_lower_ceiling_or_what_turns_add_up_to(
    step: float | None, loading: Loading | None, is_gpu: bool, expected: float | None
) -> None:
    """8 ranks with 4 workers each on 96 cores; the loader was timed with 2 cores busy."""
    rate = Rate(step, "measured", False) if step else None
    found = of_vit_b("machine.workers=4", place=Place(1, 8, 96, "", is_gpu), step=rate, loading=loading)
    assert found.speed == (None if expected is None else pytest.approx(expected))
    assert (found.seconds is None) == (expected is None)


@pytest.mark.parametrize(
    ("threads", "expected"), [(1, 760.0), (12, 96 / (96 / 760 + 1 / 50)), (None, 96 / (96 / 760 + 1 / 50))]
)
def test_forecast_loader_takes_nothing_from_steps_that_leave_it_cores(threads: int | None, expected: float) -> None:
    """8 ranks of one thread leave 88 of 96 cores to 32 workers, each of which loads 50 images a second."""
    place = Place(1, 8, 96, "", threads=threads)
    found = of_vit_b("machine.workers=4", place=place, step=Rate(100.0, "", False), loading=Loading(100.0, 2, False))
    assert found.speed == pytest.approx(expected)


def test_forecast_loader_has_no_more_cores_than_its_node() -> None:
    found = of_vit_b("machine.workers=30", step=Rate(1e5, "", False), loading=Loading(100.0, 2, False))
    assert found.loader_ceiling == 50 * 96


def test_forecast_times_requeues_and_checkpoints() -> None:
    place = Place(1, 8, 96, "H100", True, 80e9, limit=86400, unused=240, lose_at_most=30)
    given = ["train.epochs=100", "checkpoint.keep_every=1000"]
    found = of_vit_b(*given, place=place, step=Rate(1000 / 7.6, "", False))
    assert found.steps == 24415
    assert found.speed == pytest.approx(1000)
    assert found.seconds == pytest.approx(1e5, rel=1e-3)
    assert found.requeues == 1  # jobs of 86,160 s
    assert found.between_saves == 1800
    assert found.disk == forecast.checkpoint_bytes(found.config) * (2 + 1 + 24)
    resumed = of_vit_b(*given, "checkpoint.every=2", place=place, step=Rate(1000 / 7.6, "", False), done=24000)
    assert resumed.seconds == pytest.approx(415 * 4.096, rel=1e-3)
    assert resumed.between_saves == pytest.approx(8.192)
    assert of_vit_b(place=Place(limit=None)).requeues is None
    rising = of_vit_b("train.resolutions=[[0,112],[0.5,224]]", place=place, step=Rate(1000 / 7.6, "", False))
    low, high = (cost.of_run(rising.config, side) or cost.Cost() for side in (112, 224))
    share = (1 + low.training_flops / high.training_flops) / 2
    assert rising.seconds == pytest.approx(share * rising.steps * rising.config.train.global_batch / 1000, rel=1e-3)
    tested = of_vit_b("track.evaluate_every=10", num_test=50_000, step=Rate(1000 / 7.6, "", False))
    assert tested.seconds == pytest.approx((1e8 + 10 * 50_000 / 3) / 1000, rel=1e-3)


def test_forecast_counts_online_evaluations_and_the_best_checkpoint() -> None:
    """Features of ViT-B/16 take 0.6 of the time of a training step (docs/monitoring.md)."""
    given, step = ["track.evaluate_every=10", "checkpoint.keep_best=knn_top1"], Rate(1000 / 7.6, "", False)
    words = [*given, "track.online=[knn]", "track.online_images=100000"]
    found = of_vit_b(*words, num_test=50_000, step=step)
    assert found.seconds == pytest.approx((1e8 + 10 * (50_000 / 3 + 0.6 * 150_000)) / 1000, rel=3e-3)
    unlabelled = of_vit_b(given[0], "track.online=[rankme]", num_test=50_000, step=step)
    assert unlabelled.seconds == pytest.approx((1e8 + 10 * (50_000 / 3 + 0.6 * 10**6)) / 1000, rel=1e-2)
    assert found.disk == 4 / 3 * unlabelled.disk


@pytest.mark.parametrize("words", ["[cls]", "[mean,cls]", "[both] heads.blocks=[2,4]", "[mean] heads.attentive=true"])
def test_forecast_of_stored_features_is_their_size_and_one_pass(words: str) -> None:
    heads = f"heads.adamw=[0.1] heads.features={words}".split()
    settings = ["init_from=random", "model.name=vit_demo4", *SMALL, "view.crop=center", "view.flip=0", *heads]
    chosen = config.load("probe", None, [*settings, "train.global_batch=10", "train.steps=20"])
    width = ProbeHeads(models.build("vit_demo4"), 5, chosen.heads, chunk=8, seed=0).width
    assert forecast.stored_features(chosen, 100) == 4 * 100 * width
    assert forecast.stored_features(replace(chosen, view=ProbeConfig().view), 100) == 0
    found = Forecast("probe", chosen, Place(), 100, 50, Rate(1000.0, "", False), reading=10.0)
    assert found.seconds == pytest.approx(20 * 10 / 1000 + 150 / 10)
    assert found.disk == 3 * forecast.checkpoint_bytes(chosen) + 4 * 100 * width


def row(**changed: Any) -> dict[str, Any]:
    """A row of `bench step --record`."""
    known = {"device": "NVIDIA H100 80GB HBM3", "model": "vit_b16", "image_size": [224, 224], "images": 512,
             "decoder": "full 512 x 8, drop, 0.75", "precision": "bf16", "variant": "eager", "share": 0.4}  # fmt: skip
    return known | changed


@pytest.mark.parametrize(
    ("rows", "share", "extrapolated", "words"),
    [
        ([row(), row(model="vit_l16", share=0.9)], 0.4 * 0.78, False, "measured: vit_b16, 512 images at once"),
        ([row(model="vit_h14", share=0.1), row(model="vit_l16")], 0.4 * 0.78, True, "not measured: as vit_l16"),
        ([row(decoder="cross 512 x 8, drop, 0.75", share=0.2)], 0.2 * 0.78, True, "not measured: as vit_b16"),
        ([], 0.25, True, "is assumed"), ([row(device="A100")], 0.25, True, "is assumed"),
        ([row(precision="fp32"), row(variant="compiled")], 0.25, True, "is assumed"),
    ],
)  # fmt: skip
def test_forecast_rate_is_that_of_the_table_or_extrapolated_or_assumed(
    rows: list[dict[str, Any]], share: float, extrapolated: bool, words: str
) -> None:
    chosen = of_vit_b().config
    image = cost.of_run(chosen)
    assert image is not None
    found = forecast.expected_rate(chosen, "h100", 512, rows)
    assert found is not None
    assert (found.value, found.extrapolated) == (pytest.approx(share * 989e12 / image.training_flops), extrapolated)
    assert words in found.how
    assert forecast.expected_rate(chosen, "a board of my own", 512, rows) is None
    few = forecast.expected_rate(replace(chosen, machine=MachineConfig(cuda_graphs=True)), "h100", 64, rows)
    assert few is not None
    assert few.extrapolated, "a GPU is slower with fewer images at once than were measured"


@pytest.mark.parametrize(
    ("model", "images", "measured"),
    [("vit_b16", 512, 4173), ("vit_b16", 128, 2592), ("vit_l16", 256, 2271), ("vit_l16", 64, 910)],
)
def test_forecast_rate_of_an_h100_is_near_what_was_measured(model: str, images: int, measured: float) -> None:
    """docs/gpu.md; below some hundred images at once a GPU waits for its host."""
    found = forecast.expected_rate(of_vit_b(f"model.name={model}").config, "H100", images, jsonl.read(forecast.TABLE))
    assert found is not None
    assert found.value == pytest.approx(measured, rel=0.15)
    assert ("too few" in found.how) == found.by_host == (images < 256)


@pytest.mark.parametrize(
    ("name", "part", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100", 80), ("NVIDIA A100-SXM4-40GB", "A100", 40), ("gpu:a100", "A100", 40),
        ("a100_80gb", "A100", 80), ("A100SXM4", "A100", 40), ("NVIDIA A100 80GB PCIe", "A100", 80),
        ("a100-80g", "A100", 80),
        ("NVIDIA H100 80GB HBM3", "H100", 80), ("nvidia_h100_pcie", "H100 PCIe", 80),
        ("NVIDIA H100 NVL", "H100 NVL", 94),
        ("NVIDIA H200", "H200", 141), ("NVIDIA H200 NVL", "H200 NVL", 141), ("NVIDIA B200", "B200", 180),
        ("NVIDIA GH200 480GB", "GH200", 96), ("NVIDIA GH200 120GB", "GH200", 96),
        ("NVIDIA GH200 144G HBM3e", "GH200", 96),
        ("rtx4090", "RTX 4090", 24), ("Tesla V100-SXM2-32GB", "V100", 32), ("Tesla V100-PCIE-16GB", "V100 PCIe", 16),
        ("v100s", "V100S", 32), ("NVIDIA L40S", "L40S", 48), ("NVIDIA L4", "L4", 24), ("A10G", "A10G", 24),
        ("NVIDIA RTX A6000", "A6000", 48), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48),
        ("rtx6000ada", "RTX 6000 Ada", 48), ("A6000 Ada", "A6000 Ada", 48), ("gpu:rtx_a6000:4", "A6000", 48),
        ("AMD Instinct MI250X / MI250", "MI250X MI250", 64), ("AMD Instinct MI250", "MI250", 64),
        ("AMD Instinct MI300X", "MI300X", 192), ("gpu:mi250x:8", "MI250X", 64), ("gpu_mem:80gb&a100", "A100", 80),
        *((name, None, 0) for name in (
            "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "gpu:a100_3g.20gb", "a100-3g20gb", "a100_mig", "GRID A100-10C",
            "NVIDIA A40-48Q", "NVIDIA A100-1-5C", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GB200", "NVIDIA A100X", "NVIDIA H20", "a100|h100", "Quadro RTX 6000",
            "Tesla V100-FHHL-16GB", "A1000", "AMD EPYC 7B13", "",
        )),
    ],
)  # fmt: skip
def test_gpus_are_found_by_the_names_of_torch_slurm_and_users(name: str, part: str | None, memory: float) -> None:
    found = gpus.find(name)
    assert (found.part, found.memory) == (part, memory) if found else part is None
