"""What traced forwards show, when another plan should take the present one's place, and what has become slow; pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass

from ...hardware.records import DeviceMemory, LinkSpeed
from ...hardware.units import format_bytes, format_count
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan
from ..spans import COMPUTE, COPY, FORWARD, STALL, Span, busy_ms, total_ms

WORTH_A_REPLAN = 0.05
"""Part of a forward that another plan must save. To adopt it costs a copy of all residents: the time of a few forwards
where transfer rules, and of one where compute does, so that 5 % is earned back within a run of 20 to 50 forwards."""

OVER_BUDGET = 0.01
"""Part of the card by which the weights may stand above a budget that has shrunk since: what other programs take and
give back all the time. The safety reserve, ten times that, is there for it."""


MOST_REPLANS = 3
"""Plans that may follow the first of a run: for what the first step shows, for another shape, for memory that others
take. Beyond them, what changes all the time is better left alone until the next run."""

SLOW = 3.0
"""Times the median of the forwards before: what spilled video memory costs at least (7 minutes became an hour, 5
minutes in all became 6 a step), and more than a forward varies by otherwise."""

FEW_FORWARDS = 3
"""Before them no forward is called usual."""

FULL = 0.05
"""Part of the card below which it counts as full: where the driver keeps that free itself, it begins to spill."""

SLOW_LINK = 0.5
"""Part of the measured speed below which copies are called slow: fewer lanes, or another program's copies."""


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
        return f"the weights take {weights}, {left} are left for them now"
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


def slow_link(link: LinkSpeed | None, *, streams: int, seen_bytes_per_s: float | None) -> str | None:
    """A note where copies from page-locked memory are far slower than the link; None where they are not."""
    if link is None or not link.pinned or seen_bytes_per_s is None:
        return None
    measured = link.best(max_streams=streams)[1]
    if seen_bytes_per_s >= SLOW_LINK * measured:
        return None
    return (
        f"copies run at {seen_bytes_per_s / 1e9:.1f} GB/s, {measured / 1e9:.1f} GB/s had been measured: something else "
        "uses the link, or it has fallen back to fewer lanes; close other programs, or look at the slot of the card"
    )


def usual_ms(durations: Sequence[float]) -> float | None:
    """What a forward took before the last one, if the last took several times that; None if it did not, or too few are
    known.
    """
    if len(durations) <= FEW_FORWARDS:
        return None
    usual = statistics.median(durations[:-1])
    return usual if durations[-1] >= SLOW * usual else None


def spill(plan: SwapPlan, memory: DeviceMemory, *, took_ms: float, usual: float) -> str | None:
    """A note for a forward that has become slow while the card is full: the driver moves what does not fit to host
    memory without a word. None where the card is not full.
    """
    if memory.free_bytes >= FULL * memory.total_bytes:
        return None
    largest = max(plan.slot_bytes, plan.resident_bytes // len(plan.swapped), 1)
    more = max(1, math.ceil(2 * FULL * memory.total_bytes / largest))
    return (
        f"a forward took {took_ms:,.0f} ms, {usual:,.0f} ms are usual, with "
        f"{format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} free: the driver is probably "
        f"moving video memory to the host; lower vram_threshold_percent, by hand swap "
        f"{format_count(more, 'more block')}, or close other programs on the GPU"
    )


def kept_over_budget(present: SwapPlan, other: SwapPlan, *, total_bytes: int) -> str | None:
    """A note where the weights stand above their budget and no smaller plan is to be had; None where they do not."""
    if present.device_bytes - other.budget_bytes <= OVER_BUDGET * total_bytes:
        return None
    weights, left = format_bytes(present.device_bytes), format_bytes(other.budget_bytes)
    return f"the weights take {weights}, {left} are left for them now, and no smaller plan fits"
