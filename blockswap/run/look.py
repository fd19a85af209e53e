"""Looks at a plan that is followed: what its forwards have shown, whether memory has shrunk under it or forwards have
become slow, and whether another should take its place.
"""

from __future__ import annotations

import math
import statistics

from ...hardware import format_bytes
from ...hardware.units import format_count
from ..engine.session import SwapSession
from ..errors import PlanError
from ..plan.swap_plan import SwapPlan
from .planner import Planner
from .replan import OVER_BUDGET, why_replace
from .run_report import RunStats, observe_timed

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


def learn(session: SwapSession, planner: Planner, found: RunStats, timed: range) -> bool:
    """Once the forwards that were timed are over on the device: what they say. What follows from it is done before the
    next forward, which may fail; this one is over.

    Returns:
        Whether they have said something that was not known.
    """
    plan = planner.followed
    if plan is None or found.is_timed or session.log.forwards < timed.stop:
        return False
    found.observe(observe_timed(session, planner, timed), timed)
    if found.observed is None or not found.is_timed:
        return False
    _notice_slow_link(planner, plan, found)
    planner.learn(found.observed, plan)
    found.prediction = planner.predict(plan)
    return True


def _notice_slow_link(planner: Planner, plan: SwapPlan, found: RunStats) -> None:
    assert found.observed is not None
    link, speed = planner.link, found.observed.copied_bytes_per_s
    if link is None or not link.pinned or speed is None or plan.staging_bytes or not plan.pinned_bytes:
        return
    measured = link.best(max_streams=plan.streams)[1]
    if speed < SLOW_LINK * measured:
        found.note(
            f"copies run at {speed / 1e9:.1f} GB/s where {measured / 1e9:.1f} GB/s had been measured: something else "
            "uses the link, or it has fallen back to fewer lanes; close other programs, or look at the slot of the card"
        )


def has_become_slow(session: SwapSession, planner: Planner, found: RunStats, timed: range) -> bool:
    """Whether the last forward took several times what is usual, seen once in a run. With the card full, a note says
    what to change: the driver moves what does not fit to host memory without a word.
    """
    durations = [] if session.trace is None else session.trace.forward_ms[timed.start :]
    if found.is_slow or len(durations) <= FEW_FORWARDS:
        return False
    usual = statistics.median(durations[:-1])
    if durations[-1] < SLOW * usual:
        return False
    found.is_slow = True
    memory, plan = planner.machine.memory(), planner.followed
    if plan is not None and memory.free_bytes < FULL * memory.total_bytes:
        largest = max(plan.slot_bytes, plan.resident_bytes // len(plan.swapped), 1)
        more = max(1, math.ceil(2 * FULL * memory.total_bytes / largest))
        found.note(
            f"a forward took {durations[-1]:,.0f} ms where {usual:,.0f} ms are usual, with "
            f"{format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} free: the driver is probably "
            f"moving video memory to the host; lower vram_threshold_percent, by hand swap "
            f"{format_count(more, 'more block')}, or close other programs on the GPU"
        )
    return True


def is_over(planner: Planner, found: RunStats) -> bool:
    """Whether the weights stand above what memory leaves for them now, and otherwise than when that was last seen."""
    plan = planner.followed
    if plan is None or plan.over_ceiling:
        return False
    budget = planner.budget()
    over, tolerance = plan.device_bytes - budget.weight_bytes, OVER_BUDGET * budget.total_bytes
    if over <= tolerance or abs(over - found.over_bytes) <= tolerance:
        return False
    found.over_bytes = over
    return True


def why_change(planner: Planner, present: SwapPlan, found: RunStats) -> str | None:
    """Why another plan should take `present`'s place, as a sentence; None to go on, with a note where that hurts."""
    if found.looks >= MOST_REPLANS:
        found.note(f"the plan has been changed {MOST_REPLANS} times in this run and is kept now")
        return None
    try:
        other = planner.consider()
    except PlanError as failure:
        found.note(f"the plan is kept although memory has shrunk: {failure}")
        return None
    total = planner.machine.memory().total_bytes
    why = why_replace(present, other, total_bytes=total, predicted=planner.predict(present))
    if why is not None:
        found.looks += 1
    elif present.device_bytes - other.budget_bytes > OVER_BUDGET * total:
        weights, left = format_bytes(present.device_bytes), format_bytes(other.budget_bytes)
        found.note(f"the weights take {weights} where {left} are left for them now, and no smaller plan fits")
    return why
