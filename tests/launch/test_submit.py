"""`submit.py` as a command: help, scripts, what it leaves when it fails, with a fake SLURM or none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import CLUSTER_FILE, ROOT, SMALL, command, write_config

from launch import preflight, snapshot, submit
from mae_dist import config
from mae_dist.run import identity, jobs


def test_help_and_dry_run_need_no_torch_and_no_slurm(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import torch` raises here, and no command of SLURM is on the PATH."""
    (tmp_path / "no" / "torch").mkdir(parents=True)
    (tmp_path / "no" / "torch" / "__init__.py").write_text("raise ImportError('torch is not for login nodes')")

    def stdout(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / "submit.py", *words], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(tmp_path / "no"), "PATH": "/nowhere"}, cwd=tmp_path,
        )  # fmt: skip
        return done.stdout

    text = " ".join(stdout("--help").split())
    assert "--sweep" in text
    assert "so partitions are not checked" in text
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", "out=run"]
    text = stdout(*words, "--nodes", "2", "--dry-run")
    for line in ("--nodes=2", "--ntasks-per-node=2", "--time=10", "--signal=USR2@20", "--requeue", "--mem=4000M"):
        assert f"#SBATCH {line}\n" in text
    assert "srun --unbuffered" in text
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)

    def printed(*words: str) -> str:
        assert submit.main(["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", "out=run", *words]) == 0
        return capsys.readouterr().out

    text = printed("--nodes", "1-2", "--dry-run")
    assert "#SBATCH --nodes=1-2\n" in text  # and nothing that would fix the number of ranks of a requeue
    assert "#SBATCH --mincpus=2\n" in text
    assert "#SBATCH --ntasks" not in text
    assert "--ntasks-per-node=2" in text
    swept = printed("--sweep", "seed=0,1,2", "--at-once", "2", "--dry-run")
    assert "#SBATCH --array=0-2%2\n" in swept
    assert swept.count("#!/bin/bash") == 2


def test_submit_without_slurm_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.environ["PATH"]
    os.environ["PATH"] = "/nowhere"
    try:
        words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"]
        assert submit.main(words) == 2
    finally:
        os.environ["PATH"] = path
    assert capsys.readouterr().err == (
        "mae-dist: sinfo: not found; is this a login node of a SLURM cluster? Without one: `mae-dist VERB ...`\n"
    )
    assert not (tmp_path / "run").exists()


def frozen(base: Path, name: str) -> config.RunConfig:
    """The settings that the newest submission has written for the run `name`."""
    code = max((base / "code").iterdir())
    return config.load("pretrain", str(code / "settings" / f"{name}.yaml"), [])


def test_settings_are_frozen_with_absolute_paths(
    data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "data.path=set", "data.test_path=set", "out=run"]
    assert submit.main(["pretrain", "--cluster", CLUSTER_FILE, *words]) == 0
    settings = frozen(tmp_path / "run", "pretrain")
    assert (settings.out, settings.data.path, settings.data.test_path) == (str(tmp_path / "run"), *(str(data),) * 2)
    # the same command, and the same run started by hand, have equal settings
    write_config(tmp_path / "run", "pretrain", settings, preflight.open_split("set", "train").fingerprint)
    assert submit.main(["pretrain", "--cluster", CLUSTER_FILE, *words]) == 0
    assert (slurm / "2.sbatch").exists()


def test_init_from_is_compared_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "data.path=set", "out=run"]
    chosen = config.load("probe", None, [*words, "init_from=start"])
    frozen = identity.absolute(chosen)
    assert frozen.init_from == str(tmp_path / "start")
    write_config(tmp_path / "run", "probe", frozen, "x")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    identity.refuse_others(tmp_path / "run", "probe", chosen, "x")
    with pytest.raises(ValueError, match="init_from: .*/start -> .*/other"):
        identity.refuse_others(tmp_path / "run", "probe", config.load("probe", None, [*words, "init_from=other"]), "x")
    assert identity.absolute(config.load("probe", None, [*words, "init_from=random"])).init_from == "random"


