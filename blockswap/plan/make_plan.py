"""Turns readings, measurements and settings into a SwapPlan, for node, command line and tests alike; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...hardware.records import DeviceMemory, DeviceSpec, DiskSpeed, HostMemory, LinkSpeed
from ...hardware.tiers import tune
from ...hardware.units import format_bytes, format_count
from ..errors import PlanError
from ..model.layout import ModelProfile
from ..settings import SwapSettings
from .budget import MemoryBudget, make_budget
from .hosting import choose_hosting
from .schedule import ForwardTime, Ring, VirtualTime, spread, steady_time
from .swap_plan import HostTier, PlanInputs, SwapPlan, Timing

SLOT_CHOICES = (2, 3)
"""With two slots an even spread of equal blocks is within 1.10 of max(compute, transfer), with three at it; a fourth
gains nothing (`simulate` over N 30/40/48, 25-100 % swapped, transfer/compute 0.25-4)."""

WORTH_A_SLOT = 0.005
"""Share of the forward that a third slot must save to be worth its memory; the prediction's own error is larger than
anything below it."""

Choice: TypeAlias = "tuple[tuple[bool, ...], int]"
"""For each block whether it is swapped, and the number of slots."""

UNIFIED = "device and host share one memory: swapping frees nothing, so it is off"

RAN_OUT = "since the device ran out of memory with a larger plan for this video size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits beside the settings: from ComfyUI's flags, or from what the device lacks.

    Attributes:
        pin: Host memory may be page-locked.
        overlap: Copies may have streams of their own.
        must_swap_all: No block may stay on the device.
        reserve_bytes: Device memory that others ask us to leave free; the larger of this and our own reserve counts.
    """

    pin: bool = True
    overlap: bool = True
    must_swap_all: bool = False
    reserve_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """A machine at one moment.

    Attributes:
        spec: The device.
        memory: Device memory.
        host: Host memory.
        link: The measured link; None if it is not measured.
        disk: Measured speed of reading the model's file; None if it is not measured.
        unused_cache_bytes: Device memory that torch has reserved and does not use.
    """

    spec: DeviceSpec
    memory: DeviceMemory
    host: HostMemory
    link: LinkSpeed | None = None
    disk: DiskSpeed | None = None
    unused_cache_bytes: int = 0


def plan_inputs(
    profile: ModelProfile,
    settings: SwapSettings,
    readings: Readings,
    limits: Limits | None = None,
    *,
    own_host_bytes: int = 0,
) -> PlanInputs:
    """The inputs of a plan for a model that is not placed or measured yet; callers replace what they know better.

    Args:
        profile: The blocks and their bytes.
        settings: The user's settings. With automatic tuning, count, streams and share follow from the readings.
        readings: The machine.
        limits: Limits beside the settings; None sets none.
        own_host_bytes: What slabs and staging slabs in place have added to host memory; it counts as available.

    Raises:
        PlanError: The user asks for a number of blocks, and no tensor of a block can be swapped.
    """
    limits, is_auto = limits or Limits(), settings.auto_hardware_tuning
    if not (is_auto or limits.must_swap_all):
        _refuse_what_frees_nothing(profile, settings)
    memory, host = readings.memory, readings.host
    host = replace(host, available_bytes=host.available_bytes + own_host_bytes)
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
        host_room_bytes=host.room_bytes,
        pin_budget_bytes=host.pin_budget_bytes,
        vram_threshold_percent=percent,
        bandwidth_target=tuning.bandwidth_target if is_auto else settings.bandwidth_target,
        blocks_to_swap=None if is_auto else settings.blocks_to_swap,
        vace_blocks_to_swap=0 if is_auto else settings.vace_blocks_to_swap,
        slots=None if overlap else 1,
        overlap=overlap,
        # A manual setting is followed even where page-locking is known to do harm; only automatic tuning avoids it.
        pin=settings.enable_dram_optimization and limits.pin and (tuning.pin or not is_auto),
        timing=timing_of(readings.link, streams=tuning.streams if is_auto else settings.num_cuda_streams),
        disk=readings.disk,
        tuning=tuning.reasons if is_auto else (),
        notes=(f"free device memory is an estimate: {memory.source}",) if memory.is_estimate else (),
    )
    return swapping_all(inputs, profile) if limits.must_swap_all else inputs


