"""Turns readings, measurements and settings into a SwapPlan, for node, command line and tests alike; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...hardware.records import DeviceMemory, DeviceSpec, DiskSpeed, HostMemory, LinkSpeed
from ...hardware.tiers import tune
from ...hardware.units import format_bytes, format_count
from ..errors import PlanError
from ..model.groups import MAIN, VACE, is_beside, kind_of
from ..model.layout import ModelProfile, device_bytes
from ..settings import SwapSettings
from .budget import MemoryBudget, make_budget
from .hosting import choose_hosting
from .schedule import ForwardTime, Ring, VirtualTime, slot_lanes, spread, spread_bytes, steady_time
from .swap_plan import HostTier, PlanInputs, SwapPlan, Timing, blocks_in_words

SLOT_CHOICES = (2, 3)
"""With two slots an even spread of equal blocks is within 1.10 of max(compute, transfer), with three at it; a fourth
gains nothing (`simulate` over N 30/40/48, 25-100 % swapped, transfer/compute 0.25-4)."""

WORTH_A_SLOT = 0.005
"""Share of the forward that a third slot must save to be worth its memory; the prediction's own error is larger than
anything below it."""

Choice: TypeAlias = "tuple[tuple[bool, ...], int]"
"""For each block whether it is swapped, and the number of slots in lane 0."""

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
        wants_pin=settings.enable_dram_optimization,
        timing=timing_of(readings.link, streams=tuning.streams if is_auto else settings.num_cuda_streams),
        disk=readings.disk,
        tuning=tuning.reasons if is_auto else (),
        notes=(*_without_effect(settings), *_estimated(memory)),
    )
    return swapping_all(inputs, profile) if limits.must_swap_all else inputs


def _without_effect(settings: SwapSettings) -> tuple[str, ...]:
    """What a user has set that automatic tuning does not look at."""
    count = settings.blocks_to_swap
    if not (settings.auto_hardware_tuning and count):
        return ()
    return (
        f"blocks_to_swap = {count} has no effect while auto_hardware_tuning is on; switch it off to set the number",
    )


def _estimated(memory: DeviceMemory) -> tuple[str, ...]:
    return (f"free VRAM is an estimate: {memory.source}",) if memory.is_estimate else ()


def _refuse_what_frees_nothing(profile: ModelProfile, settings: SwapSettings) -> None:
    fixed = _fixed(profile)
    if fixed and settings.blocks_to_swap and not any(block.streamed_bytes for block in profile.blocks):
        raise PlanError(
            f"swapping {format_count(settings.blocks_to_swap, 'block')} would free nothing: {'; '.join(fixed)}; set "
            "blocks_to_swap to 0, or load the model with another quantization"
        )


def _fixed(profile: ModelProfile) -> list[str]:
    """What stays on the device whole, as sentences."""
    sentences = []
    for why, (names, nbytes) in profile.fixed.items():
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        sentences.append(f"{format_bytes(nbytes)} of weights always stay on the GPU ({which}: {why})")
    return sentences


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
    choice, why, remarks = _choose(profile, budget, inputs)
    plan = _complete(profile, budget, inputs, choice, why, remarks)
    _refuse_what_does_not_fit(profile, budget, inputs, plan)
    if plan.fits is not False:
        return plan
    weights, activations = plan.device_bytes, plan.activation_bytes or 0
    warning = (
        f"it will probably run out of VRAM: {format_bytes(activations)} for the computation and "
        f"{format_bytes(weights)} of weights are needed, {format_bytes(plan.limit_bytes)} are free; take fewer frames, "
        "or a smaller size"
    )
    return replace(plan, reasons=(warning, *plan.reasons), remarks=(warning, *plan.remarks))


class Weights:
    """The device memory of a model's weights, by what of them is swapped.

    Args:
        profile: The blocks and their bytes.

    Attributes:
        sizes: Each block's bytes in a slab.
        lanes: Each block's lane.
    """

    def __init__(self, profile: ModelProfile) -> None:
        self.sizes = [block.slab_bytes for block in profile.blocks]
        self.lanes = profile.lanes
        self._resident = [device_bytes(size) for size in self.sizes]
        self._small = profile.small_device_bytes

    def window(self, choice: Choice) -> tuple[int, ...]:
        """The bytes of each slot: of the largest block in its lane that is swapped."""
        swapped, slots = choice
        largest: dict[int, int] = {}
        for lane, size, is_swapped in zip(self.lanes, self._resident, swapped, strict=True):
            if is_swapped:
                largest[lane] = max(size, largest.get(lane, 0))
        return tuple(largest[lane] for lane in slot_lanes(swapped, self.lanes, slots))

    def nbytes(self, choice: Choice) -> int:
        """Residents, small tensors and window."""
        residents = sum(size for size, is_swapped in zip(self._resident, choice[0], strict=True) if not is_swapped)
        return self._small + residents + sum(self.window(choice))

    def in_lane(self, swapped: Sequence[bool], lane: int = 0) -> list[int]:
        """The swapped blocks of a lane."""
        return [i for i, own in enumerate(self.lanes) if own == lane and swapped[i]]

    def copied_bytes(self, choice: Choice) -> int:
        """What a forward copies: of each lane all its swapped blocks, unless each of them has a slot."""
        swapped, slots = choice
        inside = [(self.in_lane(swapped, lane), 1 if lane else slots) for lane in set(self.lanes)]
        return sum(self.sizes[i] for blocks, most in inside if len(blocks) > most for i in blocks)


def _block_counts(profile: ModelProfile) -> tuple[int, int]:
    """Number of main blocks, and of VACE blocks."""
    kinds = [kind_of(block.name) for block in profile.blocks]
    return kinds.count(MAIN), kinds.count(VACE)


def _choose(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> tuple[Choice, str, list[str]]:
    """Which blocks are swapped, through how many slots, why (the given count, or as few as fit the budget), and what a
    user should know of that.
    """
    count = len(profile.blocks)
    if inputs.blocks_to_swap is not None:
        return _by_count(profile, budget, inputs, inputs.blocks_to_swap)
    if inputs.is_unified:
        return ((False,) * count, 0), UNIFIED, []
    everything = Weights(profile).nbytes(((False,) * count, 0))
    if everything <= budget.weight_bytes:
        taken = f"{format_bytes(everything)} of {format_bytes(budget.weight_bytes)}"
        return ((False,) * count, 0), f"all {count} blocks fit: {taken}", []
    return (*_fewest_that_fit(profile, budget, inputs), [])


def _by_count(
    profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, asked: int
) -> tuple[Choice, str, list[str]]:
    """The given counts, spread; what is beside the blocks is swapped with them. Two slots, or three if the prediction
    gains by it, the budget holds them, and not every block is asked for: a user who swaps all blocks wants the least
    memory.
    """
    counts, cuts = [], []
    wishes = (asked, inputs.vace_blocks_to_swap)
    for name, wish, most in zip(("blocks_to_swap", "vace_blocks_to_swap"), wishes, _block_counts(profile), strict=True):
        counts.append(min(wish, most))
        if wish > most:
            cuts.append(f"{name} is cut from {wish} to {most}, the number of blocks the model has")
    weights, (main, vace) = Weights(profile), _block_counts(profile)
    blocks = {MAIN: iter(spread(main, counts[0])), VACE: iter(spread(vace, counts[1]))}
    kinds = [kind_of(block.name) for block in profile.blocks]
    swapped = tuple(next(blocks[kind]) if kind in blocks else counts[0] > 0 for kind in kinds)
    why = f"{sum(counts)} of {main + vace} blocks are swapped, {inputs.why}"
    count = len(weights.in_lane(swapped))
    if inputs.slots is not None or not inputs.overlap:
        return (swapped, min(inputs.slots or 1, count)), why, cuts
    fewest, most = SLOT_CHOICES
    fits = asked < main and count > fewest and weights.nbytes((swapped, most)) <= budget.weight_bytes
    if fits and _saving(profile, budget, inputs, (swapped, fewest), (swapped, most)):
        return (swapped, most), why, cuts
    return (swapped, min(fewest, count)), why, cuts


def _saving(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, choice: Choice, other: Choice) -> float:
    """Share of a forward that `other` saves against `choice`; 0 if it is unknown or within the prediction's error."""
    before, after = (_complete(profile, budget, inputs, each, "", ()).predicted for each in (choice, other))
    if before is None or after is None or after.elapsed >= (1 - WORTH_A_SLOT) * before.elapsed:
        return 0.0
    return 1 - after.elapsed / before.elapsed


