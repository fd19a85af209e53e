"""What was read, measured and asked becomes a SwapPlan: the one way that node, command line and tests take; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...hardware.records import DeviceMemory, DeviceSpec, HostMemory, LinkSpeed
from ...hardware.tiers import tune
from ...hardware.units import format_bytes
from ..errors import PlanError
from ..model.layout import ModelProfile
from ..settings import SwapSettings
from .budget import MemoryBudget, make_budget
from .schedule import ForwardTime, Ring, VirtualTime, spread, steady_time
from .swap_plan import STAGING_SLABS, HostTier, PlanInputs, SwapPlan, Timing

SLOT_CHOICES = (2, 3)
"""With two slots an even spread of equal blocks is within 1.10 of max(compute, transfer), with three at it; a fourth
gains nothing (`simulate` over N 30/40/48, 25-100 % swapped, transfer/compute 0.25-4)."""

WORTH_A_SLOT = 0.005
"""Part of the forward that a third slot must save to be worth its memory; below it the model's own error is larger."""

VACE_PREFIX = "vace_blocks."

Choice: TypeAlias = "tuple[tuple[bool, ...], int]"
"""For each block whether it is swapped, and the number of slots."""

UNIFIED = "device and host share one memory: swapping frees nothing, so it is off"

RAN_OUT = "since the device ran out of memory with a larger plan for this video size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is set from outside of the settings, by ComfyUI's flags or by what the device cannot do.

    Attributes:
        pin: Host memory may be page-locked.
        overlap: Copies may have streams of their own.
        must_swap_all: No block may stay on the device.
        reserve_bytes: Device memory to be left free beside our own reserve.
        originals_stay: Somebody else keeps the blocks' weights in host memory, so that slabs are copies.
    """

    pin: bool = True
    overlap: bool = True
    must_swap_all: bool = False
    reserve_bytes: int = 0
    originals_stay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """A machine at one moment.

    Attributes:
        spec: The device.
        memory: Its memory.
        host: Host memory.
        link: The measured link; None if it is not measured.
        unused_cache_bytes: What torch has reserved on the device and does not use.
    """

    spec: DeviceSpec
    memory: DeviceMemory
    host: HostMemory
    link: LinkSpeed | None = None
    unused_cache_bytes: int = 0


def plan_inputs(
    profile: ModelProfile, settings: SwapSettings, readings: Readings, limits: Limits | None = None
) -> PlanInputs:
    """The inputs of a plan for a model of which nothing is placed and nothing was measured; callers replace the rest.

    Args:
        profile: The blocks and their bytes.
        settings: What the user asked for. With automatic tuning count, streams and ratio follow from the readings.
        readings: The machine.
        limits: What is set from outside of the settings; None sets nothing.
    """
    limits, is_auto = limits or Limits(), settings.auto_hardware_tuning
    memory, host = readings.memory, readings.host
    percent = settings.vram_threshold_percent
    tuning = tune(readings.spec, host, readings.link, vram_threshold_percent=percent)
    overlap = settings.enable_cuda_optimization and limits.overlap
    inputs = PlanInputs(
        device_total_bytes=memory.total_bytes,
        device_free_bytes=memory.free_bytes,
        unused_cache_bytes=readings.unused_cache_bytes,
        reserve_bytes=limits.reserve_bytes,
        is_unified=bool(readings.spec.is_integrated),
        host_available_bytes=host.available_bytes,
        pin_budget_bytes=host.pin_budget_bytes,
        originals_stay=limits.originals_stay,
        vram_threshold_percent=percent,
        bandwidth_target=tuning.bandwidth_target if is_auto else settings.bandwidth_target,
        blocks_to_swap=None if is_auto else settings.blocks_to_swap,
        vace_blocks_to_swap=0 if is_auto else settings.vace_blocks_to_swap,
        slots=None if overlap else 1,
        overlap=overlap,
        # By hand, only what the user says decides; what is known to do harm is part of the automatic choice.
        pin=settings.enable_dram_optimization and limits.pin and (tuning.pin or not is_auto),
        timing=timing_of(readings.link, streams=tuning.streams if is_auto else settings.num_cuda_streams),
        tuning=tuning.reasons if is_auto else (),
        notes=(f"free device memory is an estimate: {memory.source}",) if memory.is_estimate else (),
    )
    return swapping_all(inputs, profile) if limits.must_swap_all else inputs


def swapping_all(inputs: PlanInputs, profile: ModelProfile) -> PlanInputs:
    """The same with every block to be swapped."""
    main, vace = block_counts(profile)
    return replace(inputs, blocks_to_swap=main, vace_blocks_to_swap=vace)


def timing_of(link: LinkSpeed | None, *, streams: int, compute_ms: tuple[float, ...] | None = None) -> Timing:
    """What a measured link makes of this number of streams, beside the blocks' durations; None is unknown."""
    return Timing(
        compute_ms=compute_ms,
        pinned_bytes_per_s=link.best(max_streams=streams)[1] if link is not None and link.pinned else None,
        pageable_bytes_per_s=None if link is None else link.pageable,
        host_copy_bytes_per_s=None if link is None else link.host_copy,
        streams=streams,
    )


