"""What installers, the registry and ComfyUI see of the package."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import wanvideo_enhanced_blockswap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OUTER, *PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
INNER = [package.removeprefix(f"{OUTER}.") for package in PACKAGES]
NOT_SHIPPED = {"tests", "benchmarks"}


@pytest.fixture(scope="module")
def requirements() -> list[str]:
    return (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")


@pytest.fixture(params=["Wan-Video Enhanced BlockSwap.v3", "1st_blockswap-main", "ブロック"])
def folder_under_another_name(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """The package as ComfyUI loads it: by path, from a folder of any name, as a module named after that path."""
    folder = tmp_path / request.param
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for inner in {inner.split(".")[0] for inner in INNER}:
        shutil.copytree(ROOT / inner, folder / inner, ignore=shutil.ignore_patterns("__pycache__"))
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[loaded]


def kind_then_name(name: str) -> tuple[int, str]:
    """The order of ruff's RUF022: constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def distribution(requirement: str) -> str:
    """The name that a requirement starts with."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower()


@pytest.mark.parametrize("name", [OUTER, f"{OUTER}.blockswap", f"{OUTER}.hardware"])
def test_the_public_names_are_sorted_and_listed_once(name: str) -> None:
    public = importlib.import_module(name).__all__
    assert public == sorted(set(public), key=kind_then_name)


@pytest.mark.parametrize("name", [OUTER, f"{OUTER}.blockswap", f"{OUTER}.hardware"])
def test_every_public_name_exists(name: str) -> None:
    package = importlib.import_module(name)
    assert [public for public in package.__all__ if not hasattr(package, public)] == []


def test_every_folder_of_shipped_code_is_installed() -> None:
    folders = {init.parent.relative_to(ROOT).parts for init in ROOT.glob("*/**/__init__.py")}
    ours = {parts for parts in folders if parts[0] not in NOT_SHIPPED and not parts[0].startswith(".")}
    assert {".".join(parts) for parts in ours} == set(INNER)


def test_every_file_of_data_that_shipped_code_reads_is_installed() -> None:
    installed = PYPROJECT["tool"]["setuptools"]["package-data"]
    files = {path for inner in INNER for path in (ROOT / inner.replace(".", "/")).glob("*.csv")}
    assert files == {
        ROOT / package.removeprefix(OUTER).strip(".").replace(".", "/") / name
        for package, names in installed.items()
        for name in names
        if name.endswith(".csv")
    }
    assert files


def test_requirements_are_the_dependencies_of_the_project(requirements: list[str]) -> None:
    assert [line for line in requirements if line] == PYPROJECT["project"]["dependencies"]


@pytest.mark.parametrize("name", ["torch", "torchvision", "torchaudio", "amdsmi"])
def test_installing_never_replaces_what_was_built_for_the_users_gpu(name: str, requirements: list[str]) -> None:
    assert name not in map(distribution, requirements)


@pytest.mark.parametrize("key", ["PublisherId", "DisplayName"])
def test_the_registry_is_told_who_publishes_what(key: str) -> None:
    assert PYPROJECT["tool"]["comfy"][key]


def test_the_web_folder_is_not_named_in_pyproject() -> None:
    # ComfyUI would serve a folder named there a second time, under the name of the project.
    assert "web" not in PYPROJECT["tool"]["comfy"]


def test_every_node_offered_has_a_display_name() -> None:
    mapped = wanvideo_enhanced_blockswap
    assert mapped.NODE_CLASS_MAPPINGS.keys() == mapped.NODE_DISPLAY_NAME_MAPPINGS.keys()


def test_comfyui_finds_the_node_mappings_under_any_folder_name(folder_under_another_name: ModuleType) -> None:
    assert (
        folder_under_another_name.NODE_CLASS_MAPPINGS.keys() == wanvideo_enhanced_blockswap.NODE_CLASS_MAPPINGS.keys()
    )


@pytest.mark.parametrize("inner", INNER)
def test_everything_inside_is_loaded_from_the_same_folder(folder_under_another_name: ModuleType, inner: str) -> None:
    name = folder_under_another_name.__name__
    files = [file.stem for file in (ROOT / inner.replace(".", "/")).glob("*.py") if file.stem != "__init__"]
    modules = [importlib.import_module(f"{name}.{inner}.{stem}") for stem in files]
    homes = {str(getattr(value, "__module__", "")) for module in modules for value in vars(module).values()}
    assert any(home.startswith(f"{name}.{inner}.") for home in homes)
    assert not any(home.startswith(OUTER) for home in homes)


def test_the_core_exports_what_the_python_example_uses_and_nothing_else() -> None:
    example = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    imported = [node for node in ast.parse(example).body if isinstance(node, ast.ImportFrom)]
    (core,) = [node for node in imported if node.module == f"{OUTER}.blockswap"]
    assert {alias.name for alias in core.names} == set(importlib.import_module(f"{OUTER}.blockswap").__all__)
