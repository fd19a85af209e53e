"""The whole of ComfyUI, started as users start it, with one of its front ends in a browser: the node loads and reports.

COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m pytest -m rig tests/rig/test_rig_browser.py

The front end is RIG_FRONT_END, a folder of .frontends; by default the one that this ComfyUI asks for, if it is there,
else `pinned`. There is no device, so the node's run ends at once: it says on its bar that nothing is swapped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from frontend import bars
from frontend.front_end import NODE, PATIENCE_S, READY, RENDERERS, ROOT, Variant, browser, what_is_missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.rig

PORT = 8231

SECONDS_TO_START = 120

FOLDER = "wanvideo-enhanced-blockswap"

NEW_PROMPT = """async ([type, ceiling]) => {
    app.graph.clear();
    const [swap, preview] = [LiteGraph.createNode(type), LiteGraph.createNode("PreviewAny")];
    app.graph.add(swap);
    app.graph.add(preview);
    swap.connect(0, preview, 0);
    swap.widgets.find(widget => widget.name === "vram_threshold_percent").value = ceiling;
    await app.queuePrompt(0);
    return String(swap.id);
}"""
"""The node's output goes to one that shows it, and the prompt is queued, as by the button. With the same values,
ComfyUI would not execute the node again."""

CONNECTED = """async () => {
    const { api } = await import("/scripts/api.js");
    return api.socket?.readyState === WebSocket.OPEN && Boolean(api.clientId);
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variant]:
    """A running ComfyUI, and the front end that it shows."""
    folder = Path(os.environ.get("COMFYUI_DIR") or pytest.skip("needs COMFYUI_DIR"))
    if what_is_missing() is not None:
        pytest.skip(str(what_is_missing()))
    asked_for = re.search(r"^comfyui-frontend-package==(.+)$", (folder / "requirements.txt").read_text(), re.MULTILINE)
    assert asked_for is not None
    variant = Variant(os.environ.get("RIG_FRONT_END") or asked_for[1])
    variant = variant if variant.static.is_dir() else Variant("pinned")
    base = tmp_path_factory.mktemp("served")
    (base / "custom_nodes").mkdir()
    for source in (folder / "custom_nodes" / "ComfyUI-WanVideoWrapper", ROOT):
        (base / "custom_nodes" / (FOLDER if source == ROOT else source.name)).symlink_to(source)
    flags = ["--cpu", "--port", str(PORT), "--base-directory", str(base), "--front-end-root", str(variant.static)]
    command = [os.environ.get("COMFYUI_PYTHON") or sys.executable, str(folder / "main.py"), *flags]
    with (base / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process:
        try:
            _wait_for_server(process, base / "log")
            yield variant
        finally:
            process.kill()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture(params=RENDERERS)
def page(request: pytest.FixtureRequest, served: Variant, chromium: Browser) -> Iterator[SimpleNamespace]:
    """The page as the front end and this renderer show it, and what it has thrown."""
    variant = Variant(served.version, request.param)
    settings = json.dumps(variant.settings).encode()
    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/settings", data=settings).close()
    with contextlib.closing(chromium.new_page()) as page:
        thrown: list[str] = []
        page.on("pageerror", lambda error: thrown.append(str(error.stack)))
        page.goto(f"http://127.0.0.1:{PORT}")
        page.wait_for_function(READY, arg=NODE)
        page.wait_for_function(CONNECTED)
        yield SimpleNamespace(page=page, thrown=thrown, variant=variant)


def test_the_node_loads_runs_and_says_so_on_its_bar(page: SimpleNamespace) -> None:
    node = page.page.evaluate(NEW_PROMPT, [NODE, 40 + 10 * RENDERERS.index(page.variant.renderer)])
    shown = _wait_for_bar(page.page, node)
    assert shown["phase"] == "off"
    assert "CPU" in " ".join(shown["lines"])
    assert [error for error in page.thrown if "blockswap" in error.lower()] == []


def _wait_for_bar(page: Page, node: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE_S
    while (shown := page.evaluate(bars.PANEL, node))["phase"] == "idle" and time.monotonic() < end:
        time.sleep(0.1)
    return shown


def _wait_for_server(process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/object_info/{NODE}").close()
            return
        time.sleep(0.3)
    pytest.fail(log.read_text("utf-8", errors="replace")[-3000:])
