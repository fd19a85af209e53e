"""What the panel says when nothing runs: not connected, no wrapper, bypassed, or the result of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from wanvideo_enhanced_blockswap.blockswap.run.progress import Phase, Progress
from wanvideo_enhanced_blockswap.node_progress import EVENT

from . import answers
from .bars import ADOPTING, CONNECT, DONE, FAILED, SAMPLING, bar, connected, send
from .front_end import NODE, RENDERERS, VERSIONS, FrontEnd, Variant, opened
from .test_bar import module
from .test_text_nodes import FIELD

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TEXTS = json.loads((Path(__file__).parent / "sentences.json").read_text(encoding="utf-8"))
LOADER = "WanVideoModelLoader"
STORE = f"{NODE}.lastRuns"
OFF = Progress(phase=Phase.OFF, why="the CPU computes from host memory")

DISCONNECT = "id => { app.graph.getNodeById(id).disconnectOutput(0); }"
SELECT = """id => {
    app.canvas.selectNode(app.graph.getNodeById(id));
    app.canvas.canvas.focus();
}"""

one_language = pytest.mark.parametrize(
    "front_end", [Variant(v, r) for v in VERSIONS for r in RENDERERS], indirect=True, ids=str
)
one_page = pytest.mark.parametrize("front_end", [Variant()], indirect=True, ids=str)


# Before a run


def test_a_node_that_is_not_connected_says_so_and_follows_its_links(ui: FrontEnd) -> None:
    words = TEXTS[ui.variant.language]
    node = ui.add(NODE)
    assert (bar(ui, node).notice, bar(ui, node).lines) == ("unconnected", words["unconnected"])
    ui.evaluate(CONNECT, node)
    assert (bar(ui, node).notice, bar(ui, node).lines) == ("", words["idle"])
    ui.load(ui.serialize())
    assert bar(ui, node).lines == words["idle"]
    ui.evaluate(DISCONNECT, node)
    assert bar(ui, node).lines == words["unconnected"]
    ui.evaluate(CONNECT, node)
    ui.evaluate("type => app.graph.remove(app.graph.nodes.findLast(node => node.type === type))", LOADER)
    assert bar(ui, node).lines == words["unconnected"]
    assert ui.errors == []


@one_language
def test_a_node_that_is_disconnected_during_its_run_shows_the_run(ui: FrontEnd) -> None:
    node = connected(ui)
    send(ui, node, SAMPLING)
    before = bar(ui, node)
    ui.evaluate(DISCONNECT, node)
    assert bar(ui, node) == before
    send(ui, node, DONE)
    assert bar(ui, node).lines[:1] == TEXTS["en"]["unconnected"]


@pytest.fixture(
    scope="module",
    params=[Variant("pinned", "canvas", "en"), Variant("newest", "vue", "zh")],
    ids=str,
)
def without_wrapper(request: pytest.FixtureRequest, chromium: Browser) -> Iterator[FrontEnd]:
    """A page of a ComfyUI that has this package alone."""
    of_both = answers.object_info()
    alone = {name: node for name, node in of_both.items() if "WanVideoWrapper" not in node["python_module"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "object_info", lambda: alone)
        with opened(chromium, request.param) as page:
            patch.undo()  # the server has taken it
            yield page


def test_without_the_wrapper_the_node_says_what_to_install(without_wrapper: FrontEnd) -> None:
    ui = without_wrapper
    shown = bar(ui, ui.add(NODE))
    assert (shown.notice, shown.lines) == ("no_wrapper", TEXTS[ui.variant.language]["no_wrapper"])
    assert not shown.overflows
    assert ui.errors == [*ui.errors_at_start]


@one_language
@pytest.mark.parametrize("keys", ["Control+b", "Control+m"])
def test_the_panel_of_a_node_that_takes_no_part_is_dim_and_says_so(ui: FrontEnd, keys: str) -> None:
    node, words = connected(ui), TEXTS[ui.variant.language]
    send(ui, node, DONE)
    assert bar(ui, node).opacity == 1
    for is_off in (True, False):
        ui.evaluate(SELECT, node)
        ui.page.keyboard.press(keys)
        ui.settle()
        assert (bar(ui, node).opacity < 0.7) == is_off
        assert (bar(ui, node).notice, bar(ui, node).lines[0] in words["bypassed"]) == ("bypassed" * is_off, is_off)
    assert ui.errors == []


@one_language
def test_a_node_that_is_bypassed_by_a_button_says_so_although_the_front_end_tells_of_it_late(ui: FrontEnd) -> None:
    node = connected(ui)
    for mode, notice in ((4, "bypassed"), (0, "")):
        ui.evaluate("([id, mode]) => { app.graph.getNodeById(id).mode = mode; document.body.click(); }", [node, mode])
        ui.settle()
        assert bar(ui, node).notice == notice


@one_language
def test_a_text_of_another_file_whose_graph_has_the_same_id_is_not_shown_on_a_bar(ui: FrontEnd) -> None:
    report = ui.add("WanVideoEnhancedBlockSwapReport")
    saved = ui.serialize()
    ui.send("executed", {"node": report, "display_node": report, "output": {"text": ["one"]}, "prompt_id": "one"})
    (node,) = [each for each in saved["nodes"] if str(each["id"]) == report]
    others = [each for each in saved["nodes"] if each is not node]
    ui.load({**saved, "nodes": [*others, {"id": node["id"], "type": NODE, "pos": [0, 0], "size": [400, 400]}]})
    assert "one" not in bar(ui, report).lines
    assert [error for error in ui.errors if "blockswap" in error.lower()] == []


# After one


def test_after_a_run_the_bar_is_pale_and_says_when_it_was_so(ui: FrontEnd) -> None:
    node = connected(ui)
    for progress, note in ((SAMPLING, ""), (DONE, TEXTS[ui.variant.language]["during"])):
        send(ui, node, progress)
        paleness = "() => getComputedStyle(document.querySelector('[data-phase]').shadowRoot.querySelector("
        opacity = ui.evaluate(paleness + "\"svg[width='100%']\").parentElement).opacity")
        assert (bar(ui, node).head[1], float(opacity) < 1) == (note, note != "")


@one_language
def test_a_pair_and_texts_are_there_again_when_the_page_is_loaded_again(ui: FrontEnd) -> None:
    node, report = connected(ui), ui.add("WanVideoEnhancedBlockSwapReport")
    saved = ui.serialize()
    for model in ("HIGH", "LOW"):
        ui.send(EVENT, {"node": node, "workflow": saved["id"], "model": model, **DONE.as_json()})
    ui.send("executed", {"node": report, "display_node": report, "output": {"text": ["one"]}, "prompt_id": "one"})
    before = bar(ui, node).lines
    ui.reload()
    ui.load(saved)
    assert bar(ui, node).lines == before
    assert [line.partition(":")[0] for line in before[:2]] == ["HIGH", "LOW"]
    assert ui.evaluate(FIELD, report)["text"] == "one"


@one_language
def test_the_last_results_are_there_again_when_the_page_is_loaded_again(ui: FrontEnd) -> None:
    results = {connected(ui): result for result in (DONE, FAILED, OFF)}
    saved = ui.serialize()

    def run(node: str, *phases: Progress) -> None:
        for progress in phases:
            ui.send(EVENT, {"node": node, "workflow": saved["id"], **progress.as_json()})

    for node, result in results.items():
        run(node, ADOPTING, SAMPLING, result)
    before, time = [bar(ui, node) for node in results], ui.evaluate("() => new Date().toTimeString().slice(0, 5)")
    run(next(iter(results)), SAMPLING)  # which is no result, and ends with the page
    ui.reload()
    ui.load(saved)
    for node, was in zip(results, before, strict=True):
        now = bar(ui, node)
        assert (now.phase, now.lines, now.parts) == (was.phase, was.lines, was.parts)
        assert now.head[1][:-2] == f"{TEXTS['en']['earlier']}{time}"[:-2]  # a minute may have passed
    assert [error for error in ui.errors if error not in ui.errors_at_start] == []


MALFORMED: list[Any] = [
    "not JSON",
    "null",
    "{}",
    "7",
    json.dumps([None, 7, [], {}, {"node": "1", "phase": "done"}, {"node": "1", "workflow": "w", "phase": "done"}]),
    json.dumps([{"node": "1", "workflow": "w", "phase": "done", "at": "noon", "memory": []}]),
    json.dumps([{"node": "1", "workflow": "w", "phase": "sampling", "at": 1}]),
]


@one_page
@pytest.mark.parametrize("content", MALFORMED)
def test_a_store_that_holds_something_else_is_ignored_and_then_replaced(ui: FrontEnd, content: str) -> None:
    found = ui.evaluate(
        """async ([script, key, content, event]) => {
            const { Workflows } = await import(script);
            localStorage.setItem(key, content);
            const workflows = new Workflows();
            const read = workflows.eventsOf({ id: "w" });
            workflows.keep({ ...event, node: "1", workflow: "w", at: 1 }, { id: "w" });
            return [read, new Workflows().eventsOf({ id: "w" }).map(each => [each.phase, each.at, each.isEarlier])];
        }""",
        [module(ui, "workflows.js"), STORE, content, DONE.as_json()],
    )
    assert found == [[], [["done", 1, True]]]


@one_page
@pytest.mark.parametrize("broken", ["getItem", "setItem"])
def test_a_store_that_is_blocked_or_full_loses_the_results_and_nothing_else(ui: FrontEnd, broken: str) -> None:
    found = ui.evaluate(
        """async ([script, key, broken, event]) => {
            const { Workflows } = await import(script);
            localStorage.removeItem(key);
            const own = Storage.prototype[broken];
            Storage.prototype[broken] = () => { throw new DOMException("QuotaExceededError"); };
            try {
                const workflows = new Workflows();
                workflows.keep({ ...event, node: "1", workflow: "w", at: 1 }, { id: "w" });
                return [workflows.eventsOf({ id: "w" }).length, new Workflows().eventsOf({ id: "w" }).length];
            } finally {
                Storage.prototype[broken] = own;
            }
        }""",
        [module(ui, "workflows.js"), STORE, broken, DONE.as_json()],
    )
    assert found == [1, 0]


@one_page
def test_the_results_of_the_last_50_nodes_are_stored(ui: FrontEnd) -> None:
    found = ui.evaluate(
        """async ([script, key, event]) => {
            const { Workflows } = await import(script);
            localStorage.removeItem(key);
            const workflows = new Workflows();
            for (let node = 0; node < 60; node++)
                workflows.keep({ ...event, node: String(node), workflow: "w", at: 1 }, { id: "w" });
            workflows.keep({ ...event, node: "30", workflow: "w", at: 2 }, { id: "w" });
            return JSON.parse(localStorage.getItem(key)).map(each => each.node);
        }""",
        [module(ui, "workflows.js"), STORE, replace(DONE, hint=None).as_json()],
    )
    assert found == [str(node) for node in (*range(10, 30), *range(31, 60), 30)]
