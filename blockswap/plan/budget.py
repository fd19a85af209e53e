"""The balance of VRAM and DRAM: what a plan may spend; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ...hardware.units import format_bytes
from .swap_plan import PlanInputs

SAFETY_RESERVE = 0.10
"""Share of the card's memory that is never counted as available: the brief's safety reserve, for fragmentation, the
allocator's rounding and what other programs take while we run."""

USABLE_DRAM = 0.80
"""Share of the available host memory that weights may take ("safe use 80 %" of the brief)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes that a plan may spend, with the terms they came from.

    Attributes:
        used_bytes: Device memory in use by others, and by us for anything but block weights.
        activation_bytes: Peak above the weights for this shape; None if neither measured nor worked out.
        weight_bytes: What residents, small tensors and window may take together.
        limit_bytes: What they could take at most before the device runs out: total - used.
        host_bytes: Host memory that the plan may take, what we hold already counted in.
        host_held_bytes: Bytes of the blocks that are in host memory already.
        originals_stay: Slabs are copies of weights that somebody else keeps.
        pin_bytes: Host memory that the plan may page-lock.
        is_unified: The card's memory is the host's, so that swapping would free nothing.
        reason: Which term sets `weight_bytes`, as a sentence.
    """

    total_bytes: int
    used_bytes: int
    activation_bytes: int | None
    weight_bytes: int
    host_bytes: int
    host_held_bytes: int
    pin_bytes: int
    originals_stay: bool = False
    is_unified: bool = False
    reason: str = ""

    @property
    def limit_bytes(self) -> int:
        """Device memory that is left when no reserve is kept."""
        return self.total_bytes - self.used_bytes

    def host_need(self, block_bytes: int, *, slab_bytes: int, staging_bytes: int = 0) -> int:
        """Host memory that a plan takes beside what is held of the blocks already.

        Args:
            block_bytes: All blocks.
            slab_bytes: Slabs of the swapped blocks.
            staging_bytes: Staging slabs.
        """
        if self.is_unified:
            return staging_bytes  # the weights are there once, and `limit_bytes` is the host's
        copies = slab_bytes if self.originals_stay else 0
        return max(0, block_bytes - self.host_held_bytes) + copies + staging_bytes


def make_budget(inputs: PlanInputs) -> MemoryBudget:
    """The balance of VRAM and DRAM: VRAM first, DRAM for the overflow.

        used          = in use now - torch's unused cache - our own weights
        available     = max(0, total - used - max(10 % of total, what others asked to be left))
        ceiling       = max(0, vram_threshold_percent of total - used)
        weight budget = min(ceiling, bandwidth_target * available, available - activations if known)
        host budget   = 80 % of what is available and of what our staging slabs and copies take

    What we hold counts as free on both sides, so that a plan made while another is in place is the same.

    Where card and host share one memory, the ceiling and the share would only leave memory idle: the weight budget is
    then what is available, less the activations.
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
    ours = inputs.staging_bytes + (inputs.slab_bytes if inputs.originals_stay else 0)
    weights, why = min(terms, key=lambda term: term[0])
    return MemoryBudget(
        total_bytes=total,
        used_bytes=used,
        activation_bytes=None if inputs.activations is None else inputs.activations.nbytes,
        weight_bytes=weights,
        host_bytes=int(USABLE_DRAM * (inputs.host_available_bytes + ours)),
        host_held_bytes=inputs.host_held_bytes,
        pin_bytes=inputs.pin_budget_bytes,
        originals_stay=inputs.originals_stay,
        is_unified=inputs.is_unified,
        reason=f"{format_bytes(weights)} for block weights: set by {why}",
    )
