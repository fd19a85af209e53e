"""One page of the front end: what a test does with it and asks of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .stub_server import StubServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

ROOT = Path(__file__).parents[2]
NODE = "WanVideoEnhancedBlockSwap"
BARRIER = "stub_server.sent"
READY = """type => !!(
    window.app?.vueAppReady && app.extensionManager && !app.extensionManager.spinner &&
    app.extensionManager.workflow.activeWorkflow && LiteGraph.registered_node_types[type]
)"""
"""The page has started: nodes are registered, extensions set up, and its first workflow is open."""

RESET = """async baseline => {
    const { command, sidebarTab, workflow } = app.extensionManager;
    const { settings } = app.ui;
    sidebarTab.activeSidebarTabId = null;
    for (const [id, value] of Object.entries(settings.settingsValues)) {
        const before = id in baseline ? baseline[id] : settings.getSettingDefaultValue(id);
        if (JSON.stringify(value) !== JSON.stringify(before)) await settings.setSettingValueAsync(id, before);
    }
    await command.execute("Comfy.NewBlankWorkflow");
    const others = workflow.openWorkflows.filter(each => each !== workflow.activeWorkflow);
    for (const each of others) await workflow.closeWorkflow(each);
}"""

WHERE = """id => {
    const [x, y, width, height] = app.graph.getNodeById(id).getBounding();
    const { scale, offset } = app.canvas.ds;
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    const corner = { x: left + (x + offset[0]) * scale, y: top + (y + offset[1]) * scale };
    return { ...corner, width: width * scale, height: height * scale };
}"""
"""What a node covers of the page."""

PATIENCE_S = 30
"""How long a condition may take to become true: a page starts in 2 to 4 seconds on an idle machine."""

VERSIONS, RENDERERS, LANGUAGES = ("pinned", "newest"), ("canvas", "vue"), ("en", "zh")

EARLIER = ("1.26.13", "1.28.9", "1.36.14", "1.42.15")
"""Front ends of earlier versions of ComfyUI, which .ci/frontends names: test_versions.py alone runs in them."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A front end as somebody uses it.

    Attributes:
        version: `pinned` is what ComfyUI 0.33 brings; one of EARLIER is a number.
        renderer: `vue` is called Nodes 2.0 in the settings.
        language: Of the user interface.
    """

    version: str = "newest"
    renderer: str = "canvas"
    language: str = "en"

    def __str__(self) -> str:
        return f"{self.version}-{self.renderer}-{self.language}"

    @property
    def static(self) -> Path:
        return ROOT / ".frontends" / self.version / "comfyui_frontend_package" / "static"

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from a new user's settings: no welcome, and no looking for new versions."""
        return {
            "Comfy.Locale": self.language,
            "Comfy.VueNodes.Enabled": self.renderer == "vue",
            "Comfy.TutorialCompleted": True,
            "Comfy.Notification.ShowVersionUpdates": False,
        }


VARIANTS = [Variant(v, r, language) for v in VERSIONS for r in RENDERERS for language in LANGUAGES]


def chromium_path() -> str | None:
    """Debian's Chromium, or what other systems call it."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path is not None), None)


def what_is_missing() -> str | None:
    """Why no browser test can run here, and the command that changes it."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return 'playwright is missing: pip install -e ".[test]"'
    if chromium_path() is None:
        return "chromium is missing: apt-get install chromium"
    if not all(Variant(version).static.is_dir() for version in (*VERSIONS, *EARLIER)):
        return "the front ends are missing: bash .ci/frontends"
    return None


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, which finds no host but this machine."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path(), args=arguments)
        yield chromium
        chromium.close()


@contextmanager
def opened(chromium: Browser, variant: Variant) -> Iterator[FrontEnd]:
    """The front end, ready, with an empty graph."""
    with StubServer(variant.static, variant.settings) as server:
        context = chromium.new_context(viewport={"width": 1600, "height": 900}, locale=variant.language)
        try:
            yield FrontEnd(context.new_page(), server, variant)
        finally:
            context.close()


