"""What can be wrong with a saved workflow: each check returns the problems that it found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator

from .definitions import Definition
from .prompt import to_prompt
from .workflow import NOTE, Workflow, box_of, box_of_group

SCHEMA = json.loads((Path(__file__).parent / "workflow_0_4.schema.json").read_text(encoding="utf-8"))
Draft7Validator.check_schema(SCHEMA)

WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".sft")
HUGGING_FACE = "https://huggingface.co/"
WIDEST, TALLEST = 2400, 1416
"""So large that the front ends open it, on a screen of 1920 by 1080, at a scale at which they draw its texts."""

MAY_BE_COLLAPSED = {
    "CLIPVisionLoader",
    "GetImageSize",
    "GetVideoComponents",
    "Wav2VecModelLoader",
    "WanVideoClipVisionEncode",
    "WanVideoVAELoader",
}
"""Nodes in which there is nothing to choose for the video."""
Definitions = Mapping[str, Definition]


def schema_problems(workflow: Workflow) -> list[str]:
    """Against the documented schema, and what it cannot say: ids are unique and within the counters."""
    found = [f"{error.json_path}: {error.message}" for error in Draft7Validator(SCHEMA).iter_errors(workflow.data)]
    if found:
        return found
    for kind, ids, last in (
        ("node", [node["id"] for node in workflow.data["nodes"]], workflow.data["last_node_id"]),
        ("link", [link.id for link in workflow.links], workflow.data["last_link_id"]),
    ):
        found += [f"{kind} id {each} is used {count} times" for each, count in Counter(ids).items() if count > 1]
        found += [f"{kind} id {each} is above the last, {last}" for each in ids if each > last]
    return found


def definition_problems(workflow: Workflow, definitions: Definitions) -> list[str]:
    """Nodes are known, run, and have the slots of their definition; each required socket is connected."""
    return [f"{node['type']} {problem}" for node in workflow.nodes for problem in _of_node(node, definitions)]


def _of_node(node: dict[str, Any], definitions: Definitions) -> Iterator[str]:
    definition = definitions.get(node["type"])
    if definition is None:
        yield "is not known"
        return
    if node["mode"] != 0:
        yield f"has mode {node['mode']}: it is muted or bypassed"
    sockets = [slot for slot in node["inputs"] if "widget" not in slot]
    if [(slot["name"], slot["type"]) for slot in sockets] != [(each.name, each.kind) for each in definition.sockets]:
        yield "has other input slots than its definition"
    for slot in node["inputs"]:
        known = definition.input(slot["name"])
        if "widget" in slot and (known is None or not known.is_widget or slot["type"] != known.kind):
            yield f"has a slot for a widget {slot['name']} that it lacks"
        if known is not None and known.is_required and "widget" not in slot and slot["link"] is None:
            yield f"needs {slot['name']}, which is not connected"
    if [(slot["name"], slot["type"]) for slot in node["outputs"]] != list(definition.outputs):
        yield "has other output slots than its definition"


def link_problems(workflow: Workflow, definitions: Definitions) -> list[str]:
    """Both ends of a link know it, types match, and no end names a link that is not there."""
    nodes = {node["id"]: node for node in workflow.nodes}
    found = []
    for link in workflow.links:
        try:
            output, slot = nodes[link.source]["outputs"][link.output], nodes[link.target]["inputs"][link.input]
        except (KeyError, IndexError):
            found.append(f"link {link.id} leads from or to a slot that does not exist")
            continue
        if link.id not in (output["links"] or []) or slot["link"] != link.id:
            found.append(f"link {link.id} is not known at both of its ends")
        if output["type"] != link.kind or slot["type"] not in (link.kind, "*"):
            found.append(f"link {link.id} of type {link.kind} joins {output['type']} and {slot['type']}")
    ids = Counter(link.id for link in workflow.links)
    ends = Counter(slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None)
    begins = Counter(each for node in nodes.values() for slot in node["outputs"] for each in slot["links"] or [])
    found += [
        f"link {each} is in the list {ids[each]} times, at inputs {ends[each]} times, at outputs {begins[each]} times"
        for each in ids | ends | begins
        if (ids[each], ends[each], begins[each]) != (1, 1, 1)
    ]
    return found


def value_problems(workflow: Workflow, definitions: Definitions) -> list[str]:
    """As many values as widgets, and each of the type, in the range and among the choices of its widget."""
    found = []
    for node in workflow.nodes:
        definition, values = definitions[node["type"]], node.get("widgets_values", [])
        try:
            named = definition.widgets(values)
        except ValueError as failure:
            found.append(f"{node['type']} has {failure}")
            continue
        missing = [each.name for each in definition.inputs if each.is_widget and each not in [one for one, _ in named]]
        found += [f"{node['type']} has no value for {name}" for name in missing]
        for widget, value in named:
            problem = widget.problem(value)
            found += [f"{node['type']}.{widget.name} = {value!r} {problem}"] if problem else []
            found += [f"{node['type']}.{widget.name} = {value!r} is a place on one machine"] if _is_path(value) else []
    return found


def _is_path(value: object) -> bool:
    return isinstance(value, str) and (
        value.startswith(("/", "~")) or "\\" in value or ".." in value or value[1:2] == ":"
    )


def reach_problems(workflow: Workflow, definitions: Definitions) -> list[str]:
    """Every node leads to one that ends the workflow; there is no cycle, and `order` is one in which nodes can run."""
    after: dict[int, set[int]] = {node["id"]: set() for node in workflow.nodes}
    for link in workflow.links:
        after[link.source].add(link.target)
    leads = {node["id"] for node in workflow.nodes if definitions[node["type"]].is_output}
    while more := {each for each in after if each not in leads and after[each] & leads}:
        leads |= more
    found = [f"{node['type']} leads to no output" for node in workflow.nodes if node["id"] not in leads]
    order = {node["id"]: node["order"] for node in workflow.data["nodes"]}
    if sorted(order.values()) != list(range(len(order))):
        found.append("order is no permutation of the nodes")
    return found + [
        f"link {link.id} leads backwards in order"
        for link in workflow.links
        if order[link.source] >= order[link.target]
    ]


def origin_problems(workflow: Workflow, definitions: Definitions) -> list[str]:
    """Each node names its package and a version of it."""
    found = []
    for node in workflow.data["nodes"]:
        kind, properties = node["type"], node["properties"]
        package = "comfy-core" if kind == NOTE else definitions[kind].package
        if properties.get("cnr_id") != package:
            found.append(f"{kind} has cnr_id {properties.get('cnr_id')}, not {package}")
        if "ver" not in properties:
            found.append(f"{kind} tells no version")
        if kind != NOTE and properties.get("Node name for S&R") != kind:
            found.append(f"{kind} has another name for S&R")
    return found


def model_problems(workflow: Workflow, folders: Mapping[str, str]) -> list[str]:
    """Each file of weights that a node loads has its address and folder in the node and in a note."""
    found = []
    text = "\n".join(workflow.notes)
    for node in workflow.nodes:
        kind, told = node["type"], {model["name"]: model for model in node["properties"].get("models", [])}
        loaded = {
            value for value in node.get("widgets_values", []) if isinstance(value, str) and value.endswith(WEIGHTS)
        }
        if loaded != set(told):
            found.append(f"{kind} loads {sorted(loaded)} but tells of {sorted(told)}")
        for name, model in told.items():
            if not (model["url"].startswith(HUGGING_FACE) and f"/resolve/main/{name}" in _flat(model["url"])):
                found.append(f"{name} has the address {model['url']}")
            if model["directory"] != folders.get(kind):
                found.append(f"{name} is in {model['directory']}, but {kind} looks into {folders.get(kind)}")
            if f"[{name}]({model['url']}) → `models/{model['directory']}`" not in text:
                found.append(f"no note tells where to get {name} and where to put it")
    return found


def _flat(address: str) -> str:
    """The same with the file directly below the branch."""
    head, _, path = address.partition("/resolve/main/")
    return f"{head}/resolve/main/{path.rpartition('/')[2]}"


def layout_problems(workflow: Workflow) -> list[str]:
    """Nothing lies over another, each node is in one group that has a title, and links lead to the right, or
    down to the next row.
    """
    data = workflow.data
    nodes = {node["id"]: (node["type"], box_of(node)) for node in data["nodes"]}
    groups = [(group["title"], box_of_group(group)) for group in data["groups"]]
    found = [f"{one} lies over {other}" for (one, a), (other, b) in combinations(nodes.values(), 2) if a.overlaps(b)]
    found += [f"group {one} lies over {other}" for (one, a), (other, b) in combinations(groups, 2) if a.overlaps(b)]
    boxes = [box for _, box in (*nodes.values(), *groups)]
    width = max(box.right for box in boxes) - min(box.left for box in boxes)
    height = max(box.bottom for box in boxes) - min(box.top for box in boxes)
    found += [f"it is {width} by {height}"] if width > WIDEST or height > TALLEST else []
    found += ["a group has no title" for title, _ in groups if not title.strip()]
    for kind, box in nodes.values():
        around = [group for _, group in groups if group.overlaps(box)]
        if [group.holds(box) for group in around] != ([] if kind == NOTE else [True]):
            found.append(f"{kind} is not inside exactly one group")
    for link in workflow.links:
        (source, begin), (target, end) = nodes[link.source], nodes[link.target]
        if begin.left > end.left and begin.bottom > end.top:
            found.append(f"{source} is to the right of {target}, which it feeds, and not above it")
    found += [
        f"{node['type']} is collapsed or has no size"
        for node in data["nodes"]
        if set(node["flags"]) - {"collapsed" if node["type"] in MAY_BE_COLLAPSED else ""} or min(node["size"]) < 40
    ]
    return found


def prompt_problems(workflow: Workflow, definitions: Definitions) -> list[str]:
    """What a server would refuse of the prompt: missing, unknown and impossible inputs."""
    found = []
    prompt = to_prompt(workflow, definitions)
    for node in prompt.values():
        kind, inputs = node["class_type"], dict(node["inputs"])
        expected = list(definitions[kind].inputs)
        for each in expected:  # grows: a choice of a dynamic combo adds inputs
            if each.name not in inputs:
                found += [f"{kind} lacks {each.name}"] if each.is_required else []
                continue
            value = inputs.pop(each.name)
            expected += each.chosen(value)
            if isinstance(value, list):
                source, output = value
                given = definitions[prompt[source]["class_type"]].outputs[output][1]
                found += [] if each.kind in (given, "*") else [f"{kind}.{each.name} gets {given}"]
            elif not each.is_widget or each.problem(value):
                found.append(f"{kind}.{each.name} gets {value!r}")
        found += [f"{kind} has no input {name}" for name in inputs]
    if not any(definitions[node["class_type"]].is_output for node in prompt.values()):
        found.append("the prompt has no outputs")
    return found
