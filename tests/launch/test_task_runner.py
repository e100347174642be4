"""What a SLURM task does at signals, at the time limit and when its child process ends; torchrun.sh on two machines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.slurm_task import SCRIPT_SETUP
from launch.task_runner import requeue_marker, script_end, should_requeue
from mae_dist.data.pack import pack
from mae_dist.data.sources import from_synthetic
from mae_dist.run import events, jobs
from mae_dist.verify import processes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("exit_statuses", "facts", "reason", "message"),
    [
        ([75, 75], {"stop_requested": True}, "saved", "stopped and saved"),
        ([75], {"stop_requested": True, "time_limit": True, "before": ["time_limit"]}, "saved", "stopped and saved"),
        ([-15], {"stop_requested": True}, "stopped", "stopped"),
        ([-15], {"stop_requested": True, "time_limit": True}, "time_limit", "before a new checkpoint was saved"),
        ([-9], {"stop_requested": True, "time_limit": True, "before": ["time_limit"]}, None, "twice in a row: raise"),
        ([-15], {"stop_requested": True, "before": ["time_limit", "stopped"]}, "stopped", "stopped"),
        ([2, 1], {}, None, ""),
        ([1, 2], {}, None, ""),
        ([-9, 1], {}, "rank_lost", "a rank was lost, restart 1 of 2"),
        ([1], {"before": ["stopped", "rank_lost"]}, "rank_lost", "a rank was lost, restart 2 of 2"),
        ([1], {"before": ["rank_lost", "rank_lost"]}, None, "a rank was lost 3 times since"),
        ([1], {"restarts": 0}, None, ""),
    ],
)
def test_requeue_decision(exit_statuses: list[int], facts: dict, reason: str | None, message: str) -> None:
    quiet = {"stop_requested": False, "time_limit": False, "before": [], "restarts": 2}
    decision = should_requeue(exit_statuses, **(quiet | facts))
    assert decision.reason == reason
    assert message in decision.message
    assert bool(message) == bool(decision.message)


TASK = """
import signal, sys
from launch import task_runner
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))  # in place of submitit's handler, which requeues
task_runner.SIGNAL_LEAD = 0.0
run, child, stop_before_end = sys.argv[1:]
job = task_runner.JobSpec(
    argv=(), logs=run, run=run, ranks_per_node=1, ranked=False, stop_before_end=float(stop_before_end)
)
task_runner.TaskRunner.command = lambda *_: [sys.executable, "-c", child]
job()
"""
SAVES = """
import signal, sys, time
received = []
signal.signal(signal.SIGUSR2, lambda *_: received.append(1))
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
print("ready", flush=True)
while not received:
    time.sleep(0.01)
