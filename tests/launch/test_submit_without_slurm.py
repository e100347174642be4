"""Submission as far as it goes without SLURM: shapes, mistakes, sweeps, pipelines, scripts; a pipeline walked here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cluster, local, pipeline, preflight, snapshot, sweep
from launch import submit as submission
from launch.cluster import Cluster
from mae_dist import config, model_sizes, models
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.run import jobs, layout

ROOT = Path(__file__).parents[2]
TEST = str(ROOT / "launch" / "clusters" / "test.yaml")
SMALL = [
    "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1", "train.precision=fp32", "train.global_batch=16",
]  # fmt: skip
SINFO = """\
main*|2-00:00:00|gpu:a100:8(S:0-1)|64|512000|4
main*|2-00:00:00|gpu:8|64|256000|2
cpu|infinite|(null)|32|128000|10
short|30:00|gpu:v100:4,gpu:a100:2|64|64000+|2
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pack(from_synthetic(32, 16), tmp_path / "set", shard_size=16)
    return tmp_path / "set"


# shapes


def test_what_sinfo_says() -> None:
    rows = cluster.partitions_of(SINFO)
    assert [row["gpus"] for row in rows] == [8, 8, 0, 6]
    assert [row["seconds"] for row in rows] == [2 * 86400, 2 * 86400, None, 1800]
    assert rows[0] == {
        "name": "main", "default": True, "seconds": 172800, "gpus": 8, "cpus": 64, "memory": 512000, "nodes": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"partition": "gpu"}, "partition=gpu: this cluster has no such partition, only main, cpu, short"),
        ({"gpus_per_node": 9}, "gpus_per_node=9: the nodes of partition main have 8"),
        ({"partition": "cpu", "gpus_per_node": 1}, "gpus_per_node=1: the nodes of partition cpu have 0"),
        ({"nodes": "1-7"}, "nodes=1-7: partition main has 6"),
        (
            {"gpus_per_node": 8, "cpus_per_task": 9},
            "8 ranks a node need 72 CPU cores, the nodes of partition main have 64",
        ),
        ({"memory": 600}, "memory=600: the nodes of partition main have 512 GB"),
        ({"time": "3-00:00:00"}, "time=3-00:00:00: partition main allows 48:00:00"),
    ],
)
def test_shapes_that_the_cluster_has_not(shape: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ask", lambda *_: SINFO)
    cluster.check_real(Cluster())
    with pytest.raises(ValueError, match=said.replace("(", "\\(")):
        cluster.check_real(Cluster(**shape))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nodes: 0", "nodes=0: must be a number, or a range"),
        ("nodes: 4-1", "nodes=4-1: must be a number, or a range"),
        ("tasks_per_node: 0", "tasks_per_node=0: must be 1 or more"),
        ("{gpus_per_node: 2, tasks_per_node: 4}", "tasks_per_node=4: more ranks than gpus_per_node=2"),
        ("time: 24:00:00", 'time=86400: write it as "hours:minutes:seconds"'),
        ("time: '0:01:00'", "shorter than starting and saving take .* ask for 5 minutes or more"),
        ("gpu_per_node: 8", "did you mean gpus_per_node"),
        ("gpus_per_node: many", "gpus_per_node"),
        ("memory: -1", "memory=-1: must be 0 or more"),
        ("[a, b]", "expected sections with keys"),
        ("sbatch: {exclude: [node1, node2]}", "sbatch.exclude=.*: must be one value, or true"),
    ],
)
def test_cluster_files_that_cannot_be(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(line)
    with pytest.raises(ValueError, match=said):
        cluster.load(str(file), [])


def test_the_annotated_example_is_a_cluster_file() -> None:
    example = cluster.load(str(ROOT / "launch" / "clusters" / "example.yaml"), ["nodes=1-4"])
    assert example.nodes_range == (1, 4)
    assert (example.ranks_per_node, example.minutes) == (8, 24 * 60)
    assert str(example) == "1-4 nodes x 8 ranks of partition gpu, 8 GPUs each, 24:00:00"


@pytest.mark.parametrize(("text", "seconds"), [("1:00", 60), ("0:30:00", 1800), ("2-00:00:00", 172800)])
def test_times(text: str, seconds: int) -> None:
    assert cluster.seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("typed", "seconds"), [("24:00:00", 86400), ("1:00:00", 3600), ("1-00:00:00", 86400), ("90", 5400), ("90:00", 5400)]
)
def test_times_that_are_typed(typed: str, seconds: int) -> None:
    options = submission.parse(["pretrain", "--cluster", TEST, "--time", typed, "--nodes", "3", "--gpus-per-node", "0"])
    place = submission.where(options, pipeline.Stage("pretrain", "pretrain", ()))
    assert (cluster.seconds_of(place.time), place.nodes, place.gpus_per_node) == (seconds, "3", 0)


