"""README and docs/: the real command line parses every command, what can run here runs, every link has a target."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from docs import generate
from launch import pipeline, submit, sweep
from mae_dist import config
from mae_dist.__main__ import USAGE, dispatch, main
from mae_dist.cli import VERBS
from mae_dist.schema import SCHEMAS

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "configs" / "RESULTS.md"
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in generate.PAGES)
PAGES = [README, *DOCS, RESULTS]
PROGRAMS = (
    "mae-dist", "python", "make", "torchrun", "docker", "apptainer", "enroot", "git", "pip", "cp", "mkdir", "id",
    "launch/torchrun.sh",
)  # fmt: skip
"""What a command in a page may begin with. Each is replaced by a script that records its arguments."""
MADE_BY_USERS = {"launch/clusters/mine.yaml"}
FULL = {"pretrain": "pretrain/cifar100_vit_ti4", "probe": "probe/cifar100_vit_ti4", "knn": "knn/cifar100_vit_ti4",
        "finetune": "finetune/cifar100_vit_ti4"}  # fmt: skip
"""What CONFIG.yaml, and mine.yaml that `mae-dist recipe` writes, stand for."""
SMALL = ["train.steps=1", "train.global_batch=4", "optim.warmup_epochs=0", "train.precision=fp32", "track.every=1",
         "machine.processes=1", "machine.workers=0"]  # fmt: skip
"""What every run of these tests adds to its command."""
DECODER = ["mae.decoder_dim=32", "mae.decoder_depth=1", "mae.decoder_heads=4"]
FEW = ["--train", "24", "--test", "8"]
"""How many images these tests pack."""
NOT_RUN = {
    "submit": "needs a cluster, but for --dry-run", "--version": "is no verb",
    "certify": "takes minutes", "chaos": "takes minutes", "bench": "takes minutes", "models": "counts all models",
    "preflight": "times steps",
    "import": "needs a downloaded file", "logs": "needs a SLURM job",
}  # fmt: skip


@cache
def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's ```sh blocks and in its sentences, as bash gives them. A sentence may also
    name a verb alone, `mae-dist report`, which is no command.

    Bash itself does quotes, variables, loops and comments. The programs are ones that only record how they were called.
    """
    text = re.sub(r"```(python|yaml)\n.*?```", "", page.read_text(), flags=re.S)
    inline = [word.replace("\\|", "|") for word in re.findall(r"`((?:mae-dist|python|make) [^`\n]+)`", text)]
    scripts = re.findall(r"```sh\n(.*?)```", text, re.S) + [
        word for word in inline if "VERB" not in word and re.search(r"[=/A-Z]| -|make|certify|chaos", word)
    ]
    with TemporaryDirectory() as folder:
        record = Path(folder) / "called"
        for program in PROGRAMS:
            stub = Path(folder) / program
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(f"#!/bin/sh\n{{ printf '%s\\037' {program} \"$@\"; printf '\\036'; }} >>'{record}'\n")
            stub.chmod(0o755)
        record.write_text("")
        for script in scripts:
            done = subprocess.run(
                ["bash", "-c", script], cwd=folder, env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            assert "command not found" not in done.stderr, f"{page.name}: {done.stderr}"
        calls = [call.split("\037")[:-1] for call in record.read_text().split("\036")[:-1]]
    return [[word for word in call if word != "..."] for call in calls]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stop_after_parsing(monkeypatch)
    for call in commands(page):
        if call[1] in ("rotate", "classes"):  # verbs that extending_verbs.md adds
            continue
        try:
            check(call)
        except (ValueError, SystemExit, AssertionError) as error:
            raise AssertionError(f"{page.name}: {' '.join(call)}: {error}") from error


class Parsed(Exception):
    """An argument parser has understood its arguments."""


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verbs parse their arguments and do nothing else."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: Any, *given: Any, original: Any = original, **more: Any) -> Any:
            result = original(self, *given, **more)
            if self.prog.startswith("mae-dist") and self.prog != "mae-dist submit":  # check_submit does more
                raise Parsed
            return result

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)


