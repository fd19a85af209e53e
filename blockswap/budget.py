"""Readings and settings into a memory budget: VRAM first, DRAM for the overflow; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

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
        host_available_bytes: Host memory that can be had, within the cgroup's limit.
        pin_budget_bytes: Host memory that may be page-locked by all models together, less what already is.
        host_held_bytes: Bytes of the blocks that are in host memory already.
    """

    device_total_bytes: int
    device_free_bytes: int
    host_available_bytes: int
    pin_budget_bytes: int
    unused_cache_bytes: int = 0
    own_bytes: int = 0
    host_held_bytes: int = 0

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
class MemoryBudget:
    """Bytes that a plan may spend, with the terms they came from.

    Attributes:
        used_bytes: Device memory in use by others, and by us for anything but block weights.
        available_bytes: total - used - safety reserve.
        ceiling_bytes: What the VRAM threshold leaves for weights.
        activation_bytes: Measured peak above the weights for this shape; None before its first forward.
        weight_bytes: What residents, small tensors and window may take together.
        limit_bytes: What they could take at most before the device runs out: total - used.
        host_bytes: Host memory that the plan may additionally take.
        host_held_bytes: Bytes of the blocks that are in host memory already.
        pin_bytes: Host memory that the plan may page-lock.
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

    @property
    def limit_bytes(self) -> int:
        """Device memory that is left when no reserve is kept."""
        return self.total_bytes - self.used_bytes


def make_budget(
    readings: MemoryReadings,
    *,
    vram_threshold_percent: float,
    bandwidth_target: float,
    activation_bytes: int | None = None,
) -> MemoryBudget:
    """The balance of VRAM and DRAM.

        used          = in use now - torch's unused cache - our own weights
        available     = max(0, total - used - 10 % of total)
        ceiling       = max(0, vram_threshold_percent of total - used)
        weight budget = min(ceiling, bandwidth_target * available, available - activations if known)

    Args:
        readings: Memory as read now.
        vram_threshold_percent: Ceiling on VRAM use after the weights are placed, in percent.
        bandwidth_target: Share of the available VRAM that weights may fill, 0 to 1.
        activation_bytes: Measured peak above the weights for this shape; None if not measured yet.
    """
    total = readings.device_total_bytes
    used = max(0, total - readings.device_free_bytes - readings.unused_cache_bytes - readings.own_bytes)
    available = max(0, total - used - int(SAFETY_RESERVE * total))
    ceiling = max(0, int(vram_threshold_percent / 100 * total) - used)
    weights = min(ceiling, int(bandwidth_target * available))
    if activation_bytes is not None:
        weights = min(weights, max(0, available - activation_bytes))
    return MemoryBudget(
        total_bytes=total,
        used_bytes=used,
        available_bytes=available,
        ceiling_bytes=ceiling,
        activation_bytes=activation_bytes,
        weight_bytes=weights,
        host_bytes=int(USABLE_DRAM * readings.host_available_bytes),
        host_held_bytes=readings.host_held_bytes,
        pin_bytes=readings.pin_budget_bytes,
    )
