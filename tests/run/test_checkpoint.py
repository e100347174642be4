"""RunDir: what is restored is what was saved, bit for bit; damage is passed over; no folder is taken for another."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mae_dist import config, evaluate, optim, schema, train
from mae_dist.__main__ import main
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.run import async_checkpoint, checkpoint, directory, layout
from mae_dist.run.directory import RunDir
from mae_dist.run.layout import step_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DATA = "0123456789abcdef"
TINY = [
    "model.name=vit_demo4", "model.image_size=32", "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4",
    "train.precision=fp32", "train.global_batch=4",
]  # fmt: skip


def settings(path: Path, *overrides: str) -> schema.PretrainConfig:
    return config.load("pretrain", None, [f"out={path}", "data.path=/data", "model.name=vit_demo4", *overrides])


def opened(path: Path, *overrides: str) -> RunDir:
    run = RunDir(path)
    assert run.open("pretrain", settings(path, *overrides), DATA)
    return run


def simple(value: float) -> dict[str, Tensor]:
    return {"model.weight": torch.full((3, 2), value), "model.count": torch.tensor(value)}


def saved(path: Path, *steps: int, keep: int = 10) -> RunDir:
    run = opened(path)
    for step in steps:
        run.save(step, simple(float(step)), keep)
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


def test_restored_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    state = {name: tensor.clone() for name, tensor in trained(0, 3).tensors().items()}
    run.save(3, trained(0, 3).tensors(), keep=2)
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
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    run = opened(tmp_path)
    state = {
        "scalar": torch.tensor(3).to(dtype),
        "many": (100 * torch.randn(4, 3)).to(dtype),
        "one": torch.ones(1, dtype=dtype),
    }
    run.save(1, state, keep=1)
    filled = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert run.restore(filled) == 1
    assert all(torch.equal(filled[name], state[name]) for name in state)


def test_a_new_run_starts_at_zero(tmp_path: Path) -> None:
    assert opened(tmp_path).restore(simple(0.0)) == 0


def test_files_are_safetensors_and_named_in_the_manifest(tmp_path: Path) -> None:
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


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 30, 4, keep=2)  # a step that is saved again, later, is not the newest
    assert [path.name for path in run.checkpoints()] == ["step-000000004", "step-000000030"]
    run.save(31, simple(31.0), keep=1)
    assert [path.name for path in run.checkpoints()] == ["step-000000031"]


def test_some_are_never_removed(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for step in range(1, 9):
        run.save(step, simple(float(step)), keep=2, keep_every=3)
    assert [step_of(path) for path in run.checkpoints()] == [3, 6, 7, 8]


def test_what_cannot_be_written_leaves_the_last_good_one(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"checkpoint of step 2 could not be written .*File too large"):
            run.save(2, {"model.weight": torch.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    assert run.restore(simple(0.0)) == 1


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    run, state = opened(tmp_path), simple(1.0) | {"model.large": torch.ones(1_000_000)}
    with async_checkpoint.AsyncSaver(run, schema.CheckpointConfig(keep=5), pinned=False) as saving:
        for step in (1, 2, 3):
            saving.save(step, state)
            for tensor in state.values():
                tensor += 1
        saving.wait()
        assert not saving.busy
    for step in (1, 2, 3):
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        checkpoint.load(tmp_path / "checkpoints" / f"step-{step:09d}", found)
        assert all((tensor == step).all() for tensor in found.values())


def test_a_failed_save_in_the_background_is_told_and_only_the_last_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = saved(tmp_path, 1)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("in the way")
    with async_checkpoint.AsyncSaver(run, schema.CheckpointConfig(), pinned=False) as saving:
        saving.save(2, simple(2.0))
        saving.wait(last=False)
        assert "checkpoint of step 2 could not be written" in caplog.text
        assert "Training continues" in caplog.text
        saving.save(3, simple(3.0))
        with pytest.raises(ValueError, match="checkpoint of step 3 could not be written"):
            saving.wait()


def test_no_save_is_in_flight_when_an_evaluation_forks_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: a worker that hung in fork() because the thread of a save was just ending, and the rank waited for it."""
    pack(from_synthetic(16, 4), tmp_path / "set", shard_size=8)
    quick, mean_loss, seen = RunDir.save, evaluate.mean_loss, []

    def slow(self: RunDir, *arguments: Any) -> None:
        time.sleep(0.3)
        quick(self, *arguments)

    def looked(*arguments: Any) -> float:
        seen.append([thread for thread in threading.enumerate() if "_write" in thread.name])
        return mean_loss(*arguments)

    monkeypatch.setattr(RunDir, "save", slow)
    monkeypatch.setattr(evaluate, "mean_loss", looked)
    words = [*TINY, "train.steps=3", "track.evaluate_every=0.25", "checkpoint.every=1", "machine.processes=1"]
    assert main(["pretrain", f"data.path={tmp_path / 'set'}", f"out={tmp_path / 'run'}", *words]) == 0
    assert seen == [[], [], []]


