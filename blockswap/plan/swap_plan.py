"""What a plan is made from and what it says: PlanInputs and SwapPlan, with HostTier and Timing; pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..errors import SettingsError
from .schedule import ForwardTime

STAGING_SLABS = 2
"""One is filled by the worker while the other is copied to the device."""


class HostTier(Enum):
    """Where the host bytes of a swapped block are, and so how they travel."""

    PINNED = "pinned"
    """Page-locked in whole: copied by the device's own engine, asynchronously."""
    STAGED = "staged"
    """Pageable; a worker thread copies it through page-locked staging slabs."""
    PAGEABLE = "pageable"
    """Pageable; the copy blocks the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Speeds and durations that a plan is predicted from; None is unknown.

    Attributes:
        compute_ms: Duration of each block.
        pinned_bytes_per_s: Host-to-device bandwidth from page-locked memory.
        pageable_bytes_per_s: Host-to-device bandwidth from pageable memory.
        host_copy_bytes_per_s: Host-to-host bandwidth of the staging worker.
        streams: Copy streams at which `pinned_bytes_per_s` holds.
    """

    compute_ms: tuple[float, ...] | None = None
    pinned_bytes_per_s: float | None = None
    pageable_bytes_per_s: float | None = None
    host_copy_bytes_per_s: float | None = None
    streams: int = 1

    def __post_init__(self) -> None:
        for name in ("pinned_bytes_per_s", "pageable_bytes_per_s", "host_copy_bytes_per_s"):
            speed = getattr(self, name)
            if speed is not None and not speed > 0:
                raise SettingsError(f"{name}: expected more than 0 bytes per second, or None, got {speed}")
        if self.compute_ms is not None and not all(ms >= 0 for ms in self.compute_ms):
            raise SettingsError(f"compute_ms: expected durations of 0 or more, got {min(self.compute_ms)}")

    def bytes_per_s(self, tier: HostTier) -> float | None:
        """Bandwidth of one host tier, or None if what it depends on is unknown."""
        if tier is HostTier.PINNED:
            return self.pinned_bytes_per_s
        if tier is HostTier.PAGEABLE:
            return self.pageable_bytes_per_s
        if self.pinned_bytes_per_s is None or self.host_copy_bytes_per_s is None:
            return None
        return min(self.pinned_bytes_per_s, self.host_copy_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Device memory that a forward takes above the weights.

    Attributes:
        nbytes: The peak.
        is_measured: Seen in a forward of this shape; otherwise worked out from the shape.
    """

    nbytes: int
    is_measured: bool


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """What is held of a model's blocks at one moment, in bytes.

    Attributes:
        device_bytes: Device memory of residents, small tensors and window.
        slab_bytes: Host memory that holds the streamed tensors of the swapped blocks.
        staging_bytes: Host memory of the staging slabs.
        pinned_bytes: Host memory that is page-locked.
    """

    device_bytes: int = 0
    slab_bytes: int = 0
    staging_bytes: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything that a plan is made from, at one moment: what is asked, what was read, what is known. Bytes are ints.

    Attributes:
        device_total_bytes: The card's memory.
        device_free_bytes: Free on the card, counting all processes.
        unused_cache_bytes: What torch has reserved on the card and does not use.
        own_bytes: Our residents, window and small tensors that are on the card now.
        reserve_bytes: What somebody has asked to be left free beside our own reserve.
        is_unified: The card's memory is the host's.
        host_available_bytes: Host memory that can be had, within the cgroup's limit.
        pin_budget_bytes: Host memory that may be page-locked by all models together, less what others have locked.
        host_held_bytes: Bytes of the blocks that are in host memory already, in slabs of ours or elsewhere.
        slab_bytes: The part of them that is in slabs of ours.
        staging_bytes: Staging slabs of ours that are there, beside the blocks' bytes.
        originals_stay: Somebody else keeps the blocks' weights, so that slabs are copies and not the only ones.
        vram_threshold_percent: Ceiling on VRAM use once the weights are placed, in percent of the card.
        bandwidth_target: Share of the available VRAM that weights may fill, 0 to 1.
        blocks_to_swap: Blocks to swap among the main blocks; None lets the budget decide.
        vace_blocks_to_swap: The same among the VACE blocks; read only when `blocks_to_swap` is given.
        why: Why so many, if they are given.
        slots: Number of slots; None lets the virtual-time model decide.
        overlap: Copies have streams of their own; without, one slot suffices, since nothing can run ahead.
        pin: Streamed weights may be page-locked.
        timing: What is known about speeds.
        activations: What a forward takes above the weights; None if it is not known.
        tuning: Which automatic choices were made and why, as sentences; empty if the user made them.
        notes: What else the user must know of these inputs, as sentences.
    """

    device_total_bytes: int
    device_free_bytes: int
    unused_cache_bytes: int = 0
    own_bytes: int = 0
    reserve_bytes: int = 0
    is_unified: bool = False
    host_available_bytes: int
    pin_budget_bytes: int
    host_held_bytes: int = 0
    slab_bytes: int = 0
    staging_bytes: int = 0
    originals_stay: bool = False
    vram_threshold_percent: float = 50.0
    bandwidth_target: float = 0.8
    blocks_to_swap: int | None = None
    vace_blocks_to_swap: int = 0
    why: str = "as asked"
    slots: int | None = None
    overlap: bool = True
    pin: bool = True
    timing: Timing = field(default_factory=Timing)
    activations: Activations | None = None
    tuning: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in READINGS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected bytes, 0 or more, got {getattr(self, name)}")
        if self.device_free_bytes > self.device_total_bytes:
            raise ValueError(
                f"device_free_bytes: expected at most the total of {self.device_total_bytes}, "
                f"got {self.device_free_bytes}"
            )
        for name, lowest in (("blocks_to_swap", 0), ("vace_blocks_to_swap", 0), ("slots", 1)):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or count < lowest):
                raise SettingsError(f"{name}: expected a whole number from {lowest}, got {count!r}")


