"""Readings and settings into a memory budget: VRAM first, DRAM for the overflow; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ...hardware.units import format_bytes

SAFETY_RESERVE = 0.10
"""Share of the card's memory that is never counted as available: the brief's safety reserve, for fragmentation, the
allocator's rounding and what other programs take while we run."""

USABLE_DRAM = 0.80
"""Share of the available host memory that weights may take ("safe use 80 %" of the brief)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReadings:
    """What was read, in bytes, at one moment.

    Attributes:
        device_total_bytes: The card's memory.
        device_free_bytes: Free on the card, whoever uses the rest.
        unused_cache_bytes: What torch has reserved on the card and does not use.
        own_bytes: Our residents, window and small tensors that are on the card now.
        reserve_bytes: What somebody has asked to be left free beside our own reserve.
        host_available_bytes: Host memory that can be had, within the cgroup's limit.
        pin_budget_bytes: Host memory that may be page-locked by all models together, less what already is.
        host_held_bytes: Bytes of the blocks that are in host memory already, whoever holds them.
        slab_bytes: The part of them that is in slabs of ours.
        staging_bytes: Staging slabs of ours that are there, beside the blocks' bytes.
        originals_stay: Somebody else keeps the blocks' weights, so that slabs are copies and not the only ones.
        is_unified: The card's memory is the host's.
    """

    device_total_bytes: int
    device_free_bytes: int
    host_available_bytes: int
    pin_budget_bytes: int
    unused_cache_bytes: int = 0
    own_bytes: int = 0
    reserve_bytes: int = 0
    host_held_bytes: int = 0
    slab_bytes: int = 0
    staging_bytes: int = 0
    originals_stay: bool = False
    is_unified: bool = False

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} expects bytes, 0 or more, but got {getattr(self, name)}")
        if self.device_free_bytes > self.device_total_bytes:
            raise ValueError(
                f"device_free_bytes expects at most the total of {self.device_total_bytes} "
                f"but got {self.device_free_bytes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Device memory that a forward takes above the weights.

    Attributes:
        nbytes: The peak.
        is_measured: Seen in a forward of this shape; otherwise worked out from the shape.
    """

    nbytes: int
    is_measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes that a plan may spend, with the terms they came from.

    Attributes:
        used_bytes: Device memory in use by others, and by us for anything but block weights.
        available_bytes: total - used - safety reserve.
        ceiling_bytes: What the VRAM threshold leaves for weights.
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
    available_bytes: int
    ceiling_bytes: int
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


def make_budget(
    readings: MemoryReadings,
    *,
    vram_threshold_percent: float,
    bandwidth_target: float,
    activations: Activations | None = None,
) -> MemoryBudget:
    """The balance of VRAM and DRAM.

        used          = in use now - torch's unused cache - our own weights
        available     = max(0, total - used - max(10 % of total, what others asked to be left))
        ceiling       = max(0, vram_threshold_percent of total - used)
        weight budget = min(ceiling, bandwidth_target * available, available - activations if known)
        host budget   = 80 % of what is available and of what our staging slabs and copies take

    What we hold counts as free on both sides, so that a plan made while another is in place is the same.

    Where card and host share one memory, the ceiling and the share would only leave memory idle: the weight budget is
    then what is available, less the activations.

    Args:
        readings: Memory as read now.
        vram_threshold_percent: Ceiling on VRAM use after the weights are placed, in percent.
        bandwidth_target: Share of the available VRAM that weights may fill, 0 to 1.
        activations: What a forward takes above the weights; None if it is not known.
    """
    total = readings.device_total_bytes
    used = max(0, total - readings.device_free_bytes - readings.unused_cache_bytes - readings.own_bytes)
    reserve = max(int(SAFETY_RESERVE * total), readings.reserve_bytes)
    available = max(0, total - used - reserve)
    ceiling = max(0, int(vram_threshold_percent / 100 * total) - used)
    in_use = f"{format_bytes(used)} of {format_bytes(total)} in use besides"
    terms = [(available, f"what is free above a reserve of {format_bytes(reserve)}, with {in_use}")]
    if not readings.is_unified:
        share = int(bandwidth_target * available)
        terms.append((ceiling, f"vram_threshold_percent = {vram_threshold_percent:g}, with {in_use}"))
        terms.append((share, f"{bandwidth_target:.0%} of the {format_bytes(available)} available, with {in_use}"))
    if activations is not None:
        how = "measured" if activations.is_measured else "expected"
        left = f"the {format_bytes(activations.nbytes)} that activations are {how} to take, with {in_use}"
        terms.append((max(0, available - activations.nbytes), left))
    ours = readings.staging_bytes + (readings.slab_bytes if readings.originals_stay else 0)
    weights, why = min(terms, key=lambda term: term[0])
    return MemoryBudget(
        total_bytes=total,
        used_bytes=used,
        available_bytes=available,
        ceiling_bytes=ceiling,
        activation_bytes=None if activations is None else activations.nbytes,
        weight_bytes=weights,
        host_bytes=int(USABLE_DRAM * (readings.host_available_bytes + ours)),
        host_held_bytes=readings.host_held_bytes,
        pin_bytes=readings.pin_budget_bytes,
        originals_stay=readings.originals_stay,
        is_unified=readings.is_unified,
        reason=f"{format_bytes(weights)} for block weights: set by {why}",
    )
