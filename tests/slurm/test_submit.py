"""Sweeps, pipelines, failing jobs and user errors on a real SLURM."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from launch import submit as program
from mae_dist.__main__ import main
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic

from .launching import NODES, SETTINGS, Launch, Slurm, submit


def mae_dist(*words: str | Path) -> str:
    """Output of `mae-dist WORDS`."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setenv("COLUMNS", "200")
        assert main([str(word) for word in words]) == 0
    return printed.getvalue()


def test_failed_job_names_its_reason_and_is_not_requeued(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    pack(from_synthetic(64, 16), folder, shard_size=8)
    launched = launch("failing", f"data.path={folder}", "data.max_bad=1e-9", "machine.workers=0", nodes=NODES[:1])
    for tar in folder.glob("train-*.tar"):  # after submit.py has checked it, before the run reads it
        content = bytearray(tar.read_bytes())
        content[1024:2048] = bytes(1024)
        tar.write_bytes(content)
    launched.wait(lambda: launched.slurm.state(launched.job) == "FAILED", "failure")
    output = mae_dist("logs", launched.run)
    assert "failed: " in output.splitlines()[0]
    assert "exit status 2" in output
    for text in (output.splitlines()[0], mae_dist("runs", launched.run)):
        assert "samples could not be read: more than data.max_bad" in text
    assert launched.num_starts() == 1


@pytest.mark.slow
def test_requeue_by_the_script_of_torchrun_in_a_container(launch: Launch, tmp_path: Path) -> None:
    """The container is a shell with another PATH, without SLURM's commands: the job's script outside requeues."""
    container = tmp_path / "container"
    container.write_text(f'#!/bin/sh\nPATH={tmp_path} exec {sys.executable} "$@"\n')
    container.chmod(0o755)
    (tmp_path / "sh").symlink_to("/bin/sh")
    launched = launch(
        "agents",
        "train.steps=40",
        cluster=f"python: {container}",
        shape=["--torchrun", "--tasks-per-node", "2"],
        slow=0.1,
    )
    launched.reach(5)
    launched.slurm.run("scancel", "--signal=USR2", launched.job)
    launched.wait(lambda: launched.num_starts() > 1, "it is started again")
    assert launched.saved_before_leaving()
    assert "the job's script tries it" in launched.output(0)
    launched.finish()
    assert set(launched.task_events()) == {0, 1}
    assert {event["by"] for event in launched.task_events()[0] if event["event"] == "requeue"} == {"script"}
    first, second = launched.starts()
    assert (first["ranks"], first["step"]) == (second["ranks"], 0) == (4, 0)
    assert second["step"] >= 5


@pytest.mark.slow
def test_sweep_is_job_arrays_with_a_results_table(slurm: Slurm, cluster_file: Path, data: Path, tmp_path: Path) -> None:
    """Two arrays in turn, as one has at most MaxArraySize=3 jobs there."""
    out = tmp_path / "sweep"
    done = submit(
        "pretrain", "--cluster", cluster_file, "--tasks-per-node", "1", *SETTINGS, f"data.path={data}", f"out={out}",
        "train.steps=10", "--sweep", "optim.base_lr=1e-3,1e-2", "seed=0,1", "--at-once", "2",
    )  # fmt: skip
    assert re.search(r"jobs \d+, \d+: pretrain, 4 runs, 2 at once", done.stdout)
    slurm.wait((out / "results.md").exists, "the table", 300)
    table = (out / "results.md").read_text()
    names = {f"base_lr-{lr}_seed-{seed}" for lr in ("1e-3", "1e-2") for seed in (0, 1)}
    assert all(name in table for name in names)
    assert {path.name for path in out.glob("base_lr-*")} == names
    results = {json.loads((out / name / "result.json").read_text())["loss"] for name in names}
    assert len(results) == 4
    assert mae_dist("runs", out).count("finished") >= 4


@pytest.mark.slow
def test_pipeline_ends_with_a_report_and_skips_what_is_done(slurm: Slurm, cluster_file: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "pipe", tmp_path / "pipeline.yaml"
    small = "model.name=vit_demo4 model.image_size=32 view.test_crop=1 train.precision=fp32 train.global_batch=16"
    file.write_text(f"""\
out: {out}
stages:
  data:
    run: data pack synthetic --out {{data}} --train 64 --test 32
  pretrain:
    run: pretrain data.path={{data}} {small} mae.decoder_dim=32 mae.decoder_depth=1 mae.decoder_heads=4 train.steps=4
    tasks_per_node: 1
  knn:
    run: knn data.path={{data}} init_from={{pretrain}} {small}
    sweep: model.pool=avg,cls
    tasks_per_node: 1
  report:
    run: report {{pretrain}} {{knn}} --out {{out}}/report.html
""")
    done = submit("pipeline", file, "--cluster", cluster_file)
    assert done.stdout.count("job ") == 4
    slurm.wait((out / "pipeline" / "report" / "done").exists, "the report", 300)
    assert "<html" in (out / "report.html").read_text()
    results = [json.loads((out / "knn" / f"pool-{pool}" / "result.json").read_text()) for pool in ("avg", "cls")]
    assert all("top1" in result for result in results)
    again = submit("pipeline", file, "--cluster", cluster_file)
    assert again.stdout.count("done already") == 4
    assert "job " not in again.stdout
    # other settings of one stage are refused for its existing runs
    file.write_text(file.read_text().replace("train.steps=4", "train.steps=3"))
    refused = submit("pipeline", file, "--cluster", cluster_file, status=2)
    assert "train.steps: 4 -> 3" in refused.stderr


def test_pipeline_failure_cancels_the_stages_after_it(slurm: Slurm, cluster_file: Path, tmp_path: Path) -> None:
    """The split does not exist, which no check can know before the data are made."""
    out, file = tmp_path / "pipe", tmp_path / "pipeline.yaml"
    small = "model.name=vit_demo4 model.image_size=32 view.test_crop=1 train.precision=fp32 train.global_batch=16"
    file.write_text(f"""\
out: {out}
stages:
  data: {{run: "data pack synthetic --out {{data}} --train 64 --test 32"}}
  pretrain: {{run: "pretrain data.path={{data}} data.split=dev {small} train.steps=4", tasks_per_node: 1}}
  knn: {{run: "knn data.path={{data}} init_from={{pretrain}} {small}"}}
""")
    submit("pipeline", file, "--cluster", cluster_file)
    slurm.wait(lambda: "cancelled" in mae_dist("runs", out), "the stage after it is cancelled", 300)
    rows = {line.split()[0]: line for line in mae_dist("runs", out).splitlines() if line.split()}
    assert "failed: exit status 2" in rows["pretrain"]
    assert "cancelled; SLURM: a job that it waits for has failed (DependencyNeverSatisfied)" in rows["knn"]
    assert "no split 'dev'" in mae_dist("logs", out / "pretrain")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "nowhere"], "partition=nowhere: this cluster has no such partition, only main, urgent"),
        (["--gpus-per-node", "9"], "gpus_per_node=9: the nodes of partition main have 2"),
        (["--nodes", "5"], "nodes=5: partition main has 4"),
        (["--nodes", "two"], "nodes=two: must be a number"),
        (["--time", "1"], "time=0:01:00: shorter than starting and saving take"),
        (["--time", "soon"], "time=soon: write it as"),
        (["data.path=nowhere"], "data.path=nowhere: no such folder"),
        (["out=/proc/nobody/run"], "/proc/nobody"),
        (["--cluster", "missing.yaml"], "--cluster missing.yaml: no such file; there are"),
        (["train.global_batch=2"], "train.global_batch=2: 4 processes are more than the images"),
        (["model.name=vit_demo5"], "did you mean one of vit_demo4"),
        (["train.stps=5"], "did you mean train.steps"),
        (["--sweep", "sed=1,2"], "is no section.key"),
    ],
)
def test_user_error_is_one_line_and_queues_nothing(
    words: list[str], message: str, slurm: Slurm, cluster_file: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = set(slurm.run("squeue", "-h", "-o", "%i").split())
    base = [
        "pretrain",
        "--cluster",
        str(cluster_file),
        "--nodes",
        "2",
        *SETTINGS,
        f"data.path={data}",
        f"out={tmp_path / 'run'}",
    ]
    assert program.main([*base, *words]) == 2
    output, error = capsys.readouterr()
    assert error.startswith("mae-dist: ")
    assert error.count("\n") == 1, error
    assert message in error
    assert output == ""
    assert set(slurm.run("squeue", "-h", "-o", "%i").split()) <= before
    assert not (tmp_path / "run").exists()


def test_run_with_a_queued_job_is_refused(launch: Launch) -> None:
    launched = launch("waiting", cluster="sbatch: {begin: now+1hour}")
    assert launched.state() == "queued"
    assert f"job {launched.job} of this run is PENDING" in launch.refused("waiting")
    launched.slurm.run("scancel", launched.job)
    launched.wait(lambda: launched.state() == "stopped", "it is cancelled")
    second = launch("waiting", cluster="sbatch: {begin: now+1hour}")  # what the first left does not matter
    launched.slurm.run("scancel", second.job)


def test_failing_setup_line_is_shown_and_the_job_not_requeued(launch: Launch) -> None:
    launched = launch("setup", cluster="setup: ['true', 'module load nothing']", nodes=NODES[:1])
    launched.wait(lambda: launched.slurm.state(launched.job) == "FAILED", "failure")
    assert "failed: the line of setup `module load nothing` failed with status 127" in mae_dist("runs", launched.run)
    assert launched.num_starts() == 0
