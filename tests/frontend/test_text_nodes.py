"""The plan and the report node show their text on themselves."""

from __future__ import annotations

from typing import Any

import pytest

from .answers import translations
from .front_end import RENDERERS, VERSIONS, FrontEnd, Variant
from .test_bar_life import OPEN_SUBGRAPH, TO_SUBGRAPH

HINTS = {"WanVideoEnhancedBlockSwapPlan": "plan_text", "WanVideoEnhancedBlockSwapReport": "report_text"}
TWELVE = "\n".join(f"line {number}: some words of a report with 71,234 figures in it" for number in range(1, 13))

FIELD = """id => {
    const walk = graph => [...graph.nodes].flatMap(node => [node, ...(node.subgraph ? walk(node.subgraph) : [])]);
    const node = walk(app.rootGraph ?? app.graph).find(each => String(each.id) === id);
    const field = node.widgets.find(widget => widget.name === "blockswap_text").element;
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.font = "14px Inter, sans-serif";
    return {
        text: field.value,
        shown: field.isConnected && field.checkVisibility(),
        scrolls: field.scrollHeight > field.clientHeight || field.scrollWidth > field.clientWidth,
        edits: !field.readOnly,
        titleFits: canvas.measureText(node.title).width + 60 < node.size[0],
    };
}"""

one_language = pytest.mark.parametrize(
    "front_end", [Variant(v, r) for v in VERSIONS for r in RENDERERS], indirect=True, ids=str
)
FORMER = {"WanVideoBlockSwapPlan": "plan_text", "WanVideoBlockSwapReport": "report_text"}
"""Their names in saved workflows."""

each_node = pytest.mark.parametrize("kind", HINTS)


def say(ui: FrontEnd, node: str, text: str) -> None:
    """What ComfyUI sends of a node that has run."""
    ui.send("executed", {"node": node, "display_node": node, "output": {"text": [text]}, "prompt_id": "one"})


@each_node
def test_a_new_node_says_what_will_be_there_and_then_shows_twelve_lines(ui: FrontEnd, kind: str) -> None:
    node = ui.add(kind)
    hint = translations()[ui.variant.language]["wanVideoEnhancedBlockSwap"][HINTS[kind]]
    expected: dict[str, Any] = {"shown": True, "scrolls": False, "edits": False, "titleFits": True}
    assert ui.evaluate(FIELD, node) == {"text": hint, **expected}
    say(ui, node, TWELVE)
    assert ui.evaluate(FIELD, node) == {"text": TWELVE, **expected}
    assert ui.errors == []


@one_language
@pytest.mark.parametrize("kind", FORMER)
def test_a_node_of_a_former_name_shows_its_text_as_well(ui: FrontEnd, kind: str) -> None:
    node = ui.add(kind)
    say(ui, node, TWELVE)
    assert ui.evaluate(FIELD, node)["text"] == TWELVE
    assert ui.errors == []


@one_language
@each_node
def test_the_text_is_neither_saved_nor_queued(ui: FrontEnd, kind: str) -> None:
    node = ui.add(kind)
    saved, queued = ui.serialize(), ui.graph_to_prompt()
    say(ui, node, TWELVE)
    assert (ui.serialize(), ui.graph_to_prompt()) == (saved, queued)


@one_language
@each_node
def test_the_text_is_there_again_after_undo_and_in_another_tab(ui: FrontEnd, kind: str) -> None:
    node = ui.add(kind)
    say(ui, node, "one")
    first = ui.serialize()
    ui.load({**first, "id": "00000000-0000-4000-8000-000000000004"})
    assert ui.evaluate(FIELD, node)["text"] != "one"
    ui.load(first)
    assert ui.evaluate(FIELD, node)["text"] == "one"
    ui.send("execution_start", {"prompt_id": "another", "timestamp": 1})
    assert ui.evaluate(FIELD, node)["text"] == "one"
    say(ui, node, "two")
    assert ui.evaluate(FIELD, node)["text"] == "two"


@one_language
def test_a_node_in_a_subgraph_shows_its_own_text(ui: FrontEnd) -> None:
    host, inner = ui.evaluate(TO_SUBGRAPH, ui.add("WanVideoEnhancedBlockSwapReport"))
    ui.evaluate(OPEN_SUBGRAPH, host)
    ui.settle()
    say(ui, f"{host}:{inner}", "inside")
    found = ui.evaluate(FIELD, inner)
    assert (found["text"], found["shown"]) == ("inside", True)
    ui.evaluate("() => app.canvas.setGraph(app.rootGraph)")
    assert ui.errors == []


@one_language
@pytest.mark.parametrize("output", [None, {}, {"text": "one"}, {"images": []}], ids=str)
def test_an_output_without_a_text_changes_nothing(ui: FrontEnd, output: Any) -> None:
    node, other = ui.add("WanVideoEnhancedBlockSwapPlan"), ui.add("SaveVideo")
    before = ui.evaluate(FIELD, node)
    for each in (node, other, "99"):
        ui.send("executed", {"node": each, "display_node": each, "output": output, "prompt_id": "one"})
    assert ui.evaluate(FIELD, node) == before
    assert [error for error in ui.errors if "blockswap" in error.lower()] == []