def make_plan(profile: ModelProfile, inputs: PlanInputs) -> SwapPlan:
    """The plan for one transformer on one device.

    Raises:
        PlanError: Not even the smallest window fits the device, or the host cannot hold the blocks.
    """
    return plan_within(profile, make_budget(inputs), inputs)


def plan_within(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> SwapPlan:
    """The same within a budget that is worked out already.

    Raises:
        PlanError: Not even the smallest window fits the device, or the host cannot hold the blocks.
    """
    if not profile.blocks:
        raise PlanError("the model has no blocks: nothing can be swapped")
    (swapped, slots), chosen = _choose(profile, budget, inputs)
    plan = _complete(profile, budget, inputs, swapped, slots)
    _refuse_what_cannot_be(profile, budget, plan)
    unfit = [_does_not_fit(plan)] if plan.fits is False else []
    terms = [budget.reason] if budget.reason else []
    tuning = inputs.tuning if plan.swapped_count else ()
    reasons = (*unfit, *chosen, *terms, *plan.reasons, *tuning, *inputs.notes)
    return replace(plan, reasons=reasons, tuning=tuning)


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


def _choose(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> tuple[Choice, list[str]]:
    """Which blocks are swapped, through how many slots, and why: by count, or as few as fit the budget."""
    count = len(profile.blocks)
    if inputs.blocks_to_swap is not None:
        swapped, reasons = _by_count(profile, inputs)
        return (swapped, _slots_by_count(profile, budget, inputs, swapped)), reasons
    if budget.is_unified:
        return ((False,) * count, 0), [UNIFIED]
    everything = weight_bytes(profile, (False,) * count, 0)
    if everything <= budget.weight_bytes:
        taken = f"{format_bytes(everything)} of {format_bytes(budget.weight_bytes)}"
        return ((False,) * count, 0), [f"all {count} blocks fit: {taken}"]
    choice, why = _fewest_that_fit(profile, budget, inputs)
    return choice, [why]


def _by_count(profile: ModelProfile, inputs: PlanInputs) -> tuple[tuple[bool, ...], list[str]]:
    """The counts asked for, spread."""
    main, vace = block_counts(profile)
    asked = (
        ("blocks_to_swap", inputs.blocks_to_swap or 0, main),
        ("vace_blocks_to_swap", inputs.vace_blocks_to_swap, vace),
    )
    reasons = [
        f"{name} is cut from {wanted} to {count}, the number of blocks the model has"
        for name, wanted, count in asked
        if wanted > count
    ]
    mains, vaces = (min(wanted, count) for _, wanted, count in asked)
    reasons.append(f"{mains + vaces} of {len(profile.blocks)} blocks are swapped, {inputs.why}")
    return (spread(vace, vaces) if vace else ()) + (spread(main, mains) if main else ()), reasons


def _slots_by_count(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, swapped: tuple[bool, ...]) -> int:
    """Two slots, or three where the model of time says they pay, the budget holds them, and not every block is asked
    for: a user who swaps all wants the least memory that swapping can do with.
    """
    count = sum(swapped)
    if inputs.slots is not None:
        return min(inputs.slots, count)
    if not inputs.overlap:
        return min(1, count)
    fewest, most = SLOT_CHOICES
    asks_for_all = (inputs.blocks_to_swap or 0) >= block_counts(profile)[0]
    if asks_for_all or count <= fewest or weight_bytes(profile, swapped, most) > budget.weight_bytes:
        return min(fewest, count)
    return most if _saving(profile, budget, inputs, (swapped, fewest), (swapped, most)) else fewest


def _saving(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, choice: Choice, other: Choice) -> float:
    """Part of a forward that `other` saves against `choice`; 0 where it is unknown or within the model's error."""
    times = []
    for swapped, slots in (choice, other):
        tiers, _, _ = _tiers(profile, budget, inputs, swapped)
        times.append(predict(profile, swapped, slots, tiers, inputs.timing))
    if times[0] is None or times[1] is None or times[1].elapsed >= (1 - WORTH_A_SLOT) * times[0].elapsed:
        return 0.0
    return 1 - times[1].elapsed / times[0].elapsed


def _fewest_that_fit(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> tuple[Choice, str]:
    """The fewest swapped blocks that fit the weight budget, with the number of slots that is faster for that memory."""
    count, target = len(profile.blocks), format_bytes(budget.weight_bytes)
    slots = inputs.slots or (SLOT_CHOICES[0] if inputs.overlap else 1)
    fewest = _fewest(profile, budget.weight_bytes, slots)
    if fewest is None:
        everything = (True,) * count
        need = format_bytes(weight_bytes(profile, everything, slots))
        why = f"even with all {count} blocks swapped the weights take {need} of {target}"
        return (everything, min(slots, count)), why
    best, why = (spread(count, fewest), slots), "blocks are swapped, the fewest that fit"
    other = _with_another_slot(profile, budget, best) if inputs.slots is None and inputs.overlap else None
    gain = 0.0 if other is None else _saving(profile, budget, inputs, best, other)
    best = other if other is not None and gain else best
    if sum(best[0]) > fewest:
        why = f"blocks are swapped, 1 more than the {fewest} that fit, since a third slot saves {gain:.1%} of a forward"
    return best, f"{sum(best[0])} of {count} {why}: {format_bytes(weight_bytes(profile, *best))} of {target}"


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
            f"compute_ms: expected a duration for each of {len(swapped)} blocks, got {len(timing.compute_ms)}"
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
    profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, swapped: Sequence[bool]
) -> tuple[tuple[HostTier | None, ...], int, list[str]]:
    """Host tier of each block, bytes of the staging slabs, and the reasons where not all is pinned."""
    inside = [i for i, is_swapped in enumerate(swapped) if is_swapped]
    sizes = {i: profile.blocks[i].slab_host_bytes for i in inside}
    pageable = tuple(HostTier.PAGEABLE if s else None for s in swapped)
    if not inputs.pin or not inputs.overlap:
        why = (
            "page-locked memory is switched off, or not to be had here"
            if not inputs.pin
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
    profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, swapped: tuple[bool, ...], slots: int
) -> SwapPlan:
    tiers, staging_bytes, reasons = _tiers(profile, budget, inputs, swapped)
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
        streams=inputs.timing.streams if inputs.overlap else 1,
        overlap=inputs.overlap,
        tiers=tiers,
        device_bytes=device_bytes,
        budget_bytes=budget.weight_bytes,
        activation_bytes=budget.activation_bytes,
        limit_bytes=budget.limit_bytes,
        slab_bytes=sum(profile.blocks[i].slab_host_bytes for i in inside),
        pinned_bytes=pinned + staging_bytes,
        staging_bytes=staging_bytes,
        streamed_bytes=sum(profile.blocks[i].slab_bytes for i in inside) if slots < len(inside) else 0,
        predicted=predict(profile, swapped, slots, tiers, inputs.timing),
        over_ceiling=device_bytes > budget.weight_bytes,
        reasons=tuple(reasons),
    )


def _refuse_what_cannot_be(profile: ModelProfile, budget: MemoryBudget, plan: SwapPlan) -> None:
    if plan.device_bytes > budget.limit_bytes:
        can_be_less = not (all(plan.swapped) or budget.is_unified)
        advice = "swap more blocks or leave that to auto_hardware_tuning, " if can_be_less else ""
        raise PlanError(
            f"not enough VRAM: {format_bytes(plan.device_bytes)} needed for block weights "
            f"({f'{plan.slots} slots of {format_bytes(plan.slot_bytes)}, ' if plan.slots else ''}"
            f"{len(plan.swapped) - plan.swapped_count} resident blocks, "
            f"{format_bytes(profile.small_device_bytes)} of small tensors), "
            f"{format_bytes(budget.limit_bytes)} not in use by other data; "
            f"{advice}close other programs, or take "
            "a smaller or quantised model"
        )
    need = budget.host_need(profile.block_bytes, slab_bytes=plan.slab_bytes, staging_bytes=plan.staging_bytes)
    if need > budget.host_bytes:
        raise PlanError(
            f"not enough RAM: {format_bytes(need)} more needed for {len(plan.swapped)} blocks, "
            f"{format_bytes(budget.host_bytes)} usable (80 % of what is available); close other programs, "
            "take a quantised model, or add RAM"
        )