def test_every_number_of_nodes_of_a_range_is_checked(data: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.path={data}", f"out={tmp_path / 'run'}", "machine.strategy=hsdp", "machine.shards=4"]
    chosen = config.load("pretrain", None, words)
    preflight.check_shape(chosen, Cluster(nodes="4"))
    with pytest.raises(ValueError, match="machine.shards=4: 6 processes do not divide"):
        preflight.check_shape(chosen, Cluster(nodes="2-4", gpus_per_node=2))
    with pytest.raises(ValueError, match="machine.shards=4: 5 processes do not divide"):
        preflight.check_shape(chosen, Cluster(nodes="4-8"))


# sizes


@pytest.mark.parametrize("name", ["vit_b16", "vit_demo4", "vit_ti4", "mixer_b16", "mixer_demo4"])
@pytest.mark.parametrize("factor", [1, 2])
def test_parameters_follow_from_sizes(name: str, factor: int) -> None:
    size = factor * model_sizes.default_image_size(model_sizes.SIZES[name]["patch"])
    backbone = models.build(name, image_size=size)
    assert model_sizes.num_parameters(name, size) == sum(p.numel() for p in backbone.parameters())


def test_a_full_disk_is_known_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"])
    preflight.check_disk(chosen)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(ValueError, match=r"1\.0 GB of disk are free, but 3 checkpoints of 0\.34 GB need"):
        preflight.check_disk(chosen)


def strangers(path: str | Path, mode: int) -> bool:
    """os.access for somebody to whom nothing belongs; these tests may be root's, who may do anything."""
    return Path(path).stat().st_mode & mode == mode


def test_tars_that_may_not_be_read_are_known_before(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "access", strangers)
    index = preflight.open_split(str(data), "train")
    for tar in index.tars:
        tar.chmod(0o644)
    preflight.check_readable(index)
    index.tars[1].chmod(0o640)
    with pytest.raises(ValueError, match=f"{index.tars[1]}: you may not read it; ask its owner"):
        preflight.check_readable(index)


def test_folders_that_may_not_be_written_are_known_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"out=/proc/nobody/run: nothing can be written in /proc; choose"):
        preflight.check_writable(Path("/proc/nobody/run"))
    (tmp_path / "file").touch(0o777)
    with pytest.raises(ValueError, match="nothing can be written in .*file; choose"):
        preflight.check_writable(tmp_path / "file" / "run")
    others = tmp_path / "others"
    others.mkdir()
    others.chmod(0o755)
    monkeypatch.setattr(preflight.os, "access", strangers)
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={others / 'a' / 'run'}", "--dry-run"]
    assert submission.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"submit: out={others / 'a' / 'run'}: nothing can be written in {others}; choose")
    others.chmod(0o777)
    preflight.check_writable(others / "a" / "run")


# sweeps


def test_combinations() -> None:
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
    ("words", "said"),
    [
        (["train.seed"], "expected section.key=value"),
        (["train.seed="], "expected section.key=value"),
        (["seed=1,1"], "train.seed: 1 is there more than once"),
        (["seed=1,2", "train.seed=3"], "train.seed: given more than once"),
        (["every=1,2"], "which one: checkpoint.every, track.every"),
        (["sede=1,2"], "sede: is no section.key"),
        (["data.path=a/b,a-b"], "data.path=a/b and data.path=a-b would share the folder path-a-b"),
        (["data.split=a,a_seed-1", "seed=1,1_seed-1"], "would share the folder split-a_seed-1_seed-1"),
    ],
)
def test_sweeps_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sweep.combinations("pretrain", words)


# pipelines


