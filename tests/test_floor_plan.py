"""The shape of the house: who may import whom, what stays free of torch, and that the README's map is the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mae_dist"
FLOORS = [
    {
        "schema",
        "config",
        "rng",
        "batch",
        "dist",
        "launcher",
        "models",
        "sizes",
        "pictures",
        "curves",
        "stop",
        "jobs",
        "folder",
    },
    {"data", "objectives", "optim", "checkpoint", "track", "evaluate", "weights"},
    {"parallel", "saver"},
    {"heal"},
    {"train"},
    {"stages"},
    {"__main__"},
]
TORCH_FREE = [
    "schema",
    "config",
    "rng",
    "pictures",
    "curves",
    "jobs",
    "folder",
    "sizes",
    "data.order",
    "data.index",
    "data.pack",
    "data.synthetic",
    "stages.report",
    "stages.runs",
    "stages.logs",
]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def launchers() -> list[Path]:
    return sorted((ROOT / "launch").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of mae_dist that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("mae_dist.")} - {"__version__"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert not imports(path)
        return
    floor = next(i for i, rooms in enumerate(FLOORS) if room(path) in rooms)
    allowed = set().union(*FLOORS[:floor]) | {room(path)}
    if floor == 0:
        allowed |= FLOORS[0]
    assert imports(path) <= allowed | ({"stages"} if room(path) == "__main__" else set())


def test_effects_stay_at_the_rim() -> None:
    homes = {
        "omegaconf": {"config.py"},
        "wandb": {"track.py"},
        "torch.distributed": {"dist.py", "launcher.py", "parallel.py", "checkpoint.py", "saver.py"},
        "torch.nn.parallel": {"parallel.py"},
        "pickle": {"cifar.py"},
        "submitit": set(),
    }
    for library, allowed in homes.items():
        pattern = re.compile(rf"^\s*(import|from) {re.escape(library)}\b", re.M)
        assert {p.name for p in sources() if pattern.search(p.read_text())} <= allowed, library


def test_torch_is_loaded_only_where_it_is_needed() -> None:
    names = [f"mae_dist.{name}" for name in TORCH_FREE] + ["mae_dist.__main__"]
    code = f"import sys\nfor name in {names}: __import__(name)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_file_hides_too_much() -> None:
    assert not {str(p): n for p in sources() + launchers() if (n := len(p.read_text().splitlines())) > 400}


def test_every_module_says_what_it_is() -> None:
    silent = [
        p for p in sources() + launchers() if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_nothing_is_unpickled() -> None:
    for path in sources():
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, path
        assert "allow_pickle=True" not in path.read_text()


def is_mapped(name: str) -> bool:
    """Whether the README's map must have this file."""
    return name.endswith((".py", ".yaml", ".sh", "Dockerfile"))


def test_the_readme_maps_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tracked = {name for name in listed if not Path(name).name.startswith(".") and is_mapped(name)}
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- map -->")[1]
    mapped, folders = set(), []
    for line in block.splitlines():
        match = re.match(r"^( *)([\w.\-]+/?)(?:  +(\S.*))?$", line)
        if not match:
            continue
        depth, name, caption = len(match[1]) // 2, match[2], match[3]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
            continue
        assert caption, f"{name} has no caption"
        mapped.add("/".join([*folders, name]))
    empty = {name for name in tracked if not (ROOT / name).read_text().strip()}
    assert {name for name in mapped if is_mapped(name)} == tracked - empty
