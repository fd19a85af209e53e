"""A look at a plan that is followed: whether memory has shrunk under it, and whether another should take its place."""

from __future__ import annotations

from ..hardware import format_bytes
from .decision import SwapPlan
from .errors import PlanError
from .planner import Planner
from .replan import OVER_BUDGET, why_replace
from .run_report import Findings

MOST_REPLANS = 3
"""Plans that may follow the first of a run: for what the first step shows, for another shape, for memory that others
take. Beyond them, what changes all the time is better left alone until the next run."""


def is_over(planner: Planner, found: Findings) -> bool:
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


def why_change(planner: Planner, present: SwapPlan, found: Findings) -> str | None:
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