def stages(tmp_path: Path, text: str) -> dict[str, pipeline.Stage]:
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


def test_stages_wait_for_those_they_name(tmp_path: Path) -> None:
    found = stages(tmp_path, SMALL_PIPELINE)
    assert {name: stage.needs for name, stage in found.items()} == {
        "data": (), "pretrain": ("data",), "knn": ("data", "pretrain"), "report": ("pretrain", "knn"),
    }  # fmt: skip
    out = tmp_path / "out"
    assert found["report"].runs[0].words[1:4] == (*(f"{out}/{n}" for n in ("pretrain", "knn/seed-0", "knn/seed-1")),)
    assert found["pretrain"].shape == ("nodes=2",)
    timed = stages(tmp_path, SMALL_PIPELINE.replace("nodes: 2", "time: '24:00:00'"))["pretrain"]
    assert cluster.load(TEST, list(timed.shape)).time == "24:00:00"
    assert found["knn"].runs[1].config.init_from == f"{out}/pretrain"
    assert found["knn"].home == out / "knn"


def test_fingerprints_follow_from_settings_and_foundations(tmp_path: Path) -> None:
    before = stages(tmp_path, SMALL_PIPELINE)
    same = stages(tmp_path, SMALL_PIPELINE.replace("nodes: 2", "nodes: 3").replace("steps=2", "steps=2 track.every=1"))
    longer = stages(tmp_path, SMALL_PIPELINE.replace("steps=2", "steps=3"))
    assert {name for name in before if before[name].fingerprint != same[name].fingerprint} == set()
    assert {name for name in before if before[name].fingerprint != longer[name].fingerprint} == {
        "pretrain",
        "knn",
        "report",
    }


def test_where_it_is_typed_changes_no_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, receipts = tmp_path / "pipeline.yaml", []
    file.write_text("out: runs/out\nstages:\n" + SMALL_PIPELINE)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        _, found = pipeline.load(str(file), [])
        receipts.append([run.receipt[1] for stage in found for run in stage.runs if run.receipt])
        words = found[0].runs[0].words
        assert words[words.index("--out") + 1] == str(tmp_path / name / "runs" / "out" / "data")  # for any other folder
    assert receipts[0] == receipts[1]
    typed = ["data", "pack", "synthetic", "--out", "runs/out/data", "--train", "32", "--test", "16"]
    expected = hashlib.sha256(json.dumps([typed, []], sort_keys=True).encode()).hexdigest()[:16]
    assert receipts[0][0] == f"{expected}\n"  # as it has always been, so that what is done stays done


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: 5\nstages: {a: {run: report x}}", "out: 5: must be the path of a folder"),
        ("out: [1]\nstages: {a: {run: report x}}", r"out: \[1\]: must be the path of a folder"),
        ("out: x\nstages: {}", "must have `out: FOLDER` and `stages:`"),
        ("out: x", "must have `out: FOLDER` and `stages:`"),
        ("5", "must have `out: FOLDER` and `stages:`"),
    ],
)
def test_files_that_are_no_pipelines(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"pipeline {file}: {said}"):
        pipeline.load(str(file), [])


@pytest.mark.parametrize(
    ("text", "said"),
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
        ("  a: {run: pretrain data.path=nowhere model.name=vit_demo4}", "stage a: data.path=nowhere: no such folder"),
    ],
)
def test_pipelines_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        stages(tmp_path, text)


def test_the_pipelines_that_come_with_it_can_be_read() -> None:
    for file in (ROOT / "launch" / "pipelines").glob("*.yaml"):
        assert pipeline.load(str(file), [])[1]


