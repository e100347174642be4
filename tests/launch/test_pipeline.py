"""Pipelines: their files, their fingerprints, running them on this machine, submitting them to a fake SLURM."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_slurm import CLUSTER_FILE, ROOT, SMALL

from launch import cluster as cluster_file
from launch import local, pipeline, submit
from mae_dist.__main__ import main
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic


def stages(tmp_path: Path, text: str) -> dict[str, pipeline.Stage]:
    """The stages of a pipeline file with this text below `stages:`."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"out: {tmp_path / 'out'}\nstages:\n" + text)
    return {stage.name: stage for stage in pipeline.load(str(file), [])[1]}


SMALL_PIPELINE = f"""\
  data: {{run: "data pack synthetic --out {{data}} --train 32 --test 16"}}
  pretrain:
    run: >-
      pretrain data.path={{data}} {" ".join(SMALL)}
      mae.decoder_dim=32 mae.decoder_depth=1 mae.decoder_heads=4 train.steps=2
    nodes: 2
  knn: {{run: "knn data.path={{data}} init_from={{pretrain}} {" ".join(SMALL)} model.pool=avg",
    sweep: "train.seed=0,1"}}
  report: {{run: "report {{pretrain}} {{knn}} --out {{out}}/report.html"}}
"""


def test_pipeline_stage_needs_the_stages_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = stages(tmp_path, SMALL_PIPELINE)
    assert {name: stage.needs for name, stage in found.items()} == {
        "data": (), "pretrain": ("data",), "knn": ("data", "pretrain"), "report": ("pretrain", "knn"),
    }  # fmt: skip
    out = tmp_path / "out"
    assert found["report"].runs[0].argv[1:4] == (*(f"{out}/{n}" for n in ("pretrain", "knn/seed-0", "knn/seed-1")),)
    assert found["pretrain"].overrides == ("nodes=2",)
    written = SMALL_PIPELINE + "  rows: {run: 'embed {pretrain} {data} --out {rows}'}\n"
    rows = stages(tmp_path, written)["rows"]
    assert (rows.needs, rows.runs[0].argv[-1]) == (("pretrain", "data"), str(out / "rows"))
    assert [stage.ranked for stage in (rows, found["report"])] == [True, False]
    with pytest.raises(SystemExit, match="2"):
        submit.main(["embed", "run", "data", "--out", "rows"])
    assert capsys.readouterr().err.endswith("submit a pipeline that has a stage `run: embed ...`\n")
    timed = stages(tmp_path, SMALL_PIPELINE.replace("nodes: 2", "time: '24:00:00'"))["pretrain"]
    assert cluster_file.load(CLUSTER_FILE, list(timed.overrides)).time == "24:00:00"
    settings = found["knn"].runs[1].config
    assert settings is not None
    assert settings.origin == f"{out}/pretrain"
    assert found["knn"].folder == out / "knn"


def test_pipeline_fingerprint_covers_settings_and_needed_stages(tmp_path: Path) -> None:
    before = stages(tmp_path, SMALL_PIPELINE)
    same = stages(tmp_path, SMALL_PIPELINE.replace("nodes: 2", "nodes: 3").replace("steps=2", "steps=2 track.every=1"))
    longer = stages(tmp_path, SMALL_PIPELINE.replace("steps=2", "steps=3"))
    assert {name for name in before if before[name].fingerprint != same[name].fingerprint} == set()
    assert {name for name in before if before[name].fingerprint != longer[name].fingerprint} == {
        "pretrain",
        "knn",
        "report",
    }


