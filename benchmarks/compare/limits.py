"""The limits of a comparison, each with the figures that meet it or do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wanvideo_enhanced_blockswap.hardware import format_bytes

from .cells import EQUAL, RESIDENT, Row

HIDDEN = 1.01
"""Step over the resident model's if compute hides all copies."""
AT_THE_BOUND = 1.03
"""Step over the bound elsewhere."""
OF_THE_LINK = 0.95
"""Bytes per second over the link's, where transfer dominates."""
OVER_PLAIN = 3.0
"""The plain swap's step over ours, where transfer dominates."""
EXACT_PINS = 1.01
"""Page-locked bytes over swapped bytes."""
SAME_TIME = 1.01
"""Step over a peer's that counts as no slower: equal steps differ by this much in a measurement."""
SAME_MEMORY = 1.02
"""Device memory over a peer's that counts as no more: small tensors of all blocks stay on the device."""
CLEAR = 2.0
"""Transfer over compute at which transfer dominates; at its inverse compute hides it."""
OURS = ("ours", "ours-1-slot")
"""The engine, and its variant for the least memory."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit at one cell.

    Attributes:
        said: The limit and the figure.
        met: Whether it is met.
    """

    said: str
    met: bool


def verdicts(rows: Sequence[Row], *, block_bytes: float, link_bytes_per_s: float) -> list[Verdict]:
    """A verdict for each limit that applies; cells without figures have none.

    Args:
        rows: The completed rows.
        block_bytes: Bytes of one block's weights.
        link_bytes_per_s: As measured.
    """
    ran = [row for row in rows if not row.reason and row.step_ms]
    resident = {row.shape: row for row in ran if row.engine == RESIDENT}
    found: list[Verdict] = []
    for row in ran:
        if row.engine == "ours":
            cell, swapped_bytes = f"{row.shape}, {row.swapped} swapped", row.swapped * block_bytes
            others = [other for other in ran if (other.shape, other.swapped) == (row.shape, row.swapped)]
            base = resident.get(row.shape)
            if base is None:
                found.append(Verdict(f"{cell}: no step to compare with, because resident has no figures", met=False))
            else:
                found += _beside_resident(cell, row, base, others, block_bytes, link_bytes_per_s)
            if row.pinned_bytes is not None:
                share = row.pinned_bytes / swapped_bytes
                found.append(_at_most(f"{cell}: page-locked over swapped bytes", share, EXACT_PINS))
            found += [
                _beside(cell, other, [one for one in others if one.engine in OURS])
                for other in others
                if not other.engine.startswith(("ours", RESIDENT, "plain"))
            ]
    return found


def _beside_resident(
    cell: str, row: Row, base: Row, others: Sequence[Row], block_bytes: float, link_bytes_per_s: float
) -> Iterator[Verdict]:
    assert row.step_ms is not None
    assert base.step_ms is not None
    assert row.bound_ms is not None
    swapped_bytes = row.swapped * block_bytes
    link_ms = swapped_bytes / link_bytes_per_s * 1e3 if link_bytes_per_s else 0.0
    dominates, is_hidden = link_ms >= CLEAR * base.step_ms, CLEAR * link_ms <= base.step_ms
    yield Verdict(f"{cell}: output {row.output}", row.output == EQUAL)
    if is_hidden:
        yield _at_most(f"{cell}: step over resident", row.step_ms / base.step_ms, HIDDEN)
    else:
        yield _at_most(f"{cell}: step over bound", row.step_ms / row.bound_ms, AT_THE_BOUND)
    if dominates:
        speed = swapped_bytes / row.step_ms * 1e3 / link_bytes_per_s
        yield Verdict(f"{cell}: share of the link {speed:.3f}, at least {OF_THE_LINK}", speed >= OF_THE_LINK)
    yield _memory(cell, row, base, block_bytes)
    for other in others:
        if other.engine == "plain" and dominates and other.step_ms is not None:
            ratio = other.step_ms / row.step_ms
            yield Verdict(f"{cell}: {ratio:.1f} times as fast as plain, at least {OVER_PLAIN:.0f}", ratio >= OVER_PLAIN)


def _memory(cell: str, row: Row, base: Row, block_bytes: float) -> Verdict:
    """The resident blocks and two slots, however far the host runs ahead."""
    assert row.weights_bytes is not None
    assert base.held_bytes is not None
    most = base.held_bytes - (row.swapped - 2) * block_bytes
    said = f"{cell}: weights {format_bytes(row.weights_bytes)}, at most {format_bytes(int(most))} (within 2 %)"
    return Verdict(said, row.weights_bytes <= most * SAME_MEMORY)


def _beside(cell: str, other: Row, ours: Sequence[Row]) -> Verdict:
    """Whether one of ours is as fast as a peer and takes no more memory."""
    assert other.step_ms is not None
    assert other.peak_bytes is not None
    said = ", ".join(f"{one.engine} {one.step_ms:.4g} ms in {format_bytes(one.peak_bytes or 0)}" for one in ours)
    met = any(
        one.step_ms is not None
        and one.peak_bytes is not None
        and one.step_ms <= other.step_ms * SAME_TIME
        and one.peak_bytes <= other.peak_bytes * SAME_MEMORY
        for one in ours
    )
    return Verdict(f"{cell}: {said}; {other.engine} {other.step_ms:.4g} ms in {format_bytes(other.peak_bytes)}", met)


def _at_most(what: str, found: float, most: float) -> Verdict:
    return Verdict(f"{what} {found:.3f}, at most {most:g}", found <= most)
