"""What a SLURM task does about signals, the clock and how its process ends, without SLURM; two machines without it."""

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

from launch.slurm_task import SCRIPT_SETUP
from launch.task_runner import TOO_SHORT, requeue_marker, script_end, should_requeue
from mae_dist.data.pack import from_synthetic, pack
from mae_dist.run import jobs
from mae_dist.verify import processes

ROOT = Path(__file__).parents[2]
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
    found, why = should_requeue(status, **(STARTED | facts))
    assert found == again
    assert said in why
    assert bool(said) == bool(why)


TASK = """
import signal, sys
from pathlib import Path
from launch import task_runner as job
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(job.REQUEUE))  # submitit's handler, which requeues
job.EARLY = 0.0
run, child = sys.argv[1:3]
made = job.JobSpec(words=(), logs=run, run=run, ranks_per_node=1, ranked=False, stop_before_end=float(sys.argv[3]))
job.TaskRunner.command = lambda *_: [sys.executable, "-c", child]
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
    requeue_marker(tmp_path, job).touch()
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
    assert not requeue_marker(tmp_path, job).exists()
    assert subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, check=False).returncode == 1


@pytest.mark.slow
def test_two_machines_without_slurm_stop_together_and_go_on(tmp_path: Path) -> None:
    """Both are this one, with a rank each."""
    data, run = tmp_path / "set", tmp_path / "run"
    pack(from_synthetic(32, 16), data, shard_size=16)
    words = [
        "pretrain", f"data.path={data}", "model.name=vit_demo4", "model.image_size=32", "view.test_crop=1",
        "mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4", "train.precision=fp32", "train.steps=30",
        "train.global_batch=16", "track.every=1", "machine.workers=0", f"out={run}",
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        head = f"localhost:{free.getsockname()[1]}"
    variables = {"NODES": "2", "HEAD": head, "RANKS": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def start() -> list[subprocess.Popen[str]]:
        command = [ROOT / "launch" / "torchrun.sh", *words]
        return [
            subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]

    machines, deadline = start(), time.monotonic() + 120
    while processes.reached(run) < 3:
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