def test_pipeline_fingerprint_is_independent_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, stamps = tmp_path / "pipeline.yaml", []
    file.write_text("out: runs/out\nstages:\n" + SMALL_PIPELINE)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        _, found = pipeline.load(str(file), [])
        stamps.append([run.stamp[1] for stage in found for run in stage.runs if run.stamp])
        words = found[0].runs[0].argv
        assert words[words.index("--out") + 1] == str(tmp_path / name / "runs" / "out" / "data")
    assert stamps[0] == stamps[1]
    typed = ["data", "pack", "synthetic", "--out", "runs/out/data", "--train", "32", "--test", "16"]
    expected = hashlib.sha256(json.dumps([typed, []], sort_keys=True).encode()).hexdigest()[:16]
    assert stamps[0][0] == f"{expected}\n"  # pinned: a change would run finished stages again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: 5\nstages: {a: {run: report x}}", "out: 5: must be the path of a folder"),
        ("out: [1]\nstages: {a: {run: report x}}", r"out: \[1\]: must be the path of a folder"),
        ("out: x\nstages: {}", "must have `out: FOLDER` and `stages:`"),
        ("out: x", "must have `out: FOLDER` and `stages:`"),
        ("5", "must have `out: FOLDER` and `stages:`"),
    ],
)
def test_malformed_pipeline_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"pipeline {file}: {message}"):
        pipeline.load(str(file), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SMALL_PIPELINE
            + "  a: {run: 'knn init_from={pretrain} data.path={data} model.name=vit_ti4', sweep: seed=0}",
            "/pretrain has vit_demo4; set model.name=vit_demo4",
        ),
        (
            SMALL_PIPELINE.replace("vit_demo4", "mixer_demo4")
            + "  a: {run: 'finetune init_from={pretrain} data.path={data} model.name=mixer_demo4 model.image_size=64'}",
            "/pretrain has 32, and mixer_demo4 is bound to its grid; set model.image_size=32",
        ),
        ("  a: {run: report x, at_once: many}", "stage a: at_once: many: must be a number, 1 or more"),
        ("  a: {run: report x, at_once: 0}", "stage a: at_once: 0: must be a number, 1 or more"),
        ("  a: {run: 5}", "stage a: run: 5: must be words in one line"),
        ("  a: {run: }", "stage a: run: None: must be words in one line"),
        ("  a: {run: knn, sweep: [seed=1]}", "stage a: sweep: ['seed=1']: must be words in one line"),
        ('  a: {run: "report \'x"}', "stage a: run: report 'x: No closing quotation; every quotation mark needs"),
        ("  1: {runs: knn}", "stage 1: has no `run:`"),
        ("  a/b: {run: report x}", "stage a/b: is no name for a stage"),
        ("  code: {run: report x}", "stage code: is no name for a stage"),
        ("  a: {run: 'knn init_from={b}'}", "stage a: run: {b}: no stage above has this name; there are a, out"),
        ("  a: {runs: knn}", "stage a: has no `run:`"),
        ("  a: {run: knnn}", "stage a: run: knnn: no such verb; did you mean knn"),
        ("  a: {run: report x, nods: 2}", "stage a: nods: there is no such key; did you mean nodes"),
        ("  a: {run: report x, sweep: seed=1}", "stage a: sweep: report has no settings to sweep"),
        ("  a: {run: pretrain}", "stage a: pretrain needs data.path=..., model.name=..."),
        (
            "  a: {run: pretrain data.path=nowhere model.name=vit_demo4}",
            "stage a: data.path=nowhere: no such folder or file",
        ),
    ],
)
def test_invalid_pipeline_stage_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stages(tmp_path, text)


def test_example_pipelines_are_valid() -> None:
    for file in (ROOT / "launch" / "pipelines").glob("*.yaml"):
        assert pipeline.load(str(file), [])[1]


def test_local_pipeline_passes_sigterm_on_to_its_run(tmp_path: Path) -> None:
    run = pipeline.Run(
        "data", tmp_path, ("data", "pack", "synthetic", "--out", str(tmp_path / "data"), "--train", "9" * 6)
    )

    def terminate() -> None:
        while not [*tmp_path.iterdir()]:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handler, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=terminate, daemon=True)
    thread.start()
    status, _ = local.execute(run)
    assert status != 0
    assert not (tmp_path / "data" / "dataset.json").exists()
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
def test_local_pipeline_fails_resumes_and_skips_what_is_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    packing, _ = SMALL_PIPELINE.split("\n", 1)
    file.write_text(f"out: {out}\nstages:\n{packing}")
    assert submit.main(["pipeline", str(file), "--local"]) == 0
    (tar,) = (out / "data").glob("train-*.tar")
    sound = tar.read_bytes()
    tar.write_bytes(bytes(len(sound)))  # after it was packed, and before it is read
    file.write_text(f"out: {out}\nstages:\n" + SMALL_PIPELINE)
    capfd.readouterr()
    assert submit.main(["pipeline", str(file), "--local"]) == 2
    output = capfd.readouterr()
    assert output.out.count("done already") == 1
    line, where = output.err.splitlines()
    assert line.startswith("mae-dist: pretrain failed with status 2: none of the first ")
    assert "train_0000" in line
    assert where == f"its output is in {out / 'pipeline' / 'pretrain' / 'local.log'}"
    tar.write_bytes(sound)
    assert submit.main(["pipeline", str(file), "--local"]) == 0
    assert "<html" in (out / "report.html").read_text()
    assert "finished" in (out / "pipeline" / "pretrain" / "local.log").read_text()
    capfd.readouterr()
    assert submit.main(["pipeline", str(file), "--local"]) == 0
    assert capfd.readouterr().out.count("done already") == 5