def check(call: list[str]) -> None:
    """Raise for a command that its program would not understand, and for a path of the repository that is missing."""
    program, *words = call
    if program in ("mae-dist", "launch/torchrun.sh"):
        check_verb(words)
    elif program == "torchrun":
        options = get_args_parser().parse_args(words)
        assert options.module
        assert options.training_script == "mae_dist"
        check_verb(options.training_script_args)
    elif words[0] == "launch/submit.py":
        check_submit(words[1:])
    elif program == "python":
        assert words[:2] == ["-m", "pytest"] or (ROOT / words[0]).is_file(), "neither pytest nor a file here"
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), "no such target"
    elif program == "docker" and words[0] == "run":
        check_verb(words[words.index("mae_dist") + 1 :])
    for word in words:
        path = word.partition("=")[2] or word
        if re.match(r"(configs|launch|docker|docs|tests|mae_dist)/", path) and path not in MADE_BY_USERS:
            assert (ROOT / path).exists(), f"{path} is not there"


def check_verb(words: list[str]) -> None:
    """Refuse arguments that `mae-dist WORDS` would refuse before it does anything."""
    verb, *rest = words
    if verb == "--version":
        return
    if verb == "submit":
        check_submit(rest)
        return
    assert verb in VERBS, f"no verb {verb}"
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if verb in SCHEMAS:
        check_settings(verb, rest)
        return
    if verb in ("certify", "chaos", "bench", "models"):
        check_settings("pretrain", settings)
    with pytest.raises(Parsed):
        dispatch(verb, rest)


def check_settings(verb: str, words: list[str]) -> list[str]:
    """Refuse settings that the verb would refuse; give the file and the settings, completed where a page leaves out
    what every command needs.
    """
    file, settings = config.split_words(verb, words)
    file = f"configs/{FULL[verb]}.yaml" if file in ("CONFIG.yaml", "mine.yaml", None) else file
    given = {word.partition("=")[0] for word in settings}
    needed = {"out": "RUN", "data.path": "DATA"} | ({} if verb == "pretrain" else {"init_from": "random"})
    settings += [f"{name}={value}" for name, value in needed.items() if name not in given]
    config.load(verb, file, settings)
    return [str(file), *settings]


def check_submit(words: list[str]) -> None:
    """Refuse arguments that submit.py would refuse before it looks at data or SLURM."""
    options = submit.parse(words)
    if options.verb == "pipeline":
        pipeline.load(*config.split_words("pipeline", options.words))  # pyright: ignore[reportArgumentType]
        return
    file_and_settings = check_settings(options.verb, options.words)
    for _, chosen in sweep.combinations(options.verb, options.sweep):
        config.load(options.verb, file_and_settings[0], [*file_and_settings[1:], *chosen])