class FrontEnd:
    """A page and its server.

    Attributes:
        page: Playwright's, for what is not here.
        server: Holds the settings that the page has stored.
        variant: Which front end this is.
        errors: Exceptions in the page, and errors on its console, since `reset`.
        errors_at_start: Those until it was ready.
    """

    def __init__(self, page: Page, server: StubServer, variant: Variant) -> None:
        self.page, self.server, self.variant = page, server, variant
        self.errors: list[str] = []
        self._sent = 0
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error.stack or error}"))
        page.on("console", self._on_console)
        page.goto(server.address)
        self._start()
        self._settings = self.evaluate("() => ({ ...app.ui.settings.settingsValues })")
        self._stored = dict(server.settings)
        self.errors_at_start = tuple(self.errors)

    def reload(self) -> None:
        """Loads the page again, as a user does."""
        self.page.reload()
        self._start()
        self.close_dialogs()

    def _start(self) -> None:
        self.wait_for(READY, NODE)
        self.evaluate(
            """async barrier => {
                const { api } = await import("/scripts/api.js");
                window.testSeen = 0;
                api.addEventListener(barrier, event => { window.testSeen = event.detail.count; });
            }""",
            BARRIER,
        )
        self.settle()

    def reset(self) -> None:
        """An empty graph in the only tab, no dialog, the settings of the start, and no errors yet."""
        self.close_dialogs()
        self.evaluate(RESET, self._settings)
        self.settle()
        self.server.settings.clear()
        self.server.settings.update(self._stored)
        self.errors.clear()
        self.server.failed.clear()

    def close_dialogs(self) -> None:
        """Presses Escape until no dialog is left: the first may only close a list or a field of it."""
        patience = time.monotonic() + PATIENCE_S
        while self.page.get_by_role("dialog").count():
            assert time.monotonic() < patience, "a dialog does not close"
            self.page.keyboard.press("Escape")
            self.settle()

    def evaluate(self, script: str, argument: object = None) -> Any:
        """What a JavaScript function or expression gives; it may be asynchronous."""
        return self.page.evaluate(script, argument)

    def wait_for(self, script: str, argument: object = None) -> None:
        """Waits until a JavaScript function or expression is true; fails after PATIENCE_S."""
        self.page.wait_for_function(script, arg=argument)

    def settle(self) -> None:
        """Waits for two frames: what has happened so far is drawn."""
        self.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def load(self, workflow: dict[str, Any]) -> None:
        """Opens a workflow, as the menu does."""
        self.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.settle()

    def add(self, kind: str, **values: object) -> str:
        """Adds one node to the graph; gives its id."""
        node = self.evaluate(
            """([kind, values]) => {
                const node = LiteGraph.createNode(kind);
                node.pos = [300, 150];
                app.graph.add(node);
                for (const [name, value] of Object.entries(values))
                    node.widgets.find(widget => widget.name === name).value = value;
                return String(node.id);
            }""",
            [kind, values],
        )
        self.settle()
        return str(node)

    def send(self, event: str, detail: object) -> None:
        """Sends a JSON event; returns once the page has handled and drawn it."""
        self.server.send(event, detail)
        self._wait_until_seen()

    def send_text(self, node: object, text: str) -> None:
        """Sends a node's progress text, the one that ComfyUI shows without our JavaScript."""
        self.server.send_text(str(node), text)
        self._wait_until_seen()

    def set_setting(self, name: str, value: object) -> None:
        """Changes a setting, as its control in the dialog does."""
        self.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
        self.settle()

    def setting(self, name: str) -> Any:
        return self.evaluate("name => app.extensionManager.setting.get(name)", name)

    def graph_to_prompt(self) -> dict[str, Any]:
        """What would be queued: the prompt's nodes by id."""
        output: dict[str, Any] = self.evaluate("async () => (await app.graphToPrompt()).output")
        return output

    def serialize(self) -> dict[str, Any]:
        """What would be saved."""
        return dict(json.loads(self.evaluate("() => JSON.stringify(app.graph.serialize())")))

    def screenshot(self, path: Path | str, node: object = None) -> None:
        """The page as a picture, or what one node covers of it."""
        self.settle()
        self.page.screenshot(path=path, clip=None if node is None else self.evaluate(WHERE, str(node)))

    def _wait_until_seen(self) -> None:
        # Messages of a socket arrive in order: when the page has this one, it has had the one before.
        self._sent += 1
        self.server.send(BARRIER, {"count": self._sent})
        self.wait_for("count => window.testSeen === count", self._sent)
        self.settle()

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type != "error":
            return
        where = message.location["url"]
        is_ours = urlsplit(where).netloc == urlsplit(self.server.address).netloc
        if "Failed to load resource" in message.text and not is_ours:
            return  # another host, which is not to be found
        self.errors.append(f"console: {message.text} ({where})")