@pytest.mark.slow
def test_a_pipeline_walked_on_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    packing, _ = SMALL_PIPELINE.split("\n", 1)
    file.write_text(f"out: {out}\nstages:\n{packing}")
    assert submission.main(["pipeline", str(file), "--local"]) == 0
    (tar,) = (out / "data").glob("train-*.tar")
    sound = tar.read_bytes()
    tar.write_bytes(bytes(len(sound)))  # after it was packed, and before it is read
    file.write_text(f"out: {out}\nstages:\n" + SMALL_PIPELINE)
    capfd.readouterr()
    assert submission.main(["pipeline", str(file), "--local"]) == 2
    said = capfd.readouterr()
    assert said.out.count("done already") == 1
    line, where = said.err.splitlines()
    assert line.startswith(
        "submit: stage pretrain failed with status 2: train_000000.png in train-000000.tar: no sample"
    )
    assert where == f"all that it said is in {out / 'pipeline' / 'pretrain' / 'local.log'}"
    tar.write_bytes(sound)
    assert submission.main(["pipeline", str(file), "--local"]) == 0
    assert "<html" in (out / "report.html").read_text()
    assert "finished" in (out / "pipeline" / "pretrain" / "local.log").read_text()
    capfd.readouterr()
    assert submission.main(["pipeline", str(file), "--local"]) == 0
    assert capfd.readouterr().out.count("done already") == 5


def test_a_failed_stage_names_the_line_that_mae_dist_logs_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        "[rank1]: Traceback (most recent call last):", '[rank1]:   File "train.py", line 1, in fit',
        "[rank1]: OSError: Input/output error", "mae-dist: rank 1 did not answer at step 4: hung or gone", "srun: done",
    ]  # fmt: skip
    monkeypatch.setattr(local, "step", lambda _: (1, said))
    assert local.walk(list(stages(tmp_path, SMALL_PIPELINE).values())) == 1
    assert (
        capsys.readouterr().err.splitlines()[0]
        == "submit: stage data failed with status 1: OSError: Input/output error"
    )


# the command


def test_help_and_the_script_need_no_torch_and_no_slurm(data: Path, tmp_path: Path) -> None:
    """`import torch` fails here, and there is no srun on the path."""
    (tmp_path / "no" / "torch").mkdir(parents=True)
    (tmp_path / "no" / "torch" / "__init__.py").write_text("raise ImportError('torch is not for login nodes')")

    def say(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / "submit.py", *words], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(tmp_path / "no"), "PATH": "/nowhere"}, cwd=tmp_path,
        )  # fmt: skip
        return done.stdout

    said = " ".join(say("--help").split())
    assert "--sweep" in said
    assert "so partitions are not checked" in said
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", "out=run"]
    text = say(*words, "--nodes", "2", "--dry-run")
    for line in ("--nodes=2", "--ntasks-per-node=2", "--time=10", "--signal=USR2@20", "--requeue", "--mem=4000M"):
        assert f"#SBATCH {line}\n" in text
    assert "srun --unbuffered" in text
    text = say(*words, "--nodes", "1-2", "--dry-run")
    assert "#SBATCH --nodes=1-2\n" in text  # and nothing that would hold a requeue to the ranks of the first start
    assert "#SBATCH --mincpus=2\n" in text
    assert "#SBATCH --ntasks" not in text
    assert "--ntasks-per-node=2" in text
    assert not (tmp_path / "run").exists()
    swept = say(*words, "--sweep", "seed=0,1,2", "--at-once", "2", "--dry-run")
    assert "#SBATCH --array=0-2%2\n" in swept
    assert swept.count("#!/bin/bash") == 2


