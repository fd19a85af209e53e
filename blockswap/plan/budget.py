"""MemoryBudget: how much VRAM and DRAM a plan may spend; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ...hardware.units import format_bytes
from .swap_plan import PlanInputs

SAFETY_RESERVE = 0.10
"""Share of the card's memory that never counts as available, a documented default: for fragmentation, the allocator's
rounding, and what other programs allocate during a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes that a plan may spend.

    Attributes:
        weight_bytes: Device memory for residents, small tensors and window together.
        limit_bytes: Device memory that other data do not use. A plan that needs more is refused.
        host_bytes: Host memory that slabs and staging slabs may add to what the system cannot drop.
        host_limit_bytes: Available host memory. A plan that adds more is refused.
        reason: Which term sets `weight_bytes`, as a sentence.
    """

    weight_bytes: int
    limit_bytes: int
    host_bytes: int
    host_limit_bytes: int
    reason: str = ""


def make_budget(inputs: PlanInputs) -> MemoryBudget:
    """The budget: VRAM first, DRAM for the rest.

        used          = in use now - torch's unused cache - our own weights
        available     = max(0, total - used - max(10 % of total, what others asked us to leave free))
        ceiling       = max(0, vram_threshold_percent of total - used)
        weight budget = min(ceiling, bandwidth_target * available, available - activations if known)
        host budget   = available host memory - a floor (HostMemory.room_bytes)

    Our own memory counts as free on both sides, so that the budget does not depend on a plan in place.

    If card and host share one memory, swapping frees nothing, and the ceiling and the share would only leave memory
    unused: the weight budget is then what is available, less the activations.
    """
    total = inputs.device_total_bytes
    used = max(0, total - inputs.device_free_bytes - inputs.unused_cache_bytes - inputs.own_bytes)
    reserve = max(int(SAFETY_RESERVE * total), inputs.reserve_bytes)
    available = max(0, total - used - reserve)
    in_use = f"{format_bytes(used)} of {format_bytes(total)} already in use by other data"
    terms = [(available, f"what is free above a reserve of {format_bytes(reserve)}, with {in_use}")]
    if not inputs.is_unified:
        percent, target = inputs.vram_threshold_percent, inputs.bandwidth_target
        ceiling = max(0, int(percent / 100 * total) - used)
        terms.append((ceiling, f"vram_threshold_percent = {percent:g}, with {in_use}"))
        share = f"{target:.0%} of the {format_bytes(available)} available, with {in_use}"
        terms.append((int(target * available), share))
    if inputs.activations is not None:
        nbytes, how = inputs.activations.nbytes, "measured" if inputs.activations.is_measured else "expected"
        left = f"the {format_bytes(nbytes)} that activations are {how} to take, with {in_use}"
        terms.append((max(0, available - nbytes), left))
    weights, why = min(terms, key=lambda term: term[0])
    return MemoryBudget(
        weight_bytes=weights,
        limit_bytes=total - used,
        host_bytes=inputs.host_room_bytes,
        host_limit_bytes=inputs.host_available_bytes,
        reason=f"{format_bytes(weights)} for block weights: set by {why}",
    )