def _refuse_what_frees_nothing(profile: ModelProfile, settings: SwapSettings) -> None:
    fixed = _fixed(profile)
    if fixed and settings.blocks_to_swap and not any(block.streamed_bytes for block in profile.blocks):
        raise PlanError(
            f"swapping {format_count(settings.blocks_to_swap, 'block')} would free nothing: {'; '.join(fixed)}; set "
            "blocks_to_swap to 0, or load the model with another quantization"
        )


def _fixed(profile: ModelProfile) -> list[str]:
    """What stays on the device whole, as sentences."""
    return [f"{format_bytes(n)} of weights always stay on the device ({why})" for why, n in profile.fixed_bytes.items()]


def swapping_all(inputs: PlanInputs, profile: ModelProfile) -> PlanInputs:
    """The same inputs with every block to be swapped."""
    main, vace = _block_counts(profile)
    return replace(inputs, blocks_to_swap=main, vace_blocks_to_swap=vace)


def timing_of(link: LinkSpeed | None, *, streams: int, compute_ms: tuple[float, ...] | None = None) -> Timing:
    """Speeds of a measured link with this number of streams, and the blocks' durations; None is unknown."""
    return Timing(
        compute_ms=compute_ms,
        pinned_bytes_per_s=link.best(max_streams=streams)[1] if link is not None and link.pinned else None,
        pageable_bytes_per_s=None if link is None else link.pageable,
        host_copy_bytes_per_s=None if link is None else link.host_copy,
        streams=streams,
    )


def make_plan(profile: ModelProfile, inputs: PlanInputs, budget: MemoryBudget | None = None) -> SwapPlan:
    """The plan for one transformer on one device.

    Args:
        profile: The blocks and their bytes.
        inputs: Settings, readings and measurements.
        budget: What the plan may spend; None works it out from `inputs`.

    Raises:
        PlanError: The device cannot hold the weights, or the host cannot hold the blocks.
    """
    if not profile.blocks:
        raise PlanError("the model has no blocks: nothing can be swapped")
    budget = budget or make_budget(inputs)
    choice, why = _choose(profile, budget, inputs)
    plan = _complete(profile, budget, inputs, choice, why)
    _refuse_what_does_not_fit(profile, budget, inputs, plan)
    if plan.fits is not False:
        return plan
    weights, activations = plan.device_bytes, plan.activation_bytes or 0
    warning = (
        f"expect it to run out of memory: {format_bytes(activations)} of activations and {format_bytes(weights)} of "
        f"weights are {format_bytes(weights + activations)}, and {format_bytes(plan.limit_bytes)} are free; "
        "take fewer frames or smaller ones"
    )
    return replace(plan, reasons=(warning, *plan.reasons))


def weight_bytes(profile: ModelProfile, swapped: Sequence[bool], slots: int) -> int:
    """Device memory of residents, small tensors and a window of at most `slots` slots."""
    inside = [i for i, is_swapped in enumerate(swapped) if is_swapped]
    residents = [i for i, is_swapped in enumerate(swapped) if not is_swapped]
    window = min(slots, len(inside)) * profile.slot_bytes(inside)
    return profile.small_device_bytes + profile.resident_device_bytes(residents) + window


def _block_counts(profile: ModelProfile) -> tuple[int, int]:
    """Number of main blocks, and of VACE blocks."""
    vace = sum(block.name.startswith("vace_blocks.") for block in profile.blocks)
    return len(profile.blocks) - vace, vace