time.sleep({seconds})
sys.exit(75)
"""


@dataclass
class Task:
    """Task 0 of job 7, or of element 3 of array 7, where scontrol is the only command of SLURM."""

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
            (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/calls\n{self.scontrol}\n')
            (tools / "scontrol").chmod(0o755)
        variables = {
            "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_END_TIME": str(time.time() + self.seconds_left), "PYTHONPATH": str(ROOT), "PATH": str(tools),
        }  # fmt: skip
        if self.array:
            variables |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        command = [sys.executable, "-c", TASK, str(self.folder), self.child, str(self.stop_before_end)]
        with (self.folder / "output").open("w") as output:
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
        while "ready" not in (self.folder / "output").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        return process

    def events(self) -> list[dict]:
        return jobs.events(self.folder, "7_3" if self.array else "7")[0]


def test_early_sigusr2_leaves_the_rank_all_its_time_to_save(tmp_path: Path) -> None:
    """SLURM's signal may come half a minute before the job's own alarm, which must not kill a rank that saves."""
    task = Task(tmp_path, seconds_left=4, stop_before_end=2.5, child=SAVES.format(seconds=2))
    with task.start() as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR2)
    assert [event.get("status") for event in task.events() if event["event"] == "end"] == [75]
    assert [event["by"] for event in task.events() if event["event"] == "stop_requested"] == ["SIGUSR2"]


def test_time_limit_alarm_stops_the_job_and_kills_a_rank_that_does_not_exit(tmp_path: Path) -> None:
    task = Task(tmp_path, seconds_left=3, stop_before_end=2, child=SAVES.format(seconds=60))
    with task.start():
        pass
    stop, end, requeue = task.events()[1:]
    assert (stop["by"], end["status"]) == ("time limit", -9)
    assert (requeue["reason"], requeue["by"], requeue["saved"]) == ("time_limit", "task", 0)
    (recorded,) = events.of(tmp_path, "requeue")  # in the run's file as well
    assert recorded["message"] == requeue["message"] == "the time limit came before a new checkpoint was saved"
    assert (recorded["job"], recorded["start"], recorded["reason"]) == ("7", 0, "time_limit")


def test_requeue_of_an_array_element_reads_its_own_state(tmp_path: Path) -> None:
    """The last element has the number of the whole array, so scontrol also prints the other elements."""
    answer = "echo ArrayTaskId=3 JobState=RUNNING Restarts=0; echo ArrayTaskId=0 JobState=COMPLETED Restarts=0"
    task = Task(tmp_path, 60, 1, SAVES.format(seconds=0), answer, array=True)
    with task.start() as process:
        process.send_signal(signal.SIGUSR2)
    assert process.returncode == 75  # of submitit's handler
    assert (tmp_path / "calls").read_text() == "show job -o 7_3\n"
    assert (task.events()[-1]["reason"], task.events()[-1]["by"]) == ("saved", "task")


def test_requeue_is_left_to_slurm_when_it_has_ended_the_start(tmp_path: Path) -> None:
    task = Task(tmp_path, 60, 1, SAVES.format(seconds=0), "echo JobState=COMPLETING Restarts=0")
    with task.start() as process:
        process.send_signal(signal.SIGUSR2)
    assert process.returncode == 75
    assert (task.events()[-1]["reason"], task.events()[-1]["by"]) == ("saved", "slurm")


@pytest.mark.parametrize("array", [False, True])
def test_requeue_by_the_script_where_the_task_could_not(tmp_path: Path, array: bool) -> None:
    """As in a container without scontrol, where submitit's handler fails."""
    job = "7_3" if array else "7"
    requeue_marker(tmp_path, job).touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nkill $PPID\n')
    (tools / "scontrol").chmod(0o755)
    lines = [*SCRIPT_SETUP, "sh -c 'exit 1'", *script_end(str(tmp_path))]
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"} if array else {}
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "0"} | ids
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, check=False)
    assert done.returncode == -signal.SIGTERM  # as SLURM ends a job that it requeues
    assert (tmp_path / "calls").read_text() == f"requeue {job}\n"
    assert not requeue_marker(tmp_path, job).exists()
    assert subprocess.run(["bash", "-c", "\n".join(lines)], env=variables, check=False).returncode == 1


@pytest.mark.slow
def test_torchrun_sh_on_two_machines_stops_at_sigterm_and_resumes(tmp_path: Path) -> None:
    """Both machines are this one, with a rank each."""
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
    output = "".join(machine.communicate(timeout=60)[1] for machine in machines)
    assert "stopped and saved at step" in output
    assert all(machine.returncode for machine in machines)
    for machine in start():
        assert machine.wait(timeout=120) == 0
    assert (run / "result.json").exists()
    first, second = events.of(run, "start")
    assert first["ranks"] == second["ranks"] == 2
    assert 0 < second["step"] == second["reached"]


def test_torchrun_sh_help_and_missing_variables() -> None:
    script = str(ROOT / "launch" / "torchrun.sh")
    assert "NODES=4 HEAD=node1" in subprocess.run([script, "--help"], capture_output=True, text=True).stdout
    done = subprocess.run([script, "pretrain"], env=os.environ | {"NODES": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "torchrun.sh: NODES=2 needs HEAD=HOST, the machine at which they meet\n",
    )


def test_torchrun_sh_lets_the_machines_of_one_run_meet_and_no_others(tmp_path: Path) -> None:
    """torchrun's address and id follow from the run's folder."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    variables = os.environ | {"NODES": "2", "HEAD": "node1", "PYTHON": str(tmp_path / "python"), "RANKS": "1"}

    def meeting(*words: str, folder: Path = tmp_path, head: str = "node1") -> tuple[str, ...]:
        command, env = [str(ROOT / "launch" / "torchrun.sh"), "pretrain", *words], variables | {"HEAD": head}
        printed = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True).stdout
        port, run = re.findall(r"--rdzv-endpoint node1:(\d+) --rdzv-id (\d+) ", printed)[0]
        return port, run

    own = meeting("data.path=a", "out=runs/1")
    assert 15_000 <= int(own[0]) < 30_000
    assert own == meeting("data.path=b", f"out={tmp_path}/runs/1", folder=ROOT)
    others = [meeting("out=runs/2"), meeting("out=runs/1", folder=ROOT), meeting("c.yaml"), meeting("d.yaml")]
    assert len({own, *others}) == 5
    assert meeting("out=runs/1", head="node1:29500") == ("29500", own[1])
