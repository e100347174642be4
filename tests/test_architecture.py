"""Architecture: who may import whom, what imports no torch, how long files, functions and the loop may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.architecture import FLOORS, PACKAGE, ROOT, imports, part_of, sources

TORCH_FREE = [
    "atomic", "cli", "commands.data", "commands.models", "config", "cost", "environment", "errors", "hints",
    "image_grid", "interfaces", "model_sizes", "patch_counts", "rng", "schema", "setting", "signals", "data.index",
    "data.order", "data.pack", "data.sources", "data.synthetic", "data.workers", "run.events", "run.identity",
    "run.jobs", "run.jsonl", "run.layout", "run.slurm_cli", "watchdog",
]  # fmt: skip
"""Modules that import no torch, beside all of monitor/."""


def launchers() -> list[Path]:
    return sorted((ROOT / "launch").rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert imports(path) == {"trained"}  # in `load`, so that importing the package imports no torch
        return
    floor = next(i for i, parts in enumerate(FLOORS) if part_of(path) in parts)
    assert imports(path) <= set().union(*FLOORS[:floor]) | {part_of(path)}


def test_libraries_with_effects_are_imported_in_few_files() -> None:
    collectives = {"dist.py", "rendezvous.py", "launcher.py", "parallel.py", "checkpoint.py", "async_checkpoint.py"}
    allowed_in = {
        "omegaconf": {"config.py"}, "wandb": {"mirror.py"}, "torch.distributed": collectives,
        "torch.nn.parallel": {"parallel.py"}, "pickle": {"cifar.py"}, "submitit": set(),
    }  # fmt: skip
    harmless = "from pickle import UnpicklingError\n"  # the type of torch.load's refusal
    for library, allowed in allowed_in.items():
        pattern = re.compile(rf"^\s*(import|from) {re.escape(library)}\b", re.M)
        assert {p.name for p in sources() if pattern.search(p.read_text().replace(harmless, ""))} <= allowed, library


def test_torch_free_modules_import_no_torch() -> None:
    monitor = [f"monitor.{path.stem}" for path in sorted((PACKAGE / "monitor").glob("*.py"))]
    names = [f"mae_dist.{name}" for name in [*TORCH_FREE, *monitor]] + ["mae_dist.__main__"]
    code = f"import sys\nfor name in {names}: __import__(name)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_have_at_most_400_lines() -> None:
    assert not {str(p): n for p in sources() + launchers() if (n := len(p.read_text().splitlines())) > 400}


def functions(path: Path) -> list[ast.FunctionDef]:
    """All functions and methods of a file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def length(node: ast.stmt) -> int:
    """Lines of a statement, comments and docstring included."""
    return (node.end_lineno or 0) - node.lineno + 1


def test_functions_have_at_most_50_lines() -> None:
    long = {f"{path.name}: {f.name}": length(f) for path in sources() + launchers() for f in functions(path)}
    assert not {name: lines for name, lines in long.items() if lines > 50}


def test_loop_of_fit_has_at_most_30_lines() -> None:
    (fit,) = [function for function in functions(PACKAGE / "train.py") if function.name == "fit"]
    (loop,) = [node for node in ast.walk(fit) if isinstance(node, ast.While)]
    assert length(loop) - 1 <= 30


def test_every_module_has_a_docstring() -> None:
    without = [
        p for p in sources() + launchers() if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not without


def test_no_file_is_unpickled() -> None:
    for path in sources():
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, path
        assert "allow_pickle=True" not in path.read_text()
