"""Checkpoints: what is restored is what was saved, bit for bit; damaged ones are skipped; a failed save leaves none."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import resource
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import opened
from safetensors import safe_open
from torch import Tensor, nn

from mae_dist import atomic, dist, optim, schema, train
from mae_dist.__main__ import main
from mae_dist.errors import MachineFault
from mae_dist.run import checkpoint, jsonl, layout
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TINY = [
    "model.name=vit_demo4", "model.image_size=32", "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4",
    "train.precision=fp32", "train.global_batch=4",
]  # fmt: skip


def simple(value: float) -> dict[str, Tensor]:
    return {"model.weight": torch.full((3, 2), value), "model.count": torch.tensor(value)}


def saved(path: Path, *steps: int, keep: int = 10) -> RunDir:
    run = opened(path)
    for step in steps:
        run.save(step, checkpoint.share(simple(float(step))), keep)
    return run


def tensor_files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if file.name != checkpoint.MANIFEST]


def trained(seed: int, steps: int) -> train.TrainState:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    groups = optim.param_groups(module, schema.OptimConfig(), 0, no_decay_tokens=False)
    optimizer = optim.build(schema.OptimConfig(), groups)
    optim.init_optimizer_state(optimizer)
    optim.set_lr(optimizer, 0.01)
    average = optim.EMA(module, 0.5)
    for _ in range(steps):
        module(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(torch.tensor(True))
    scale = optim.LossScale(torch.device("cpu"), enabled=False)
    return train.TrainState(module, optimizer, scale, average, steps)  # pyright: ignore[reportArgumentType]


def test_resume_restores_checkpoint_bit_identical(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    state = {name: tensor.clone() for name, tensor in trained(0, 3).tensors().items()}
    run.save(3, checkpoint.share(trained(0, 3).tensors()), keep=2)
    other = trained(1, 5)
    filled = other.tensors()
    assert not all(torch.equal(filled[name], state[name]) for name in state)
    assert other.restore(run)
    assert other.step == 3
    filled = other.tensors()
    assert filled.keys() == state.keys()
    for name, tensor in state.items():
        assert filled[name].dtype == tensor.dtype, name
        assert torch.equal(filled[name], tensor), name
    assert filled["optimizer.0.weight.step"].shape == ()
    assert filled["optimizer.0.weight.step"] == 3
    assert filled["optimizer.0.weight.exp_avg"].any()
    assert filled["model.1.num_batches_tracked"] == 3
    assert {name for name in filled if name.startswith("ema.")} == {
        f"ema.{n}" for n, _ in other.objective.named_parameters()
    }
    assert not torch.equal(filled["ema.0.weight"], filled["model.0.weight"])
    pairs = zip(other.objective.parameters(), trained(0, 3).objective.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # restored in place


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_checkpoint_keeps_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    run = opened(tmp_path)
    state = {
        "scalar": torch.tensor(3).to(dtype),
        "many": (100 * torch.randn(4, 3)).to(dtype),
        "one": torch.ones(1, dtype=dtype),
    }
    run.save(1, checkpoint.share(state), keep=1)
    filled = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert run.restore(filled) == 1
    assert all(torch.equal(filled[name], state[name]) for name in state)


def test_restore_without_a_checkpoint_is_step_0(tmp_path: Path) -> None:
    assert opened(tmp_path).restore(simple(0.0)) == 0


def test_checkpoint_is_safetensors_named_in_the_manifest(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 5).checkpoints()
    files = tensor_files(folder)
    assert files
    assert all(file.suffix == ".safetensors" for file in files)
    found = {}
    for file in files:
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    assert found.keys() == simple(5.0).keys()
    assert all(torch.equal(found[name].reshape(tensor.shape), tensor) for name, tensor in simple(5.0).items())
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 5
    assert set(manifest["files"]) == {file.name for file in files}
    assert checkpoint.names_in(folder) == {"model.weight": torch.Size([3, 2]), "model.count": torch.Size([])}


def test_checkpoint_keep_leaves_the_newest(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 30, 4, keep=2)  # a step that is saved again, later, is not the newest
    assert [path.name for path in run.checkpoints()] == ["step-000000004", "step-000000030"]
    run.save(31, checkpoint.share(simple(31.0)), keep=1)
    assert [path.name for path in run.checkpoints()] == ["step-000000031"]
    run.save(7, checkpoint.share(simple(7.0)), keep=1)  # after a fallback from a damaged one
    assert [path.name for path in run.checkpoints()] == ["step-000000007", "step-000000031"]


def test_checkpoint_keep_every_is_never_removed(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for step in range(1, 9):
        run.save(step, checkpoint.share(simple(float(step))), keep=2, keep_every=3)
    assert [step_of(path) for path in run.checkpoints()] == [3, 6, 7, 8]


@pytest.mark.parametrize(
    ("number", "values", "left"),
    [
        ("test_loss", [0.9, 0.4, 0.6, 0.4, None, 0.5], [2, 6]),  # the earliest of equal ones
        ("knn_top1", [9.0, 40.0, 6.0, 41.0, None, 5.0], [4, 6]),
        ("knn_top1", [math.nan, 4.0, 3.0, 2.0, 1.0, 0.0], [2, 6]),
        ("rankme", [None] * 6, [6]),
    ],
)
def test_checkpoint_keep_best_is_never_removed(
    number: str, values: list[float | None], left: list[int], tmp_path: Path
) -> None:
    run = opened(tmp_path)
    for step, value in enumerate(values, 1):
        if value is not None:
            jsonl.append(run.path / layout.METRICS, {"kind": "evaluation", "step": step, number: value})
        run.save(step, checkpoint.share(simple(float(step))), keep=1, keep_best=number)
    assert [step_of(path) for path in run.checkpoints()] == left
    assert layout.best(run.path, number) == ((left[0], values[left[0] - 1]) if len(left) == 2 else None)


def test_checkpoint_best_is_one_that_is_still_there(tmp_path: Path) -> None:
    """A rewind drops later records and checkpoints; the one that was the best before may be gone by then."""
    run = saved(tmp_path, 3, 5)
    for step, value in ((2, 50.0), (3, 20.0), (5, 30.0), (6, 25.0), (7, 60.0)):
        jsonl.append(run.path / layout.METRICS, {"kind": "evaluation", "step": step, "knn_top1": value})
    assert layout.best(run.path, "knn_top1") == (5, 30.0)
    assert layout.best(run.path, "knn_top1", also=6) == (5, 30.0)
    assert layout.best(run.path, "knn_top1", also=7) == (7, 60.0)
    run.forget(4)
    assert layout.best(run.path, "knn_top1") == (3, 20.0)


def test_checkpoint_on_a_full_disk_leaves_the_last_good_one(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(MachineFault, match=r"checkpoint of step 2 could not be written .*File too large"):
            run.save(2, checkpoint.share({"model.weight": torch.zeros(100_000)}), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    assert run.restore(simple(0.0)) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_checkpoint_on_a_file_system_without_fsync_counts_with_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(atomic, "_warned", [])
    assert saved(tmp_path, 1, 2).restore(simple(0.0)) == 2
    assert len(re.findall("cannot wait for its disk", caplog.text)) == 1


def test_checkpoint_counts_though_its_folder_cannot_be_synchronised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert saved(tmp_path, 1).restore(simple(0.0)) == 1
    assert f"{tmp_path / 'checkpoints'}: not synchronised" in caplog.text


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "mkdir")])
def test_checkpoint_that_the_storage_refuses_names_file_and_error_and_leaves_the_earlier_ones(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        with pytest.raises(MachineFault, match=rf"step 2 could not be written to {tmp_path}.*Errno {errno.EIO}"):
            run.save(2, checkpoint.share(simple(2.0)), keep=10)
    assert [step_of(path) for path in run.checkpoints()] == [1]
    run.save(2, checkpoint.share(simple(2.0)), keep=10)
    assert run.restore(simple(0.0)) == 2


def test_checkpoint_that_cannot_be_removed_no_longer_counts_and_is_removed_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, real = saved(tmp_path, 1), shutil.rmtree

    def refuse(path: Path, **_: Any) -> None:
        (path / checkpoint.MANIFEST).unlink()  # as far as it comes
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    run.save(2, checkpoint.share(simple(2.0)), keep=1)
    assert "step-000000001 could not be removed" in caplog.text
    assert [step_of(path) for path in run.checkpoints()] == [2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    monkeypatch.setattr(shutil, "rmtree", real)
    (tmp_path / "checkpoints" / ".snapshot").mkdir()  # somebody else's
    opened(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000000002", ".snapshot"}


def test_ckpt_lists_inspects_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved(tmp_path, 4, 7)
    assert main(["ckpt", "list", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[1] for line in listed.splitlines() if line.startswith("│")] == ["4", "7"]
    assert main(["ckpt", "inspect", str(tmp_path), "--step", "4"]) == 0
    assert "3 x 2" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(tmp_path)]) == 0
    flip(tensor_files(run.checkpoints()[1])[0])
    assert main(["ckpt", "verify", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "step-000000007: DAMAGED" in said
    assert "would resume from step-000000004" in said
    for words in (["inspect", str(tmp_path), "--step", "5"], ["list", str(tmp_path / "none")], ["list"]):
        assert main(["ckpt", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    run.save(2, checkpoint.share(simple(7.0)), keep=10)
    state = simple(0.0)
    assert run.restore(state) == 2
    assert state["model.count"] == 7


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("what", ["tensors", "manifest"])
def test_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, damage: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = saved(tmp_path, 1, 2, 3)
    newest = run.checkpoints()[-1]
    file = tensor_files(newest)[0] if what == "tensors" else newest / checkpoint.MANIFEST
    if (damage, what) == (cut, "manifest"):
        file.write_text(file.read_text()[:-10])
    elif (damage, what) == (flip, "manifest"):
        file.write_text(file.read_text().replace('"sha256": "', '"sha256": "f'))
    else:
        damage(file)
    state = simple(0.0)
    with caplog.at_level(logging.WARNING):
        assert run.restore(state) == 2
    assert all(torch.equal(state[name], tensor) for name, tensor in simple(2.0).items())
    assert "step-000000003 is damaged" in caplog.text
    assert newest.exists()  # a damaged checkpoint is not removed, so that a person can inspect it


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": null}', '{"files": {}}', "\xff"])
def test_damaged_manifest_counts_as_damage(tmp_path: Path, text: str) -> None:
    run = saved(tmp_path, 1)
    (run.checkpoints()[0] / checkpoint.MANIFEST).write_bytes(text.encode("latin-1"))
    assert checkpoint.verify(run.checkpoints()[0]) is not None


@pytest.mark.parametrize(("field", "value"), [("step", 2), ("step", 0.5), ("world", "1"), ("num_tensors", -1)])
def test_manifest_of_another_step_or_without_numbers_counts_as_damage(tmp_path: Path, field: str, value: Any) -> None:
    (path,) = saved(tmp_path, 1).checkpoints()
    assert checkpoint.verify(path) is None
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {field: value}))
    assert str(checkpoint.verify(path)).startswith(
        "manifest.json is of step 2" if value == 2 else f"{path}/manifest.json: not the manifest"
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {"DCP_SHARDING_INFO": "{}"}, {"DCP_SHARDING_INFO": "["},
        {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [10**12, 0]} for name in simple(0.0)})},
        {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [-9, 0]} for name in simple(0.0)})},
        {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [1, 0]} for name in simple(0.0)})},
    ],
)  # fmt: skip
def test_checkpoint_by_another_hand_is_refused_though_its_checksums_fit(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    run = saved(tmp_path, 1)
    (path,) = run.checkpoints()
    (file,) = tensor_files(path)
    facts = checkpoint.write_safetensors(file, simple(1.0), metadata)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"files": {file.name: facts}}))
    assert checkpoint.verify(path) is None
    with pytest.raises(ValueError, match=f"^{path}: ") as caught:
        run.restore(simple(0.0))
    assert len(str(caught.value)) < 500


def test_all_checkpoints_damaged_is_an_error(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    for path in run.checkpoints():
        flip(tensor_files(path)[0])
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        run.restore(simple(0.0))


def test_unfinished_save_is_ignored_and_removed(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".saving-000000002"
    leftover.mkdir()
    (leftover / "half.safetensors").write_bytes(b"...")
    assert [path.name for path in run.checkpoints()] == ["step-000000001"]
    assert run.restore(simple(0.0)) == 1
    opened(tmp_path)
    assert not leftover.exists()


def test_checkpoint_of_another_model_is_refused_by_tensor_name(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"has no tensor model\.other"):
        run.restore(simple(0.0) | {"model.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.weight is \(3, 2\), the model's is \(2, 3\)"):
        run.restore({"model.weight": torch.zeros(2, 3)})
    state = {"model.weight": torch.zeros(3, 2)}
    assert run.restore(state) == 1  # a part may be asked for
    assert (state["model.weight"] == 1).all()


def test_checkpoint_share_of_ranks_has_every_tensor_once_and_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and biases alternate, as in a model."""
    state = {f"{i}.{name}": torch.zeros(size) for i in range(12) for name, size in (("weight", 1000), ("bias", 10))}
    monkeypatch.setattr(dist, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(checkpoint.share(state))
    assert sorted(name for parts in shares for name in parts) == sorted(state)
    sizes = [sum(part.values.numel() for part in parts.values()) for parts in shares]
    assert sizes == pytest.approx([4040] * 3, rel=0.01)
