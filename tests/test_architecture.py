"""The direction of imports, and what shipped code never does."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("hardware", "blockswap", "commands")  # above them: the files in the root, which ComfyUI and the shell see
SHIPPED = sorted([*ROOT.glob("*.py"), *(file for folder in LAYERS for file in ROOT.glob(f"{folder}/**/*.py"))])
PURE = (
    *("layout", "budget", "decision", "plan", "planning", "replan", "schedule", "settings", "errors", "clocks"),
    *("spans", "report", "report_text", "trace_file", "wiring"),
)
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
FLAGGED = {"subprocess", "pickle", "os.system", "os.popen", "importlib.import_module", "eval", "exec", "print"}
every_shipped_file = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))


def layer(path: Path) -> int:
    top = path.relative_to(ROOT).parts[0]
    return LAYERS.index(top) if top in LAYERS else len(LAYERS)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imports(path: Path) -> Iterator[Path | str]:
    """What a file imports anywhere in it: files of the package, and dotted names of everything else."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for place in [base / alias.name for alias in node.names] if base.is_dir() else [base]:
                file = place.with_suffix(".py")
                yield file if file.is_file() else base / "__init__.py"


def reached(path: Path, seen: set[Path | str]) -> set[Path | str]:
    for target in set(imports(path)) - seen:
        seen.add(target)
        if isinstance(target, Path):
            reached(target, seen)
    return seen


def top_names(targets: set[Path | str]) -> set[str]:
    return {target.split(".")[0] for target in targets if isinstance(target, str)}


@every_shipped_file
def test_imports_go_down_only(path: Path) -> None:
    above = {str(target) for target in imports(path) if isinstance(target, Path) and layer(target) > layer(path)}
    assert above == set()


@every_shipped_file
def test_a_file_knows_the_package_by_relative_imports_and_comfyui_from_the_root_alone(path: Path) -> None:
    unknown = {"wanvideo_enhanced_blockswap"} | (COMFYUI if layer(path) < len(LAYERS) else set())
    assert top_names(set(imports(path))) & unknown == set()


@pytest.mark.parametrize("name", ["__init__", "nodes"])
def test_what_comfyui_loads_reaches_neither_the_commands_nor_the_command_line(name: str) -> None:
    files = {
        str(target.relative_to(ROOT)) for target in reached(ROOT / f"{name}.py", set()) if isinstance(target, Path)
    }
    assert {file for file in files if file.startswith(("cli", "commands", "__main__"))} == set()


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_reaches_nothing_but_the_standard_library(name: str) -> None:
    assert top_names(reached(ROOT / "blockswap" / f"{name}.py", set())) <= set(sys.stdlib_module_names)


@every_shipped_file
def test_shipped_code_has_none_of_the_calls_that_a_registry_scan_flags(path: Path) -> None:
    called = {ast.unparse(node.func) for node in nodes(path) if isinstance(node, ast.Call)}
    named = {name for target in imports(path) if isinstance(target, str) for name in (target, target.split(".")[0])}
    assert (called | named) & FLAGGED <= ({"print"} if path.name.startswith("cli") else set())


@every_shipped_file
def test_a_shipped_file_has_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
