"""The harness: what the other tests of this folder rely on."""

from __future__ import annotations

import pytest

from .answers import FOLDER, SYSTEM_STATS
from .front_end import NODE, VERSIONS, FrontEnd, Variant

each_version = pytest.mark.parametrize(
    "front_end", [Variant(version) for version in VERSIONS], indirect=True, ids=lambda variant: variant.version
)


def test_a_page_starts_without_errors_of_ours(front_end: FrontEnd) -> None:
    assert [error for error in front_end.errors_at_start if FOLDER in error or "exception" in error] == []


def test_a_page_is_in_the_language_and_the_renderer_of_its_variant(ui: FrontEnd) -> None:
    ui.add(NODE)
    title = ui.evaluate("type => LiteGraph.registered_node_types[type].title", NODE)
    assert ("块交换" in title) == (ui.variant.language == "zh")
    assert (ui.page.locator("[data-node-id]").count() > 0) == (ui.variant.renderer == "vue")


@each_version
def test_the_pinned_front_end_is_the_one_that_comfyui_asks_for(ui: FrontEnd) -> None:
    asked_for = SYSTEM_STATS["system"]["required_frontend_version"]
    running = ui.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
    assert (running == asked_for) == (ui.variant.version == "pinned")


@each_version
def test_a_reset_takes_back_what_a_test_has_done(ui: FrontEnd) -> None:
    before = ui.setting("Comfy.LinkRenderMode")
    ui.add(NODE)
    ui.set_setting("Comfy.LinkRenderMode", before + 1)
    ui.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    ui.page.get_by_role("dialog").wait_for()
    ui.evaluate("() => console.error('of a test')")
    stored = ui.server.settings.pop("Comfy.LinkRenderMode")
    ui.reset()
    assert ui.serialize()["nodes"] == []
    assert (ui.setting("Comfy.LinkRenderMode"), stored) == (before, before + 1)
    assert "Comfy.LinkRenderMode" not in ui.server.settings
    assert ui.page.get_by_role("dialog").count() == 0
    assert ui.errors == []


@each_version
def test_exceptions_and_errors_of_a_page_are_noticed(ui: FrontEnd) -> None:
    ui.evaluate("() => new Promise(done => { setTimeout(() => { done(); throw new Error('one'); }); })")
    ui.evaluate("() => console.error('two')")
    ui.evaluate("() => fetch('/extensions/none.js')")
    ui.settle()
    assert [kind in error for kind, error in zip(("one", "two", "none.js"), ui.errors, strict=True)] == [True] * 3
    assert ui.server.failed == ["/extensions/none.js"]


@each_version
def test_a_page_reaches_no_other_host(ui: FrontEnd) -> None:
    assert ui.evaluate("() => fetch('http://example.com', { mode: 'no-cors' }).then(() => true, () => false)") is False


@each_version
def test_events_and_progress_texts_arrive_as_from_comfyui(ui: FrontEnd) -> None:
    node = ui.add("SaveVideo")
    ui.evaluate(
        """async () => {
            const { api } = await import("/scripts/api.js");
            window.testHeard = [];
            api.addEventListener("harness.event", event => window.testHeard.push(event.detail));
        }"""
    )
    ui.send("harness.event", {"node": node, "bytes": 1 << 35})
    ui.send_text(node, "11.2 GB free\n块")
    assert ui.evaluate("() => window.testHeard") == [{"node": node, "bytes": 1 << 35}]
    assert ui.evaluate("id => app.graph.getNodeById(id).widgets.at(-1).value", node) == "11.2 GB free\n块"


@each_version
def test_a_setting_reaches_the_server(ui: FrontEnd) -> None:
    ui.set_setting("Comfy.LinkRenderMode", 1)
    assert ui.setting("Comfy.LinkRenderMode") == ui.server.settings["Comfy.LinkRenderMode"] == 1