def test_local_pipeline_dry_run_prints_the_commands_and_runs_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    file.write_text(f"out: {out}\nstages:\n" + SMALL_PIPELINE)
    assert submit.main(["pipeline", str(file), "--local", "--dry-run"]) == 0
    assert [line.split()[2] for line in capfd.readouterr().out.splitlines() if line][:2] == ["data", "pretrain"]
    assert not out.exists()


def test_local_pipeline_failure_names_the_cause_as_logs_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [
        "[rank1]: Traceback (most recent call last):", '[rank1]:   File "train.py", line 1, in fit',
        "[rank1]: OSError: Input/output error", "mae-dist: rank 1 did not answer at step 4: hung or gone", "srun: done",
    ]  # fmt: skip
    monkeypatch.setattr(local, "execute", lambda _: (1, output))
    assert local.run_stages(list(stages(tmp_path, SMALL_PIPELINE).values())) == 1
    assert capsys.readouterr().err.splitlines()[0] == "mae-dist: data failed with status 1: OSError: Input/output error"


def test_pipeline_stage_without_ranks_gets_the_resources_of_one(tmp_path: Path, slurm: Path) -> None:
    where = tmp_path / "cluster.yaml"
    where.write_text(
        "{gpus_per_node: 2, cpus_per_task: 3, memory: 12, nodes: 2, exclusive: true, time: '1:00:00',"
        " sbatch: {no-kill: true, nice: 5, begin: now, spread-job: null, requeue: false}}"
    )
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"out: {tmp_path / 'out'}\nstages:\n" + SMALL_PIPELINE.replace('--test 16"', '--test 16", memory: 9')
    )
    assert submit.main(["pipeline", str(file), "--cluster", str(where)]) == 0
    scripts = [(slurm / f"{number}.sbatch").read_text() for number in (1, 2, 3, 4)]
    requested = [{line for line in text.splitlines() if line.startswith("#SBATCH")} for text in scripts]
    for lines in requested:
        assert lines >= {"#SBATCH --no-kill", "#SBATCH --spread-job", "#SBATCH --nice=5", "#SBATCH --begin=now"}
        assert not any("requeue" in line for line in lines)
        assert "#SBATCH --cpus-per-task=3" in lines
    assert [next(line for line in lines if "--mem=" in line)[14:] for lines in requested] == [
        "9000M", "12000M", "12000M", "6000M",
    ]  # fmt: skip
    assert [any("exclusive" in line for line in lines) for lines in requested] == [False, True, True, False]
    assert [any("gpus" in line for line in lines) for lines in requested] == [False, True, True, False]
    assert [next(line for line in lines if "--nodes=" in line)[-1] for lines in requested] == ["1", "2", "2", "1"]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (0, "nodes=0: must be a number"),
        (9, "train.global_batch=16: 18 processes are more"),
        (5, "nodes=5: partition main has 4"),
    ],
)
def test_pipeline_error_begins_with_the_name_of_the_stage(
    nodes: int, message: str, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"out: {tmp_path / 'out'}\nstages:\n" + SMALL_PIPELINE.replace("nodes: 2", f"nodes: {nodes}"))
    assert submit.main(["pipeline", str(file), "--cluster", CLUSTER_FILE]) == 2
    assert capsys.readouterr().err.startswith(f"mae-dist: stage pretrain: {message}")
    assert not (slurm / "1.sbatch").exists()


def test_local_sweep_makes_a_table_of_the_runs_that_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three learning rates diverges. What would be processes of their own runs in this one."""
    data, out = tmp_path / "set", tmp_path / "sweep"
    pack(from_synthetic(32, 16), data, shard_size=16)
    monkeypatch.setattr(local, "execute", lambda run: (main(list(run.argv)), []))
    small = ["mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4", "track.every=1"]
    words = ["pretrain", *SMALL, *small, f"data.path={data}", f"out={out}", "train.steps=4", "machine.processes=1"]
    words += ["checkpoint.max_skipped=1", "--sweep", "optim.base_lr=1e-3,1e15,1e-2", "--local"]
    assert submit.main(words) == 2
    error = capsys.readouterr().err
    assert f"base_lr-1e15 failed with status 2: \nits output is in {out / 'base_lr-1e15' / 'jobs'}" in error
    table = (out / "results.md").read_text()
    assert "base\\_lr-1e-3" in table.replace("base_lr", "base\\_lr")
    assert {path.parent.name for path in out.glob("*/result.json")} == {"base_lr-1e-3", "base_lr-1e-2"}
    assert submit.main(words) == 2
    assert capsys.readouterr().out.count("done already") == 2
