"""Figures of a link, and tables of them for a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wanvideo_enhanced_blockswap.hardware import format_bytes

IDLE, BUSY = "idle", "busy"
LEAST_WIDTH = 4
"""Narrowest column: the rule below a header needs three hyphens and a colon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        size_bytes: Size of one copy.
        streams: Copy streams that share it.
        memory: `pinned` or `pageable`.
        load: `idle`, or `busy` with matrix products on the compute stream.
        gbytes_per_s: 1e9 bytes per second.
        product_slowdown: Duration of the products during the copy over that of the same ones alone, minus 1.
        reason: Why a figure is missing.
    """

    size_bytes: int
    streams: int
    memory: str
    load: str = IDLE
    gbytes_per_s: float | None = None
    product_slowdown: float | None = None
    reason: str | None = None


def tables(rows: Sequence[Row]) -> str:
    """A table for each kind of memory and load, sizes by streams, with the reasons for missing figures below."""
    kinds = dict.fromkeys((row.memory, row.load) for row in rows)
    return "\n".join(_table([row for row in rows if (row.memory, row.load) == kind]) for kind in kinds)


def _table(rows: Sequence[Row]) -> str:
    memory, load = rows[0].memory, rows[0].load
    counts = sorted({row.streams for row in rows})
    cells = [["streams", *map(str, counts)]]
    reasons: dict[str, list[str]] = {}
    for size in sorted({row.size_bytes for row in rows}):
        of_size = {row.streams: row for row in rows if row.size_bytes == size}
        cells.append([format_bytes(size), *(_said(of_size[count]) for count in counts)])
        for reason in dict.fromkeys(row.reason for row in of_size.values() if row.reason is not None):
            reasons.setdefault(reason, []).append(format_bytes(size))
    widths = [max(LEAST_WIDTH, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, [f"{'-' * (width - 1)}:" for width in widths])
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    slower = ", and by how much the copy slowed the matrix products" if load == BUSY else ""
    why = [f"- {', '.join(sizes)}: {reason}" for reason, sizes in reasons.items()]
    return "\n".join([f"{memory}, {load}: GB/s{slower}", "", *lines, "", *why, *([""] if why else [])])


def _said(row: Row) -> str:
    if row.gbytes_per_s is None:
        return "-"
    slower = "" if row.product_slowdown is None else f" ({row.product_slowdown:+.1%})"
    return f"{row.gbytes_per_s:.2f}{slower}"
