"""What a command found: for a person as text, for a program as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found.

    Attributes:
        data: One JSON object.
        text: The same for a person.
        succeeded: Whether the command shows what it is there to show.
    """

    data: Mapping[str, object]
    text: str
    succeeded: bool = True


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first left-aligned, the others right-aligned."""
    first, *others = (max(len(row[i]) for row in rows) for i in range(len(rows[0])))
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], others, strict=True)]
        lines.append("  ".join([row[0].ljust(first), *cells]).rstrip())
    return "\n".join(lines)