def test_job_inherits_no_variable_of_the_allocation_it_is_submitted_from(
    data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JOB_ID", "JOB_END_TIME", "RESTART_COUNT", "MEM_PER_NODE", "NTASKS", "CONF", "CLUSTERS"):
        monkeypatch.setenv(f"SLURM_{name}", "7")
    monkeypatch.setenv("SBATCH_ACCOUNT", "vision")
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"]
    assert submit.main(words) == 0
    names = {line.partition("=")[0] for line in (slurm / "1.env").read_text().splitlines()}
    assert {name for name in names if name.startswith("SLURM_")} == {"SLURM_CONF", "SLURM_CLUSTERS"}
    assert "SBATCH_ACCOUNT" in names


@pytest.mark.parametrize("folder_exists", [True, False])
def test_sigint_during_submission_leaves_nothing_queued_or_written(
    folder_exists: bool, data: Path, tmp_path: Path, slurm: Path
) -> None:
    """In a process of its own, with Python's handler: a process in the background may ignore SIGINT."""
    out = tmp_path / "new" / "sweep"
    if folder_exists:
        (out / "old").mkdir(parents=True)
    accept = (slurm / "sbatch").read_text()
    command(slurm, "sbatch", f"""[ ! -e {slurm}/1.sbatch ] || kill -INT $PPID\n{accept}""")  # Ctrl-C at the second job
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={out}", "--sweep", "seed=0,1"]
    typed = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from launch import submit; sys.exit(submit.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", typed, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (130, "mae-dist: interrupted, nothing is queued\n")
    assert (slurm / "cancelled").read_text().split() == ["1", "2"]
    if folder_exists:
        assert (out / "old").exists()
        assert not (out / "code").exists()
    else:
        assert not (tmp_path / "new").exists()


def test_sigint_during_import_ends_without_traceback() -> None:
    """Ctrl-C comes at the import of its first module."""
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
def test_closed_stdout_is_no_error(
    unbuffered: str, data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "launch" / "submit.py", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (slurm / "1.sbatch").exists()


def test_copy_of_the_code_sets_no_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have none."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    snapshot.copy_code(tmp_path / "code")
    copied = {file.relative_to(tmp_path / "code") for file in tmp_path.rglob("*.*")}
    assert copied >= {Path("mae_dist/schema.py"), Path("mae_dist/monitor/report.css"), Path("launch/submit.py")}
    assert not [file for file in copied if file.name.endswith(".pyc")]


@pytest.mark.usefixtures("slurm")
def test_failed_copy_of_the_code_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = snapshot.shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if source.name == "task_runner.py":
            raise OSError(errno.ENOSPC, "No space left on device", "there")
        copy(source, target)

    monkeypatch.setattr(snapshot.shutil, "copyfile", full)
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={tmp_path / 'new' / 'run'}"]
    assert submit.main(words) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"mae-dist: {tmp_path / 'new' / 'run' / 'code'}")
    assert output.endswith(": the code could not be copied: [Errno 28] No space left on device: 'there'\n")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "run").mkdir(parents=True)
    assert submit.main(words) == 2
    assert not list((tmp_path / "new" / "run").iterdir())


def test_run_is_not_submitted_again_while_slurm_does_not_answer(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={run}"]
    assert submit.main(words) == 0
    command(slurm, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    capsys.readouterr()
    assert submit.main(words) == 2
    assert capsys.readouterr().err == (
        f"mae-dist: out={run}: it is unknown whether job 1 of this run is still queued or running (slurm_load_jobs "
        "error: Unable to contact slurm controller); try again when SLURM answers\n"
    )
    command(slurm, "squeue", "echo '1|PENDING'")
    assert submit.main(words) == 2
    assert "job 1 of this run is PENDING; wait for it" in capsys.readouterr().err
    command(slurm, "squeue", "[[ $* == *--me* ]] || { echo 'Invalid job id specified' >&2; exit 1; }")
    assert submit.main(words) == 0  # SLURM has forgotten it


def test_sweep_beyond_the_largest_job_array_is_several_arrays_in_turn(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = tmp_path / "run", ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}"]
    command(slurm, "scontrol", "echo 'MaxArraySize            = 2'")
    assert submit.main([*words, f"out={run}", "--sweep", "seed=0,1,2,3,4", "--at-once", "3"]) == 0
    first, second, third, table = ((slurm / f"{number}.sbatch").read_text() for number in (1, 2, 3, 4))
    assert "--array=0-1%2" in first
    assert "--dependency" not in first
    assert "--array=0-1%2" in second
    assert "--dependency=afterany:1\n" in second
    assert "--array" not in third
    assert "--dependency=afterany:2\n" in third
    assert "--dependency=afterany:1:2:3\n" in table
    assert [s.job for seed in (0, 3, 4) for s in jobs.submissions(run / f"seed-{seed}")] == ["1_0", "2_1", "3"]
    printed = capsys.readouterr().out
    assert "jobs 1, 2, 3: pretrain, 5 runs, 3 at once" in printed
    assert printed.endswith("scancel 1 2 3 4\n")


def test_sweep_whose_second_job_array_is_refused_leaves_none_queued(
    data: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = tmp_path / "run", ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}"]
    command(slurm, "scontrol", "echo 'MaxArraySize            = 2'")
    accept = (slurm / "sbatch").read_text().partition("\n")[2]
    command(slurm, "sbatch", f"[ ! -e {slurm}/1.sbatch ] || {{ echo 'job limit reached' >&2; exit 1; }}\n{accept}")
    assert submit.main([*words, f"out={run}", "--sweep", "seed=0,1,2"]) == 2
    assert "sbatch refuses: " in capsys.readouterr().err
    assert (slurm / "cancelled").read_text() == "1\n"
    assert not run.exists()


def test_slurm_without_configuration_is_explained(
    data: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, f"data.path={data}", f"out={run}"]
    command(
        slurm, "sinfo", "echo 'sinfo: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host' >&2; exit 1"
    )
    assert submit.main(words) == 2
    assert capsys.readouterr().err == (
        "mae-dist: no SLURM in this shell; try `module load slurm`, or set SLURM_CONF "
        "(sinfo: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host)\n"
    )
    jobs.record_submission(run, jobs.Submission("12", str(run / jobs.FOLDER), "1", 1))
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit.main(words) == 2
    assert capsys.readouterr().err == (
        f"mae-dist: out={run}: it is unknown whether job 12 of this run is still queued or running, as there is no "
        "squeue here; submit from a login node of its cluster\n"
    )