def _fewest_that_fit(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs) -> tuple[Choice, str]:
    """The least share of the bytes that fits the weight budget when it is swapped, with the number of slots that is
    faster for that memory.
    """
    weights, limit = Weights(profile), budget.weight_bytes
    count = len(weights.sizes)
    slots = inputs.slots or (SLOT_CHOICES[0] if inputs.overlap else 1)
    ways = _shares(weights, slots)
    fewest = next((share for share, choice in ways.items() if weights.nbytes(choice) <= limit), None)
    if fewest is None:
        everything = (True,) * count, min(slots, len(weights.in_lane((True,) * count)))
        need = format_bytes(weights.nbytes(everything))
        return everything, f"even with all {count} blocks swapped the weights take {need} of {format_bytes(limit)}"
    first = best = ways[fewest]
    gain, why = 0.0, "are swapped, the fewest that fit"
    if inputs.slots is None and inputs.overlap:
        more = _shares(weights, slots + 1)
        # In the memory of `best`, not in all that is free, so that more memory never swaps more blocks.
        tries = ((fewest, limit), (fewest + 1, weights.nbytes(best)))
        fitting = (more[share] for share, most in tries if share in more and weights.nbytes(more[share]) <= most)
        other = next(fitting, None)
        gain = 0.0 if other is None else _saving(profile, budget, inputs, best, other)
        best = other if other is not None and gain else best
    fit, extra = sum(first[0]), sum(best[0]) - sum(first[0])
    if extra > 0:
        why = f"are swapped, {extra} more than the {fit} that fit, since a third slot saves {gain:.1%} of a forward"
    taken = f"{format_bytes(weights.nbytes(best))} of {format_bytes(limit)}"
    parts = "parts" if any(is_beside(block.name) for block in profile.blocks) else "blocks"
    return best, f"{sum(best[0])} of {count} {parts} {why}: {taken}"


