"""Plans and runs of a few figures, as progress shows them."""

from __future__ import annotations

from wanvideo_enhanced_blockswap.blockswap.plan.schedule import ForwardTime
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.report import Measured


def planned(swapped: int, *, free: int, blocks: int = 40, slots: int = 2, over_ceiling: bool = False) -> SwapPlan:
    """The last `swapped` blocks stream; `free` bytes of the device are not used by other data."""
    inside = tuple(i >= blocks - swapped for i in range(blocks))
    return SwapPlan(
        swapped=inside,
        slots=slots,
        slot_bytes=0,
        streams=1,
        overlap=True,
        tiers=tuple(HostTier.PINNED if one else None for one in inside),
        device_bytes=0,
        budget_bytes=free,
        activation_bytes=None,
        limit_bytes=free,
        slab_bytes=0,
        pinned_bytes=0,
        staging_bytes=0,
        streamed_bytes=0,
        predicted=None,
        over_ceiling=over_ceiling,
        reasons=(),
    )


def predicted(stall_ms: float, forward_ms: float) -> ForwardTime:
    return ForwardTime(elapsed=forward_ms, compute=forward_ms - stall_ms, stall=stall_ms, transferred=0.0, onloads=0)


def ran(
    forwards: int,
    streamed: int,
    *,
    forward_ms: float | None = None,
    stall_ms: float | None = None,
    copy_bytes_per_s: float | None = None,
) -> Measured:
    return Measured(
        forwards=forwards,
        forward_ms=forward_ms,
        stall_ms=stall_ms,
        copy_bytes_per_s=copy_bytes_per_s,
        onloads=0,
        onloaded_bytes=streamed,
        placed_bytes=0,
        returned_bytes=0,
        weight_bytes=None,
        slab_bytes=0,
        pinned_bytes=0,
    )
