"""`mae-dist report`: self-contained, well-formed, true to the numbers, and escaped."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from report_pages import DASH, EVIL, Checker, figures, finish, make_run, render, write_lines

from mae_dist import image_grid
from mae_dist.__main__ import main
from mae_dist.cli import duration
from mae_dist.monitor import compare, records, report
from mae_dist.run import events, jobs

NOW = "2026-01-01T00:00:00+0000"
SUBMITTED = {"event": "submit", "time": NOW, "logs": "/", "nodes": "1", "tasks_per_node": 1}


def cells(html: str, name: str) -> list[str]:
    """The texts of a run's row in the summary table."""
    row = next(r for r in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL) if f" {name}</span>" in r)
    return [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row)]


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    """A pretraining with pictures and a resume, and a probe from it beside one from random."""
    pretrain = finish(make_run(tmp_path / "mae"), verb="pretrain", loss=0.4123, steps=40)
    day = "2026-07-10T"
    starts = [{"step": step, "hostname": EVIL, "ranks": 2} for step in (0, 17)]
    starts[1] |= {"reached": 20, "away": 93.0}
    events.append(pretrain, "start", time=day + "10:01:00", **starts[0])
    events.append(pretrain, "rewind", time=day + "11:00:00", step=9, to=6, nonfinite=[7, 8, 9], left_out=[3])
    jobs.record_submission(pretrain, jobs.Submission("7", str(pretrain / "jobs"), "1", 1))
    jobs.record(pretrain / "jobs", "7", 0, "stop_requested", 0, time=day + "11:58:19", by="SIGUSR2")
    events.append(pretrain, "stop", time=day + "11:58:20", reason="signal", step=17, message="stopped at step 17")
    again = {"reason": "saved", "by": "task", "message": "stopped and saved"}
    events.append(pretrain, "requeue", time=day + "11:58:21", job="7", start=0, saved=17, **again)
    jobs.record(pretrain / "jobs", "7", 0, "requeue", 0, time=day + "11:58:21", **again)
    events.append(pretrain, "start", time=day + "12:00:00", **starts[1])
    events.append(pretrain, "fail", time=day + "12:10:00", reason="crash", rank=1, message=EVIL)
    (pretrain / "pictures").mkdir()
    for step in range(1, 21):
        image = np.full((8, 8, 3), step, np.uint8)
        image_grid.sheet([[image]], tile=16).save(pretrain / "pictures" / f"reconstruction-{step:09d}.png")
    probes = []
    for name, start, top1 in (("probe-mae", str(pretrain), 31.25), ("probe-random", "random", 20.5)):
        run = make_run(tmp_path / name, "probe", f"init_from={start}")
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": 40, "epoch": 4.0, "test_top1": top1, "test_top5": 60.125}) + "\n")
        probes.append(finish(run, verb="probe", top1=top1, top5=60.125, num_test_images=2000, loss=2.75))
    return [pretrain, *probes]


def test_report_is_well_formed_and_loads_nothing(family: list[Path]) -> None:
    html = render(*family)
    checked = Checker(html)
    assert checked.addresses  # the pictures
    assert all(address.startswith("data:image/png;base64,") for address in checked.addresses)
    assert not checked.tags & {"script", "link", "iframe", "object", "base"}
    assert "@import" not in html
    assert "url(" not in html
    always = ["Learning rate", "Gradient norm", "Throughput", "Waiting for data"]
    assert [title for title, _ in figures(html)] == ["Loss", *always, "Loss", "Test top-1", "Test top-5", *always]


def test_report_summary_has_the_numbers(family: list[Path]) -> None:
    html = render(*family)
    tail = ["640", "8 s", "finished"]
    numbers = ["4", "40", DASH, DASH, "0.4123", DASH]
    assert cells(html, "mae") == ["mae", "pretrain", "vit_p4_d128", "random", "/data", *numbers, *tail]
    numbers = ["4", "40", "31.25", "60.12", "2.75", "2,000"]
    assert cells(html, "probe-mae") == ["probe-mae", "probe", "vit_p4_d128", "mae", "/data", *numbers, *tail]
    assert "per-patch variance" in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8, "8 s"), (59, "59 s"), (60, "1.0 min"), (7199, "2.0 h"), (86399, "24.0 h"), (9e5, "10.4 d")],
)
def test_duration_is_in_the_largest_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_report_pair_shows_the_gain_in_points(family: list[Path]) -> None:
    html = render(*family)
    (card,) = re.findall(r'<article class="pair">.*?</article>', html, re.DOTALL)
    assert "+10.75 <small>points top-1" in card
    error = math.sqrt(31.25 * 68.75 / 2000 + 20.5 * 79.5 / 2000)
    assert f"{error:.2f} points" in card


