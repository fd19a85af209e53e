"""What a plan is made from and what it decides: PlanInputs and SwapPlan, with HostTier and Timing; pure."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from enum import Enum

from ...hardware.records import DiskSpeed
from ...hardware.units import format_count
from .schedule import ForwardTime

STAGING_SLABS = 2
"""The worker fills one while the device copies from the other."""


class HostTier(Enum):
    """What kind of host memory holds a swapped block, which decides how the block is copied."""

    PINNED = "pinned"
    """Page-locked: the device copies asynchronously."""
    FILE = "file"
    """None of ours: a worker thread reads the block from its file through page-locked staging slabs."""
    STAGED = "staged"
    """Pageable: a worker thread copies through page-locked staging slabs."""
    PAGEABLE = "pageable"
    """Pageable: a worker thread copies, at the speed of the driver's own staging."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Speeds and durations that a prediction uses; None is unknown.

    Attributes:
        compute_ms: Duration of each block.
        pinned_bytes_per_s: Host-to-device bandwidth from page-locked memory.
        pageable_bytes_per_s: Host-to-device bandwidth from pageable memory.
        host_copy_bytes_per_s: Host-to-host bandwidth of the staging worker.
        file_bytes_per_s: Speed at which the worker reads a file.
        is_staging_pinned: The staging slabs are page-locked, so that one is read into while the other is copied.
        streams: Number of copy streams with which `pinned_bytes_per_s` is reached.
    """

    compute_ms: tuple[float, ...] | None = None
    pinned_bytes_per_s: float | None = None
    pageable_bytes_per_s: float | None = None
    host_copy_bytes_per_s: float | None = None
    file_bytes_per_s: float | None = None
    is_staging_pinned: bool = True
    streams: int = 1

    def bytes_per_s(self, tier: HostTier) -> float | None:
        """Bandwidth of one host tier; None if a speed that it depends on is unknown."""
        if tier is HostTier.PINNED:
            return self.pinned_bytes_per_s
        if tier is HostTier.PAGEABLE:
            return self.pageable_bytes_per_s
        is_file = tier is HostTier.FILE
        fill = self.file_bytes_per_s if is_file else self.host_copy_bytes_per_s
        copy = self.pinned_bytes_per_s if self.is_staging_pinned else self.pageable_bytes_per_s
        if fill is None or copy is None:
            return None
        return min(fill, copy) if self.is_staging_pinned else 1 / (1 / fill + 1 / copy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Peak device memory of a forward above the weights.

    Attributes:
        nbytes: The peak.
        is_measured: Measured in a forward of this shape; otherwise estimated from the shape.
    """

    nbytes: int
    is_measured: bool


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """Memory that a model's blocks take at one moment, in bytes.

    Attributes:
        device_bytes: Device memory of residents, small tensors and window.
        slab_bytes: Host memory of the swapped blocks' slabs.
        staging_bytes: Host memory of the staging slabs.
        pinned_bytes: Page-locked host memory.
        added_bytes: The part of slabs and staging slabs that is not there without them: a slab of bytes that are in no
            file takes the place of other memory.
    """

    device_bytes: int = 0
    slab_bytes: int = 0
    staging_bytes: int = 0
    pinned_bytes: int = 0
    added_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything that a plan is made from, at one moment.

    Attributes:
        device_total_bytes: Memory of the card.
        device_free_bytes: Free memory of the card, counting all processes; at most the total.
        unused_cache_bytes: Device memory that torch has reserved and does not use.
        own_bytes: Device memory of our residents, window and small tensors.
        reserve_bytes: Device memory that others ask us to leave free; the larger of this and our own reserve counts.
        is_unified: Card and host share one memory.
        host_available_bytes: Available host memory, within the cgroup's limit. What ours has added counts as free.
        host_room_bytes: The part of it that slabs and staging slabs may take.
        pin_budget_bytes: Host memory that may be page-locked, less what other models have locked.
        vram_threshold_percent: Upper limit of VRAM use once the weights are placed, in percent of the card.
        bandwidth_target: Share of the available VRAM that weights may fill, 0 to 1.
        blocks_to_swap: Number of main blocks to swap; None lets the budget decide.
        vace_blocks_to_swap: Number of VACE blocks to swap; read only if `blocks_to_swap` is given.
        why: Reason for a given `blocks_to_swap`.
        slots: Number of slots; None lets predicted times decide.
        overlap: Copies have streams of their own. Without them one slot suffices, since no copy can run ahead.
        pin: Slabs may be page-locked.
        wants_pin: The user wants them to be.
        timing: Known speeds, without that of reads.
        disk: Speed of reading the model's file; None if unknown.
        activations: Peak of a forward above the weights; None if unknown.
        tuning: Automatic choices with their reasons, as sentences; empty if the user made the choices.
        notes: What else the user must know about these inputs, as sentences.

    Raises:
        ValueError: A number of bytes is negative.
    """

    device_total_bytes: int
    device_free_bytes: int
    unused_cache_bytes: int = 0
    own_bytes: int = 0
    reserve_bytes: int = 0
    is_unified: bool = False
    host_available_bytes: int
    host_room_bytes: int
    pin_budget_bytes: int
    vram_threshold_percent: float = 50.0
    bandwidth_target: float = 0.8
    blocks_to_swap: int | None = None
    vace_blocks_to_swap: int = 0
    why: str = "as asked"
    slots: int | None = None
    overlap: bool = True
    pin: bool = True
    wants_pin: bool = True
    timing: Timing = field(default_factory=Timing)
    disk: DiskSpeed | None = None
    activations: Activations | None = None
    tuning: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.name.endswith("_bytes") and getattr(self, entry.name) < 0:
                raise ValueError(f"{entry.name}: expected bytes, 0 or more, got {getattr(self, entry.name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapPlan:
    """The decision; a run follows it exactly.

    Attributes:
        swapped: For each block in execution order, whether it is swapped.
        slots: Number of slots in the window; 0 if nothing is swapped.
        slot_bytes: Device memory of one of them.
        own_slots: Device memory of each further slot, of which a group of modules beside the blocks has one.
        streams: Number of copy streams.
        overlap: Copies run on streams of their own.
        tiers: Host tier of each block; None for resident blocks.
        device_bytes: Device memory of residents, small tensors and window together: never exceeded.
        budget_bytes: Device memory that the budget allows for block weights.
        activation_bytes: Expected or measured peak of a forward above the weights; None is unknown.
        limit_bytes: Device memory that other data do not use: room for weights and activations.
        slab_bytes: Host memory of the slabs, which blocks that are read from their file have none of.
        pinned_bytes: Page-locked host memory of slabs and staging slabs.
        staging_bytes: Host memory of the staging slabs: page-locked, unless `pinned_bytes` is 0.
        added_bytes: What slabs and staging slabs add to the host memory that the system cannot drop.
        file_bytes: Bytes of the blocks that are read from their file.
        file_bytes_per_s: Speed of these reads that the prediction assumes; None if unknown.
        streamed_bytes: Bytes that one forward of all blocks copies to the device; 0 if every swapped block has a slot.
        predicted: Predicted times of one forward of all blocks, in ms; None if a speed is unknown.
        over_ceiling: The weights exceed the budget.
        beside: For each of them, whether it is neither a block nor a VACE block.
        reasons: Why the plan is as it is, as sentences.
        remarks: The part of `reasons` that a user should know.
        tuning: The part of `reasons` about the GPU's tier and the number of streams; empty if the user chose that, or
            if nothing is swapped.
    """

    swapped: tuple[bool, ...]
    slots: int
    slot_bytes: int
    own_slots: tuple[int, ...] = ()
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
    added_bytes: int = 0
    file_bytes: int = 0
    file_bytes_per_s: float | None = None
    streamed_bytes: int
    predicted: ForwardTime | None
    over_ceiling: bool
    beside: tuple[bool, ...] = ()
    reasons: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()

    @property
    def swapped_count(self) -> int:
        """Number of swapped blocks, and modules beside them."""
        return sum(self.swapped)

    @property
    def block_count(self) -> int:
        """Number of blocks, without modules beside them."""
        return len(self.swapped) - sum(self.beside)

    @property
    def streaming_count(self) -> int:
        """Number of swapped blocks, without modules beside them."""
        return self.swapped_count - self.streaming_beside

    @property
    def staying_count(self) -> int:
        """Number of blocks that stay on the device."""
        return self.block_count - self.streaming_count

    @property
    def streaming_beside(self) -> int:
        """Number of swapped modules beside the blocks."""
        return sum(map(operator.and_, self.swapped, self.beside)) if self.beside else 0

    @property
    def swapped_indices(self) -> tuple[int, ...]:
        """The swapped blocks, in execution order."""
        return tuple(i for i, is_swapped in enumerate(self.swapped) if is_swapped)

    @property
    def fits(self) -> bool | None:
        """Whether weights and activations fit in `limit_bytes`; None if activations are unknown."""
        return None if self.activation_bytes is None else self.device_bytes + self.activation_bytes <= self.limit_bytes

    @property
    def anonymous_bytes(self) -> int:
        """Host memory of slabs and staging slabs that is not page-locked."""
        return self.slab_bytes + self.staging_bytes - self.pinned_bytes

    @property
    def window_bytes(self) -> int:
        """Device memory of all slots."""
        return sum(self.window)

    @property
    def window(self) -> tuple[int, ...]:
        """Device memory of each slot."""
        return (*(self.slot_bytes,) * self.slots, *self.own_slots)

    @property
    def resident_bytes(self) -> int:
        """Device memory of resident blocks, and of the small tensors of all blocks."""
        return self.device_bytes - self.window_bytes

    @property
    def stall_ms(self) -> float | None:
        """Predicted time per forward that compute waits for copies; None if unknown."""
        return None if self.predicted is None else self.predicted.stall


def blocks_in_words(plan: SwapPlan) -> str:
    """Where the blocks are, such as "12 blocks on the GPU, 18 streaming"."""
    if not plan.swapped_count:
        return f"all {format_count(plan.block_count, 'block')} on the GPU"
    parts = plan.streaming_beside
    others = f", with {format_count(parts, 'other part')} of the model" if parts else ""
    on_gpu = format_count(plan.staying_count, "block")
    return f"{on_gpu} on the GPU, {plan.streaming_count} streaming{others}"
