"""Sweeps: combinations of settings, and submitting them to a fake SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import CLUSTER_FILE, SMALL, command, write_config

from launch import preflight, submit, sweep
from mae_dist import config
from mae_dist.run import jobs


def test_sweep_combinations_and_folder_names() -> None:
    found = sweep.combinations("pretrain", ["optim.base_lr=1e-4,1e-3", "seed=0,1", "train.steps=5"])
    assert [name for name, _ in found] == [
        "base_lr-1e-4_seed-0", "base_lr-1e-4_seed-1", "base_lr-1e-3_seed-0", "base_lr-1e-3_seed-1",
    ]  # fmt: skip
    assert found[1][1] == ["optim.base_lr=1e-4", "train.seed=1", "train.steps=5"]
    assert sweep.combinations("pretrain", []) == [("run", [])]
    (_, first), (_, second) = sweep.combinations("pretrain", ["view.scale=[0.2,1],[0.5,1]"])
    assert (first, second) == (["view.scale=[0.2,1]"], ["view.scale=[0.5,1]"])
    names = [name for name, _ in sweep.combinations("probe", ["data.path=a/b,c/d", "heads.held_out=0.1,0.2"])]
    assert names[0] == "path-a-b_held_out-0.1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.seed"], "expected section.key=value"),
        (["train.seed="], "expected section.key=value"),
        (["seed=1,1"], "train.seed: 1 is given more than once"),
        (["seed=1,2", "train.seed=3"], "train.seed: given more than once"),
        (["every=1,2"], "which one: checkpoint.every, track.every"),
        (["sede=1,2"], "sede: is no section.key"),
        (["data.path=a/b,a-b"], "data.path=a/b and data.path=a-b would share the folder path-a-b"),
        (["data.split=a,a_seed-1", "seed=1,1_seed-1"], "would share the folder split-a_seed-1_seed-1"),
    ],
)
def test_invalid_sweep_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.combinations("pretrain", words)


def finish(run: Path, words: list[str]) -> None:
    """Make the folder look like a finished run with these settings."""
    chosen = config.load("pretrain", None, [*words, f"out={run}"])
    fingerprint = preflight.open_split(chosen.data.path, "train").fingerprint
    write_config(run, "pretrain", chosen, fingerprint)
    (run / "result.json").write_text('{"loss": 1.0}')


def test_sweep_queues_only_runs_that_are_not_done(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a sweep"
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={out}", "--sweep", "seed=0,1,2"]
    assert submit.main(words) == 0
    output = capsys.readouterr().out
    assert "--array=0-2%3" in (slurm / "1.sbatch").read_text()
    assert output.splitlines()[-1] == f"next: mae-dist runs '{out}' --watch | mae-dist logs '{out}' | scancel 1 2"
    for seed in (0, 2):
        finish(out / f"seed-{seed}", [*SMALL, f"data.path={data}", f"train.seed={seed}"])
    assert submit.main(words) == 0
    output = capsys.readouterr().out
    assert output.count("done already") == 2
    assert "seed-0: done already, skipped" in output
    assert "--array" not in (slurm / "3.sbatch").read_text()
    assert [s.job for s in jobs.submissions(out / "seed-1")] == ["1_1", "3"]
    assert [s.job for s in jobs.submissions(out / "seed-0")] == ["1_0"]
    assert [s.job for s in jobs.submissions(out / "pipeline" / "results")] == ["2", "4"]
    # another sweep into the same folder is refused, not skipped
    assert submit.main([*words, "optim.base_lr=1"]) == 2
    assert "optim.base_lr: 0.00015 -> 1.0" in capsys.readouterr().err
    finish(out / "seed-1", [*SMALL, f"data.path={data}", "train.seed=1"])
    (out / "results.md").touch()
    before = sorted(out.rglob("*"))
    assert submit.main(words) == 0
    assert capsys.readouterr().out == f"pretrain: done already, skipped\nnext: mae-dist runs '{out}'\n"
    assert sorted(out.rglob("*")) == before
    assert not (slurm / "5.sbatch").exists()


def test_sweep_with_live_jobs_is_refused_and_names_them(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"data.path={data}", f"out={tmp_path / 'a'}"]
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, *where, "--sweep", "seed=0,1,2"]
    assert submit.main(words) == 0
    command(slurm, "squeue", "printf '%s\\n' '1_0|FAILED' '1_1|RUNNING' '1_2|PENDING' '2|PENDING'")
    capsys.readouterr()
    assert submit.main(words) == 2
    assert capsys.readouterr().err == (
        f"mae-dist: out={tmp_path / 'a' / 'seed-1'}: job 1_1 of this run is RUNNING, and 2 more are queued or running; "
        "wait for them, or end them: scancel 1 2\n"
    )
