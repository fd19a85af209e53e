"""What was read, measured and asked becomes a SwapPlan: the one way that node, command line and tests take; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...hardware.records import DeviceMemory, DeviceSpec, HostMemory, LinkSpeed
from ...hardware.tiers import Tuning, tune
from ...hardware.units import format_bytes
from ..errors import PlanError
from ..model.layout import ModelProfile
from ..settings import SwapSettings
from .budget import Activations, MemoryBudget, MemoryReadings, make_budget
from .schedule import ForwardTime, Ring, VirtualTime, spread, steady_time
from .swap_plan import STAGING_SLABS, HostTier, PlanRequest, SwapPlan, Timing

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


SLOT_CHOICES = (2, 3)
"""With two slots an even spread of equal blocks is within 1.10 of max(compute, transfer), with three at it; a fourth
gains nothing (`simulate` over N 30/40/48, 25-100 % swapped, transfer/compute 0.25-4)."""

WORTH_A_SLOT = 0.005
"""Part of the forward that a third slot must save to be worth its memory; below it the model's own error is larger."""

VACE_PREFIX = "vace_blocks."

Choice: TypeAlias = "tuple[tuple[bool, ...], int]"
"""For each block whether it is swapped, and the number of slots."""

UNIFIED = "device and host share one memory: swapping frees nothing, so it is off"


def plan_swap(profile: ModelProfile, budget: MemoryBudget, request: PlanRequest) -> SwapPlan:
    """The plan for one transformer on one device.

    Args:
        profile: The blocks and their bytes.
        budget: What may be spent.
        request: What is asked, and what is known about speeds.

    Raises:
        PlanError: Not even the smallest window fits the device, or the host cannot hold the blocks.
    """
    if not profile.blocks:
        raise PlanError("a plan expects a model with blocks but got one with none; nothing can be swapped")
    swapped, reasons = _residency(profile, budget, request)
    slots = _slots(profile, budget, request, swapped)
    if request.blocks_to_swap is None and sum(swapped):
        swapped, slots, reason = _auto(profile, budget, request)
        reasons.append(reason)
    plan = _complete(profile, budget, request, swapped, slots)
    _refuse_what_cannot_be(profile, budget, plan)
    terms = [budget.reason] if budget.reason else []
    if plan.fits is False:
        reasons.insert(0, _does_not_fit(plan))
    return replace(plan, reasons=(*reasons, *terms, *plan.reasons))


def _does_not_fit(plan: SwapPlan) -> str:
    activations = plan.activation_bytes or 0
    need, free = format_bytes(plan.device_bytes + activations), format_bytes(plan.limit_bytes)
    parts = f"{format_bytes(activations)} of activations and {format_bytes(plan.device_bytes)} of weights"
    return f"expect it to run out of memory: {parts} are {need}, and {free} are free; take fewer frames or smaller ones"


def weight_bytes(profile: ModelProfile, swapped: Sequence[bool], slots: int) -> int:
    """Device memory of residents, small tensors and a window of at most `slots` slots."""
    inside = [i for i, is_swapped in enumerate(swapped) if is_swapped]
    residents = [i for i, is_swapped in enumerate(swapped) if not is_swapped]
    window = min(slots, len(inside)) * profile.slot_bytes(inside)
    return profile.small_device_bytes + profile.resident_device_bytes(residents) + window


def block_counts(profile: ModelProfile) -> tuple[int, int]:
    """Number of main blocks, and of VACE blocks."""
    vace = sum(block.name.startswith(VACE_PREFIX) for block in profile.blocks)
    return len(profile.blocks) - vace, vace