@pytest.mark.parametrize(("minutes", "saved"), [("1e-9", [1, 2, 3, 4]), ("60", [4])])
def test_no_more_than_so_many_minutes_are_lost(tmp_path: Path, minutes: str, saved: list[int]) -> None:
    pack(from_synthetic(16, 4), tmp_path / "set", shard_size=8)
    words = [*TINY, "train.steps=4", f"checkpoint.minutes={minutes}", "checkpoint.keep=9", "machine.processes=1"]
    assert main(["pretrain", f"data.path={tmp_path / 'set'}", f"out={tmp_path / 'run'}", *words]) == 0
    assert [directory.step_of(path) for path in RunDir(tmp_path / "run").checkpoints()] == saved


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


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    run.save(2, simple(7.0), keep=10)
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
def test_damage_falls_back_to_the_one_before(
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
    assert newest.exists()  # nobody removes what a person may want to look at


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": null}', '{"files": {}}', "\xff"])
def test_a_manifest_that_is_none_counts_as_damage(tmp_path: Path, text: str) -> None:
    run = saved(tmp_path, 1)
    (run.checkpoints()[0] / checkpoint.MANIFEST).write_bytes(text.encode("latin-1"))
    assert checkpoint.verify(run.checkpoints()[0]) is not None


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    for path in run.checkpoints():
        flip(tensor_files(path)[0])
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        run.restore(simple(0.0))


def test_an_unfinished_save_is_ignored_and_removed(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".saving-000000002"
    leftover.mkdir()
    (leftover / "half.safetensors").write_bytes(b"...")
    assert [path.name for path in run.checkpoints()] == ["step-000000001"]
    assert run.restore(simple(0.0)) == 1
    opened(tmp_path)
    assert not leftover.exists()


def test_what_does_not_fit_the_model_is_refused_by_name(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    with pytest.raises(ValueError, match=r"has no tensor model\.other"):
        run.restore(simple(0.0) | {"model.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.weight is \(3, 2\), the model's is \(2, 3\)"):
        run.restore({"model.weight": torch.zeros(2, 3)})
    state = {"model.weight": torch.zeros(3, 2)}
    assert run.restore(state) == 1  # a part may be asked for
    assert (state["model.weight"] == 1).all()


def test_a_run_that_has_made_no_step_may_be_begun_with_other_settings(tmp_path: Path) -> None:
    opened(tmp_path)
    other = settings(tmp_path, "train.seed=1")
    assert RunDir(tmp_path).open("pretrain", other, DATA)
    assert RunDir(tmp_path).settings()[2].train.seed == 1


WORKS = """
import sys, time
from mae_dist.run.directory import RunDir
RunDir(sys.argv[1])._claim()
print("claimed", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_only_one_process_is_at_work_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another is waited for, and refused by its name if it stays; one that was killed holds nothing."""
    command = [sys.executable, "-c", WORKS, str(tmp_path / "run")]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        monkeypatch.setattr(directory, "PATIENCE", 0.3)
        with pytest.raises(ValueError, match=rf"out=\S+run: process {other.pid} on \S+ is at work in this run; end it"):
            opened(tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()
        monkeypatch.setattr(directory, "PATIENCE", 30)
        threading.Timer(0.5, other.kill).start()
        opened(tmp_path / "run")
    impatient = f"from mae_dist.run import directory; directory.PATIENCE = 0\n{WORKS}"
    command = [sys.executable, "-c", impatient, str(tmp_path / "run"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"process {os.getpid()} on " in done.stderr


def test_other_settings_are_refused_by_field(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    other = settings(tmp_path, "train.seed=1", "mae.mask_ratio=0.5")
    with pytest.raises(ValueError, match=r"train\.seed: 0 -> 1; mae\.mask_ratio: 0\.75 -> 0\.5") as error:
        RunDir(tmp_path).open("pretrain", other, DATA)
    assert "machine" not in str(error.value)
    with pytest.raises(ValueError, match=f"content of data.path: {DATA} -> fedcba"):
        RunDir(tmp_path).open("pretrain", settings(tmp_path), "fedcba")
    accepting = settings(tmp_path, "data.accept_change=true")
    assert RunDir(tmp_path).open("pretrain", accepting, "fedcba")
    assert RunDir(tmp_path).settings()[1] == "fedcba"
    knn = config.load("knn", None, [f"out={tmp_path}", "data.path=/data", "model.name=vit_demo4", "init_from=random"])
    with pytest.raises(ValueError, match="verb: pretrain -> knn"):
        RunDir(tmp_path).open("knn", knn, DATA)


def test_where_and_how_may_change(tmp_path: Path) -> None:
    opened(tmp_path, "data.mean=[0.1,0.2,0.3]")
    overrides = [
        "machine.micro_batch=7",
        "machine.workers=0",
        "checkpoint.every=3",
        "track.every=1",
        "data.path=/moved",
    ]
    run = opened(tmp_path, "data.mean=[0.1,0.2,0.3]", *overrides)
    verb, data, found = run.settings()
    assert (verb, data) == ("pretrain", DATA)
    assert found == settings(tmp_path, "data.mean=[0.1,0.2,0.3]", *overrides)


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match="exists and is no run of mae-dist"):
            RunDir(path).open("pretrain", settings(path), DATA)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"init_from=\S+: holds no config\.yaml"):
        RunDir.existing(tmp_path, "init_from")
    with pytest.raises(ValueError, match=r"init_from=\S+: no such folder"):
        RunDir.existing(tmp_path / "nowhere", "init_from")
    assert RunDir.existing(tmp_path / "empty", "init_from").path == tmp_path / "empty"


def test_a_run_begins_in_the_folder_that_its_launcher_has_prepared(tmp_path: Path) -> None:
    for name in ("jobs", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "something").write_text("of the launcher")
    layout.refuse_others(tmp_path, "pretrain", settings(tmp_path), DATA)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no run of mae-dist"):
        layout.refuse_others(tmp_path, "pretrain", settings(tmp_path), DATA)
    (tmp_path / "thesis.tex").unlink()
    run = opened(tmp_path)
    assert run.settings() == layout.settings(tmp_path)
    assert (tmp_path / "code" / "something").read_text() == "of the launcher"


@pytest.mark.parametrize("text", ["", "[1]", "{", "verb: pretrain", "verb: bake\ndata_fingerprint: x\n"])
def test_a_broken_config_yaml_is_named(tmp_path: Path, text: str) -> None:
    run = opened(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        run.settings()


def test_a_finished_run_is_not_opened_again(tmp_path: Path) -> None:
    run = opened(tmp_path)
    assert run.result() is None
    run.finish({"top1": 12.5})
    assert run.result() == {"top1": 12.5}
    assert not RunDir(tmp_path).open("pretrain", settings(tmp_path), DATA)


def test_every_start_leaves_a_line_of_provenance(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.record_launch(0, torch.device("cpu"))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "lr": 0.1}}\n' for step in range(1, 44)))
    before = time.time() - 90
    os.utime(tmp_path / "metrics.jsonl", (before, before))
    run.record_launch(40, torch.device("cpu"))
    notes = [json.loads(line) for line in (tmp_path / "provenance.jsonl").read_text().splitlines()]
    assert [note["step"] for note in notes] == [0, 40]
    assert "reached" not in notes[0]
    assert notes[1]["reached"] == 43
    assert 90 <= notes[1]["away"] < 100
    assert notes[0]["world"] == 1
    assert notes[0]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_snapshot_of_the_code_says_what_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / layout.REVISION).write_text("0123456789ab+\n")
    monkeypatch.setattr(layout, "__file__", str(tmp_path / "mae_dist" / "run" / "layout.py"))
    assert directory.provenance(torch.device("cpu"))["git"] == "0123456789ab+"