READINGS = (
    *("device_total_bytes", "device_free_bytes", "unused_cache_bytes", "own_bytes", "reserve_bytes"),
    *("host_available_bytes", "pin_budget_bytes", "host_held_bytes", "slab_bytes", "staging_bytes"),
)
"""Fields of PlanInputs that were read, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapPlan:
    """The decision: frozen, complete, and followed to the letter.

    Attributes:
        swapped: For each block in execution order, whether it is swapped.
        slots: Slots of the window; 0 if nothing is swapped.
        slot_bytes: Device memory of one slot.
        streams: Copy streams.
        overlap: Copies run on streams of their own.
        tiers: Host tier of each block; None for resident blocks.
        device_bytes: Device memory of residents, small tensors and window together: never exceeded.
        budget_bytes: What block weights may take on the device by the budget.
        activation_bytes: What forwards are expected, or were measured, to take above the weights; None is unknown.
        limit_bytes: Device memory for both that is not in use by anything else.
        slab_bytes: Host memory of the slabs.
        pinned_bytes: Host memory that is page-locked: slabs and staging.
        staging_bytes: The part of it that is staging slabs.
        streamed_bytes: Bytes that one forward of all blocks copies to the device; 0 if every swapped block has a slot.
        predicted: One forward of all blocks in virtual time, in ms; None where a speed is unknown.
        over_ceiling: The weights do not fit under the budget even so.
        reasons: Why, in sentences.
        tuning: Those of them about the GPU's tier and what was chosen below it; empty if the streams
            were given, or nothing is copied.
    """

    swapped: tuple[bool, ...]
    slots: int
    slot_bytes: int
    streams: int
    overlap: bool
    tiers: tuple[HostTier | None, ...]
    device_bytes: int
    budget_bytes: int
    activation_bytes: int | None
    limit_bytes: int
    slab_bytes: int
    pinned_bytes: int
    staging_bytes: int
    streamed_bytes: int
    predicted: ForwardTime | None
    over_ceiling: bool
    reasons: tuple[str, ...]
    tuning: tuple[str, ...] = ()

    @property
    def swapped_count(self) -> int:
        """Number of swapped blocks."""
        return sum(self.swapped)

    @property
    def swapped_indices(self) -> tuple[int, ...]:
        """The swapped blocks, in execution order."""
        return tuple(i for i, is_swapped in enumerate(self.swapped) if is_swapped)

    @property
    def fits(self) -> bool | None:
        """Whether weights and activations together fit what is free; None if activations are unknown."""
        return None if self.activation_bytes is None else self.device_bytes + self.activation_bytes <= self.limit_bytes

    @property
    def window_bytes(self) -> int:
        """Device memory of all slots."""
        return self.slots * self.slot_bytes

    @property
    def resident_bytes(self) -> int:
        """Device memory of resident blocks, and of the small tensors of all blocks."""
        return self.device_bytes - self.window_bytes

    @property
    def stall_ms(self) -> float | None:
        """Time per forward that compute waits for copies; None if unknown."""
        return None if self.predicted is None else self.predicted.stall