def _residency(profile: ModelProfile, budget: MemoryBudget, request: PlanRequest) -> tuple[tuple[bool, ...], list[str]]:
    """Manual: the counts asked for, spread. Automatic: none if all fits or if card and host share one memory, else all
    (`_auto` then looks for fewer).
    """
    main, vace = block_counts(profile)
    if request.blocks_to_swap is None:
        everything = weight_bytes(profile, (False,) * len(profile.blocks), 0)
        if budget.is_unified:
            return (False,) * len(profile.blocks), [UNIFIED]
        if everything <= budget.weight_bytes:
            taken = f"{format_bytes(everything)} of {format_bytes(budget.weight_bytes)}"
            fits = f"all {len(profile.blocks)} blocks fit: {taken}"
            return (False,) * len(profile.blocks), [fits]
        return (True,) * len(profile.blocks), []
    reasons = []
    for name, asked, count in (
        ("blocks_to_swap", request.blocks_to_swap, main),
        ("vace_blocks_to_swap", request.vace_blocks_to_swap, vace),
    ):
        if asked > count:
            reasons.append(f"{name} is cut from {asked} to {count}, the number of blocks the model has")
    counts = min(request.vace_blocks_to_swap, vace), min(request.blocks_to_swap, main)
    reasons.append(f"{sum(counts)} of {len(profile.blocks)} blocks are swapped, {request.why}")
    return (spread(vace, counts[0]) if vace else ()) + (spread(main, counts[1]) if main else ()), reasons


def _slots(profile: ModelProfile, budget: MemoryBudget, request: PlanRequest, swapped: tuple[bool, ...]) -> int:
    """Two slots, or three where the model of time says they pay, the budget holds them, and not every block is asked
    for: who swaps all wants the least memory that swapping can do with.
    """
    count = sum(swapped)
    if request.slots is not None:
        return min(request.slots, count)
    if not request.overlap:
        return min(1, count)
    fewest, most = SLOT_CHOICES
    asks_for_all = request.blocks_to_swap is not None and request.blocks_to_swap >= block_counts(profile)[0]
    if asks_for_all or count <= fewest or weight_bytes(profile, swapped, most) > budget.weight_bytes:
        return min(fewest, count)
    return most if _saving(profile, budget, request, (swapped, fewest), (swapped, most)) else fewest


def _saving(profile: ModelProfile, budget: MemoryBudget, request: PlanRequest, choice: Choice, other: Choice) -> float:
    """Part of a forward that `other` saves against `choice`; 0 where it is unknown or within the model's error."""
    times = []
    for swapped, slots in (choice, other):
        tiers, _, _ = _tiers(profile, budget, request, swapped)
        times.append(predict(profile, swapped, slots, tiers, request.timing))
    if times[0] is None or times[1] is None or times[1].elapsed >= (1 - WORTH_A_SLOT) * times[0].elapsed:
        return 0.0
    return 1 - times[1].elapsed / times[0].elapsed


def _auto(profile: ModelProfile, budget: MemoryBudget, request: PlanRequest) -> tuple[tuple[bool, ...], int, str]:
    """The fewest swapped blocks that fit the weight budget, with the number of slots that is faster for that memory."""
    count, target = len(profile.blocks), format_bytes(budget.weight_bytes)
    slots = request.slots or (SLOT_CHOICES[0] if request.overlap else 1)
    fewest = _fewest(profile, budget.weight_bytes, slots)
    if fewest is None:
        everything = (True,) * count
        need = format_bytes(weight_bytes(profile, everything, slots))
        why = f"even with all {count} blocks swapped the weights take {need} of {target}"
        return everything, min(slots, count), why
    best, why = (spread(count, fewest), slots), "blocks are swapped, the fewest that fit"
    other = _with_another_slot(profile, budget, best) if request.slots is None and request.overlap else None
    gain = 0.0 if other is None else _saving(profile, budget, request, best, other)
    best = other if other is not None and gain else best
    if sum(best[0]) > fewest:
        why = f"blocks are swapped, 1 more than the {fewest} that fit, since a third slot saves {gain:.1%} of a forward"
    need = format_bytes(weight_bytes(profile, *best))
    return *best, f"{sum(best[0])} of {count} {why}: {need} of {target}"