@pytest.mark.parametrize(
    ("verb", "changes"), [("probe", ["train.seed=1"]), ("probe", ["optim.base_lr=0.2"]), ("finetune", [])]
)
def test_report_pairs_differ_only_in_init_from(tmp_path: Path, verb: str, changes: list[str]) -> None:
    one = finish(make_run(tmp_path / "a", "probe", "init_from=mae"), top1=2.0, num_test_images=10)
    other = finish(make_run(tmp_path / "b", verb, "init_from=random", *changes), top1=1.0, num_test_images=10)
    same = finish(make_run(tmp_path / "c", "probe", "init_from=random", "data.path=/mnt"), top1=1.0, num_test_images=10)
    found = compare.pairs(compare.grouped(records.read_runs([one, other, same]))[1])
    assert [(random.name, run.name) for random, run in found] == [("c", "a")]


def test_report_escapes_everything(tmp_path: Path, family: list[Path]) -> None:
    evil = make_run(tmp_path / "<b>&'bold", num_steps=3)
    html = render(*family, evil, title=EVIL)
    assert "<script" not in html
    assert html.count(str(escape(EVIL))) >= 5  # title twice, hostname, two incidents
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;&#x27;bold" in html
    Checker(html)


def test_report_incidents_are_in_order_of_time(family: list[Path]) -> None:
    text = re.sub("<[^>]*>", " ", render(*family))
    parts = [
        "rewound to step 6: 3 steps were not finite; 1 samples left out", "stop requested by SIGUSR2",
        "stopped: stopped at step 17", "requeued by task: stopped and saved",
        "2 ranks; 3 steps repeated, 1.6 min after the last step", "failed (crash, rank 1): ",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count("requeued by task") == 1


def test_report_of_incomplete_runs_has_their_step(tmp_path: Path) -> None:
    started = make_run(tmp_path / "started", num_steps=0)
    by_epochs = make_run(tmp_path / "by_epochs", "pretrain", "train.epochs=12")
    by_steps = make_run(tmp_path / "by_steps", "pretrain", "train.steps=50")
    html = render(started, by_epochs, by_steps)
    assert cells(html, "started")[-1] == "incomplete, no step yet"
    assert cells(html, "by_epochs")[-1] == "incomplete at step 40 of 120"  # ten steps an epoch
    assert cells(html, "by_steps")[-1] == "incomplete at step 40 of 50"
    (started / "metrics.jsonl").unlink()
    assert "Curves" not in render(started)


def test_report_ignores_a_half_written_line_and_counts_damaged_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.25}]
    write_lines(run / "metrics.jsonl", lines, cut='{"step": 4, "lo')
    (read,) = records.read_runs([run])
    assert records.points(read, "loss") == [(1, 0.5), (3, 0.25)]
    assert read.num_unreadable == 0
    write_lines(run / "metrics.jsonl", lines, cut='{"step": 4, "lo\n{"step": 3, "loss": 0.125}\n')
    (read,) = records.read_runs([run])
    assert records.points(read, "loss") == [(1, 0.5), (3, 0.125)]  # the later line of a step counts
    assert "1 unreadable lines" in render(run)


def test_report_data_wait_is_a_share_of_the_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=1)  # a step takes 0.2 s, of which 0.05 s waiting
    (read,) = records.read_runs([run])
    assert records.data_wait(read) == [(1, pytest.approx(25.0))]


def test_report_marks_resumes(family: list[Path]) -> None:
    html = render(*family)
    marks = [
        [mark.findtext("title") for mark in figure.iterfind(".//g") if mark.get("class", "").startswith("mark")]
        for _, figure in figures(html)
    ]
    assert marks[:5] == [["mae: resumed at step 17"]] * 5  # the plots of pretrain
    assert marks[5:] == [[]] * 7


def test_report_gallery_has_the_latest_and_some_earlier_pictures(family: list[Path]) -> None:
    html = render(family[0])
    steps = [int(s) for s in re.findall(r'alt="reconstruction of mae at step (\d+)"', html)]
    assert steps[0] == 1
    assert steps[-1] == 20
    assert len(steps) == 1 + report.MAX_EARLIER_PICTURES
    assert steps == sorted(set(steps))
    assert len(re.findall(r'<input type="radio" name="film-1"', html)) == len(steps)
    assert len(re.findall(r"<input [^>]*checked", html)) == 1


def test_report_names_runs_of_equal_folder_names_by_their_paths(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert [run.name for run in records.read_runs([one, two, one])] == [str(one), str(two)]


DAMAGED = ["- a\n- b\n", "out: somewhere\n", "verb: [\n", "format: 2\nverb: knn\n", "verb: knn\n"]


@pytest.mark.parametrize("text", [None, *DAMAGED])
def test_report_of_no_run_is_one_sentence(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        report.main([str(tmp_path), "--out", str(tmp_path / "out.html")])
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("total_steps", "[1]", r"total_steps=\[1\] is no number"), ("verb", "[probe]", "verb .* is none of pretrain"),
        ("global_batch", "0", "train.global_batch=0: must be at least 1"),
        ("band", "[[1, .nan, 2]]", "track.band: .* must be"), ("band", "[[1, 2]]", "track.band: .* must be"),
    ],
)  # fmt: skip
def test_report_names_a_damaged_setting(tmp_path: Path, field: str, value: str, sentence: str) -> None:
    file = make_run(tmp_path / "run") / "config.yaml"
    file.write_text(re.sub(rf"\b{field}: .+", f"{field}: {value}", file.read_text(), count=1))
    with pytest.raises(ValueError, match=rf"config\.yaml.*{sentence}"):
        render(tmp_path / "run")