def _choose(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> tuple[Choice, list[str]]:
    """Which blocks are swapped, through how many slots, and why: the given count, or as few as fit the budget."""
    count = len(profile.blocks)
    if inputs.blocks_to_swap is not None:
        return _by_count(profile, budget, inputs, inputs.blocks_to_swap)
    if inputs.is_unified:
        return ((False,) * count, 0), [UNIFIED]
    everything = weight_bytes(profile, (False,) * count, 0)
    if everything <= budget.weight_bytes:
        taken = f"{format_bytes(everything)} of {format_bytes(budget.weight_bytes)}"
        return ((False,) * count, 0), [f"all {count} blocks fit: {taken}"]
    choice, why = _fewest_that_fit(profile, budget, inputs)
    return choice, [why]


def _by_count(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, asked: int) -> tuple[Choice, list[str]]:
    """The given counts, spread. Two slots, or three if the prediction gains by it, the budget holds them, and not every
    block is asked for: a user who swaps all blocks wants the least memory.
    """
    counts, reasons = [], []
    wishes = (asked, inputs.vace_blocks_to_swap)
    for name, wish, most in zip(("blocks_to_swap", "vace_blocks_to_swap"), wishes, _block_counts(profile), strict=True):
        counts.append(min(wish, most))
        if wish > most:
            reasons.append(f"{name} is cut from {wish} to {most}, the number of blocks the model has")
    main, vace = _block_counts(profile)
    swapped = spread(vace, counts[1]) + spread(main, counts[0])
    count = sum(counts)
    reasons.append(f"{count} of {len(profile.blocks)} blocks are swapped, {inputs.why}")
    if inputs.slots is not None or not inputs.overlap:
        return (swapped, min(inputs.slots or 1, count)), reasons
    fewest, most = SLOT_CHOICES
    fits = asked < main and count > fewest and weight_bytes(profile, swapped, most) <= budget.weight_bytes
    if fits and _saving(profile, budget, inputs, (swapped, fewest), (swapped, most)):
        return (swapped, most), reasons
    return (swapped, min(fewest, count)), reasons


def _saving(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, choice: Choice, other: Choice) -> float:
    """Share of a forward that `other` saves against `choice`; 0 if it is unknown or within the prediction's error."""
    before, after = (_complete(profile, budget, inputs, each, ()).predicted for each in (choice, other))
    if before is None or after is None or after.elapsed >= (1 - WORTH_A_SLOT) * before.elapsed:
        return 0.0
    return 1 - after.elapsed / before.elapsed


def _fewest_that_fit(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> tuple[Choice, str]:
    """The fewest swapped blocks that fit the weight budget, with the number of slots that is faster for that memory."""
    count, limit = len(profile.blocks), budget.weight_bytes
    slots = inputs.slots or (SLOT_CHOICES[0] if inputs.overlap else 1)
    # With as many slots as swapped blocks, the window takes what swapping frees.
    ways = range(min(slots + 1, count), count + 1)
    fewest = next((k for k in ways if weight_bytes(profile, spread(count, k), slots) <= limit), None)
    if fewest is None:
        everything = (True,) * count
        need = format_bytes(weight_bytes(profile, everything, slots))
        why = f"even with all {count} blocks swapped the weights take {need} of {format_bytes(limit)}"
        return (everything, min(slots, count)), why
    best, why = (spread(count, fewest), slots), "blocks are swapped, the fewest that fit"
    other = _with_another_slot(profile, limit, best) if inputs.slots is None and inputs.overlap else None
    gain = 0.0 if other is None else _saving(profile, budget, inputs, best, other)
    best = other if other is not None and gain else best
    if sum(best[0]) > fewest:
        why = f"blocks are swapped, 1 more than the {fewest} that fit, since a third slot saves {gain:.1%} of a forward"
    taken = f"{format_bytes(weight_bytes(profile, *best))} of {format_bytes(limit)}"
    return best, f"{sum(best[0])} of {count} {why}: {taken}"


def _with_another_slot(profile: ModelProfile, limit: int, choice: Choice) -> Choice | None:
    """`choice` with one slot more in `limit` bytes, else with one block and one slot more in the memory that `choice`
    takes; None if neither fits.

    The second limit is not the budget, so that the number of swapped blocks follows from `choice` alone and cannot grow
    with the memory of the card.
    """
    count, (swapped, slots) = len(profile.blocks), choice
    for k, most in ((sum(swapped), limit), (sum(swapped) + 1, weight_bytes(profile, *choice))):
        if slots + 1 < k <= count and weight_bytes(profile, spread(count, k), slots + 1) <= most:
            return spread(count, k), slots + 1
    return None


def predict(
    profile: ModelProfile,
    swapped: Sequence[bool],
    slots: int,
    tiers: Sequence[HostTier | None],
    timing: Timing,
    *,
    overlap: bool,
) -> ForwardTime | None:
    """One forward of all blocks in virtual time, in ms; None if a speed is unknown."""
    if timing.compute_ms is None:
        return None
    transfer = [0.0] * len(swapped)
    for i, tier in enumerate(tiers):
        if tier is not None:
            speed = timing.bytes_per_s(tier)
            if speed is None:
                return None
            transfer[i] = profile.blocks[i].slab_bytes / speed * 1e3
    blocking = () if overlap else range(len(swapped))
    ring = Ring(swapped, slots=slots)
    time = VirtualTime(ring, compute=timing.compute_ms, transfer=transfer, blocking=blocking)
    return steady_time(time, [range(len(swapped))])


def _complete(
    profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, choice: Choice, why: Sequence[str]
) -> SwapPlan:
    swapped, slots = choice
    hosting = choose_hosting(profile, swapped, inputs, room_bytes=budget.host_bytes)
    timing, reasons = hosting.timing(inputs, budget.host_bytes), list(hosting.reasons)
    inside = [block for block, is_swapped in zip(profile.blocks, swapped, strict=True) if is_swapped]
    device_bytes, limit = weight_bytes(profile, swapped, slots), budget.weight_bytes
    if device_bytes > limit:
        reasons.append(f"the weights take {format_bytes(device_bytes)}, over the budget of {format_bytes(limit)}")
    if inside and slots >= len(inside):
        reasons.append(
            f"{len(inside)} swapped blocks have a slot each: nothing moves after the first forward, nothing is freed"
        )
    if inside:
        reasons += _fixed(profile)
    tuning = inputs.tuning if inside else ()
    return SwapPlan(
        swapped=swapped,
        slots=slots,
        slot_bytes=profile.slot_bytes([i for i, is_swapped in enumerate(swapped) if is_swapped]),
        streams=inputs.timing.streams if inputs.overlap else 1,
        overlap=inputs.overlap,
        tiers=hosting.tiers,
        device_bytes=device_bytes,
        budget_bytes=limit,
        activation_bytes=None if inputs.activations is None else inputs.activations.nbytes,
        limit_bytes=budget.limit_bytes,
        slab_bytes=hosting.slab_bytes,
        pinned_bytes=hosting.pinned_bytes,
        staging_bytes=hosting.staging_bytes,
        added_bytes=hosting.added_bytes,
        file_bytes=hosting.file_bytes,
        file_bytes_per_s=timing.file_bytes_per_s if hosting.file_bytes else None,
        streamed_bytes=sum(block.slab_bytes for block in inside) if slots < len(inside) else 0,
        predicted=predict(profile, swapped, slots, hosting.tiers, timing, overlap=inputs.overlap),
        over_ceiling=device_bytes > limit,
        reasons=(*why, budget.reason, *reasons, *tuning, *inputs.notes),
        tuning=tuning,
    )


def _refuse_what_does_not_fit(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, plan: SwapPlan) -> None:
    if plan.device_bytes > budget.limit_bytes:
        can_be_less = not (all(plan.swapped) or inputs.is_unified)
        advice = "swap more blocks or leave that to auto_hardware_tuning, " if can_be_less else ""
        slots = f"{format_count(plan.slots, 'slot')} of {format_bytes(plan.slot_bytes)}, " if plan.slots else ""
        raise PlanError(
            f"not enough VRAM: {format_bytes(plan.device_bytes)} needed for block weights "
            f"({slots}{len(plan.swapped) - plan.swapped_count} resident blocks, "
            f"{format_bytes(profile.small_device_bytes)} of small tensors), "
            f"{format_bytes(budget.limit_bytes)} not in use by other data; "
            f"{advice}close other programs, or take a smaller or quantised model"
        )
    if plan.added_bytes > budget.host_limit_bytes:
        raise PlanError(
            f"not enough RAM: {format_bytes(plan.added_bytes)} more needed for {plan.swapped_count} swapped blocks, "
            f"{format_bytes(budget.host_limit_bytes)} available; close other programs, take a quantised model, or add "
            "RAM"
        )
