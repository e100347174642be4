"""Submission as far as it goes without SLURM: shapes, mistakes, sweeps, pipelines, scripts; a pipeline walked here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cluster, pipeline, preflight, sweep
from launch import submit as submission
from launch.cluster import Cluster
from launch.job import TOO_SHORT, marker, script_end, verdict
from launch.place import SCRIPT_SETUP
from mae_dist import config, jobs, models, sizes
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.stages import child

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


# what a task makes of the end of its process


STARTED = {"told": False, "late": False, "ends": [1, 1], "before": [], "restarts": 2}


@pytest.mark.parametrize(
    ("status", "facts", "again", "said"),
    [
        (75, {"told": True}, True, "stopped and saved"),
        (75, {"told": True, "late": True, "before": [TOO_SHORT]}, True, "stopped and saved"),
        (-15, {"told": True}, True, "stopped"),
        (-15, {"told": True, "late": True}, True, TOO_SHORT),
        (-9, {"told": True, "late": True, "before": [TOO_SHORT]}, False, "twice in a row: ask for more time"),
        (-15, {"told": True, "before": [TOO_SHORT, "stopped"]}, True, "stopped"),
        (2, {}, False, ""),
        (1, {"ends": [1, 2]}, False, ""),
        (-9, {}, True, "a rank was lost, restart 1 of 2"),
        (1, {"before": ["stopped", "a rank was lost, restart 1 of 2"]}, True, "a rank was lost, restart 2 of 2"),
        (1, {"before": ["a rank was lost, 1", "a rank was lost, 2"]}, False, "a rank was lost 3 times since"),
        (1, {"restarts": 0}, False, ""),
    ],
)
def test_whether_a_job_starts_again(status: int, facts: dict, again: bool, said: str) -> None:
    found, why = verdict(status, **(STARTED | facts))
    assert found == again
    assert said in why
    assert bool(said) == bool(why)


TASK = """
import signal, sys
from pathlib import Path
from launch import job
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(job.REQUEUE))  # submitit's handler, which requeues
job.EARLY = 0.0
run, child = sys.argv[1:3]
made = job.Job(words=(), logs=run, run=run, ranks_per_node=1, ranked=False, stop_before_end=float(sys.argv[3]))
job.Watch.command = lambda *_: [sys.executable, "-c", child]
made()
"""
SAVES = """
import signal, sys, time
told = []
signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
print("ready", flush=True)
while not told:
    time.sleep(0.01)
time.sleep({seconds})
sys.exit(75)
"""


@dataclass
class Task:
    """Task 0 of job 7, or of element 3 of array 7, with a SLURM whose only answer is scontrol's."""

    folder: Path
    seconds_left: float
    stop_before_end: float
    child: str
    scontrol: str | None = "echo JobId=7 JobState=RUNNING Restarts=0"
    array: bool = False

    def start(self) -> subprocess.Popen[bytes]:
        tools = self.folder / "bin"
        tools.mkdir(parents=True, exist_ok=True)
        if self.scontrol is not None:
            (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/asked\n{self.scontrol}\n')
            (tools / "scontrol").chmod(0o755)
        variables = {
            "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_END_TIME": str(time.time() + self.seconds_left), "PYTHONPATH": str(ROOT), "PATH": str(tools),
        }  # fmt: skip
        if self.array:
            variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        command = [sys.executable, "-c", TASK, str(self.folder), self.child, str(self.stop_before_end)]
        with (self.folder / "said").open("w") as said:
            process = subprocess.Popen(command, env=variables, stdout=said, stderr=said)
        while "ready" not in (self.folder / "said").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        return process

    def events(self) -> list[dict]:
        return jobs.events(self.folder, "7_3" if self.array else "7")[0]


def test_a_rank_that_slurm_has_told_early_has_all_the_time_to_save(tmp_path: Path) -> None:
    """SLURM's signal may come half a minute before the job's own clock rings: that ring kills nobody."""
    task = Task(tmp_path, seconds_left=4, stop_before_end=2.5, child=SAVES.format(seconds=2))
    with task.start() as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR2)
    assert [event.get("status") for event in task.events() if event["event"] == "end"] == [75]
    assert [event["by"] for event in task.events() if event["event"] == "told"] == ["SIGUSR2"]


