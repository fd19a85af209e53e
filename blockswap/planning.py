"""From what was read, measured and asked to a plan: the one way that node, command line and tests take; pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..hardware.spec import DeviceMemory, DeviceSpec, HostMemory, LinkSpeed
from ..hardware.tuning import Tuning, tune
from .budget import Activations, MemoryBudget, MemoryReadings, make_budget
from .decision import PlanRequest, SwapPlan, Timing
from .layout import ModelProfile
from .plan import block_counts, plan_swap
from .settings import SwapSettings

RAN_OUT = "since the device ran out of memory with a larger plan for this video size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the machine and of earlier forwards when a plan is made.

    Attributes:
        spec: The device.
        memory: Its memory now.
        host: Host memory now.
        link: The measured link; None if it is not measured.
        compute_ms: Duration of each block, measured; None before that.
        activations: What a forward of this shape takes above the weights; None if it is not known.
        unused_cache_bytes: What torch has reserved on the device and does not use.
        own_bytes: Our residents, window and small tensors that are on the device now.
        reserve_bytes: What somebody has asked to be left free on the device.
        host_held_bytes: Bytes of the blocks that are in host memory already, whoever holds them.
        slab_bytes: The part of them that is in slabs of ours.
        staging_bytes: Staging slabs of ours that are there.
        originals_stay: Somebody else keeps the blocks' weights, so that slabs are copies.
        locked_elsewhere_bytes: Host memory that other models have page-locked.
        pin_limit_bytes: What all models may page-lock together; None leaves it to the host's figure.
        may_pin: Page-locking is not forbidden from outside.
        may_overlap: The device has streams, and using them is not forbidden from outside.
        must_swap_all: No block may stay on the device.
        most_slots: Memory ran out with more slots than these; None if it did not.
    """

    spec: DeviceSpec
    memory: DeviceMemory
    host: HostMemory
    link: LinkSpeed | None = None
    compute_ms: tuple[float, ...] | None = None
    activations: Activations | None = None
    unused_cache_bytes: int = 0
    own_bytes: int = 0
    reserve_bytes: int = 0
    host_held_bytes: int = 0
    slab_bytes: int = 0
    staging_bytes: int = 0
    originals_stay: bool = False
    locked_elsewhere_bytes: int = 0
    pin_limit_bytes: int | None = None
    may_pin: bool = True
    may_overlap: bool = True
    must_swap_all: bool = False
    most_slots: int | None = None


def make_plan(profile: ModelProfile, settings: SwapSettings, facts: Facts) -> SwapPlan:
    """The plan that `settings` ask for under these facts.

    Args:
        profile: The blocks and their bytes.
        settings: What the user asked for. Automatic tuning takes count, streams and ratio from the facts.
        facts: What is known.

    Raises:
        PlanError: Not even the smallest window fits the device, or the host cannot hold the blocks.
    """
    tuning = tune(facts.spec, facts.host, facts.link, vram_threshold_percent=settings.vram_threshold_percent)
    plan = plan_swap(profile, budget_for(settings, facts, tuning), _request(profile, settings, facts, tuning))
    further = [f"free device memory is an estimate: {facts.memory.source}"] if facts.memory.is_estimate else []
    chosen = tuning.reasons if settings.auto_hardware_tuning and plan.swapped_count else ()
    return replace(plan, reasons=(*plan.reasons, *chosen, *further), tuning=chosen)


def budget_for(settings: SwapSettings, facts: Facts, tuning: Tuning) -> MemoryBudget:
    """What a plan may spend."""
    pins = facts.host.pin_budget_bytes
    if facts.pin_limit_bytes is not None:
        pins = min(pins, facts.pin_limit_bytes)
    readings = MemoryReadings(
        device_total_bytes=facts.memory.total_bytes,
        device_free_bytes=facts.memory.free_bytes,
        unused_cache_bytes=facts.unused_cache_bytes,
        own_bytes=facts.own_bytes,
        reserve_bytes=facts.reserve_bytes,
        host_available_bytes=facts.host.available_bytes,
        pin_budget_bytes=max(0, pins - facts.locked_elsewhere_bytes),
        host_held_bytes=facts.host_held_bytes,
        slab_bytes=facts.slab_bytes,
        staging_bytes=facts.staging_bytes,
        originals_stay=facts.originals_stay,
        is_unified=bool(facts.spec.is_integrated),
    )
    ratio = tuning.bandwidth_target if settings.auto_hardware_tuning else settings.bandwidth_target
    return make_budget(
        readings,
        vram_threshold_percent=settings.vram_threshold_percent,
        bandwidth_target=ratio,
        activations=facts.activations,
    )


def _request(profile: ModelProfile, settings: SwapSettings, facts: Facts, tuning: Tuning) -> PlanRequest:
    is_auto = settings.auto_hardware_tuning
    counts = (None, 0) if is_auto else (settings.blocks_to_swap, settings.vace_blocks_to_swap)
    if facts.must_swap_all or facts.most_slots is not None:
        counts = block_counts(profile)
    overlap = settings.enable_cuda_optimization and facts.may_overlap
    return PlanRequest(
        blocks_to_swap=counts[0],
        why="as asked" if facts.most_slots is None else RAN_OUT,
        vace_blocks_to_swap=counts[1],
        overlap=overlap,
        slots=facts.most_slots if overlap or facts.most_slots is None else 1,
        # By hand, only what the user says decides; what is known to do harm is part of the automatic choice.
        pin=settings.enable_dram_optimization and facts.may_pin and (tuning.pin or not is_auto),
        timing=timing_for(facts, streams=tuning.streams if is_auto else settings.num_cuda_streams),
    )


def timing_for(facts: Facts, *, streams: int) -> Timing:
    """Speeds at this number of streams, and durations."""
    link = facts.link
    pinned = None
    if link is not None and link.pinned:
        pinned = link.best(max_streams=streams)[1]
    return Timing(
        compute_ms=facts.compute_ms,
        pinned_bytes_per_s=pinned,
        pageable_bytes_per_s=None if link is None else link.pageable,
        host_copy_bytes_per_s=None if link is None else link.host_copy,
        streams=streams,
    )
