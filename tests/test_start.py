"""What is logged when ComfyUI starts: another folder with our node, and a wrapper that is not there."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import standin
import wanvideo_enhanced_blockswap as package
from aiohttp import web
from fake_comfyui import faked, warnings

ROOT = Path(package.__file__).parent
NODE = "WanVideoEnhancedBlockSwap"
REMOVE = "remove one of the two folders and restart ComfyUI"
PREDECESSOR = f"""
class {NODE}:
    pass

NODE_CLASS_MAPPINGS = {{"{NODE}": {NODE}}}
"""


class Start:
    """A ComfyUI that starts: packs are loaded, then the server."""

    def __init__(self, folder: Path, nodes: ModuleType, server: ModuleType) -> None:
        self.server = server.PromptServer.instance = SimpleNamespace(
            app=web.Application(), loop=asyncio.new_event_loop()
        )
        self.classes: dict[str, Any] = nodes.NODE_CLASS_MAPPINGS
        self.scripts: dict[str, str] = {}
        vars(nodes).update(EXTENSION_WEB_DIRS=self.scripts)
        self.folder = folder
        self.loaded: list[str] = []

    def add(self, name: str, content: str | Path = ROOT) -> ModuleType:
        """Loads a pack of this code, or a copy of that one, as ComfyUI does."""
        path = self.folder / name
        if isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.mkdir()
            (path / "__init__.py").write_text(content)
        module_name = str(path).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(module_name, path / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        self.loaded.append(module_name)
        spec.loader.exec_module(module)
        if hasattr(module, "WEB_DIRECTORY"):
            self.scripts[name] = str((path / module.WEB_DIRECTORY).absolute())
        for key, node in module.NODE_CLASS_MAPPINGS.items():
            self.classes[key] = node
            node.RELATIVE_PYTHON_MODULE = f"custom_nodes.{name}"
        return module

    def serve(self) -> None:
        async def start() -> None:
            runner = web.AppRunner(self.server.app)
            await runner.setup()
            await asyncio.sleep(0)
            await runner.cleanup()

        self.server.loop.run_until_complete(start())


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Start]:
    with faked(monkeypatch, tmp_path):
        start = Start(tmp_path, sys.modules["nodes"], sys.modules["server"])
        yield start
    start.server.loop.close()
    for name in [name for name in sys.modules if name.startswith(tuple(start.loaded))]:
        del sys.modules[name]


def wrapperless(comfyui: Start) -> None:
    for name in standin.NODE_CLASS_MAPPINGS:
        del comfyui.classes[name]


def two_folders(used: str, unused: str) -> str:
    last = f"ComfyUI uses that of {used}, which is loaded last"
    return f"two folders have the node {NODE}: {last}, and not that of {unused}; {REMOVE}"


def test_where_nothing_is_wrong_nothing_is_logged(comfyui: Start, caplog: pytest.LogCaptureFixture) -> None:
    comfyui.add("ours")
    comfyui.serve()
    assert warnings(caplog) == []
    assert list(comfyui.scripts) == ["ours"]


@pytest.mark.parametrize("is_last", [False, True], ids=["earlier", "later"])
def test_a_pack_with_our_node_is_named_in_one_line(
    comfyui: Start, caplog: pytest.LogCaptureFixture, is_last: bool
) -> None:
    packs: list[tuple[str, Any]] = [("IntelligentVRAMNode", PREDECESSOR), ("our.folder", ROOT)]
    for name, content in reversed(packs) if is_last else packs:
        comfyui.add(name, content)
    assert warnings(caplog) == []
    comfyui.serve()
    both = ["custom_nodes/our.folder (this package)", "custom_nodes/IntelligentVRAMNode"]
    assert warnings(caplog) == [two_folders(*reversed(both) if is_last else both)]
    # The browser says it on the node.
    assert list(comfyui.scripts) == ["our.folder"]


def test_of_two_copies_of_this_package_one_logs_it_and_one_has_scripts(
    comfyui: Start, caplog: pytest.LogCaptureFixture
) -> None:
    comfyui.add("cloned")
    comfyui.add("from-the-manager")
    comfyui.serve()
    used, unused = "custom_nodes/from-the-manager (this package)", "custom_nodes/cloned"
    assert warnings(caplog) == [two_folders(used, unused)]
    assert list(comfyui.scripts) == ["from-the-manager"]


def test_a_copy_that_is_loaded_again_from_its_folder_is_no_other(
    comfyui: Start, caplog: pytest.LogCaptureFixture
) -> None:
    ours = comfyui.add("ours")
    earlier = type(NODE, (), {"__module__": ours.NODE_CLASS_MAPPINGS[NODE].__module__})
    ours.COMFYUI.check(NODE, comfyui.classes[NODE], earlier)
    assert warnings(caplog) == []


@pytest.mark.parametrize("is_first", [True, False], ids=["before us", "after us"])
def test_a_wrapper_is_looked_for_when_every_pack_is_loaded(
    comfyui: Start, caplog: pytest.LogCaptureFixture, is_first: bool
) -> None:
    if not is_first:
        wrapperless(comfyui)
    comfyui.add("ours")
    comfyui.classes.update(standin.NODE_CLASS_MAPPINGS)
    comfyui.serve()
    assert warnings(caplog) == []


def missing(comfyui: Start, _: pytest.MonkeyPatch) -> None:
    wrapperless(comfyui)


def too_old(_: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("standin."):
            monkeypatch.delattr(module, "init_blockswap", raising=False)


@pytest.mark.parametrize(
    ("change", "said", "cure"),
    [
        (missing, "ComfyUI-WanVideoWrapper is not loaded: ", "install it through ComfyUI Manager, or look in"),
        (too_old, "standin has changed, or is too old: init_blockswap ", "update it and WanVideo Enhanced BlockSwap"),
    ],
)
def test_a_wrapper_that_is_not_there_is_logged_once_with_what_to_do(
    comfyui: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[..., None],
    said: str,
    cure: str,
) -> None:
    change(comfyui, monkeypatch)
    comfyui.add("cloned")
    comfyui.add("ours")
    comfyui.serve()
    (_, line) = warnings(caplog)
    assert line.startswith(said)
    assert f"; {cure}" in line


def test_a_missing_wrapper_is_not_logged_again_when_the_node_runs(
    comfyui: Start, caplog: pytest.LogCaptureFixture
) -> None:
    wrapperless(comfyui)
    ours = comfyui.add("ours")
    comfyui.serve()
    before = warnings(caplog)
    sys.modules["server"].PromptServer.instance = None
    ours.NODE_CLASS_MAPPINGS[NODE]().setargs(auto_hardware_tuning=False)
    assert warnings(caplog) == before
    assert len(before) == 1


def test_a_check_that_fails_does_not_end_the_start(comfyui: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = comfyui.add("ours")
    asked: list[object] = []
    monkeypatch.setattr(ours.COMFYUI, "check", lambda *of: (asked.append(of), 1 / 0))
    comfyui.serve()
    assert len(asked) == 1


def test_a_pack_that_is_loaded_while_the_server_runs_is_loaded(comfyui: Start) -> None:
    comfyui.serve()
    assert NODE in comfyui.add("ours").NODE_CLASS_MAPPINGS


@pytest.mark.parametrize("server", [SimpleNamespace(), SimpleNamespace(app=None), SimpleNamespace(app=object())])
def test_it_is_loaded_beside_a_server_that_is_not_comfyui_s(comfyui: Start, server: Any) -> None:
    sys.modules["server"].PromptServer.instance = server
    assert NODE in comfyui.add("ours").NODE_CLASS_MAPPINGS