def _shares(weights: Weights, slots: int) -> dict[int, Choice]:
    """The ways to swap a share of the bytes, in as many steps as there are blocks, that free memory: with as many slots
    as swapped blocks, the window takes what swapping frees.
    """
    count, found = len(weights.sizes), {}
    for share in range(1, count + 1):
        swapped = spread_bytes(weights.sizes, share)
        in_first = len(weights.in_lane(swapped))
        if in_first > slots:
            found[share] = swapped, slots
    return found


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
    ring = Ring(swapped, slots=slots, lanes=profile.lanes)
    time = VirtualTime(ring, compute=timing.compute_ms, transfer=transfer, blocking=blocking)
    return steady_time(time, [range(len(swapped))])


def _complete(
    profile: ModelProfile,
    budget: MemoryBudget,
    inputs: PlanInputs,
    choice: Choice,
    why: str,
    remarks: Sequence[str],
) -> SwapPlan:
    swapped, slots = choice
    hosting = choose_hosting(profile, swapped, inputs, room_bytes=budget.host_bytes)
    timing, remarks = hosting.timing(inputs, budget.host_bytes), [*remarks, *hosting.reasons]
    inside = [block for block, is_swapped in zip(profile.blocks, swapped, strict=True) if is_swapped]
    weights, limit = Weights(profile), budget.weight_bytes
    taken, copied = weights.nbytes(choice), weights.copied_bytes(choice)
    if taken > limit:
        left = f"the {format_bytes(limit)} that vram_threshold_percent and the computation leave them"
        remarks.append(f"the blocks take {format_bytes(taken)} of VRAM, more than {left}")
    reasons = []
    beside = [block for block in inside if is_beside(block.name)]
    if beside:
        size = format_bytes(sum(block.slab_bytes for block in beside))
        reasons.append(f"of what is swapped, {format_count(len(beside), 'module')} are beside the blocks: {size}")
    if inside and not copied:
        remarks.append(f"with {format_count(len(inside), 'block')} swapped nothing streams, and no VRAM is saved")
    if inside:
        remarks += _fixed(profile)
    remarks += inputs.notes
    tuning = inputs.tuning if inside else ()
    return SwapPlan(
        swapped=swapped,
        slots=slots,
        slot_bytes=weights.window(choice)[0] if slots else 0,
        own_slots=weights.window(choice)[slots:],
        streams=inputs.timing.streams if inputs.overlap else 1,
        overlap=inputs.overlap,
        tiers=hosting.tiers,
        device_bytes=taken,
        budget_bytes=limit,
        activation_bytes=None if inputs.activations is None else inputs.activations.nbytes,
        limit_bytes=budget.limit_bytes,
        slab_bytes=hosting.slab_bytes,
        pinned_bytes=hosting.pinned_bytes,
        staging_bytes=hosting.staging_bytes,
        added_bytes=hosting.added_bytes,
        file_bytes=hosting.file_bytes,
        file_bytes_per_s=timing.file_bytes_per_s if hosting.file_bytes else None,
        streamed_bytes=copied,
        predicted=predict(profile, swapped, slots, hosting.tiers, timing, overlap=inputs.overlap),
        over_ceiling=taken > limit,
        beside=tuple(is_beside(block.name) for block in profile.blocks),
        reasons=tuple(text for text in (why, budget.reason, *reasons, *tuning, *remarks) if text),
        remarks=tuple(remarks),
        tuning=tuning,
    )


def _refuse_what_does_not_fit(profile: ModelProfile, budget: MemoryBudget, inputs: PlanInputs, plan: SwapPlan) -> None:
    if plan.device_bytes > budget.limit_bytes:
        can_be_less = not (all(plan.swapped) or inputs.is_unified)
        advice = "swap more blocks or leave that to auto_hardware_tuning, " if can_be_less else ""
        raise PlanError(
            f"not enough VRAM: {format_bytes(plan.device_bytes)} needed for the model's blocks "
            f"({blocks_in_words(plan)}), {format_bytes(budget.limit_bytes)} not in use by others; "
            f"{advice}close other programs, or take a smaller or quantised model"
        )
    if plan.added_bytes > budget.host_limit_bytes:
        raise PlanError(
            f"not enough RAM: {format_bytes(plan.added_bytes)} more needed for the blocks that stream, "
            f"{format_bytes(budget.host_limit_bytes)} available; close other programs, take a quantised model, or add "
            "RAM"
        )
