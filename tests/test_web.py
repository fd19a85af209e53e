"""What is served to browsers: modules that touch only what is ours, and that none keeps from before an update."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WEB = Path(__file__).parents[1] / "web"
MODULES = sorted((WEB / "js").iterdir())
ENTRY = WEB / "js" / "blockswap.js"
COMFYUI = {"../../../scripts/api.js", "../../../scripts/app.js"}

NOT_OURS = re.compile(
    r"\b(?:window|globalThis)\.\w+\s*=[^=]"  # a global of everybody's
    r"|\bdocument\.(?!createElement(?:NS)?\()"  # the page
    r"|\bprototype\b"  # a class of ComfyUI's
    r"|\b(?:eval|fetch|XMLHttpRequest|WebSocket|import)\s*\("  # code; the network without ComfyUI
    r"|\binnerHTML\b|<style"  # markup from texts; styles of the whole page
)


def code(module: Path) -> str:
    """The module without its comments."""
    text = module.read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def test_every_module_is_one_that_comfyui_tells_browsers_not_to_keep() -> None:
    # ComfyUI says so of .js and .css alone: an .mjs from before an update would stay in use with the new modules.
    assert [module.name for module in MODULES if module.suffix != ".js"] == []
    assert ENTRY in MODULES


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_module_imports_what_is_there(module: Path) -> None:
    imported = re.findall(r'^import .+ from "([^"]+)";$', code(module), re.MULTILINE)
    assert len(imported) == len(re.findall(r"^import\b", code(module), re.MULTILINE))
    missing = [name for name in imported if not (module.parent / name).is_file()]
    assert set(missing) == (COMFYUI if module == ENTRY else set())


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_module_touches_nothing_that_is_not_ours(module: Path) -> None:
    assert NOT_OURS.findall(code(module)) == []


def test_one_module_registers_the_extension_and_loading_the_others_does_nothing() -> None:
    # ComfyUI loads each .js by itself.
    for module in MODULES:
        statements = [line for line in code(module).splitlines() if re.match(r"[A-Za-z_$]", line)]
        acting = [
            line
            for line in statements
            if not re.match(r"(?:import|export|const|let|class|function|async function)\b", line)
        ]
        assert acting == (["app.registerExtension({"] if module == ENTRY else []), module.name
