"""The example workflows as the front ends draw them, each node as tall as its widgets and its bar make it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from workflow_schema import Workflow

from .answers import EXAMPLES
from .bars import DONE, send
from .front_end import NODE, RENDERERS, VERSIONS, FrontEnd, Variant

WORKFLOWS = [Workflow.read(path) for path in sorted(EXAMPLES.glob("*.json"))]

LOOK_AT_ALL = """() => {
    app.canvas.ds.scale = 0.2;
    app.canvas.ds.offset = [200, 400];
    app.canvas.setDirty(true, true);
}"""
BOXES = """() => {
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    const { scale, offset } = app.canvas.ds;
    const onPage = element => {
        const box = element.getBoundingClientRect();
        const [x, y] = [(box.left - left) / scale - offset[0], (box.top - top) / scale - offset[1]];
        return [x, y, x + box.width / scale, y + box.height / scale];
    };
    const drawn = ([x, y, width, height]) => [x, y, x + width, y + height];
    const box = node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`);
        return element ? onPage(element) : drawn(node.getBounding());
    };
    return {
        nodes: app.graph.nodes.map(node => [node.title, box(node)]),
        groups: app.graph.groups.map(group => drawn(group.boundingRect ?? group._bounding)),
    };
}"""

EDGE = 3
"""In units of the graph: what the front ends draw outside a node."""


def apart(one: list[float], other: list[float]) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def holds(group: list[float], box: list[float]) -> bool:
    inside = [group[0] <= box[0], group[1] <= box[1], box[2] <= group[2], box[3] <= group[3]]
    return all(inside)


@pytest.mark.parametrize("front_end", [Variant(v, r) for v in VERSIONS for r in RENDERERS], indirect=True, ids=str)
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name[:2])
def test_with_its_bars_nothing_lies_over_anything_else(ui: FrontEnd, workflow: Workflow) -> None:
    ui.load(workflow.data)
    for node in workflow.of_type(NODE):
        send(ui, str(node["id"]), DONE)
    ui.evaluate(LOOK_AT_ALL)
    ui.settle()
    found: dict[str, Any] = ui.evaluate(BOXES)
    nodes = [
        (title, [x + EDGE, y + EDGE, right - EDGE, bottom - EDGE]) for title, (x, y, right, bottom) in found["nodes"]
    ]
    assert len(nodes) == len(workflow.data["nodes"])
    assert [(one, other) for (one, a), (other, b) in combinations(nodes, 2) if not apart(a, b)] == []
    around = {title: [group for group in found["groups"] if not apart(group, box)] for title, box in nodes}
    assert [
        title for title, box in nodes if title != "Read me" and [holds(each, box) for each in around[title]] != [True]
    ] == []


@pytest.mark.parametrize("front_end", [Variant(v) for v in VERSIONS], indirect=True, ids=str)
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name[:2])
def test_a_swap_node_is_saved_as_tall_as_it_is(ui: FrontEnd, workflow: Workflow) -> None:
    ui.load({**workflow.data, "id": "00000000-0000-4000-8000-000000000005"})  # which no run has made taller
    saved = {str(node["id"]): node["size"] for node in ui.serialize()["nodes"] if node["type"] == NODE}
    assert saved == {str(node["id"]): node["size"] for node in workflow.of_type(NODE)} != {}