def test_report_names_a_damaged_result_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "result.json").write_text('{"top1": 3')
    with pytest.raises(ValueError, match=r"result\.json.*leave the run out"):
        render(run)


def test_report_is_written_into_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert report.main([str(one), str(two)]) == 0
    assert capsys.readouterr().out.strip() == str(one / "report.html")
    assert "<title>one, two</title>" in (one / "report.html").read_text()
    assert not list(one.glob(".report*"))
    out = tmp_path / "new" / "my.html"
    assert report.main([str(two), "--out", str(out), "--title", "Mine"]) == 0
    assert "<title>Mine</title>" in out.read_text()
    with pytest.raises(ValueError, match="is a folder"):
        report.main([str(two), "--out", str(tmp_path)])


def test_report_imports_no_torch() -> None:
    code = "import sys, mae_dist.monitor.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_report_embeds_pictures_of_the_run_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    (run / "pictures").mkdir()
    (tmp_path / "secret").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (run / "pictures" / "reconstruction-000000099.png").symlink_to(tmp_path / "secret")
    (run / "pictures" / "other-000000001.png").write_bytes(b"no picture")
    (run / "pictures" / "large-000000001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.truncate(run / "pictures" / "large-000000001.png", report.MOST_PICTURE + 1)
    html = render(run)
    assert "at step 99" not in html
    assert 'alt="other' not in html
    assert 'alt="large' not in html
    monkeypatch.setattr(report, "MOST_PICTURES", 8 * 4)
    for number in range(9):
        (run / "pictures" / f"kind{number}-000000001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert render(run).count('alt="kind') == 4
    assert "pictures from kind4 on are left out" in caplog.text


def test_report_of_a_long_run_is_thinned_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finish(make_run(tmp_path / "run", num_steps=100), loss=0.05)
    whole = cells(render(run), "run")
    monkeypatch.setattr(records, "MOST_STEPS", 10)
    page = render(run)
    assert "8 in a row are shown as one, the last." in page
    assert cells(page, "run") == whole
    assert records.read_runs([run])[0].last("step") == 100


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics.jsonl", {"kind": "step", "step": 10**400}),
        ("metrics.jsonl", {"kind": "step", "step": 41, "loss": 10**400}),
        ("metrics.jsonl", {"kind": "evaluation", "step": 40, "test_loss": 1e308, "test_top1": -1e308}),
        ("metrics.jsonl", {"kind": "evaluation", "step": 40, "test_top1": -(10**400)}),
        ("events.jsonl", {"event": "start", "time": NOW, "step": 3}),
        (
            "events.jsonl",
            {"event": "start", "time": NOW, "step": 3, "ranks": [], "hostname": ""},
        ),
        (
            "events.jsonl",
            {"event": "stop", "time": "0001-01-01T00:00:00", "reason": "", "step": 1, "message": ""},
        ),
        ("events.jsonl", {"time": NOW}),
        *(
            (
                "events.jsonl",
                {"event": "submit", "time": NOW, "job": job, "logs": "/", "nodes": "1", "tasks_per_node": 1},
            )
            for job in ("/etc", "**/", "[/red]x", "--help", "")
        ),
        ("events.jsonl", {"event": "fail", "time": NOW, "reason": ["a"], "rank": "x", "message": {}}),
        ("events.jsonl", {"event": "warn", "time": NOW, "step": 1, "about": [1], "message": "x"}),
        ("jobs/7_0.jsonl", {"event": "end", "time": NOW, "start": 0, "status": "x"}),
        ("jobs/7_0.jsonl", {"event": "stop_requested", "time": NOW, "start": 0, "by": [1]}),
        ("jobs/7_0.jsonl", {"event": "start", "time": NOW, "start": 0, "host": "\x1b[2J"}),
    ],
)
def test_runs_are_shown_without_records_that_nobody_has_written(
    tmp_path: Path, name: str, line: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    if name.startswith("jobs/"):
        jobs.record_submission(run, jobs.Submission("7", str(run / "jobs"), "1", 1))
        (run / "jobs").mkdir()
    with (run / name).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    assert "40" in cells(render(run), "run")
    assert main(["runs", str(tmp_path)]) == 0
    assert "40/" in capsys.readouterr().out
    if name.startswith("jobs/"):
        assert main(["logs", str(run)]) == 0
        assert "\x1b" not in capsys.readouterr().out
    (run / "result.json").write_text(json.dumps({"top1": 10**400}))
    with pytest.raises(ValueError, match=r"result.json: .*has a number that no machine holds"):
        render(run)
    assert main(["runs", str(tmp_path)]) == 0
