"""Front ends of earlier versions of ComfyUI: the page starts, the node has its widgets, and the bar follows a run.

The other files look at the same, and more, in those of today.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from wanvideo_enhanced_blockswap import NODE_CLASS_MAPPINGS

from .answers import EXAMPLES, WEB
from .bars import ADOPTING, DONE, SAMPLING, bar, core_texts, send, shown
from .front_end import EARLIER, NODE, RENDERERS, FrontEnd, Variant
from .test_bar_life import HEIGHT, SHOW_BAR, without_size
from .test_help_pages import headings

WITHOUT_VUE = ("1.26.13",)
"""Front ends with one renderer."""

WITHOUT_ELEMENTS = (Variant("1.28.9", "vue"),)
"""Renderers that show neither a package's own elements on a node nor ComfyUI's progress text: a bar cannot be seen."""

OWN_EXCEPTIONS = {"1.28.9": "Cannot read properties of undefined (reading 'id')"}
"""What a front end throws at its start, with and without this package."""

pytestmark = pytest.mark.parametrize(
    "front_end",
    [Variant(v, r) for v in EARLIER for r in RENDERERS if r == "canvas" or v not in WITHOUT_VUE],
    indirect=True,
    ids=str,
)

PLAIN = ("blocks_to_swap", "auto_hardware_tuning", "vram_threshold_percent")
"""Widgets that no front end hides among the advanced ones."""

EXAMPLE = json.loads(min(EXAMPLES.glob("*.json")).read_text(encoding="utf-8"))


def test_the_page_starts_without_errors_of_ours(front_end: FrontEnd) -> None:
    variant, errors = front_end.variant, front_end.errors_at_start
    own = OWN_EXCEPTIONS.get(variant.version, "none")
    assert [e for e in errors if "blockswap" in e.lower() or ("exception" in e and own not in e)] == []
    assert front_end.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__") == variant.version
    assert bool(front_end.evaluate("() => LiteGraph.vueNodesMode")) == (variant.renderer == "vue")


def test_a_new_node_shows_its_widgets(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    names = ui.evaluate("id => app.graph.getNodeById(id).widgets.map(widget => widget.name)", node)
    inputs = NODE_CLASS_MAPPINGS[NODE].INPUT_TYPES()
    assert names == [*inputs["required"], *inputs.get("optional", {}), "blockswap_memory"]
    if ui.variant.renderer == "vue":
        said = ui.page.locator(f"[data-node-id='{node}']").inner_text()
        assert [name for name in PLAIN if name not in said] == []
    assert ui.errors == []


def test_the_bar_follows_a_run_to_its_end(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    height = ui.evaluate(HEIGHT, node)
    for progress in (ADOPTING, SAMPLING, DONE):
        send(ui, node, progress)
        seen = bar(ui, node)
        assert (seen.phase, seen.overflows) == (progress.phase.value, False)
        assert seen.is_shown == (ui.variant not in WITHOUT_ELEMENTS)
        assert core_texts(ui) == []
        if progress is ADOPTING and seen.is_shown:
            assert ui.evaluate(HEIGHT, node) == pytest.approx(height, abs=30)
    assert list(bar(ui, node).parts) == ["other", "residents", "window", "activations", "free", "ceiling"]
    ui.send("execution_start", {"prompt_id": "another", "timestamp": 1})
    assert bar(ui, node).head[1].startswith("earlier run, ")
    assert ui.errors == []


def test_the_switch_of_the_bar_works_at_once(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.set_setting(SHOW_BAR, value=False)
    assert shown(ui, node) is None
    send(ui, node, SAMPLING)
    assert core_texts(ui) == [SAMPLING.text]
    ui.set_setting(SHOW_BAR, value=True)
    assert bar(ui, node).phase == "sampling"
    assert core_texts(ui) == []
    assert ui.errors == []


def test_an_example_opens_and_a_run_leaves_no_trace_in_what_is_saved(ui: FrontEnd) -> None:
    ui.load(EXAMPLE)
    (node,) = [str(node["id"]) for node in EXAMPLE["nodes"] if node["type"] == NODE]
    saved, queued = ui.serialize(), ui.graph_to_prompt()
    send(ui, node, DONE)
    assert (without_size(ui.serialize()), ui.graph_to_prompt()) == (without_size(saved), queued)
    ui.load(saved)
    assert bar(ui, node).phase == "done"
    assert [_inputs(queued, name) for name in PLAIN] == [_inputs(ui.graph_to_prompt(), name) for name in PLAIN]
    assert ui.errors == []


def test_the_help_page_of_the_node_opens(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.evaluate("id => { app.canvas.selectNode(app.graph.getNodeById(id)); app.canvas.setDirty(true, true); }", node)
    ui.page.locator("[data-testid=info-button], .help-button").first.click()
    panel = ui.page.locator(".node-help-content")
    expected = headings((WEB / "docs" / f"{NODE}.md").read_text(encoding="utf-8"))
    panel.get_by_role("heading", name=expected[-1], exact=True).wait_for()
    assert panel.get_by_role("heading").all_inner_texts() == expected


def _inputs(prompt: dict[str, Any], name: str) -> list[Any]:
    return [node["inputs"][name] for node in prompt.values() if node["class_type"] == NODE]
