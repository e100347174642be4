"""What `submit.py` checks before anything is queued: ranks, disk, data, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_slurm import CLUSTER_FILE, SMALL, write_config

from launch import preflight, submit
from launch.cluster import Cluster
from mae_dist import config, model_sizes, models


def test_node_range_is_checked_for_every_number_of_nodes(data: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.path={data}", f"out={tmp_path / 'run'}", "machine.strategy=hsdp", "machine.shards=4"]
    chosen = config.load("pretrain", None, words)
    preflight.check_ranks(chosen, Cluster(nodes="4"))
    with pytest.raises(ValueError, match="machine.shards=4: 6 processes do not divide"):
        preflight.check_ranks(chosen, Cluster(nodes="2-4", gpus_per_node=2))
    with pytest.raises(ValueError, match="machine.shards=4: 5 processes do not divide"):
        preflight.check_ranks(chosen, Cluster(nodes="4-8"))


@pytest.mark.parametrize("name", ["vit_b16", "vit_demo4", "vit_ti4", "mixer_b16", "mixer_demo4"])
@pytest.mark.parametrize("factor", [1, 2])
def test_num_parameters_matches_the_model(name: str, factor: int) -> None:
    size = factor * model_sizes.default_image_size(model_sizes.SIZES[name]["patch"])
    backbone = models.build(name, image_size=size)
    assert model_sizes.num_parameters(name, size) == sum(p.numel() for p in backbone.parameters())


def test_full_disk_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={tmp_path / 'run'}"])
    preflight.check_disk(chosen)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(ValueError, match=r"1\.0 GB of disk are free, but 3 checkpoints of 0\.31 GB need"):
        preflight.check_disk(chosen)


def access_as_stranger(path: str | Path, mode: int) -> bool:
    """os.access as for a user who owns nothing: these tests may run as root, who may do anything."""
    return Path(path).stat().st_mode & mode == mode


def test_unreadable_tar_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "access", access_as_stranger)
    index = preflight.open_split(str(data), "train")
    for tar in index.tars:
        tar.chmod(0o644)
    preflight.check_readable(index)
    index.tars[1].chmod(0o640)
    with pytest.raises(ValueError, match=f"{index.tars[1]}: you may not read it; ask its owner"):
        preflight.check_readable(index)


def test_unwritable_folder_is_refused(
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
    monkeypatch.setattr(preflight.os, "access", access_as_stranger)
    where = [f"data.path={data}", f"out={others / 'a' / 'run'}"]
    words = ["pretrain", "--cluster", CLUSTER_FILE, *SMALL, *where, "--dry-run"]
    assert submit.main(words) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"mae-dist: out={others / 'a' / 'run'}: nothing can be written in {others}; choose")
    others.chmod(0o777)
    preflight.check_writable(others / "a" / "run")


def test_finished_run_and_foreign_folder_are_refused(data: Path, tmp_path: Path) -> None:
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={tmp_path}"])
    with pytest.raises(ValueError, match="exists and is no run of mae-dist"):
        preflight.check("pretrain", chosen, Cluster())
    run = tmp_path / "run"
    run.mkdir()
    chosen = config.load("pretrain", None, [*SMALL, f"data.path={data}", f"out={run}"])
    write_config(run, "pretrain", chosen, preflight.open_split(str(data), "train").fingerprint)
    preflight.check("pretrain", chosen, Cluster())
    (run / "result.json").write_text(json.dumps({"loss": 1}))
    with pytest.raises(ValueError, match="this run is finished"):
        preflight.check("pretrain", chosen, Cluster())
