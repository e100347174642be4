"""Container files, as far as they can be checked without an engine: pinned bases, no root, installed as in CI."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from mae_dist import __version__

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
IMAGE = DOCKER / "Dockerfile"
FILES = sorted(DOCKER.glob("*Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of each line, without comments and with continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied(path: Path) -> list[str]:
    """Files and folders of the repository that a Dockerfile copies or mounts."""
    found = []
    for word, rest in instructions(path):
        if word in ("COPY", "ADD") and "--from=" not in rest:
            found += [name for name in rest.split()[:-1] if not name.startswith("--")]
        found += re.findall(r"--mount=type=bind,source=([^,\s]+)", rest)
    return found


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return listed.split()


def in_context(name: str) -> bool:
    """Whether a file is in the build context: the last line of .dockerignore that matches it or its folder decides."""
    included = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if any(fnmatch(str(part), pattern) for part in (Path(name), *Path(name).parents[:-1])):
            included = line.startswith("!")
    return included


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_base_images_have_exact_tags(path: Path) -> None:
    stages: set[str] = set()
    for word, rest in instructions(path):
        if word != "FROM":
            continue
        image, *name = re.split(r"\s+AS\s+", rest)
        assert image in stages or re.fullmatch(r"[a-z]+(/[a-z]+)?:\d+\.\d[\w.\-]*(@sha256:[0-9a-f]{64})?", image), image
        stages |= set(name)
    assert stages or path != IMAGE


def test_image_user_is_a_number_and_not_root() -> None:
    words = instructions(IMAGE)
    last = words[max(i for i, (word, _) in enumerate(words) if word == "FROM") :]
    arguments = dict(rest.split("=", 1) for word, rest in last if word == "ARG")
    user = [rest for word, rest in last if word == "USER"][-1]
    for name, value in arguments.items():
        user = user.replace(f"${{{name}}}", value)
    assert user.isdecimal(), f"USER {user}: Kubernetes needs a number to know that it is not root"
    assert int(user) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_copied_files_exist_and_are_in_the_build_context(path: Path) -> None:
    names, missing = tracked(), []
    for source in copied(path):
        files = [name for name in names if name == source or name.startswith(source + "/")]
        missing += [source] * (not files) + [name for name in files if not in_context(name)]
    assert copied(path)
    assert not missing


def test_build_context_holds_only_copied_files() -> None:
    wanted = {source for path in FILES for source in copied(path)}
    extra = [name for name in tracked() if in_context(name) and not wanted & {name, *map(str, Path(name).parents)}]
    assert [name for name in extra if not name.startswith("docker/")] == []
    assert not in_context("mae_dist/data/__pycache__/order.cpython-311.pyc")


def test_image_and_make_install_with_the_same_script() -> None:
    makefile, image = (ROOT / "Makefile").read_text(), IMAGE.read_text()
    assert "docker/install.sh $(VENV) '.[dev]'" in makefile
    assert "docker/install.sh /opt/venv ." in image
    assert "-c .ci/constraints.txt" in (DOCKER / "install.sh").read_text()
    assert "pip install" not in makefile + image


def test_no_registry_hosts_are_named() -> None:
    for path in [*DOCKER.iterdir(), ROOT / ".dockerignore"]:
        assert not re.search(r"https?:|--(extra-)?index-url|\w\.(io|com|net)/", path.read_text()), path


def test_compose_refers_to_existing_files() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        context = (DOCKER / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DOCKER / source).is_dir() if source.startswith(".") else source in compose["volumes"]


def test_entrypoint_scripts_are_executable() -> None:
    for path in FILES:
        for word, rest in instructions(path):
            if word == "ENTRYPOINT":
                script = yaml.safe_load(rest)[0].removeprefix("/mae_dist/")
                assert os.access(ROOT / script, os.X_OK), script


def test_entrypoint_runs_mae_dist_unless_a_program_is_named(tmp_path: Path) -> None:
    for name, line in {"mae-dist": f'exec {sys.executable} -m mae_dist "$@"', "torchrun": 'echo torchrun "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def answer(*words: str) -> str:
        start = [str(DOCKER / "entrypoint.sh"), *words]
        return subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert answer("--version") == f"{__version__}\n"
    assert answer("runs", "--help").startswith("usage: mae-dist runs")
    assert answer("python", "-c", "print('a b', 2)") == "a b 2\n"
    assert answer("torchrun", "-m", "mae_dist") == "torchrun -m mae_dist\n"
