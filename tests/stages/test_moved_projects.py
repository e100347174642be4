"""Projects that are moved: data and initial weights are compared by what they are, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from running import MAE, SETTINGS, losses, refused

from launch import preflight
from mae_dist import config
from mae_dist.__main__ import main
from mae_dist.run import identity, layout

SMALL = [*SETTINGS, "model.image_size=16"]


def pretrain(data: Path, out: Path, *words: str) -> None:
    settings = [*SMALL, *MAE, "checkpoint.every=1", *words]
    assert main(["pretrain", f"data.path={data}", f"out={out}", *settings]) == 0


def finetune(data: Path, start: Path, out: Path, *words: str) -> list[str]:
    return [
        "finetune", f"data.path={data}", f"init_from={start}", f"out={out}", *SMALL, "model.pool=avg", "train.steps=2",
        "checkpoint.every=1", *words,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def project(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a pretraining and a fine-tuning, both finished."""
    top = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_data, top / "data")
    pretrain(top / "data", top / "pretrain", "train.steps=2")
    assert main(finetune(top / "data", top / "pretrain", top / "finetune")) == 0
    return top


@pytest.fixture
def moved(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, in which no path is as it was; the fine-tuning was stopped after its first step."""
    shutil.copytree(project, tmp_path / "project", copy_function=shutil.copy)
    run = tmp_path / "project" / "finetune"
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000000002")
    return tmp_path / "project"


def test_resume_in_a_moved_project_is_the_same_run(project: Path, moved: Path) -> None:
    assert main(finetune(moved / "data", moved / "pretrain", moved / "finetune")) == 0
    assert losses(moved / "finetune") == losses(project / "finetune")


def test_resume_with_other_initial_weights_is_refused(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights in another folder, and in the same one."""
    pretrain(moved / "data", moved / "other", "train.steps=2", "train.seed=1")
    line = refused(capsys, *finetune(moved / "data", moved / "other", moved / "finetune"))
    assert f"init_from: {moved.parent}" not in line  # the old path, not the copied run's
    assert f"-> {moved / 'other'}" in line
    shutil.rmtree(moved / "pretrain")
    (moved / "other").rename(moved / "pretrain")
    assert "init_from: " in refused(capsys, *finetune(moved / "data", moved / "pretrain", moved / "finetune"))


def test_resume_keeps_the_checkpoint_that_it_began_with(tiny_data: Path, tmp_path: Path) -> None:
    """The run that init_from names has trained on since, first with that checkpoint still there, then without."""
    start, run = tmp_path / "start", tmp_path / "run"
    pretrain(tiny_data, start, "train.steps=2")
    newest = layout.checkpoints(start)[-1]
    newest.rename(tmp_path / "later")
    (start / "result.json").unlink()
    words = finetune(tiny_data, start, run)
    assert main(words) == 0
    began = identity.of_checkpoint(layout.checkpoints(start)[-1])
    assert began.startswith("step-000000001 ")
    (tmp_path / "later").rename(newest)
    for gone in (False, True):
        if gone:
            shutil.rmtree(start / "checkpoints" / "step-000000001")
        (run / "result.json").unlink()
        shutil.rmtree(run / "checkpoints" / "step-000000002")
        assert main(words) == 0
        assert identity.started_from(run) == began


def test_finished_run_whose_data_have_moved_is_finished(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "finetune"
    shutil.copytree(project / "finetune", run)
    for data, start in (("nowhere", project / "pretrain"), (project / "data", "nowhere"), ("nowhere", "nowhere")):
        words = finetune(Path(data), Path(start), run)
        assert main(words) == 0
        assert "finetune is finished: loss" in capsys.readouterr().out
        assert "its data and initial weights were not compared" in caplog.text
        assert preflight.finished("finetune", config.load("finetune", None, words[1:]))
    assert "train.steps: 2 -> 3" in refused(
        capsys, *finetune(project / "data", project / "pretrain", run, "train.steps=3")
    )
    assert "nowhere: no such" in refused(capsys, *finetune(Path("nowhere"), project / "pretrain", run, "train.seed=3"))


def test_run_that_recorded_no_initial_weights_is_compared_by_path(moved: Path, project: Path) -> None:
    """As runs of earlier versions."""
    old = layout.settings(moved / "finetune")[2]
    new = config.load("finetune", None, finetune(moved / "data", moved / "pretrain", moved / "finetune")[1:])
    assert not identity.same_start(old, new, None)
    assert identity.same_start(old, old, None)
    assert identity.same_start(old, new, identity.started_from(project / "finetune"))


def test_identity_of_a_checkpoint_without_manifest_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", json.dumps({"files": {"a": 1}})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: (not JSON|no JSON object|not the manifest)"):
            identity.of_checkpoint(tmp_path)
