"""What timed forwards show, when a new plan should replace the present one, and what has become slow; pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass

from ...hardware.records import DeviceMemory, LinkSpeed
from ...hardware.units import format_bytes, format_speed
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan
from ..spans import COMPUTE, COPY, FORWARD, STALL, Span, busy_ms, total_ms

WORTH_A_REPLAN = 0.05
"""Share of a forward that a new plan must save. The change costs a copy of all residents, which takes as long as one
forward where compute dominates and a few where transfer does; a run of 20 to 50 forwards earns that back at 5 %."""

OVER_BUDGET = 0.01
"""Share of the card by which the weights may exceed a budget that has shrunk since: other programs take and free as
much all the time, and the safety reserve is ten times that."""

MOST_REPLANS = 3
"""Plans that may follow the first of a run: after the first step's measurements, for another shape, for memory that
others take. If more is needed, memory changes all the time, and plans that follow it would cost more than they save."""

SLOW = 3.0
"""Times the median of the earlier forwards. Spilled video memory costs more than that (7 minutes became an hour; 5
minutes in all became 6 per step), and a forward varies by less otherwise."""

FEW_FORWARDS = 3
"""Forwards that must be known before a median is called usual."""

FULL = 0.05
"""Share of the card that is free below which it counts as full: the driver keeps about as much free when it spills."""

SLOW_LINK = 0.5
"""Share of the measured speed below which copies are called slow: fewer lanes, or another program's copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What timed forwards show.

    Attributes:
        forwards: How many were timed.
        compute_ms: Duration of each block; None if a block did not run.
        forward_ms: Duration of a forward, the median.
        stall_ms: Time per forward that compute waited for copies.
        copied_bytes_per_s: Bytes over the time in which copies were under way; None without copies.
    """

    forwards: int
    compute_ms: tuple[float, ...] | None
    forward_ms: float
    stall_ms: float
    copied_bytes_per_s: float | None


def observe(
    spans: Sequence[Span],
    *,
    slab_bytes: Sequence[int],
    timed: range,
    traced: Container[int],
    optional: Container[int] = (),
) -> Observation | None:
    """Evaluates a trace; None while the end of the timed forwards is missing.

    Args:
        spans: Of forwards, and of blocks and copies in those that were traced.
        slab_bytes: Bytes that an onload of each block copies.
        timed: Numbers of the timed forwards; earlier ones are left out, since they warm up.
        traced: Numbers of the forwards that were traced in detail.
        optional: Blocks that take no time where they did not run, as a control model that is not used.
    """
    forwards = {span.block: span for span in spans if span.lane == FORWARD and span.block >= timed.start}
    if timed.stop - 1 not in forwards:
        return None
    begin = forwards[timed.start].begin_ms
    inside = [span for span in spans if span.begin_ms >= begin]
    count = sum(number in traced for number in forwards)
    found: list[list[float]] = [[] for _ in slab_bytes]
    for span in inside:
        if span.lane == COMPUTE:
            found[span.block].append(span.duration_ms)
    known = all(durations or block in optional for block, durations in enumerate(found))
    copied = sum(slab_bytes[span.block] for span in inside if span.lane == f"{COPY} 0")
    busy = busy_ms(inside, COPY)
    return Observation(
        forwards=count,
        compute_ms=tuple(statistics.median(durations or [0.0]) for durations in found) if known else None,
        forward_ms=statistics.median(span.duration_ms for span in forwards.values()),
        stall_ms=total_ms(inside, STALL) / count,
        copied_bytes_per_s=copied / busy * 1e3 if busy else None,
    )


def why_replace(present: SwapPlan, other: SwapPlan, *, total_bytes: int, predicted: ForwardTime | None) -> str | None:
    """Why `other` should replace `present`, as a sentence; None to keep `present`.

    Args:
        present: The present plan.
        other: The plan that would be made now.
        total_bytes: The card's memory.
        predicted: A forward with `present` in virtual time, from what is known now; None where a speed is unknown.
    """
    if (present.swapped, present.slots, present.streams) == (other.swapped, other.slots, other.streams):
        return None
    over = present.device_bytes - other.budget_bytes
    if over > OVER_BUDGET * total_bytes and other.device_bytes < present.device_bytes:
        weights, left = format_bytes(present.device_bytes), format_bytes(other.budget_bytes)
        return f"the weights take {weights}, but only {left} are left for them now"
    if other.over_ceiling and not present.over_ceiling:
        return None  # it would be faster, but break the ceiling
    if present.over_ceiling and not other.over_ceiling:
        return f"the weights fit now: {format_bytes(other.device_bytes)} of {format_bytes(other.budget_bytes)}"
    if predicted is None or other.predicted is None:
        return None
    saved = predicted.elapsed - other.predicted.elapsed
    if saved > WORTH_A_REPLAN * predicted.elapsed:
        return f"a pass of the model should take {other.predicted.elapsed:,.0f} ms, not {predicted.elapsed:,.0f} ms"
    return None


def slow_link(link: LinkSpeed | None, *, streams: int, seen_bytes_per_s: float | None) -> str | None:
    """A note if copies from page-locked memory are far slower than the link; None otherwise."""
    if link is None or not link.pinned or seen_bytes_per_s is None:
        return None
    measured = link.best(max_streams=streams)[1]
    if seen_bytes_per_s >= SLOW_LINK * measured:
        return None
    return (
        f"copies run at {format_speed(seen_bytes_per_s)}, but {format_speed(measured)} were measured before: another "
        "program uses the link, or it has fallen back to fewer lanes; close other programs, or check how the card is "
        "plugged in"
    )


def usual_ms(durations: Sequence[float]) -> float | None:
    """The median of the forwards before the last one, if the last took several times that; None otherwise, or if too
    few are known.
    """
    if len(durations) <= FEW_FORWARDS:
        return None
    usual = statistics.median(durations[:-1])
    return usual if durations[-1] >= SLOW * usual else None


def spill(plan: SwapPlan, memory: DeviceMemory, *, took_ms: float, usual: float) -> str | None:
    """A note if a forward has become slow while the card is full, since the driver then moves video memory to the host
    and reports nothing; None if the card is not full.
    """
    if memory.free_bytes >= FULL * memory.total_bytes:
        return None
    largest = max(plan.slot_bytes, plan.resident_bytes // len(plan.swapped), 1)
    more = max(1, math.ceil(2 * FULL * memory.total_bytes / largest))
    return (
        f"a pass of the model took {took_ms:,.0f} ms instead of the usual {usual:,.0f} ms, with "
        f"{format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} of VRAM free: the driver is probably "
        f"moving VRAM to RAM; lower vram_threshold_percent, raise "
        f"blocks_to_swap by {more}, or close other programs on the GPU"
    )


def kept_over_budget(present: SwapPlan, other: SwapPlan, *, total_bytes: int) -> str | None:
    """A note if the weights exceed their budget and there is no smaller plan; None otherwise."""
    if present.device_bytes - other.budget_bytes <= OVER_BUDGET * total_bytes:
        return None
    weights, left = format_bytes(present.device_bytes), format_bytes(other.budget_bytes)
    return f"the weights take {weights}, but only {left} are left for them now, and no smaller plan fits"