def _fewest(profile: ModelProfile, weights: int, slots: int) -> int | None:
    """The fewest swapped blocks with which `slots` slots fit `weights` bytes; None if none do."""
    count = len(profile.blocks)
    # With as many slots as swapped blocks the window holds what it should have freed.
    ways = range(min(slots + 1, count), count + 1)
    return next((k for k in ways if weight_bytes(profile, spread(count, k), slots) <= weights), None)


def _with_another_slot(profile: ModelProfile, budget: MemoryBudget, choice: Choice) -> Choice | None:
    """`choice` with one slot more, for which one block more is swapped if need be; None if that takes more memory.

    The comparison is with the memory that `choice` takes and not with what there is: so the number of swapped blocks
    follows from `choice` alone, and cannot grow with the memory of the card.
    """
    count, (swapped, slots) = len(profile.blocks), choice
    for k, limit in ((sum(swapped), budget.weight_bytes), (sum(swapped) + 1, weight_bytes(profile, *choice))):
        more = spread(count, min(k, count))
        if slots + 1 < k <= count and weight_bytes(profile, more, slots + 1) <= limit:
            return more, slots + 1
    return None


def predict(
    profile: ModelProfile,
    swapped: Sequence[bool],
    slots: int,
    tiers: Sequence[HostTier | None],
    timing: Timing,
) -> ForwardTime | None:
    """One forward of all blocks in virtual time, in ms, or None where a speed is unknown."""
    if timing.compute_ms is None:
        return None
    if len(timing.compute_ms) != len(swapped):
        raise PlanError(
            f"compute_ms expects a duration for each of {len(swapped)} blocks but got {len(timing.compute_ms)}"
        )
    transfer = [0.0] * len(swapped)
    for i, tier in enumerate(tiers):
        if swapped[i] and tier is not None:
            speed = timing.bytes_per_s(tier)
            if speed is None:
                return None
            transfer[i] = profile.blocks[i].slab_bytes / speed * 1e3
    blocking = {i for i, tier in enumerate(tiers) if tier is HostTier.PAGEABLE}
    ring = Ring(swapped, slots=min(slots, sum(swapped)))
    time = VirtualTime(ring, compute=timing.compute_ms, transfer=transfer, blocking=blocking)
    return steady_time(time, [range(len(swapped))])


def _tiers(
    profile: ModelProfile, budget: MemoryBudget, request: PlanRequest, swapped: Sequence[bool]
) -> tuple[tuple[HostTier | None, ...], int, list[str]]:
    """Host tier of each block, bytes of the staging slabs, and the reasons where not all is pinned."""
    inside = [i for i, is_swapped in enumerate(swapped) if is_swapped]
    sizes = {i: profile.blocks[i].slab_host_bytes for i in inside}
    pageable = tuple(HostTier.PAGEABLE if s else None for s in swapped)
    if not request.pin or not request.overlap:
        why = (
            "page-locked memory is switched off, or not to be had here"
            if not request.pin
            else "copies on the compute stream need no pins"
        )
        return pageable, 0, [why] if inside else []
    wanted = sum(sizes.values())
    if wanted <= budget.pin_bytes:
        return tuple(HostTier.PINNED if s else None for s in swapped), 0, []
    short = f"pinned memory: {format_bytes(wanted)} wanted, {format_bytes(budget.pin_bytes)} may be had"
    # As many as fit are pinned, spread among the swapped ones: the worker has time between two of its own. Where
    # staging has no room, what is not pinned is pageable.
    for tier in (HostTier.STAGED, HostTier.PAGEABLE):
        for count in range(len(inside) - 1, -1, -1):
            pinned = {i for i, chosen in zip(inside, spread(len(inside), count), strict=True) if chosen}
            others = [size for i, size in sizes.items() if i not in pinned]
            staging = STAGING_SLABS * max(others) if tier is HostTier.STAGED else 0
            need = budget.host_need(profile.block_bytes, slab_bytes=wanted, staging_bytes=staging)
            locked = sum(sizes[i] for i in pinned) + staging
            if locked <= budget.pin_bytes and (need <= budget.host_bytes or tier is HostTier.PAGEABLE):
                tiers = tuple((HostTier.PINNED if i in pinned else tier) if s else None for i, s in enumerate(swapped))
                return tiers, staging, [f"{short}; {_rest(tier, len(others), len(inside))}"]
    raise AssertionError("no block pinned and none staged always fits")


