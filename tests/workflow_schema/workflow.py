"""A workflow as the front end saves it: nodes, links and groups."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

NOTE = "MarkdownNote"
"""A node of the front end alone: it has no definition, and no prompt contains it."""

TITLE_HEIGHT = 30


class Link(NamedTuple):
    """One connection, in the order in which it is stored."""

    id: int
    source: int
    output: int
    target: int
    input: int
    kind: str


class Box(NamedTuple):
    """A rectangle on the canvas."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


@dataclass(frozen=True, slots=True)
class Workflow:
    """One file.

    Attributes:
        name: The file's, without its ending: what the template dialog shows.
        data: All of it.
    """

    name: str
    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Workflow:
        return cls(path.stem, json.loads(path.read_text(encoding="utf-8")))

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """All but the notes."""
        return [node for node in self.data["nodes"] if node["type"] != NOTE]

    @property
    def notes(self) -> list[str]:
        return [node["widgets_values"][0] for node in self.data["nodes"] if node["type"] == NOTE]

    @property
    def links(self) -> list[Link]:
        return [Link(*link) for link in self.data["links"]]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [node for node in self.data["nodes"] if node["type"] == kind]

    def source(self, node: dict[str, Any], name: str) -> dict[str, Any] | None:
        """The node that feeds an input."""
        wanted = next((slot["link"] for slot in node["inputs"] if slot["name"] == name), None)
        source = next((link.source for link in self.links if link.id == wanted), None)
        return next((each for each in self.nodes if each["id"] == source), None)


def box_of(node: dict[str, Any]) -> Box:
    """What a node covers, its title included."""
    (left, top), (width, height) = node["pos"], node["size"]
    height = 0 if node["flags"].get("collapsed") else height
    return Box(left, top - TITLE_HEIGHT, left + width, top + height)


def box_of_group(group: dict[str, Any]) -> Box:
    left, top, width, height = group["bounding"]
    return Box(left, top, left + width, top + height)
