"""The widgets that automatic tuning ignores: greyed, with what was chosen, and never changed."""

from __future__ import annotations

from typing import Any

import pytest

from .answers import translations
from .bars import COPY, DONE, SAMPLING, connected, send
from .front_end import NODE, RENDERERS, VERSIONS, FrontEnd, Variant

IGNORED = ["blocks_to_swap", "num_cuda_streams", "bandwidth_target", "vace_blocks_to_swap"]

WIDGETS = """id => {
    const node = app.graph.getNodeById(id);
    node.updateComputedDisabled?.();
    const all = node.widgets.filter(widget => !/^(blockswap_|\\$\\$)/.test(widget.name));
    return Object.fromEntries(all.map(each => [each.name, [each.label || each.name, Boolean(each.computedDisabled)]]));
}"""
"""Label of each widget, and whether the classic renderer takes no click on it."""

ON_THE_PAGE = """id => {
    const element = document.querySelector(`[data-node-id="${id}"]`);
    return [element.innerText, element.querySelectorAll("input:disabled").length];
}"""
SHOW_ALL = "id => { app.graph.getNodeById(id).showAdvanced = true; }"
SWITCH = """([id, value]) => {
    const widget = app.graph.getNodeById(id).widgets.find(each => each.name === "auto_hardware_tuning");
    widget.value = value;
    widget.callback(value);
}"""
"""As both renderers do when the user clicks."""

one_language = pytest.mark.parametrize(
    "front_end", [Variant(v, r) for v in VERSIONS for r in RENDERERS], indirect=True, ids=str
)


def labels(ui: FrontEnd, chosen: int | None = None, *, is_auto: bool = True) -> dict[str, list[Any]]:
    """What the node's widgets should be like."""
    texts = translations()[ui.variant.language]
    auto, counted = (texts["wanVideoEnhancedBlockSwap"][name] for name in ("auto", "auto_chosen"))
    found = {}
    for name, each in texts["nodeDefs"][NODE]["inputs"].items():
        label = each["name"]
        if is_auto and name in IGNORED:
            template = counted if chosen is not None and name == IGNORED[0] else auto
            label = template.replace("[name]", label).replace("[number]", str(chosen))
        found[name] = [label, is_auto and name in IGNORED]
    return found


def test_what_automatic_tuning_ignores_is_greyed_and_says_what_was_chosen(ui: FrontEnd) -> None:
    node = connected(ui)
    assert ui.evaluate(WIDGETS, node) == labels(ui)
    send(ui, node, SAMPLING)
    assert ui.evaluate(WIDGETS, node) == labels(ui, 22)
    if ui.variant.renderer == "vue":
        ui.evaluate(SHOW_ALL, node)
        ui.settle()
        text, disabled = ui.evaluate(ON_THE_PAGE, node)
        assert labels(ui, 22)["blocks_to_swap"][0] in text
        assert disabled == len(IGNORED)
    ui.evaluate(SWITCH, [node, False])
    ui.settle()
    assert ui.evaluate(WIDGETS, node) == labels(ui, is_auto=False)
    if ui.variant.renderer == "vue":
        text, disabled = ui.evaluate(ON_THE_PAGE, node)
        assert labels(ui, 22)["blocks_to_swap"][0] not in text
        assert disabled == 0
    ui.evaluate(SWITCH, [node, True])
    assert ui.evaluate(WIDGETS, node) == labels(ui, 22)
    assert ui.errors == []


@one_language
def test_a_click_on_the_switch_is_followed(ui: FrontEnd) -> None:
    node = connected(ui)
    if ui.variant.renderer == "vue":
        ui.page.locator(
            f"[data-node-id='{node}'] [role=switch], [data-node-id='{node}'] input[type=checkbox]"
        ).first.click()
    else:
        ui.evaluate(
            "() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true); }"
        )
        ui.settle()
        where = """id => {
            const node = app.graph.getNodeById(id);
            const widget = node.widgets.find(each => each.name === "auto_hardware_tuning");
            const { left, top } = app.canvas.canvas.getBoundingClientRect();
            return [left + node.pos[0] + node.size[0] / 2, top + node.pos[1] + widget.last_y + 10];
        }"""
        ui.page.mouse.click(*ui.evaluate(where, node))
    ui.settle()
    assert ui.evaluate(WIDGETS, node) == labels(ui, is_auto=False)


@one_language
def test_loaded_and_pasted_nodes_follow_their_own_switch(ui: FrontEnd) -> None:
    by_hand, tuned = connected(ui), connected(ui)
    ui.evaluate(SWITCH, [by_hand, False])
    ui.load(ui.serialize())
    copies = [ui.evaluate(COPY, node) for node in (by_hand, tuned)]
    for node, is_auto in zip((by_hand, tuned, *copies), (False, True) * 2, strict=True):
        assert ui.evaluate(WIDGETS, node) == labels(ui, is_auto=is_auto)
    assert ui.errors == []


@one_language
def test_what_is_saved_and_queued_stays_as_it_is(ui: FrontEnd) -> None:
    node = connected(ui)
    ui.evaluate(SWITCH, [node, False])
    saved, queued = ui.serialize(), ui.graph_to_prompt()
    ui.evaluate(SWITCH, [node, True])
    send(ui, node, DONE)
    after, prompt = ui.serialize(), ui.graph_to_prompt()
    for workflow, prompt_ in ((saved, queued), (after, prompt)):
        (ours,) = [each for each in workflow["nodes"] if each["type"] == NODE]
        ours["widgets_values"][3] = ours.get("widgets_values_named", {})["auto_hardware_tuning"] = True
        del ours["size"]  # the classic renderer makes room for longer sentences
        prompt_[node]["inputs"]["auto_hardware_tuning"] = True
    assert (after, prompt) == (saved, queued)