def _rest(tier: HostTier, count: int, of: int) -> str:
    """What becomes of the swapped blocks that are not pinned."""
    if tier is HostTier.STAGED:
        return f"{count} of {of} swapped blocks go through {STAGING_SLABS} staging slabs"
    return f"{'all' if count == of else f'{count} of {of}'} swapped blocks stay pageable"


def _complete(
    profile: ModelProfile, budget: MemoryBudget, request: PlanRequest, swapped: tuple[bool, ...], slots: int
) -> SwapPlan:
    tiers, staging_bytes, reasons = _tiers(profile, budget, request, swapped)
    inside = [i for i, is_swapped in enumerate(swapped) if is_swapped]
    pinned = sum(profile.blocks[i].slab_host_bytes for i in inside if tiers[i] is HostTier.PINNED)
    device_bytes = weight_bytes(profile, swapped, slots)
    if device_bytes > budget.weight_bytes:
        reasons.append(
            f"the weights take {format_bytes(device_bytes)}, over the budget of {format_bytes(budget.weight_bytes)}"
        )
    if inside and slots >= len(inside):
        reasons.append(
            f"{len(inside)} swapped blocks have a slot each: nothing moves after the first forward, nothing is freed"
        )
    return SwapPlan(
        swapped=swapped,
        slots=slots,
        slot_bytes=profile.slot_bytes(inside),
        streams=request.timing.streams if request.overlap else 1,
        overlap=request.overlap,
        tiers=tiers,
        device_bytes=device_bytes,
        budget_bytes=budget.weight_bytes,
        activation_bytes=budget.activation_bytes,
        limit_bytes=budget.limit_bytes,
        slab_bytes=sum(profile.blocks[i].slab_host_bytes for i in inside),
        pinned_bytes=pinned + staging_bytes,
        staging_bytes=staging_bytes,
        streamed_bytes=sum(profile.blocks[i].slab_bytes for i in inside) if slots < len(inside) else 0,
        predicted=predict(profile, swapped, slots, tiers, request.timing),
        over_ceiling=device_bytes > budget.weight_bytes,
        reasons=tuple(reasons),
    )


def _refuse_what_cannot_be(profile: ModelProfile, budget: MemoryBudget, plan: SwapPlan) -> None:
    if plan.device_bytes > budget.limit_bytes:
        can_be_less = not (all(plan.swapped) or budget.is_unified)
        advice = "swap more blocks or leave that to auto_hardware_tuning, " if can_be_less else ""
        raise PlanError(
            f"the block weights expect {format_bytes(plan.device_bytes)} of device memory "
            f"({f'{plan.slots} slots of {format_bytes(plan.slot_bytes)}, ' if plan.slots else ''}"
            f"{len(plan.swapped) - plan.swapped_count} resident blocks, "
            f"{format_bytes(profile.small_device_bytes)} of small tensors) but got "
            f"{format_bytes(budget.limit_bytes)} that are not in use; "
            f"{advice}close other programs, or take "
            "a smaller or quantised model"
        )
    need = budget.host_need(profile.block_bytes, slab_bytes=plan.slab_bytes, staging_bytes=plan.staging_bytes)
    if need > budget.host_bytes:
        raise PlanError(
            f"the host expects {format_bytes(need)} more for {len(plan.swapped)} blocks but got "
            f"{format_bytes(budget.host_bytes)} usable (80 % of what is available); close other programs, "
            "take a quantised model, or add RAM"
        )
