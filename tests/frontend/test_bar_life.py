"""The memory bar's life on a node: shown and hidden, copied, in subgraphs, in several workflows; it leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from wanvideo_enhanced_blockswap.node_progress import EVENT

from .answers import EXAMPLES
from .bars import ADOPTING, COPY, DONE, NOT_BEGUN, SAMPLING, bar, connected, core_texts, send, shown
from .front_end import NODE, RENDERERS, VERSIONS, FrontEnd, Variant
from .stub_server import StubServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHOW_BAR = f"{NODE}.ShowBar"
EXAMPLE = json.loads(min(EXAMPLES.glob("*.json")).read_text(encoding="utf-8"))

TEXTS = json.loads((Path(__file__).parent / "sentences.json").read_text(encoding="utf-8"))

HEIGHT = """id => document.querySelector(`[data-node-id="${id}"]`)?.offsetHeight ?? app.graph.getNodeById(id).size[1]"""
"""As it is on the page: Nodes 2.0 do not write their own height into the graph."""

RESIZE = """([id, width]) => {
    const node = app.graph.getNodeById(id);
    node.setSize([width, node.size[1]]);
    app.canvas.setDirty(true, true);
}"""
TO_SUBGRAPH = """id => {
    const { node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]));
    return [String(node.id), String(node.subgraph.nodes[0].id)];
}"""
OPEN_SUBGRAPH = """id => {
    const host = app.rootGraph.getNodeById(id);
    app.canvas.openSubgraph(host.subgraph, host);
}"""
QUEUE = """async () => {
    const { api } = await import("/scripts/api.js");
    api.dispatchCustomEvent("promptQueueing", { requestId: 1, batchCount: 1 });
}"""
REMEMBER = """ids => {
    window.testRefs = ids.map(id => app.graph.getNodeById(id))
        .flatMap(node => [node, node.widgets.find(widget => widget.name === "blockswap_memory").element])
        .map(each => new WeakRef(each));
}"""
STILL_THERE = "() => window.testRefs.filter(ref => ref.deref()).length"
PANELS = "() => document.querySelectorAll('[data-phase]').length"

one_language = pytest.mark.parametrize(
    "front_end", [Variant(v, r) for v in VERSIONS for r in RENDERERS], indirect=True, ids=str
)


# Nothing of it is saved


@one_language
@pytest.mark.parametrize("progress", [ADOPTING, SAMPLING, DONE], ids=lambda progress: progress.phase.value)
def test_a_bar_changes_neither_what_is_saved_nor_what_is_queued(ui: FrontEnd, progress: Any) -> None:
    ui.load(EXAMPLE)
    (node,) = [str(node["id"]) for node in EXAMPLE["nodes"] if node["type"] == NODE]
    saved, queued = ui.serialize(), ui.graph_to_prompt()
    send(ui, node, progress)
    assert bar(ui, node).phase == progress.phase.value
    assert (without_size(ui.serialize()), ui.graph_to_prompt()) == (without_size(saved), queued)
    assert "blockswap_memory" not in json.dumps([saved, queued])


def without_size(workflow: dict[str, Any]) -> dict[str, Any]:
    """Without the sizes of nodes: longer sentences make ours taller, and Nodes 2.0 write what they measure."""
    return {**workflow, "nodes": [{**node, "pos": None, "size": None} for node in workflow["nodes"]]}


# With ComfyUI's own text


def test_comfyuis_own_text_is_not_shown_beside_the_bar(ui: FrontEnd) -> None:
    node, other = ui.add(NODE), ui.add("SaveVideo")
    send(ui, node, SAMPLING)
    assert core_texts(ui) == []
    ui.send_text(other, "from another node")
    assert core_texts(ui) == ["from another node"]


def test_without_the_bar_comfyuis_own_text_is_shown(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.set_setting(SHOW_BAR, value=False)
    send(ui, node, SAMPLING)
    assert shown(ui, node) is None
    assert core_texts(ui) == [SAMPLING.text]
    ui.set_setting(SHOW_BAR, value=True)
    assert core_texts(ui) == []
    assert ui.errors == []


@pytest.fixture(params=VERSIONS)
def without_our_modules(request: pytest.FixtureRequest, chromium: Browser) -> Iterator[FrontEnd]:
    variant = Variant(request.param)
    with StubServer(variant.static, variant.settings) as server, chromium.new_context() as context:
        context.route("**/extensions/WanVideo*/js/*", lambda route: route.fulfill(content_type="text/javascript"))
        yield FrontEnd(context.new_page(), server, variant)


def test_without_our_modules_comfyuis_own_text_is_shown(without_our_modules: FrontEnd) -> None:
    ui = without_our_modules
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    assert core_texts(ui) == [SAMPLING.text]


# Shown and hidden


def test_switching_the_bar_off_takes_it_from_every_node_and_on_brings_it_back(ui: FrontEnd) -> None:
    nodes = [connected(ui), connected(ui)]
    send(ui, nodes[0], SAMPLING)
    tall = [ui.evaluate(HEIGHT, node) for node in nodes]
    ui.set_setting(SHOW_BAR, value=False)
    assert [shown(ui, node) for node in nodes] == [None, None]
    assert ui.evaluate(PANELS) == 0
    low = [ui.evaluate(HEIGHT, node) for node in nodes]
    assert all(after < before - 100 for after, before in zip(low, tall, strict=True))
    send(ui, nodes[1], NOT_BEGUN)
    ui.set_setting(SHOW_BAR, value=True)
    assert [(bar(ui, node).phase, bar(ui, node).is_shown) for node in nodes] == [("sampling", True), ("stopped", True)]
    assert [ui.evaluate(HEIGHT, node) for node in nodes] == pytest.approx(tall, abs=2)
    assert ui.errors == []


@one_language
def test_a_node_that_is_added_without_the_bar_gets_it_when_it_is_switched_on(ui: FrontEnd) -> None:
    ui.set_setting(SHOW_BAR, value=False)
    node = ui.add(NODE)
    assert shown(ui, node) is None
    ui.set_setting(SHOW_BAR, value=True)
    assert bar(ui, node).is_shown


def test_the_bar_is_as_wide_as_the_node_lets_it(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, DONE)
    for width in (700, 460):
        ui.evaluate(RESIZE, [node, width])
        ui.settle()
        found = bar(ui, node)
        assert width - 50 < found.width / ui.evaluate("() => app.canvas.ds.scale") < width
        assert not found.overflows


@pytest.mark.parametrize("front_end", [Variant(version, "vue") for version in VERSIONS], indirect=True, ids=str)
def test_a_height_that_the_classic_renderer_has_saved_leaves_no_blank_in_nodes_2(ui: FrontEnd) -> None:
    node = connected(ui)
    height, saved = ui.evaluate(HEIGHT, node), ui.serialize()
    (ours,) = [each for each in saved["nodes"] if each["type"] == NODE]
    ours["size"][1] = 498
    ui.load(saved)
    assert ui.evaluate(HEIGHT, node) == pytest.approx(height, abs=2)
    assert height < 400


@one_language
def test_the_wheel_over_the_bar_zooms_the_canvas(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.evaluate("() => app.canvas.ds.reset()")
    ui.evaluate("() => app.canvas.setDirty(true, true)")
    ui.settle()
    ui.page.locator("[data-phase]").hover()
    before = ui.evaluate("() => app.canvas.ds.scale")
    ui.page.mouse.wheel(0, 300)
    ui.wait_for("before => app.canvas.ds.scale < before", before)
    assert bar(ui, node).is_shown


# Copies, subgraphs, workflows


@one_language
def test_a_copy_has_a_bar_of_its_own(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    copy = ui.evaluate(COPY, node)
    ui.settle()
    assert (bar(ui, node).phase, bar(ui, copy).phase) == ("sampling", "idle")
    send(ui, copy, DONE)
    assert (bar(ui, node).phase, bar(ui, copy).phase) == ("sampling", "done")
    assert ui.errors == []


@one_language
def test_a_removed_node_takes_its_bar_along(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", node)
    ui.settle()
    assert ui.evaluate(PANELS) == 0
    ui.send(EVENT, {"node": node, **SAMPLING.as_json()})
    assert ui.errors == []


@pytest.mark.parametrize("front_end", [Variant("newest", renderer) for renderer in RENDERERS], indirect=True, ids=str)
def test_nothing_holds_a_removed_node(ui: FrontEnd) -> None:
    # The newest only: the pinned one holds removed nodes itself.
    nodes = [ui.add(NODE) for _ in range(5)]
    for node in nodes:
        send(ui, node, ADOPTING)
        send(ui, node, SAMPLING)
    ui.evaluate(REMEMBER, nodes)
    ui.evaluate("() => app.graph.clear()")
    ui.add("SaveVideo")  # the page remembers the last node that it has drawn
    devtools = ui.page.context.new_cdp_session(ui.page)
    for _ in range(20):
        devtools.send("HeapProfiler.collectGarbage")
        ui.settle()
        if not ui.evaluate(STILL_THERE):
            break
    assert ui.evaluate(STILL_THERE) == 0


@one_language
def test_a_node_in_a_subgraph_follows_the_events_with_its_path(ui: FrontEnd) -> None:
    host, inner = ui.evaluate(TO_SUBGRAPH, ui.add(NODE))
    send(ui, inner, DONE)
    assert bar(ui, inner).phase == "idle"
    send(ui, f"{host}:{inner}", SAMPLING)
    assert bar(ui, inner).phase == "sampling"
    ui.evaluate(OPEN_SUBGRAPH, host)
    ui.settle()
    send(ui, f"{host}:{inner}", DONE)
    assert (bar(ui, inner).phase, bar(ui, inner).is_shown) == ("done", True)
    assert core_texts(ui) == []
    ui.evaluate("() => app.canvas.setGraph(app.rootGraph)")
    assert ui.errors == []


@one_language
def test_a_workflow_that_is_opened_again_shows_where_its_nodes_stand(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, DONE)
    first = ui.serialize()
    ui.load({**first, "id": "00000000-0000-4000-8000-000000000001"})
    assert bar(ui, node).phase == "idle"
    ui.load(first)
    assert (bar(ui, node).phase, bar(ui, node).is_shown) == ("done", True)


@one_language
def test_events_that_name_their_workflow_are_shown_there_however_many_are_queued(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.evaluate(QUEUE)
    behind = ui.serialize()
    ui.load({**behind, "id": "00000000-0000-4000-8000-000000000003"})
    ui.evaluate(QUEUE)
    ui.send(EVENT, {"node": node, "workflow": behind["id"], **DONE.as_json()})
    assert bar(ui, node).phase == "idle"
    ui.send(EVENT, {"node": node, "workflow": "00000000-0000-4000-8000-000000000003", **SAMPLING.as_json()})
    assert bar(ui, node).phase == "sampling"
    ui.load(behind)
    assert bar(ui, node).phase == "done"
    ui.send("status", {"status": {"exec_info": {"queue_remaining": 0}}})
    assert ui.errors == []


def test_what_is_of_an_earlier_run_says_so_with_its_time_until_an_event_comes(ui: FrontEnd) -> None:
    node = connected(ui)
    send(ui, node, DONE)
    before, words = bar(ui, node), TEXTS[ui.variant.language]
    assert before.head[1] == words["during"]
    now = ui.evaluate("() => new Date().toTimeString().slice(0, 5)")
    ui.send("execution_start", {"prompt_id": "another", "timestamp": 1})
    aged = bar(ui, node)
    assert (aged.phase, aged.lines) == ("done", before.lines)
    assert aged.head[1].startswith(words["earlier"])
    assert minutes(now) - minutes(aged.head[1][-5:]) in (0, 1)
    send(ui, node, SAMPLING)
    assert bar(ui, node).head[1] == ""
    assert ui.errors == []


def minutes(time: str) -> int:
    return int(time[:2]) * 60 + int(time[3:])


def test_a_run_of_the_workflow_behind_is_shown_there_and_not_here(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.evaluate(QUEUE)
    behind = ui.serialize()
    ui.load({**behind, "id": "00000000-0000-4000-8000-000000000002"})
    send(ui, node, SAMPLING)
    assert bar(ui, node).phase == "idle"
    assert core_texts(ui) == []
    ui.load(behind)
    assert bar(ui, node).phase == "sampling"
    ui.load({**behind, "id": "00000000-0000-4000-8000-000000000002"})
    ui.send("status", {"status": {"exec_info": {"queue_remaining": 0}}})
    send(ui, node, DONE)
    assert bar(ui, node).phase == "done"
    assert ui.errors == []


@pytest.mark.parametrize("front_end", [Variant(v) for v in VERSIONS], indirect=True, ids=str)
def test_another_language_is_spoken_at_once(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.load(ui.serialize())  # the front end opens the workflow again, as last stored
    send(ui, node, SAMPLING)
    try:
        for language in ("zh", "en"):
            ui.set_setting("Comfy.Locale", language)
            ui.wait_for("() => !app.extensionManager.spinner && app.graph.nodes.length === 1")
            ui.wait_for(
                """word => app.graph.nodes[0].widgets.find(widget => widget.name === "blockswap_memory")
                    .element.getAttribute("aria-label").includes(word)""",
                TEXTS[language]["legend"][1],
            )
            assert bar(ui, node).phase == "sampling"
    finally:
        ui.set_setting("Comfy.Locale", ui.variant.language)
    assert ui.errors == []
