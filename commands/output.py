"""The output of a command: `Result`, and the texts that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a command.

    Attributes:
        data: One JSON object, for a program.
        text: The same, for a person.
        succeeded: Whether the command exits with 0.
    """

    data: Mapping[str, object]
    text: str
    succeeded: bool = True


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first left-aligned, the others right-aligned."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for head, *row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, others, strict=True)]
        lines.append("  ".join([head.ljust(first), *cells]).rstrip())
    return "\n".join(lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they name, in two columns of text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)
