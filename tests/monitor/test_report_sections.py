"""The sections of `mae-dist report` about probe heads, predictions, seeds, speed, environment and what comes next."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_pages import DASH, EVIL, figures, finish, make_run, render, text_of, write_lines

from mae_dist import config, heads_settings
from mae_dist.__main__ import main
from mae_dist.monitor import compare, following, matrix, predictions, probe_table, records, report, speed
from mae_dist.run import events, jsonl, unreadable
from mae_dist.schema import HeadsConfig

HEADS = ["heads.lars=[0.1,0.4]", "heads.adamw=[1e-3]", "heads.features=[mean,cls]", "heads.ridge=true"]
INTERVAL = {"kind": "interval", "communication": 0.0, "checkpoint": 0.0, "memory": 1.5, "rank": 0, "host": "n1"}


def probe_with_heads(path: Path, **more: Any) -> Path:
    run = make_run(path, "probe", "init_from=mae", *HEADS, num_steps=4)
    rows = [
        {"name": f"{method} {n}", "method": method, "base_lr": lr, "weight_decay": 0.0, "features": "mean", "block": 4}
        | {"held_out_top1": top1, "diverged": gone}
        for n, (method, lr, top1, gone) in enumerate(
            [
                ("lars", 0.1, 20.0, False),
                (EVIL, 0.4, 31.0, False),
                ("ridge", None, 25.0, False),
                ("adamw", 9.0, 1.0, True),
            ]
        )
    ]
    found = {"chosen": f"{EVIL} 1", "held_out_top1": 31.0, "top1": 30.0, "top5": 60.0, "num_test_images": 400}
    found |= {"interval": [25.5, 34.5], "num_held_out": 100}
    (run / "heads.json").write_text(json.dumps(found | {"rows": rows} | more))
    return finish(run, verb="probe", loss=12.0, **found)


def write_predictions(path: Path, origin: str) -> Path:
    path.mkdir()
    (path / "computed.json").write_text(json.dumps({"from": origin, "step": 40}))
    (path / "result.json").write_text(json.dumps({"top1": 75.0, "num_images": 8, "classes": ["cat", EVIL]}))
    quoted = '"' + EVIL.replace('"', '""') + '"'
    classes = ["class,images,top1,top5,predicted", "cat,6,66.6,100,5", f"{quoted},2,50,100,3"]
    (path / "classes.csv").write_text("\n".join(classes) + "\n")
    rows = [f"cat,{quoted},2", f"{quoted},cat,1", "cat,cat,4", f"{quoted},{quoted},1"]
    (path / "confusion.csv").write_text("label,predicted,count\n" + "\n".join(rows) + "\n")
    return path


def test_report_of_probe_heads_has_each_head_with_its_interval_and_the_test_of_the_chosen_one(tmp_path: Path) -> None:
    html = render(probe_with_heads(tmp_path / "heads"))
    section = html[html.index("<h2>Probe heads</h2>") :]
    rows = [text_of(row) for row in re.findall(r"<tr.*?</tr>", section[: section.index("</section>")], re.DOTALL)]
    assert "30.00 25.50 to 34.50" in rows[1]
    assert "chosen" in rows[2]
    low, high = probe_table.wilson(31.0, 100)
    assert f"31.00 {low:.2f} to {high:.2f}" in rows[2]
    assert rows[-1].endswith("diverged")
    assert "<script" not in html
    assert "compared on 100 held-out training images" in text_of(html)


def test_wilson_interval_is_that_of_the_binomial_share() -> None:
    assert probe_table.wilson(50.0, 100) == pytest.approx((40.383, 59.617), abs=1e-3)  # a published table
    low, high = probe_table.wilson(0.0, 10)
    assert low == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(27.75, abs=0.01)
    for percent, count in ((3.0, 7), (99.0, 5000)):  # the ends solve |p - x| = z sqrt(x (1 - x) / n)
        for end in probe_table.wilson(percent, count):
            x = end / 100
            assert abs(percent / 100 - x) == pytest.approx(probe_table.NORMAL_95 * math.sqrt(x * (1 - x) / count))


def test_report_loss_of_a_probe_is_the_mean_over_its_heads(tmp_path: Path) -> None:
    run = probe_with_heads(tmp_path / "heads")
    (read,) = records.read_runs([run])
    assert read.num_heads == 6
    assert records.points(read, "loss")[0] == (1, pytest.approx(1 / 6))
    assert records.numbers(read)["loss"] == pytest.approx(2.0)
    assert "The loss is the mean over 6 heads" in render(run)


@pytest.mark.parametrize(
    "heads",
    [
        HeadsConfig(
            lars=(0.1,), sgd=(0.1, 0.2), adamw=(1.0,), weight_decay=(0.0, 0.1), features=("cls", "mean"), blocks=(1, 2)
        ),
        HeadsConfig(adamw=(1.0, 2.0), attentive=True, features=("mean", "mean")),
        HeadsConfig(ridge=True, knn=True),
    ],
)
def test_number_of_trained_heads_is_that_of_the_objective(heads: HeadsConfig) -> None:
    from mae_dist import models
    from mae_dist.objectives.probe_heads import ProbeHeads

    objective = ProbeHeads(models.build("vit_demo4", image_size=8), 3, heads, chunk=1, seed=0)
    assert heads_settings.num_trained(heads) == len(objective.heads)


@pytest.mark.parametrize("damage", ["{", "[]", '{"rows": 3}', '{"rows": [{"name": 1}]}'])
def test_report_without_sound_heads_has_no_table_or_names_the_file(tmp_path: Path, damage: str) -> None:
    run = probe_with_heads(tmp_path / "heads")
    (run / "heads.json").write_text(damage)
    if damage in ("{", "[]"):
        with pytest.raises(ValueError, match=r"heads\.json: n"):
            render(run)
    else:
        assert "Probe heads" not in render(run)


def test_report_of_predictions_has_classes_and_confusions(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "ft", "finetune", "init_from=mae"), top1=75.0, num_test_images=8)
    folder = write_predictions(tmp_path / "p", str(run))
    html = render(run, folder)
    assert "<script" not in html
    text = text_of(html)
    assert "cat 6 66.6 &lt;script" in text
    figure = re.findall(r'<figure class="matrix">.*?</figure>', html, re.DOTALL)
    titles = re.findall(r"<title>(.*?)</title>", figure[0])
    assert "cat taken for cat: 4 of 6 images" in titles
    assert 'fill-opacity="0.67"' in figure[0]
    assert "mae-dist predict" not in html
    assert f"mae-dist predict {run}" in render(run)
    assert "Top-1 75.00 % of 8 labelled images." in text
    with pytest.raises(ValueError, match="give the run that made them"):
        render(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("confusion.csv", "label,predicted,count\ncat,cat\n", "line 2 has 2 columns, not 3"),
        ("confusion.csv", "label,predicted,count\ncat,cat,many\n", "no number of images"),
        ("confusion.csv", "label,predicted,count\ndog,cat,1\n", "has a class that classes.csv lacks"),
        ("classes.csv", "class,images,top1,top5,predicted\ncat,6,nan,1,1\n", "no percentage"),
        ("result.json", "[", "not JSON"),
        ("result.json", None, "not finished"),
        ("confusion.csv", None, "without labels"),
    ],
)
def test_damaged_predictions_are_refused_in_one_sentence(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    run, folder = make_run(tmp_path / "ft", "finetune", "init_from=mae"), write_predictions(tmp_path / "p", "ft")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        render(run, folder)
    assert "\n" not in str(caught.value)


def test_confusion_matrix_of_many_classes_is_bounded() -> None:
    order = [f"class {n}" for n in range(predictions.MOST_CLASSES)]
    counts = {(a, b): 1 for a in order for b in order}
    text = matrix.confusion(order, counts)
    assert len(text) < 1_000_000
    assert "<title>" not in text


def seeds(tmp_path: Path, verb: str, start: str, scores: list[float]) -> list[Path]:
    made = []
    for seed, top1 in enumerate(scores):
        path = tmp_path / f"{verb}-{Path(start).name}-{seed}"
        run = make_run(path, verb, f"init_from={start}", f"train.seed={seed}", num_steps=5)
        made.append(finish(run, top1=top1, num_test_images=100))
    return made


def test_report_of_several_seeds_has_mean_and_spread(tmp_path: Path) -> None:
    runs = [
        *seeds(tmp_path, "finetune", "mae", [30.0, 32.0, 34.0]),
        *seeds(tmp_path, "finetune", "random", [20.0, 21.0]),
    ]
    html = render(*runs)
    assert "32.00 ± 2.00" in html
    assert "+11.50 <small>points top-1" in html
    error = math.hypot(2 / math.sqrt(3), math.sqrt(0.5) / math.sqrt(2))
    assert f"over 3 and 2 seeds is {error:.2f} points" in text_of(html)
    legends = ["".join(item.itertext()) for item in dict(figures(html))["Loss"].iterfind("ul/li")]
    assert legends == ["finetune-mae (3 seeds) 0.2", "finetune-random (2 seeds) 0.2"]
    assert "init_from mae random" in text_of(html)


def test_seeds_of_a_chain_are_one_group_and_equal_runs_are_none(tmp_path: Path) -> None:
    pretrained = [make_run(tmp_path / f"mae{seed}", "pretrain", f"train.seed={seed}") for seed in range(2)]
    tuned = [
        make_run(tmp_path / f"ft{seed}", "finetune", f"train.seed={seed}", f"init_from={start}")
        for seed, start in enumerate(pretrained)
    ]
    again = make_run(tmp_path / "again", "pretrain", "train.seed=1")
    _, groups = compare.grouped(records.read_runs([*pretrained, *tuned, again]))
    assert [[run.name for run in group.runs] for group in groups] == [["mae0", "mae1"], ["ft0", "ft1"], ["again"]]
    assert [group.name for group in groups] == ["mae (2 seeds)", "ft (2 seeds)", "again"]


def test_runs_that_start_from_themselves_are_read(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", "finetune", f"init_from={tmp_path / 'b'}")
    b = make_run(tmp_path / "b", "finetune", f"init_from={tmp_path / 'a'}", "train.seed=1")
    c = make_run(tmp_path / "c", "finetune", f"init_from={tmp_path / 'c'}")
    render(a, b, c)


def test_report_speed_says_what_limited_the_run_for_how_long(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "pretrain", "machine.workers=3")
    events.append(run, "start", step=0, ranks=4, hostname="n1", device="H100", git="abc", versions={"torch": "2.14"})
    slow = {"step": 10, "seconds": 30.0, "data": 0.6, "compute": 0.4, "limit": "data", "waited": 0.6} | INTERVAL
    fast = {"step": 20, "seconds": 70.0, "data": 0.0, "compute": 1.0, "limit": "compute", "waited": 0.0, "mfu": 0.5}
    damaged = {"step": 30, "seconds": "x"} | INTERVAL
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in (slow, fast | INTERVAL, damaged))
    (read,) = records.read_runs([run])
    for damaged_text, found in (
        ("[", None),
        ('{"images_per_second": "<b>"}', None),
        ('{"images_per_second": 987}', 987),
    ):
        (run / "preflight.json").write_text(damaged_text)
        assert speed.expected_rate(read) == found
    measured = speed.of(read)
    assert measured is not None
    assert measured.expected == 987
    assert measured.shares["data"] == pytest.approx(0.18)
    assert measured.mfu == pytest.approx(0.5)
    assert measured.limits == [
        "70% of the time limited by computing: 100% of the time, MFU 50%",
        "30% of the time limited by data: rank 0 on n1 waited 60% of the time for images (machine.workers=3); "
        "`mae-dist bench data` with this run's settings says what to change",
    ]
    text = text_of(render(run))
    assert "70% of the time limited by computing" in text
    assert "987" in text
    assert "device H100" in text
    assert "torch 2.14" in text


def test_report_draws_numbers_of_evaluations_whatever_their_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines += [
        {
            "kind": "evaluation",
            "step": step,
            "epoch": 1.0,
            "rank_me": 3.5 + step,
            "knn_top1": 4.0,
            EVIL: 1.0,
            "list": [1, 2],
        }
        for step in (10, 20)
    ] + [{"kind": "evaluation", "step": 40, "num_test_images": 3}]
    write_lines(run / "metrics.jsonl", lines)
    html = render(run)
    titles = [title for title, _ in figures(html)]
    assert titles[:3] == ["Loss", "Rank me", "KNN top-1"]
    assert not {"List", "Num test images"} & {*titles}
    assert "<script" not in html


def test_report_shows_what_the_run_warned_of(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    events.append(run, "warn", step=7, about="loss", message=f"the loss is too high {EVIL}")
    html = render(run)
    assert "warning: the loss is too high" in text_of(html[: html.index("<h2>Runs</h2>")])
    assert "<script" not in html


def test_next_commands_give_the_run_that_is_meant_when_copied(tmp_path: Path) -> None:
    """Each is read as `mae-dist` reads it: with the precision, data and model that were typed, and the recipe."""
    out, data = str(tmp_path / "a run"), ["data.path=/data/a b", "data.test_path=/data/test", "data.split=unlabelled"]
    typed = ["cifar100_vit_ti4", *data, "train.precision=fp32", "model.name=vit_ti4", "train.epochs=9"]
    pretraining = config.load("pretrain", None, [*typed[1:], f"out={out}"])
    make_run(Path(out), "pretrain", "train.precision=fp32", "model.name=vit_ti4", "model.image_size=32")
    for recipe in (typed[:1], []):
        for step in following.after_pretraining(pretraining, out, [*recipe, *typed[1:]]):
            _, verb, *words = shlex.split(step.command)
            found = config.load(verb, *config.split_words(verb, words))
            assert (words[:1] == recipe) == bool(recipe)
            assert (found.data.path, found.data.test_path, found.data.split) == ("/data/a b", "/data/test", "train")
            assert (found.train.precision, found.model.name, found.model.image_size) == ("fp32", "vit_ti4", 32)
            assert (found.origin, found.out) == (out, f"{out}-{verb}")
    words = ["finetune", "data.path=/d", "train.epochs=3", f"init_from={out}"]
    tuned = config.load("finetune", None, [*words[1:], "out=y", "train.precision=bf16"])
    facts: dict[str, Any] = {"finished": True, "is_start": False, "has_random": False, "predicted": True}
    (step,) = following.after("finetune", tuned, "y", shlex.join(["mae-dist", *words, "out=y"]), **facts)
    found = config.load("finetune", *config.split_words("finetune", shlex.split(step.command)[2:]))
    assert found == replace(tuned, init_from="random", out="y-random")


def test_report_names_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "it's", "pretrain")
    events.append(run, "start", step=0, command=shlex.join(["/x/__main__.py", "pretrain", "a b", "out=$(rm -rf /)"]))
    section = render(run).partition("What next")[2]
    assert "mae-dist pretrain &#39;a b&#39; &#39;out=$(rm -rf /)&#39;" in section
    finish(run, loss=0.5)
    assert main(["report", "--json", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]["next"]
    words = [shlex.split(step["command"]) for step in found]
    assert [word[1] for word in words] == ["probe", "finetune"]
    assert words[0][-2:] == [f"init_from={run}", f"out={run}-probe"]


@pytest.mark.parametrize("command", [None, 3, "", "mae-dist", "x 'unclosed", "x pretrain \x1b[2J"])
def test_a_command_that_is_none_is_not_shown(command: object) -> None:
    assert following.resuming(command) is None


def test_report_as_markdown_and_json_has_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*map(str, seeds(tmp_path, "finetune", "mae", [30.0, 32.0])), str(probe_with_heads(tmp_path / "a|b"))]
    assert main(["report", "--md", *runs]) == 0
    table = capsys.readouterr().out
    assert "| finetune-mae (2 seeds) | finetune | vit_p4_d128 | mae | 2 | 31.00 ± 1.41 |" in table
    assert "kNN" not in table
    assert "a\\|b" in table
    assert "95 % interval 25.50 to 34.50" in table
    out = tmp_path / "numbers.json"
    assert main(["report", "--json", *runs, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["groups"][0]["top1"] == 31.0
    assert found["groups"][0]["spread"] == pytest.approx(math.sqrt(2))
    assert found["runs"][2]["heads"]["interval"] == [25.5, 34.5]
    assert not (Path(runs[0]) / "report.html").exists()
    online = finish(make_run(tmp_path / "watched"), knn_top1=30.126, ridge_top1=41.0, rankme=57.34, loss=0.4)
    assert main(["report", "--md", *runs, str(online)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[1:6]]  # behind a path
    row = dict(zip(rows[0], rows[-1], strict=True))
    assert (row["| run"], row["top-1 %"], row["loss"]) == ("| watched", DASH, "0.4000")
    assert (row["kNN top-1 %"], row["ridge top-1 %"], row["RankMe"]) == ("30.13", "41.00", "57.3")
    with pytest.raises(ValueError, match="not allowed with"):
        report.main(["--md", "--json", *runs])


def test_report_draws_the_band_of_the_recipe(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "pretrain", "track.band=[[1,0.2,0.4],[3,0.1,0.2],[9,0.0,0.1]]")  # of 4 epochs
    figure = dict(figures(html := render(run)))["Loss"]
    boxes = [box.findtext("title") for box in figure.iterfind(".//rect[@class='box']")]
    assert boxes == [f"track.band: {part}" for part in ("0.2 to 0.4 in epochs 0 to 1", "0.1 to 0.2 in epochs 1 to 3",
                                                        "0 to 0.1 in epochs 3 to 9")]  # fmt: skip
    assert "Dashed boxes" in html
    (first, *_) = figure.iterfind(".//rect[@class='box']")
    assert float(first.attrib["width"]) == pytest.approx((900 - 80) / 4, abs=0.2)


def test_report_of_a_sweep_tells_of_the_best_and_lists_all(tmp_path: Path) -> None:
    runs = []
    for n in range(report.MOST_DETAILED + 3):
        run = make_run(tmp_path / f"sweep-{n:02d}", "probe", f"optim.base_lr={n + 1}", "init_from=random", num_steps=2)
        runs.append(finish(run, verb="probe", top1=float(n), num_test_images=100))
    html = render(*runs)
    short, rest = html.split("<h2>Runs</h2>")
    assert "Of 23 experiments, these 20 have the highest accuracy." in short
    assert short.count("<dt>") == 20
    assert ("sweep-02" in short, "sweep-03" in short, "sweep-22" in short) == (False, True, True)
    assert all(run.name in rest for run in runs)


def test_report_lists_unreadable_samples_by_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for number in range(5):
        reason = f"cannot be decoded ({number} bytes {EVIL})" if number else "label 7, but\n5 classes"
        for _ in range(2):  # a start, and a resume
            jsonl.append(run / unreadable.FILE, {"sample": f"s{number}\x1b[2J", "reason": reason})
    html = render(run)
    section = text_of(html[html.index("Unreadable samples") :])
    assert "cannot be decoded (1 bytes &lt;script&gt;" in section
    assert "4 s1\\x1b[2J, s2\\x1b[2J, s3\\x1b[2J label 7, but\\n5 classes 1 s0\\x1b[2J" in section
