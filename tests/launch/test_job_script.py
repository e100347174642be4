"""The script of a job, run by bash with a srun that only prints what a task would see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fake_slurm import command

from launch import slurm
from launch.cluster import Cluster, check_fields
from launch.pipeline import Stage
from launch.task_runner import JobSpec

VARIABLES = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME", "SLURM_EXPORT_ENV", "A", "B", "C", "PATH", "LATER")
CODE = Path("/copy of/the code")


def spec(logs: Path) -> JobSpec:
    return JobSpec(argv=("pretrain", "x.yaml"), logs=str(logs), ranks_per_node=1, stop_before_end=180)


def run(tmp_path: Path, cluster: Cluster, srun: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script of a job on this cluster; its srun prints VARIABLES, a line each, and then does `srun`."""
    shown = "\n".join(f'printf "%s=%s\\n" {name} "${name}"' for name in VARIABLES)
    command(tmp_path, "srun", f"{shown}\n{srun}")
    command(tmp_path, "squeue", "echo RUNNING")
    command(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/requeued; kill $PPID')
    check_fields(cluster)
    text = slurm.script([spec(tmp_path)], cluster, Stage("pretrain", "pretrain", ()), CODE)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "0"}
    return subprocess.run(
        ["bash"], input=text, capture_output=True, text=True, env=environment | variables, check=False, timeout=60
    )


def seen(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the first srun printed."""
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines()[: len(VARIABLES)])


def test_env_and_setup_leave_the_job_its_code_and_its_commands(tmp_path: Path) -> None:
    values = {"A": "two words", "B": 'it\'s "quoted"', "C": "$HOME `id` \\ *", "PATH": "/opt/x", "PYTHONPATH": "/mine"}
    setup = (
        "export PYTHONPATH=/of/setup PYTHONSAFEPATH= PYTHONHOME=/usr SLURM_EXPORT_ENV=NONE", "set -eu",
        "for word in LATER; do\n  export $word=done\ndone",
    )  # fmt: skip
    found = seen(run(tmp_path, Cluster(env=values, setup=setup), PYTHONPATH="/of/the/user"))
    assert {name: found[name] for name in "ABC"} == {name: values[name] for name in "ABC"}
    assert found["PATH"] == f"/opt/x:{tmp_path}:{os.environ['PATH']}"
    assert found["PYTHONPATH"] == f"{CODE}:/mine:/of/setup"
    assert (found["PYTHONSAFEPATH"], found["PYTHONHOME"], found["SLURM_EXPORT_ENV"]) == ("1", "", "ALL")
    assert found["LATER"] == "done"
    kept = seen(run(tmp_path, Cluster(python="apptainer exec x.sif python"), PYTHONHOME="/usr"))
    assert kept["PYTHONHOME"] == "/usr"


@pytest.mark.parametrize("line", ["module load cuda/99", "cd '/no where' && export A=1", "false"])
def test_failing_setup_line_ends_the_job_and_is_named(line: str, tmp_path: Path) -> None:
    done = run(tmp_path, Cluster(setup=("true", line, "export A=1")))
    assert done.returncode == 2
    message = done.stdout.splitlines()[-1]
    assert message.startswith(f"mae-dist: the line of setup `{line}` failed with status ")
    assert "PYTHONPATH" not in done.stdout  # no srun


def test_setup_line_that_is_none_is_refused() -> None:
    for line in ("if true; then", "export A='x", "done"):
        with pytest.raises(ValueError, match=r"setup: .*: is no shell line \(.+\); lines that belong together"):
            check_fields(Cluster(setup=("true", line)))


def test_job_is_requeued_where_its_tasks_could_not_be_started(tmp_path: Path) -> None:
    """srun fails, and `srun true` as well: a node is dead. After a task has ended, or with sound nodes, it is not."""
    wanted = "[[ $* != true ]] || exit {sound}; {end} exit 233"
    recorded = """echo '{{"event": "end", "start": 0, "status": 1}}' >> {0}/7_0.jsonl;"""
    for number, (sound, end, requeued) in enumerate(((1, "", True), (0, "", False), (1, recorded, False))):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = run(folder, Cluster(), srun=wanted.format(sound=sound, end=end.format(folder)))
        assert (folder / "requeued").exists() == requeued
        assert ("mae-dist: the tasks could not be started on all of" in done.stdout) == requeued
        assert done.returncode == (-15 if requeued else 233)
    (tmp_path / "0" / "7.unstarted").write_text("\n" * 20)
    (tmp_path / "0" / "requeued").unlink()
    assert run(tmp_path / "0", Cluster(), srun="exit 233").returncode == 233
    assert not (tmp_path / "0" / "requeued").exists()


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"gpus_per_node": 4}, {"--gpus-per-node=4"}),
        ({"gpus_per_node": 4, "gres": "gpu"}, {"--gres=gpu:4"}),
        (
            {"gpus_per_node": 4, "gres": "gpu:a100", "sbatch": {"gres": "disk:9"}},
            {"--gres=gpu:a100:4,disk:9"},
        ),
        ({"gres": "gpu", "sbatch": {"gres": "disk:9"}}, {"--gres=disk:9"}),
        ({"partition": "a, b"}, {"--partition=a,b"}),
    ],
)
def test_requests_as_sbatch_gets_them(given: dict, options: set[str], tmp_path: Path) -> None:
    text = slurm.script([spec(tmp_path)], Cluster(**given), Stage("pretrain", "pretrain", ()), CODE)
    lines = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {line for line in lines if line.startswith(("--gres", "--gpus", "--partition"))} == options


@pytest.mark.parametrize(
    ("name", "field"),
    [("gpus-per-node", "gpus_per_node"), ("ntasks", "tasks_per_node"), ("time", "time"), ("mem", "memory")],
)
def test_sbatch_option_that_is_a_field_is_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"sbatch.{name}=8: set {field} in the cluster file instead"):
        check_fields(Cluster(sbatch={name: 8}))
    with pytest.raises(ValueError, match="sbatch.gres=gpu:8: write gpus_per_node: N and gres: gpu"):
        check_fields(Cluster(sbatch={"gres": "gpu:8"}))