def test_the_clock_stops_a_job_that_nobody_tells_and_kills_what_does_not_leave(tmp_path: Path) -> None:
    task = Task(tmp_path, seconds_left=3, stop_before_end=2, child=SAVES.format(seconds=60))
    with task.start():
        pass
    told, end, again = task.events()[1:]
    assert (told["by"], end["status"]) == ("time limit", -9)
    assert again["why"] == TOO_SHORT


def test_an_element_of_an_array_asks_for_itself_and_believes_the_first_line(tmp_path: Path) -> None:
    """The number of an array's last element is the array's: its other elements must not be taken for it."""
    answer = "echo ArrayTaskId=3 JobState=RUNNING Restarts=0; echo ArrayTaskId=0 JobState=COMPLETED Restarts=0"
    task = Task(tmp_path, 60, 1, SAVES.format(seconds=0), answer, array=True)
    with task.start() as process:
        process.send_signal(signal.SIGUSR2)
    assert process.returncode == 75  # submitit was asked to requeue
    assert (tmp_path / "asked").read_text() == "show job -o 7_3\n"
    assert task.events()[-1]["why"] == "stopped and saved"


def test_a_start_that_slurm_has_ended_does_not_pass_for_done(tmp_path: Path) -> None:
    task = Task(tmp_path, 60, 1, SAVES.format(seconds=0), "echo JobState=COMPLETING Restarts=0")
    with task.start() as process:
        process.send_signal(signal.SIGUSR2)
    assert process.returncode == 75
    assert task.events()[-1]["why"] == "stopped and saved; by SLURM"


@pytest.mark.parametrize("array", [False, True])
def test_what_a_task_cannot_requeue_its_script_does(tmp_path: Path, array: bool) -> None:
    """As in a container, where there is no scontrol: here submitit's handler fails for the lack of it."""
    job = "7_3" if array else "7"
    marker(tmp_path, job).touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nkill $PPID\n')
    (tools / "scontrol").chmod(0o755)
    lines = [*SCRIPT_SETUP, "sh -c 'exit 1'", *script_end(str(tmp_path))]
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"} if array else {}
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "0"} | ids
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, check=False)
    assert done.returncode == -signal.SIGTERM  # as SLURM ends a job that it requeues
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    assert not marker(tmp_path, job).exists()
    assert subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, check=False).returncode == 1


@pytest.mark.slow
def test_two_machines_without_slurm_stop_together_and_go_on(data: Path, tmp_path: Path) -> None:
    """Both are this one, with a rank each."""
    run, words = (
        tmp_path / "run",
        ["pretrain", f"data.path={data}", *SMALL, "mae.decoder_dim=32", "mae.decoder_heads=4"],
    )
    words += ["mae.decoder_depth=1", "train.steps=30", "track.every=1", "machine.workers=0", f"out={run}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        head = f"localhost:{free.getsockname()[1]}"
    variables = os.environ | {
        "NODES": "2",
        "HEAD": head,
        "RANKS": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }

    def start() -> list[subprocess.Popen[str]]:
        command = [ROOT / "launch" / "torchrun.sh", *words]
        return [subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]

    machines, deadline = start(), time.monotonic() + 120
    while child.reached(run) < 3:
        assert time.monotonic() < deadline
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.02)
    for machine in machines:
        machine.send_signal(signal.SIGTERM)
    said = "".join(machine.communicate(timeout=60)[1] for machine in machines)
    assert "was stopped and saved at step" in said
    assert all(machine.returncode for machine in machines)
    for machine in start():
        assert machine.wait(timeout=120) == 0
    assert (run / "result.json").exists()
    first, second = (json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines())
    assert first["world"] == second["world"] == 2
    assert 0 < second["step"] == second["reached"]


def test_torchrun_sh_says_what_it_needs() -> None:
    script = str(ROOT / "launch" / "torchrun.sh")
    assert "NODES=4 HEAD=node1" in subprocess.run([script, "--help"], capture_output=True, text=True).stdout
    done = subprocess.run([script, "pretrain"], env=os.environ | {"NODES": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "torchrun.sh: NODES=2 needs HEAD=HOST, the machine at which they meet\n",
    )
