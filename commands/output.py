"""The output of a command: `Result`, and the texts that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..blockswap.plan.swap_plan import SwapPlan
from ..blockswap.run.text import slots_in_words
from ..hardware.units import format_count


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


def window_text(plan: SwapPlan) -> str:
    """A plan's slots and copy streams in words."""
    if not plan.slots:
        return "no window"
    return f"{slots_in_words(plan)}, {format_count(plan.streams, 'copy stream')}"
