"""Which rank of how many a process is, and its cores, from the variables and files of launchers and kernels."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from running import MAE, SETTINGS, finish_ranks, losses, refused, start_rank

from mae_dist import environment as place
from mae_dist import launcher
from mae_dist.__main__ import main

SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu-[08-10],big1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def test_tasks_of_srun_are_ranks_that_meet_at_the_first_node() -> None:
    found = place.of_ranks(SRUN)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu-08",
    }
    assert port == place.of_ranks(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"]
    assert port != place.of_ranks(SRUN | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]


def test_tasks_of_mpirun_are_ranks_and_several_machines_need_an_address() -> None:
    assert place.of_ranks(OPEN_MPI)["MASTER_ADDR"] == "127.0.0.1"
    several = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        place.of_ranks(several)
    assert place.of_ranks(several | {"MASTER_ADDR": "node1"})["MASTER_ADDR"] == "node1"


@pytest.mark.parametrize(
    "single",
    [{}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["nothing", "script of a job", "step of one task"],
)
def test_process_that_is_alone_is_no_rank(single: dict[str, str]) -> None:
    assert place.of_ranks(single) == {}


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "1"}, ["WORLD_SIZE is not set beside RANK=1", "unset RANK"]),
        ({"RANK": "0"}, ["WORLD_SIZE is not set beside RANK=0", "unset RANK"]),
        ({"RANK": "", "WORLD_SIZE": "2"}, ["RANK is empty beside WORLD_SIZE=2"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set"]),
        ({"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["RANK='zero' is no number"]),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            ["RANK=2 is not below WORLD_SIZE=2"],
        ),
    ],
)
def test_left_over_variables_of_ranks_are_refused_before_anything_starts(
    variables: dict[str, str], parts: list[str], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=parts[0].split(" is ")[0]) as caught:
        place.of_ranks(variables)
    for part in parts:
        assert part in str(caught.value)
    line = refused(capsys, "pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE)
    assert parts[0] in line
    assert not (tmp_path / "run").exists()


def test_user_without_name_and_home_gets_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.of_user() == {}
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "mae_dist-home-54321"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result((stat.S_IFDIR | 0o700, *[0] * 3, 54321, *[0] * 5)))
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # which the system does not know
    given = place.of_user()
    assert given == {"LOGNAME": "user54321", "HOME": str(home)}
    assert home.is_dir()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert place.of_user() == {}


def test_compile_without_a_compiler_is_refused_before_the_run_starts(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    words = ["pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE, "machine.compile=true"]
    assert "machine.compile=true: torch needs a compiler (g++" in refused(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_other_processes_take_no_modules_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold somebody's data set, with modules beside the tars."""
    root = str(Path(place.__file__).parents[1])
    (tmp_path / "logging.py").write_text("open('executed', 'w')\n")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([*place.python(), "--version"], env=os.environ | {"PYTHONPATH": root}, check=False)
    assert done.returncode == 0
    assert not Path("executed").exists()
    monkeypatch.chdir(root)  # a clone that is not installed
    assert place.python() == [sys.executable, "-m", "mae_dist"]


def test_compiled_code_lies_in_a_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setenv(place.COMPILED, "kept")
    place.prepare_compiler("cpu")
    assert os.environ[place.COMPILED] == "kept"
    folder = tmp_path / f"mae_dist-compiled-{os.getuid()}"
    for make in (lambda: folder.symlink_to(tmp_path), lambda: folder.mkdir() or folder.chmod(0o777)):
        monkeypatch.delenv(place.COMPILED, raising=False)
        make()
        with pytest.raises(
            ValueError, match=f"^machine.compile=true: the folder of compiled code, {folder}, is another user's"
        ):
            place.prepare_compiler("cpu")
        folder.unlink() if folder.is_symlink() else folder.rmdir()
    for _ in range(2):
        monkeypatch.delenv(place.COMPILED, raising=False)
        place.prepare_compiler("cpu")
        assert os.environ[place.COMPILED] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_two_tasks_of_srun_train_one_run(tiny_data: Path, tmp_path: Path) -> None:
    words = ["pretrain", f"data.path={tiny_data}", f"out={tmp_path / 'run'}", *SETTINGS, *MAE, "train.steps=2"]
    words.remove("machine.processes=1")
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    step["SLURM_JOB_ID"] = str(tmp_path)  # no other test meets at its port
    log = tmp_path / "log"
    places = [step | {"SLURM_PROCID": number, "SLURM_LOCALID": number} for number in ("0", "1")]
    finish_ranks([start_rank(words, place, log) for place in places], log)
    assert "= 2 ranks" in log.read_text()
    assert len(losses(tmp_path / "run")) == 2


def test_threads_follow_the_cores_of_the_process_and_what_slurm_gave_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(place, "quota", lambda: 8.5)
    assert place.cores() == 8
    assert [place.threads({}, ranks) for ranks in (1, 3, 100)] == [8, 2, 1]
    assert place.threads({"SLURM_CPUS_PER_TASK": "4"}, 8) == 4


@pytest.mark.parametrize(
    ("lines", "files", "cores", "memory"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "a/b/memory.max": "9000"}, 1.5, 9000),
        ("0::/\n", {"cpu.max": "400000 100000\n", "memory.max": "max\n"}, 4.0, None),
        ("0::/gone\n", {"memory.max": "5000"}, None, 5000),
        (
            "4:cpu,cpuacct:/job\n3:memory:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000",
             "memory/job/memory.limit_in_bytes": "7000", "memory/memory.limit_in_bytes": "9223372036854771712"},
            3.0, 7000,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        ("no control groups", {"memory.max": "5000"}, None, None),
    ],
)  # fmt: skip
def test_cores_and_memory_are_the_least_of_the_control_groups(
    lines: str, files: dict[str, str], cores: float | None, memory: int | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(lines)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    assert place.quota(tmp_path / "groups", tmp_path / "own") == cores
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert place.memory(tmp_path / "groups", tmp_path / "own") == (memory or machine)


def test_ranks_of_a_launcher_share_the_quota_of_their_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    monkeypatch.setattr(os, "environ", own)  # a launcher changes it
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(place, "quota", lambda: 4.0)
    monkeypatch.setattr(place.os, "sched_getaffinity", lambda _: set(range(64)))
    given = []
    monkeypatch.setattr(launcher, "run", lambda *_: given.append(os.environ["OMP_NUM_THREADS"]) or 0)
    words = [setting for setting in SETTINGS if not setting.startswith("machine.processes")]
    assert main(["pretrain", "data.path=x", "out=y", *words, *MAE, "machine.processes=2"]) == 0
    assert given == ["2"]


def test_run_in_an_allocation_of_slurm_leaves_no_node_idle_without_a_word() -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    with pytest.raises(ValueError, match="allocation 7: its nodes are not this machine: `srun --ntasks-per-node=N"):
        place.nodes_left_out(shell)
    on_a_node = shell | {"SLURMD_NODENAME": "node1", "SLURM_PROCID": "0"}
    for step in ({}, {"SLURM_STEP_ID": "4294967290"}):  # the script of a job, the shell of salloc on a node
        assert "of the 2 nodes of allocation 7, this run uses one" in place.nodes_left_out(on_a_node | step)
        assert place.nodes_left_out(on_a_node | step | {"SLURM_JOB_NUM_NODES": "1"}) == ""
    assert place.nodes_left_out(on_a_node | {"SLURM_STEP_ID": "3"}) == ""  # srun of one task
    assert place.nodes_left_out({}) == ""
