"""From a saved workflow to the prompt that the front end would queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .definitions import CONTROL, PLAYER, Definition
from .workflow import Workflow

ONLY_SAVED = {CONTROL, "upload", *PLAYER}
"""Widgets of the front end alone."""


def to_prompt(workflow: Workflow, definitions: Mapping[str, Definition]) -> dict[str, Any]:
    """Class and inputs of each node: values of widgets by name, and connections in place of what they replace."""
    sources = {link.id: [str(link.source), link.output] for link in workflow.links}
    prompt: dict[str, Any] = {}
    for node in workflow.nodes:
        named = definitions[node["type"]].widgets(node.get("widgets_values", []))
        inputs = {widget.name: value for widget, value in named if widget.name not in ONLY_SAVED}
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
