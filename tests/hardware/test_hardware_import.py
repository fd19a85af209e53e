"""What importing the layer does and does not do."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from wanvideo_enhanced_blockswap import hardware

FOLDER = Path(hardware.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


def imports_at_import_time(path):
    """Top names of the modules that a file imports before any function of it runs."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_the_exported_names_are_sorted_and_exist():
    assert sorted(hardware.__all__, key=lambda name: (not name.isupper(), name)) == hardware.__all__
    assert [name for name in hardware.__all__ if not hasattr(hardware, name)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_importing_a_file_needs_only_the_standard_library_psutil_and_torch(path):
    assert set(imports_at_import_time(path)) <= set(sys.stdlib_module_names) | {"psutil", "torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_reaches_above_the_layer(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    depth = len(path.relative_to(FOLDER).parts)
    assert [node.module for node in nodes if node.level > depth] == []


@pytest.mark.parametrize(("library", "owner"), [("pynvml", "nvml.py"), ("amdsmi", "rocm.py")])
def test_one_file_alone_knows_a_vendors_library(library, owner):
    trees = {path.name: ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    users = {
        name
        for name, nodes in trees.items()
        for node in nodes
        if (isinstance(node, ast.Import) and library in {alias.name for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and node.module == library)
    }
    assert users == {owner}