@pytest.mark.parametrize(
    ("pages", "least"),
    [
        pytest.param([README], 8, id="README.md"),
        pytest.param(
            [README, *(page for page in DOCS if not page.name.startswith("extending"))], 16, id="all",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_commands_run_on_small_data(
    pages: list[Path], least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [call for page in pages for call in commands(page)]
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, name)
    shutil.copy("launch/clusters/example.yaml", "launch/clusters/mine.yaml")
    make_class_folders(Path("DIR"))
    done = set()
    for call in calls:
        words = smaller(call)
        if words is None or (key := " ".join(words)) in done:
            continue
        done.add(key)
        if "runs/sweep" in words and not Path("runs/sweep").exists():
            shutil.copytree("runs/ti4-knn", "runs/sweep/seed-0")
        assert main(words) == 0, f"{' '.join(call)} as {key}"
    assert len(done) >= least


def make_class_folders(folder: Path) -> None:
    """Images of two classes, as folders of files and as indexed tars, for what a user has already."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    assert main(["data", "pack", "folder", "--source", str(folder), "--out", "packed"]) == 0
    for tar in Path("packed").glob("*.tar"):
        tar.rename(folder / tar.name)
    shutil.rmtree("packed")


def smaller(call: list[str]) -> list[str] | None:
    """A command of a page as it can run here in seconds; None for one that needs a cluster, a GPU, a download, docker
    or minutes.
    """
    program, *words = call
    place: dict[str, str] = dict.fromkeys(("/data/imagenet", "/data/mine", "DATA"), "data/cifar100")
    place["mine.yaml"] = "cifar100_vit_ti4"
    words = [name + sign + place.get(value, value) for word in words for name, sign, value in (word.rpartition("="),)]
    if words[0] in ("submit", "launch/submit.py") and "CONFIG.yaml" not in words and "--local" not in words:
        return ["submit", *words[1:], "--dry-run"]
    if program != "mae-dist" or words[0] in NOT_RUN or {"CONFIG.yaml", "RUN", "imagenet"} & {*words}:
        return None
    if words[:2] == ["data", "pack"] and words[2] in ("cifar100", "synthetic"):
        return ["data", "pack", "synthetic", "--out", words[words.index("--out") + 1], *FEW]
    if any(word.startswith("/data/") or "://" in word for word in words) or "init_from=runs/timm-b16" in words:
        return None
    if any(word.startswith("init_from=") and word.endswith(".pth") for word in words):
        return None
    if words[0] in (*SCHEMAS, "rotate"):
        small = [word for word in SMALL if not (words[0] == "knn" and word.startswith("optim."))]
        if not any(word.startswith("model.name=") for word in words):
            small += ["model.name=vit_demo4", *(DECODER if words[0] == "pretrain" else [])]
            small += ["heads.blocks=[2,4]"] if any(word.startswith("heads.blocks=") for word in words) else []
        return words + small
    steps_and_blocks = {"100": "1", "6": "4"}
    return [steps_and_blocks.get(word, word) for word in words]


def test_extensions_work_as_written(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for name in ("mae_dist", "configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = []
    for page in (path for path in DOCS if path.name.startswith("extending")):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            extend(clone, block)
        lines += [smaller(call) for call in commands(page)]
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    arrays = {f"{split}_{kind}": value for split in ("train", "test")
              for kind, value in (("images", images), ("labels", np.arange(4) % 2))}  # fmt: skip
    np.savez(clone / "images.npz", **arrays)  # pyright: ignore[reportArgumentType]
    calls = [["data", "pack", "synthetic", "--out", "data/cifar100", *FEW]]
    calls += [line for line in lines if line]
    assert len(calls) == 5
    calls.append(["classes", "data/npz"])
    script = "import runpy, sys\nfrom mae_dist.__main__ import main\nrunpy.run_path('pack_npz.py')\n"
    script += f"for call in {calls}:\n    assert main(call) == 0, call"
    done = subprocess.run([sys.executable, "-c", script], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("cat\ndog\n")


def extend(clone: Path, block: str) -> None:
    """Do what a block of docs/extending.md says: a new file, or lines at the beginning of a list, imports on top."""
    head, _, body = block.partition("\n")
    named = re.fullmatch(r"# (\S+\.py)(?:, in (\w+))?", head)
    assert named, head
    file = clone / named[1]
    if named[2] is None:
        file.write_text(body)
        return
    added = body.splitlines(keepends=True)
    imports = "".join(line for line in added if line.startswith("from "))
    rows = "".join(line for line in added if not line.startswith("from "))
    text, count = re.subn(rf"^({named[2]}\b.*\{{\n)", lambda found: found[1] + rows, file.read_text(), flags=re.M)
    assert count == 1, head
    file.write_text(re.sub(r"^(?=import |from (?!__future__))", imports, text, count=1, flags=re.M))


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs" / name for name in generate.PAGES)], ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert "://" not in target, target
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_and_settings_exist(page: Path) -> None:
    text = page.read_text()
    known = {f"{section}.{name}" for schema in SCHEMAS.values() for section, values in config.to_dict(schema()).items()
             if isinstance(values, dict) for name in values}  # fmt: skip
    sections = {name.partition(".")[0] for name in known}
    for word in re.findall(r"`([\w./]+)`", text):
        if re.match(r"(mae_dist|launch|configs|docker|tests|docs)/.", word):
            assert (ROOT / word).exists(), word
        section, dot, rest = word.partition(".")
        if dot and section in sections and rest not in ("json", "yaml", "py", "md"):
            assert word in known, word


def test_pages_are_short() -> None:
    for page in (README, *DOCS):
        lines = page.read_text().splitlines()
        assert len(lines) <= (160 if page == README else 120), page.name
        assert not [line for line in lines if len(line) > 140 and not line.startswith("|")], page.name


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_page_is_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run `make docs`"


def test_every_page_is_in_the_readme() -> None:
    linked = set(re.findall(r"\(docs/([\w]+\.md)\)", README.read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_usage_names_every_verb() -> None:
    assert not [verb for verb in VERBS if verb not in SCHEMAS and f"mae-dist {verb}" not in USAGE]
