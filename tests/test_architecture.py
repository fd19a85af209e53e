"""The direction of imports, and what shipped code never does."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ROOMS = {
    "hardware": (),
    "hardware/cards": ("hardware",),
    "hardware/disk": ("hardware",),
    "blockswap": ("hardware",),
    "blockswap/model": ("blockswap", "hardware", "hardware/disk"),
    "blockswap/plan": ("blockswap/model", "blockswap", "hardware"),
    "blockswap/device": ("blockswap", "hardware"),
    "blockswap/host": (
        *("blockswap/device", "blockswap/plan", "blockswap/model", "blockswap", "hardware", "hardware/disk"),
    ),
    "blockswap/engine": (
        *("blockswap/host", "blockswap/device", "blockswap/plan", "blockswap/model", "blockswap", "hardware"),
    ),
    "blockswap/run": (
        *("blockswap/engine", "blockswap/host", "blockswap/device", "blockswap/plan", "blockswap/model", "blockswap"),
        *("hardware", "hardware/disk"),
    ),
    "blockswap/wrapper": (
        *("blockswap/run", "blockswap/engine", "blockswap/model", "blockswap", "hardware", "hardware/disk"),
    ),
    "blockswap/checkpoint": ("blockswap/model", "blockswap"),
    "blockswap/simulation": ("blockswap/device", "blockswap/model", "blockswap", "hardware"),
    "commands": (
        *("blockswap/run", "blockswap/engine", "blockswap/device", "blockswap/plan", "blockswap/model", "blockswap"),
        *("blockswap/checkpoint", "blockswap/simulation", "hardware", "hardware/cards", "hardware/disk"),
    ),
    ".": (
        *("commands", "blockswap/wrapper", "blockswap/run", "blockswap/engine", "blockswap/device", "blockswap/plan"),
        *("blockswap/model", "blockswap", "hardware"),
    ),
}
"""The rooms, and which others each may import from. `.` is what ComfyUI and the shell see; `blockswap` is the
core's root: errors, settings and spans, and the names that docs/python.md uses."""

MOST_FILES = 12
MOST_LINES = 480
"""A longer file raises a question: is it still one idea? The limit is never a reason to cut an idea in two."""

FEW_LINES = 80
"""A shorter file with a single importer belongs into that importer, unless it is a real boundary."""

BOUNDARIES = {
    "__main__.py": "python -m",
    "node_progress.py": "the browser",
    "blockswap/checkpoint/wan_file.py": "the disk",
    "commands/picture.py": "matplotlib",
    "commands/probe.py": "a command",
}
SHIPPED = sorted(file for room in ROOMS for file in (ROOT / room).glob("*.py"))
PURE = (
    *("errors", "settings", "spans", "model/layout", "model/names", "model/recognise", "model/wan"),
    *("plan/budget", "plan/schedule", "plan/hosting", "plan/swap_plan", "plan/make_plan"),
    *("run/replan", "run/report", "run/text", "run/trace_file", "wrapper/wiring", "simulation/races"),
)
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
FLAGGED = {"subprocess", "pickle", "os.system", "os.popen", "importlib.import_module", "eval", "exec", "print"}
every_shipped_file = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))


def room(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what is imported for annotations alone."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imports(path: Path, *, for_types: bool = True) -> Iterator[Path | str]:
    """What a file imports anywhere in it: files of the package, and dotted names of everything else."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree if for_types else WithoutTypes().visit(tree)):
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
    for target in set(imports(path, for_types=False)) - seen:
        seen.add(target)
        if isinstance(target, Path):
            reached(target, seen)
    return seen


def top_names(targets: set[Path | str]) -> set[str]:
    return {target.split(".")[0] for target in targets if isinstance(target, str)}


def test_every_folder_that_ships_is_a_room_of_the_table() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    named = {"/".join(package.split(".")[1:]) or "." for package in packaged}
    assert named == set(ROOMS)


@every_shipped_file
def test_a_room_imports_only_from_those_that_the_table_names(path: Path) -> None:
    allowed = {room(path), *ROOMS[room(path)]}
    others = {str(target) for target in imports(path) if isinstance(target, Path) and room(target) not in allowed}
    # The example of docs/python.md imports from the core's root, which re-exports names of its rooms.
    assert others == set() or path == ROOT / "blockswap" / "__init__.py"


def test_no_room_reaches_itself_through_the_table() -> None:
    def below(one: str) -> set[str]:
        return {name for other in ROOMS[one] for name in (other, *below(other))}

    assert [one for one in ROOMS if one in below(one)] == []


@every_shipped_file
def test_a_file_knows_the_package_by_relative_imports_and_comfyui_from_the_root_alone(path: Path) -> None:
    unknown = {"wanvideo_enhanced_blockswap"} | (COMFYUI if room(path) != "." else set())
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


def test_the_driver_is_asked_to_page_lock_in_one_file() -> None:
    calls = ("cudaHostRegister", "cudaHostUnregister", "cudart")
    named = {
        str(path.relative_to(ROOT))
        for path in [*SHIPPED, *(ROOT / "benchmarks").rglob("*.py")]
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in calls
    }
    assert named == {"hardware/pinning.py"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_has_at_most_12_files(name: str) -> None:
    assert len([file for file in (ROOT / name).glob("*.py") if file.name != "__init__.py"]) <= MOST_FILES


@every_shipped_file
def test_a_file_is_one_idea_of_a_length_that_can_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@every_shipped_file
def test_a_short_file_has_more_than_one_importer_or_is_a_boundary(path: Path) -> None:
    if path.name == "__init__.py" or len(path.read_text(encoding="utf-8").splitlines()) >= FEW_LINES:
        return
    importers = [file for file in SHIPPED if file.name != "__init__.py" and path in set(imports(file))]
    assert len(importers) > 1 or str(path.relative_to(ROOT)) in BOUNDARIES
