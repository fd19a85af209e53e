"""The real ComfyUI, started whole with its server: what it logs of our node and serves of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

pytestmark = pytest.mark.rig

ROOT = Path(__file__).parents[2]
NODE = "WanVideoEnhancedBlockSwap"
WRAPPER = "ComfyUI-WanVideoWrapper"
PATIENCE_S = 180
PREDECESSOR = f"""
class {NODE}:
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{}}}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("BLOCKSWAPARGS",), "setargs", "theirs"

NODE_CLASS_MAPPINGS = {{"{NODE}": {NODE}}}
"""
BOTH = f"two folders have the node {NODE}: ComfyUI uses that of custom_nodes/"
MISSING = "ComfyUI-WanVideoWrapper is not loaded: "
CHANGED = "has changed, or is too old"

IN_ORDER = """
import os, runpy, sys
listdir, names = os.listdir, sys.argv[1].split(",")
os.listdir = lambda path=".": sorted(listdir(path), key=lambda name: names.index(name) if name in names else -1)
sys.argv[:2] = ["main.py"]
sys.path.insert(0, os.getcwd())
runpy.run_path("main.py", run_name="__main__")
"""
"""ComfyUI, with these folders listed in this order: it loads them as the system lists them."""


class Started:
    """A ComfyUI that serves, and the log of its start."""

    def __init__(self, address: str, log: str) -> None:
        self.address = address
        self.lines = [line for line in log.splitlines() if any(ours in line for ours in (BOTH, MISSING, CHANGED, NODE))]

    def ask(self, path: str) -> Any:
        with urlopen(f"{self.address}{path}", timeout=30) as answer:
            return json.load(answer)

    def packs_with_our_scripts(self) -> list[str]:
        return [path.split("/")[2] for path in self.ask("/extensions") if path.endswith("/js/blockswap.js")]

    def pack_of_the_node(self) -> str:
        return str(self.ask(f"/object_info/{NODE}")[NODE]["python_module"])


@contextlib.contextmanager
def started(scratch: Path, *packs: tuple[str, Path | None]) -> Iterator[Started]:
    """With these packs in custom_nodes, loaded in this order; without a path, the predecessor."""
    comfyui = os.environ.get("COMFYUI_DIR")
    if not comfyui:
        pytest.skip("needs COMFYUI_DIR, a ComfyUI with ComfyUI-WanVideoWrapper (and COMFYUI_PYTHON, its python)")
    names = [name for name, _ in packs]
    for name, path in packs:
        folder = scratch / "custom_nodes" / name
        folder.parent.mkdir(exist_ok=True)
        if path is None:
            folder.mkdir()
            (folder / "__init__.py").write_text(PREDECESSOR)
        else:
            folder.symlink_to(Path(comfyui) / "custom_nodes" / path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--cpu", "--disable-api-nodes", "--base-directory", str(scratch), "--port", str(port)]
    flags += ["--database-url", "sqlite:///:memory:"]
    log = scratch / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [os.environ.get("COMFYUI_PYTHON") or sys.executable, "-c", IN_ORDER, ",".join(names), *flags],
            cwd=comfyui,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        patience = time.monotonic() + PATIENCE_S
        while "To see the GUI go to" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < patience, log.read_text()
            time.sleep(0.2)
        yield Started(f"http://127.0.0.1:{port}", log.read_text())
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("is_first", [True, False], ids=["before us", "after us"])
def test_with_the_wrapper_nothing_is_logged(tmp_path: Path, is_first: bool) -> None:
    packs = [(WRAPPER, Path(WRAPPER)), ("WanVideo Enhanced.BlockSwap", ROOT)]
    with started(tmp_path, *(packs if is_first else reversed(packs))) as comfyui:
        assert comfyui.lines == []
        assert comfyui.pack_of_the_node() == "custom_nodes.WanVideo Enhanced.BlockSwap"
        assert comfyui.packs_with_our_scripts() == ["WanVideo%20Enhanced.BlockSwap"]


@pytest.mark.parametrize("is_first", [True, False], ids=["before us", "after us"])
def test_the_predecessor_and_a_missing_wrapper_are_logged_in_one_line_each(tmp_path: Path, is_first: bool) -> None:
    packs = [("IntelligentVRAMNode", None), ("ours", ROOT)]
    with started(tmp_path, *(packs if is_first else reversed(packs))) as comfyui:
        two, missing = comfyui.lines
        used, unused = ("ours (this package)", "IntelligentVRAMNode")[:: 1 if is_first else -1]
        assert f"{BOTH}{used}, which is loaded last, and not that of custom_nodes/{unused}; remove one" in two
        assert MISSING in missing
        assert comfyui.pack_of_the_node() == f"custom_nodes.{used.split()[0]}"
        assert comfyui.packs_with_our_scripts() == ["ours"]


def test_of_two_copies_of_this_package_one_is_served(tmp_path: Path) -> None:
    with started(tmp_path, ("one", ROOT), ("another", ROOT)) as comfyui:
        two, missing = comfyui.lines
        assert f"{BOTH}another (this package), which is loaded last, and not that of custom_nodes/one;" in two
        assert MISSING in missing
        assert comfyui.pack_of_the_node() == "custom_nodes.another"
        assert comfyui.packs_with_our_scripts() == ["another"]
