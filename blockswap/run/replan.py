"""When a plan should give way to another: what was measured against what was predicted; pure."""

from __future__ import annotations

import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass

from ...hardware.units import format_bytes
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan
from ..spans import COMPUTE, COPY, FORWARD, STALL, Span, busy_ms, total_ms

WORTH_A_REPLAN = 0.05
"""Part of a forward that another plan must save. To adopt it costs a copy of all residents: the time of a few forwards
where transfer rules, and of one where compute does, so that 5 % is earned back within a run of 20 to 50 forwards."""

OVER_BUDGET = 0.01
"""Part of the card by which the weights may stand above a budget that has shrunk since: what other programs take and
give back all the time. The safety reserve, ten times that, is there for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the traced forwards show.

    Attributes:
        forwards: How many were traced.
        compute_ms: Duration of each block; None if one of them did not run.
        forward_ms: Duration of a forward, the median of all.
        stall_ms: What compute waited for copies in a forward.
        copied_bytes_per_s: Bytes over the time in which copies were under way; None if none were.
    """

    forwards: int
    compute_ms: tuple[float, ...] | None
    forward_ms: float
    stall_ms: float
    copied_bytes_per_s: float | None


def observe(
    spans: Sequence[Span], *, slab_bytes: Sequence[int], timed: range, traced: Container[int]
) -> Observation | None:
    """What a trace shows; None while it lacks the end of the forwards that were timed.

    Args:
        spans: Of forwards, and of what happened in those that were traced.
        slab_bytes: What an onload of each block copies.
        timed: Numbers of the forwards that must be there; earlier ones warm up and do not count.
        traced: Numbers of the forwards that were traced in detail.
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
    copied = sum(slab_bytes[span.block] for span in inside if span.lane == f"{COPY} 0")
    busy = busy_ms(inside, COPY)
    return Observation(
        forwards=count,
        compute_ms=tuple(map(statistics.median, found)) if all(found) else None,
        forward_ms=statistics.median(span.duration_ms for span in forwards.values()),
        stall_ms=total_ms(inside, STALL) / count,
        copied_bytes_per_s=copied / busy * 1e3 if busy else None,
    )


def why_replace(present: SwapPlan, other: SwapPlan, *, total_bytes: int, predicted: ForwardTime | None) -> str | None:
    """Why `other`, made from what is known now, should take the place of `present`, as a sentence; None to go on.

    Args:
        present: The plan that is followed.
        other: What would be planned now.
        total_bytes: The card's memory.
        predicted: A forward with `present`, in virtual time, from what is known now; None where a speed is unknown.
    """
    if (present.swapped, present.slots, present.streams) == (other.swapped, other.slots, other.streams):
        return None
    over = present.device_bytes - other.budget_bytes
    if over > OVER_BUDGET * total_bytes and other.device_bytes < present.device_bytes:
        weights, left = format_bytes(present.device_bytes), format_bytes(other.budget_bytes)
        return f"the weights take {weights} where {left} are left for them now"
    if other.over_ceiling and not present.over_ceiling:
        return None  # it would save time at the price of the ceiling
    if present.over_ceiling and not other.over_ceiling:
        return f"the weights fit now: {format_bytes(other.device_bytes)} of {format_bytes(other.budget_bytes)}"
    if predicted is None or other.predicted is None:
        return None
    saved = predicted.elapsed - other.predicted.elapsed
    if saved > WORTH_A_REPLAN * predicted.elapsed:
        return f"a forward is expected to take {other.predicted.elapsed:,.0f} ms and not {predicted.elapsed:,.0f} ms"
    return None
