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
    {"batch", "model_sizes", "image_grid", "rng", "schema", "cli", "signals", "errors"},
    {"models", "optim", "dist", "config", "launcher"},
    {"objectives", "evaluate", "weights", "data", "run"},
    {"parallel", "monitor"},
    {"rewind", "verify"},
    {"train"},
    {"stages"},
    {"commands"},
    {"__main__"},
]
"""Folders, and files beside them, from the ground up: each imports only from floors below its own."""
TORCH_FREE = [
    "cli", "config", "errors", "image_grid", "model_sizes", "rng", "schema", "signals", "data.index", "data.order",
    "data.pack", "data.synthetic", "run.events", "run.jobs", "run.jsonl", "run.layout",
]  # fmt: skip
"""Modules that import no torch, beside all of monitor/."""


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
    assert imports(path) <= set().union(*FLOORS[:floor]) | {room(path)}


def test_effects_stay_at_the_rim() -> None:
    homes = {
        "omegaconf": {"config.py"},
        "wandb": {"tracker.py"},
        "torch.distributed": {
            "dist.py",
            "launcher.py",
            "parallel.py",
            "checkpoint.py",
            "async_checkpoint.py",
            "directory.py",
        },  # fmt: skip,
        "torch.nn.parallel": {"parallel.py"},
        "pickle": {"cifar.py"},
        "submitit": set(),
    }
    for library, allowed in homes.items():
        pattern = re.compile(rf"^\s*(import|from) {re.escape(library)}\b", re.M)
        assert {p.name for p in sources() if pattern.search(p.read_text())} <= allowed, library


def test_torch_is_loaded_only_where_it_is_needed() -> None:
    monitor = [f"monitor.{path.stem}" for path in sorted((PACKAGE / "monitor").glob("*.py"))]
    names = [f"mae_dist.{name}" for name in [*TORCH_FREE, *monitor]] + ["mae_dist.__main__"]
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