def test_without_slurm_it_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.environ["PATH"]
    os.environ["PATH"] = "/nowhere"
    try:
        words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"]
        assert submission.main(words) == 2
    finally:
        os.environ["PATH"] = path
    assert capsys.readouterr().err == (
        "submit: sinfo: not found; is this a login node of a SLURM cluster? Without one: launch/torchrun.sh\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_finished_run_and_a_strangers_folder_are_refused(data: Path, tmp_path: Path) -> None:
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={tmp_path}"])
    with pytest.raises(ValueError, match="exists and is no run of mae-dist"):
        preflight.check("pretrain", chosen, Cluster())
    run = tmp_path / "run"
    run.mkdir()
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={run}"])
    (run / "config.yaml").write_text(
        "verb: pretrain\ndata_fingerprint: "
        + preflight.open_split(str(data), "train").fingerprint
        + "\n"
        + config.dump(chosen)
    )
    preflight.check("pretrain", chosen, Cluster())
    (run / "result.json").write_text(json.dumps({"loss": 1}))
    with pytest.raises(ValueError, match="this run is finished"):
        preflight.check("pretrain", chosen, Cluster())


# queueing, without a SLURM behind the commands


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with SLURM's commands, which any test may replace: sbatch takes every job, gives numbers from 1 on and
    keeps what it was given as N.sbatch, with its environment as N.env; squeue knows no job. scancel notes its words.
    """
    commands = tmp_path / "slurm"
    commands.mkdir()
    command(commands, "sinfo", "echo 'main*|infinite|gpu:2|8|16000|4'")
    command(commands, "srun", "exit 1")
    command(commands, "sacct", "exit 1")
    command(commands, "squeue", "exit 0")
    command(commands, "scancel", f'echo "$@" > {commands}/cancelled')
    command(
        commands,
        "sbatch",
        f"""[ "$1" != --test-only ] || exit 0
        n=$(($(ls {commands}/*.sbatch 2>/dev/null | wc -l) + 1))
        cp "$1" {commands}/$n.sbatch; env > {commands}/$n.env; echo "Submitted batch job $n\"""",
    )
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return commands


def command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def finish(run: Path, words: list[str]) -> None:
    """Make the folder that of a finished run with these settings."""
    run.mkdir(exist_ok=True)
    chosen = config.load("pretrain", None, [*words, f"out={run}"])
    fingerprint = preflight.open_split(chosen.data.path, "train").fingerprint
    (run / "config.yaml").write_text(f"verb: pretrain\ndata_fingerprint: {fingerprint}\n{config.dump(chosen)}")
    (run / "result.json").write_text('{"loss": 1.0}')


def frozen(base: Path, name: str) -> config.RunConfig:
    """The settings that the newest submission has written for the run `name`."""
    code = max((base / "code").iterdir())
    return config.load("pretrain", str(code / "settings" / f"{name}.yaml"), [])


def test_of_a_sweep_only_what_is_not_done_is_queued(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a sweep"
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={out}", "--sweep", "seed=0,1,2"]
    assert submission.main(words) == 0
    said = capsys.readouterr().out
    assert "--array=0-2%3" in (slurm / "1.sbatch").read_text()
    assert said.splitlines()[-1] == f"next: mae-dist runs '{out}' --watch | mae-dist logs '{out}' | scancel 1 2"
    for seed in (0, 2):
        finish(out / f"seed-{seed}", [*SMALL, f"data.path={data}", f"train.seed={seed}"])
    assert submission.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("done already") == 2
    assert "seed-0: done already, passed over" in said
    assert "--array" not in (slurm / "3.sbatch").read_text()
    assert [s.job for s in jobs.submissions(out / "seed-1")] == ["1_1", "3"]
    assert [s.job for s in jobs.submissions(out / "seed-0")] == ["1_0"]
    assert [s.job for s in jobs.submissions(out / "pipeline" / "results")] == ["2", "4"]
    # another sweep into the same folder is refused, not passed over
    assert submission.main([*words, "optim.base_lr=1"]) == 2
    assert "optim.base_lr: 0.00015 -> 1.0" in capsys.readouterr().err
    finish(out / "seed-1", [*SMALL, f"data.path={data}", "train.seed=1"])
    (out / "results.md").touch()
    before = sorted(out.rglob("*"))
    assert submission.main(words) == 0
    assert capsys.readouterr().out == f"pretrain: done already, passed over\nnext: mae-dist runs '{out}'\n"
    assert sorted(out.rglob("*")) == before
    assert not (slurm / "5.sbatch").exists()


def test_settings_are_frozen_with_paths_that_hold_anywhere(
    data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "data.path=set", "data.test_path=set", "out=run"]
    assert submission.main(["pretrain", "--cluster", TEST, *words]) == 0
    settings = frozen(tmp_path / "run", "pretrain")
    assert (settings.out, settings.data.path, settings.data.test_path) == (str(tmp_path / "run"), *(str(data),) * 2)
    # and the same command, as well as the same by hand, takes them for the same
    (tmp_path / "run" / "config.yaml").write_text(
        f"verb: pretrain\ndata_fingerprint: {preflight.open_split('set', 'train').fingerprint}\n{config.dump(settings)}"
    )
    assert submission.main(["pretrain", "--cluster", TEST, *words]) == 0
    assert (slurm / "2.sbatch").exists()


def test_the_start_of_a_run_may_be_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "data.path=set", "out=run"]
    chosen = config.load("probe", None, [*words, "init_from=start"])
    frozen = layout.absolute(chosen)
    assert frozen.init_from == str(tmp_path / "start")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"verb: probe\ndata_fingerprint: x\n{config.dump(frozen)}")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    layout.refuse_others(tmp_path / "run", "probe", chosen, "x")
    with pytest.raises(ValueError, match="init_from: .*/start -> .*/other"):
        layout.refuse_others(tmp_path / "run", "probe", config.load("probe", None, [*words, "init_from=other"]), "x")
    assert layout.absolute(config.load("probe", None, [*words, "init_from=random"])).init_from == "random"


def test_what_no_ranks_share_gets_the_share_of_one(tmp_path: Path, slurm: Path) -> None:
    where = tmp_path / "cluster.yaml"
    where.write_text(
        "{gpus_per_node: 2, cpus_per_task: 3, memory: 12, nodes: 2, exclusive: true, time: '1:00:00',"
        " sbatch: {no-kill: true, nice: 5, begin: now, spread-job: null, requeue: false}}"
    )
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"out: {tmp_path / 'out'}\nstages:\n" + SMALL_PIPELINE.replace('--test 16"', '--test 16", memory: 9')
    )
    assert submission.main(["pipeline", str(file), "--cluster", str(where)]) == 0
    scripts = [(slurm / f"{number}.sbatch").read_text() for number in (1, 2, 3, 4)]
    asked = [{line for line in text.splitlines() if line.startswith("#SBATCH")} for text in scripts]
    for lines in asked:
        assert lines >= {"#SBATCH --no-kill", "#SBATCH --spread-job", "#SBATCH --nice=5", "#SBATCH --begin=now"}
        assert not any("requeue" in line for line in lines)
        assert "#SBATCH --cpus-per-task=3" in lines
    assert [next(line for line in lines if "--mem=" in line)[14:] for lines in asked] == [
        "9000M", "12000M", "12000M", "6000M",
    ]  # fmt: skip
    assert [any("exclusive" in line for line in lines) for lines in asked] == [False, True, True, False]
    assert [any("gpus" in line for line in lines) for lines in asked] == [False, True, True, False]
    assert [next(line for line in lines if "--nodes=" in line)[-1] for lines in asked] == ["1", "2", "2", "1"]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (0, "nodes=0: must be a number"),
        (9, "train.global_batch=16: 18 processes are more"),
        (5, "nodes=5: partition main has 4"),
    ],
)
def test_what_is_wrong_with_a_stage_begins_with_its_name(
    nodes: int, said: str, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"out: {tmp_path / 'out'}\nstages:\n" + SMALL_PIPELINE.replace("nodes: 2", f"nodes: {nodes}"))
    assert submission.main(["pipeline", str(file), "--cluster", TEST]) == 2
    assert capsys.readouterr().err.startswith(f"submit: stage pretrain: {said}")
    assert not (slurm / "1.sbatch").exists()


def test_of_the_allocation_that_one_submits_from_jobs_learn_nothing(
    data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JOB_ID", "JOB_END_TIME", "RESTART_COUNT", "MEM_PER_NODE", "NTASKS", "CONF", "CLUSTERS"):
        monkeypatch.setenv(f"SLURM_{name}", "7")
    monkeypatch.setenv("SBATCH_ACCOUNT", "vision")
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"]
    assert submission.main(words) == 0
    names = {line.partition("=")[0] for line in (slurm / "1.env").read_text().splitlines()}
    assert {name for name in names if name.startswith("SLURM_")} == {"SLURM_CONF", "SLURM_CLUSTERS"}
    assert "SBATCH_ACCOUNT" in names


@pytest.mark.parametrize("there", [True, False])
def test_interrupted_halfway_nothing_stays_queued_or_written(
    there: bool, data: Path, tmp_path: Path, slurm: Path
) -> None:
    """As a process of its own, which does not ignore the signal as one in the background does."""
    out = tmp_path / "new" / "sweep"
    if there:
        (out / "old").mkdir(parents=True)
    taking = (slurm / "sbatch").read_text()
    command(slurm, "sbatch", f"""[ ! -e {slurm}/1.sbatch ] || kill -INT $PPID\n{taking}""")  # Ctrl-C at the second job
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={out}", "--sweep", "seed=0,1"]
    typed = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from launch import submit; sys.exit(submit.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", typed, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (130, "submit: interrupted, nothing is queued\n")
    assert (slurm / "cancelled").read_text().split() == ["1", "2"]
    if there:
        assert (out / "old").exists()
        assert not (out / "code").exists()
    else:
        assert not (tmp_path / "new").exists()


def test_interrupted_early_it_just_ends() -> None:
    """Ctrl-C comes when it imports the first of its modules."""
    typed = f"""
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(name, *_):
        if name == "launch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
runpy.run_path({str(ROOT / "launch" / "submit.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", typed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-2, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_who_reads_only_the_beginning_gets_no_error(
    unbuffered: str, data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "launch" / "submit.py", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (slurm / "1.sbatch").exists()


@pytest.mark.usefixtures("slurm")
def test_a_copy_that_fails_halfway_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = snapshot.shutil.copytree

    def full(source: Path, *rest: Any, **more: Any) -> None:
        copy(source, *rest, **more)
        if Path(source).name == "launch":
            raise shutil.Error([(f"{source}/job.py", "there", "[Errno 28] No space left on device: 'there'")])

    monkeypatch.setattr(snapshot.shutil, "copytree", full)
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={tmp_path / 'new' / 'run'}"]
    assert submission.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"submit: {tmp_path / 'new' / 'run' / 'code'}")
    assert said.endswith(": the code could not be copied: [Errno 28] No space left on device: 'there'\n")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "run").mkdir(parents=True)
    assert submission.main(words) == 2
    assert not list((tmp_path / "new" / "run").iterdir())


def test_where_slurm_is_silent_a_run_is_not_submitted_again(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={run}"]
    assert submission.main(words) == 0
    command(slurm, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    capsys.readouterr()
    assert submission.main(words) == 2
    assert capsys.readouterr().err == (
        f"submit: out={run}: whether job 1 of this run is still alive cannot be known (slurm_load_jobs error: Unable "
        "to contact slurm controller); try again when SLURM answers\n"
    )
    command(slurm, "squeue", "echo '1|PENDING'")
    assert submission.main(words) == 2
    assert "job 1 of this run is PENDING; wait for it" in capsys.readouterr().err
    command(slurm, "squeue", "[[ $* == *--me* ]] || { echo 'Invalid job id specified' >&2; exit 1; }")
    assert submission.main(words) == 0  # SLURM has forgotten it


def test_where_slurm_is_not_set_up_it_says_what_to_try(
    data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", f"out={run}"]
    command(
        slurm, "sinfo", "echo 'sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host' >&2; exit 1"
    )
    assert submission.main(words) == 2
    assert capsys.readouterr().err == (
        "submit: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host; is SLURM set up in this shell? "
        "try `module load slurm`, or set SLURM_CONF\n"
    )
    jobs.note_submission(run, jobs.Submission("12", str(run / jobs.FOLDER), "1", 1, jobs.now()))
    monkeypatch.setenv("PATH", "/nowhere")
    assert submission.main(words) == 2
    assert capsys.readouterr().err == (
        f"submit: out={run}: whether job 12 of this run is still alive cannot be known, as there is no squeue here; "
        "submit from a login node of its cluster\n"
    )


def test_all_that_lives_of_a_sweep_is_named(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "pretrain",
        "--cluster",
        TEST,
        *SMALL,
        f"data.path={data}",
        f"out={tmp_path / 'a'}",
        "--sweep",
        "seed=0,1,2",
    ]
    assert submission.main(words) == 0
    command(slurm, "squeue", "printf '%s\\n' '1_0|FAILED' '1_1|RUNNING' '1_2|PENDING' '2|PENDING'")
    capsys.readouterr()
    assert submission.main(words) == 2
    assert capsys.readouterr().err == (
        f"submit: out={tmp_path / 'a' / 'seed-1'}: job 1_1 of this run is RUNNING, and 2 more live; "
        "wait for them, or end them: scancel 1 2\n"
    )


def test_a_folder_is_no_cluster_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--cluster {tmp_path}: is a folder; there are .*test.yaml"):
        cluster.load(str(tmp_path), [])
