"""Submission as far as it goes without SLURM: shapes, mistakes, sweeps, pipelines, scripts; a pipeline walked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cluster, pipeline, preflight, sweep
from launch import submit as submission
from launch.cluster import Cluster
from mae_dist import config, models, sizes
from mae_dist.data.pack import from_synthetic, pack

ROOT = Path(__file__).parents[1]
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


# sizes


@pytest.mark.parametrize("name", ["vit_b16", "vit_demo4", "vit_ti4", "mixer_b16", "mixer_demo4"])
@pytest.mark.parametrize("factor", [1, 2])
def test_parameters_follow_from_sizes(name: str, factor: int) -> None:
    size = factor * sizes.default_image_size(sizes.SIZES[name]["patch"])
    backbone = models.build(name, image_size=size)
    assert sizes.num_parameters(name, size) == sum(p.numel() for p in backbone.parameters())


def test_a_full_disk_is_known_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"])
    preflight.check_disk(chosen)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(ValueError, match=r"1\.0 GB of disk are free, but 3 checkpoints of 0\.34 GB need"):
        preflight.check_disk(chosen)


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
    names = [name for name, _ in sweep.combinations("probe", ["data.path=a/b,c/d", "board.held_out=0.1,0.2"])]
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
  knn: {{run: "knn data.path={{data}} from={{pretrain}} {" ".join(SMALL)} model.pool=avg", sweep: "train.seed=0,1"}}
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
    assert found["knn"].runs[1].config.start == f"{out}/pretrain"
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  a: {run: 'knn from={b}'}", "stage a: run: {b}: no stage above has this name; there are a, out"),
        ("  a: {runs: knn}", "stage a: has no `run:`"),
        ("  a: {run: knnn}", "stage a: run: knnn: no such verb; did you mean knn"),
        ("  a: {run: report x, nods: 2}", "stage a: nods: there is no such key; did you mean nodes"),
        ("  a: {run: report x, sweep: seed=1}", "stage a: sweep: report has no settings to sweep"),
        ("  a: {run: pretrain}", "stage a: pretrain needs data.path=..., model.name=..."),
        ("  a: {run: pretrain data.path=nowhere model.name=vit_demo4}", "stage a: data.path=nowhere: no such folder"),
    ],
)
def test_pipelines_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace("...", r"\.\.\.")):
        stages(tmp_path, text)


def test_the_pipelines_that_come_with_it_can_be_read() -> None:
    for file in (ROOT / "launch" / "pipelines").glob("*.yaml"):
        assert pipeline.load(str(file), [])[1]


@pytest.mark.slow
def test_a_pipeline_walked_on_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"out: {tmp_path / 'out'}\nstages:\n" + SMALL_PIPELINE)
    assert submission.main(["pipeline", str(file), "--local"]) == 0
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert "finished" in (tmp_path / "out" / "pipeline" / "pretrain" / "local.log").read_text()
    capfd.readouterr()
    assert submission.main(["pipeline", str(file), "--local"]) == 0
    assert capfd.readouterr().out.count("done already") == 5
    file.write_text(
        file.read_text().replace("train.seed=0,1", "train.seed=0,2").replace("model.pool=avg", "model.pool=mean")
    )
    assert submission.main(["pipeline", str(file), "--local"]) == 2


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

    assert "--sweep" in say("--help")
    words = ["pretrain", "--cluster", TEST, *SMALL, f"data.path={data}", "out=run", "--nodes", "1-2"]
    text = say(*words, "--dry-run")
    for line in ("--nodes=1-2", "--ntasks-per-node=2", "--time=10", "--signal=USR2@20", "--requeue", "--mem=4000M"):
        assert f"#SBATCH {line}\n" in text
    assert "srun" in text
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
