"""Texts among the settings: they stay as they are written, in a file and on the command line; nothing else is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mae_dist import config

NEEDED = ["data.path=d", "out=o", "model.name=vit_ti4"]


@pytest.mark.parametrize(
    "text", ["0042", "2026_11_25", "1e3", "12:30:45", "no", "null", "a: b", "{a,b}", "[a", "a #b", "&a", "- x", "0x1f"]
)
def test_text_setting_stays_as_written_on_the_command_line(text: str) -> None:
    assert config.load("pretrain", None, [*NEEDED, f"out={text}", f"track.project={text}"]).out == text


@pytest.mark.parametrize("text", ["0042", "2026_11_25", "1e3", "12:30:45", "no", "on", "2026-11-25", "0x1f", "'0042'"])
def test_text_setting_stays_as_written_in_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"out: {text}\ntrack: {{project: {text}, wandb: off}}\ntrain: {{epochs: 1e1}}\ndata: {{split: y}}\n"
    )
    loaded = config.load("pretrain", file, NEEDED[::2])
    assert (loaded.out, loaded.track.project, loaded.track.wandb) == (text.strip("'"), text.strip("'"), "off")
    assert (loaded.train.epochs, loaded.data.split, loaded.data.test_path) == (10.0, "y", None)
    assert config.from_dict("pretrain", yaml.safe_load(config.dump(loaded)), "dump", "") == loaded


def test_path_setting_has_lists_and_variables_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/s")
    file = tmp_path / "c.yaml"
    file.write_text("out: $SCRATCH/run\ndata: {path: [~/A, $SCRATCH/B], test_path: ~/V}\n")
    loaded = config.load("pretrain", file, NEEDED[2:])
    assert (loaded.out, loaded.data.path, loaded.data.test_path) == ("/s/run", "[/home/me/A, /s/B]", "/home/me/V")
    given = config.load("pretrain", None, [*NEEDED, "data.path=[A::~/x-{0..3}.tar, 'B, C']", "data.test_path=none"])
    assert (given.data.path, given.data.test_path) == ("[A::/home/me/x-{0..3}.tar, 'B, C']", None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("out=$NOT_THERE/x", "^out=.NOT_THERE/x: the environment has no variable NOT_THERE"),
        ("out=${oc.env:HOME}/x", "^out=.*is not read"),
        ("out=${HOME}/x", r"^out=.*is not read.*write \$NAME"),
        ("track.project=${oc.env:HOME}", "^track.project=.*is not read"),
        ("train.seed=${train.steps}", "^train.seed=.*is not read"),
        ("out=", "^argument 'out=': needs a value$"),
        ("train.steps= ", "^argument 'train.steps=': needs a value, or none$"),
        ("data.weights=2", r"^data.weights=2: must be a list, in brackets: data.weights=\[...\]"),
        ("data.weights={a: 1}", "^data.weights={a: 1}: must be a list"),
        ("view.scale=3", "^view.scale=3: must be a list"),
        ("data.weights=[2,1", "^argument 'data.weights=.2,1': brackets, braces or quotes do not match$"),
        ("data.weights=[1,x]", "^data.weights=.1,x.: must be a list of numbers"),
        ("data.mean=[yes]", "list of numbers"),
        ("train.seed=null", "^train.seed=null: needs a value; leave train.seed out"),
    ],
)
def test_interpolation_and_unknown_variables_are_refused(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.load("pretrain", None, [*NEEDED, override])


def test_interpolation_in_a_file_and_in_the_settings_of_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {seed: '${oc.env:HOME}'}")
    with pytest.raises(ValueError, match=r"c\.yaml: train\.seed=.*is not read"):
        config.load("pretrain", file, NEEDED)
    plain = yaml.safe_load(config.dump(config.load("pretrain", None, NEEDED)))
    plain["track"]["project"] = "${oc.env:HOME}"
    with pytest.raises(ValueError, match=r"run: track\.project=.*is not read"):
        config.from_dict("pretrain", plain, "run", "")


@pytest.mark.parametrize("text", ["010", "1_0", "1:30", "0x10", "-012"])
def test_setting_numbers_that_yaml_would_change_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"train.seed={text}: write a plain number"):
        config.load("pretrain", None, ["data.path=x", "out=y", "model.name=vit_demo4", f"train.seed={text}"])
    plain = ["data.path=x", "out=y", "model.name=vit_demo4", "train.seed=10", "optim.base_lr=0.05", "train.epochs=1e2"]
    assert config.load("pretrain", None, plain).train.seed == 10


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("out=a\nb", "control character"), ("data.path=a\x1b[2J", "control character"), ("out=???", "needs a value"),
        ("train.steps=10000000000000000000000", "no machine holds"), ("optim.base_lr=1e300", "at most"),
        ("machine.processes=1000000000", "at most 4096"), ("machine.workers=100000", "at most 1024"),
        ("machine.timeout=1e15", "at most 100000000"), ("model.image_size=1000000", "at most 32768"),
        ("data.channels=100000000", "at most 4096"), ("train.global_batch=1000000000000", "at most 16777216"),
    ],
)  # fmt: skip
def test_what_no_machine_holds_or_shows_is_refused(override: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        config.load("pretrain", None, ["out=x", "data.path=d", "model.name=vit_demo4", override])
    assert "\x1b" not in str(caught.value)
