"""The example workflows in the real front ends: nothing is lost or changed, and what is queued is what we expect."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import workflow_schema as ws
from wanvideo_enhanced_blockswap import NODE_CLASS_MAPPINGS
from workflow_schema import Workflow

from . import answers
from .front_end import NODE, VERSIONS, FrontEnd, Variant

WORKFLOWS = [Workflow.read(path) for path in sorted(answers.EXAMPLES.glob("*.json"))]
DEFINITIONS = {
    name: node for file in answers.RECORDED for name, node in ws.recorded(answers.OBJECT_INFO / file).items()
} | ws.live("wanvideo-enhanced-blockswap", NODE_CLASS_MAPPINGS)

NODES = """() => app.graph.nodes.map(node => ({
    id: String(node.id), type: node.type,
    isKnown: node.type in LiteGraph.registered_node_types, hasErrors: !!node.has_errors,
}))"""

DROP = """([name, text]) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], name, { type: "application/json" }));
    for (const type of ["dragenter", "dragover", "drop"])
        app.canvas.canvas.dispatchEvent(
            new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true, clientX: 800, clientY: 450 }));
}"""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a front end made of a workflow."""

    nodes: list[dict[str, Any]]
    saved: Workflow
    prompt: dict[str, Any]
    errors: list[str]
    failed: list[str]


def shown_by(page: FrontEnd, name: str) -> Shown:
    """What is on the page now."""
    saved, prompt = Workflow(name, page.serialize()), page.graph_to_prompt()
    return Shown(page.evaluate(NODES), saved, prompt, list(page.errors), list(page.server.failed))


def by_id(workflow: Workflow, *keys: str) -> dict[str, list[Any]]:
    """An empty list of values, as of a node that only shows a text, is as good as none."""
    return {
        str(node["id"]): [None if node.get(key) == [] else node.get(key) for key in keys]
        for node in workflow.data["nodes"]
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key)} became {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def node_problems(file: Workflow, shown: Shown) -> list[str]:
    types = {node["id"]: [node["type"]] for node in shown.nodes}
    bad = [f"{node['type']} has errors" for node in shown.nodes if not node["isKnown"] or node["hasErrors"]]
    return bad + differences(by_id(file, "type"), types)


def link_problems(file: Workflow, shown: Shown) -> list[str]:
    """Both numbers and words are used as ids; they are compared as words."""
    before, after = ([[str(part) for part in link] for link in each.data["links"]] for each in (file, shown.saved))
    return differences({link[0]: link for link in before}, {link[0]: link for link in after})


def value_problems(file: Workflow, shown: Shown) -> list[str]:
    keys = ("properties", "title", "mode", "color")
    before, after = by_id(file, *keys), by_id(shown.saved, *keys)
    for each, workflow in ((before, file), (after, shown.saved)):
        for node in workflow.data["nodes"]:
            each[str(node["id"])].append(_without_players(node.get("widgets_values")))
    return differences(before, after)


def _without_players(values: list[Any] | None) -> list[Any] | None:
    """A sound's player and its button are saved as nothing or None, by one front end or the other."""
    while values and values[-1] in (None, ""):
        values = values[:-1]
    return values or None


def prompt_problems(file: Workflow, shown: Shown) -> list[str]:
    queued = {name: {key: node[key] for key in ("class_type", "inputs")} for name, node in shown.prompt.items()}
    return differences(ws.to_prompt(file, DEFINITIONS), queued)


def form_problems(_: Workflow, shown: Shown) -> list[str]:
    """What is saved again has the form of the file that we ship, except that a front end adds a slot to each widget."""
    saved = shown.saved
    checks = (ws.link_problems, ws.value_problems, ws.reach_problems)
    return ws.schema_problems(saved) or [found for check in checks for found in check(saved, DEFINITIONS)]


def additions(_: Workflow, shown: Shown) -> list[str]:
    """What our nodes have in the saved file beyond their definition: the bar is not for saving."""
    found = []
    for node in shown.saved.nodes:
        if node["type"] in NODE_CLASS_MAPPINGS:
            known = [each.name for each in DEFINITIONS[node["type"]].inputs]
            named = [*(slot["name"] for slot in node["inputs"]), *node.get("widgets_values_named", ())]
            found += [f"{node['type']} has {name}" for name in named if name not in known]
    return found


CHECKS: dict[str, Callable[[Workflow, Shown], list[str]]] = {
    "nodes": node_problems,
    "links": link_problems,
    "values": value_problems,
    "prompt": prompt_problems,
    "form": form_problems,
    "additions": additions,
    "errors": lambda _, shown: shown.errors,
    "addresses": lambda _, shown: shown.failed,
}


@pytest.fixture(scope="module", params=WORKFLOWS, ids=lambda workflow: workflow.name)
def workflow(request: pytest.FixtureRequest) -> Workflow:
    return request.param


@pytest.fixture(scope="module")
def shown(front_end: FrontEnd, workflow: Workflow) -> Shown:
    front_end.reset()
    front_end.load(workflow.data)
    return shown_by(front_end, workflow.name)


@pytest.mark.parametrize("check", CHECKS)
def test_an_opened_example_is_whole(workflow: Workflow, shown: Shown, check: str) -> None:
    assert CHECKS[check](workflow, shown) == []


def test_a_file_dropped_on_the_canvas_is_opened(ui: FrontEnd) -> None:
    file = WORKFLOWS[2]
    ui.evaluate(DROP, [f"{file.name}.json", json.dumps(file.data)])
    ui.wait_for("count => app.graph.nodes.length === count", len(file.data["nodes"]))
    ui.settle()
    shown = shown_by(ui, file.name)
    assert {name: check(file, shown) for name, check in CHECKS.items()} == {name: [] for name in CHECKS}


# The checks find what they are for


def node_of(data: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["type"] == kind)


def values_of(data: dict[str, Any], kind: str) -> list[Any]:
    values: list[Any] = node_of(data, kind)["widgets_values"]
    return values


HARMS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "an unknown type": ("nodes", lambda data: node_of(data, NODE).update(type="WanVideoBlockSwapper")),
    "a file that is not there": ("nodes", lambda data: values_of(data, "WanVideoModelLoader").__setitem__(0, "x.gguf")),
    "a link to a slot that is none": ("links", lambda data: data["links"][0].__setitem__(4, 99)),
    "a value too many": ("values", lambda data: values_of(data, NODE).append(True)),
    "a muted node": ("prompt", lambda data: node_of(data, NODE).update(mode=2)),
    "a choice that is none": ("form", lambda data: values_of(data, "WanVideoModelLoader").__setitem__(1, "bf17")),
    "a link of another type": ("form", lambda data: data["links"][0].__setitem__(5, "MODEL")),
}
"""What is done to an example, and the check that says so."""


@pytest.mark.parametrize("front_end", [Variant(version) for version in VERSIONS], indirect=True, ids=str)
@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_workflow_is_found(ui: FrontEnd, harm: str) -> None:
    check, do_harm = HARMS[harm]
    file = Workflow(harm, deepcopy(WORKFLOWS[0].data))
    do_harm(file.data)
    ui.load(file.data)
    assert CHECKS[check](file, shown_by(ui, harm)) != []
