"""`plan`: the swap plan for a GPU, from the header of a checkpoint file alone."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..blockswap.checkpoint.wan_file import model_files, read_checkpoint
from ..blockswap.errors import PlanError, SettingsError
from ..blockswap.model.activations import activation_bytes
from ..blockswap.model.groups import is_beside
from ..blockswap.model.layout import ModelProfile
from ..blockswap.model.recognise import CheckpointProfile
from ..blockswap.model.wan import WanArchitecture, block_flops, tokens_for
from ..blockswap.plan.budget import SAFETY_RESERVE
from ..blockswap.plan.make_plan import UNIFIED, Readings, make_plan, plan_inputs
from ..blockswap.plan.swap_plan import Activations, PlanInputs, SwapPlan, blocks_in_words
from ..blockswap.run.text import expected_waits, plan_details
from ..blockswap.settings import SwapSettings
from ..hardware import (
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    HostMemory,
    LinkSpeed,
    Vendor,
    format_bytes,
    measure_link,
    probe_device,
    read_device_memory,
    read_host_memory,
)
from ..hardware.cards import KnownGpu, find_gpu, vendor_of
from ..hardware.disk import measure_disk
from ..hardware.units import format_speed
from .options import cache_dir, choose_device, parse_count, parse_shape, parse_size
from .output import Result, pairs

ASSUMED_DISK = DiskSpeed(3.5e9, 3.5e9)
"""Of a machine that is only named: an NVMe disk on PCIe 3.0."""

BOUND_BY_COPIES = 0.05
"""Share of a forward that the GPU may wait for copies without being bound by them."""

_GIVEN = "as given"  # the source of the memory of a card that is only named


@dataclass(frozen=True, slots=True)
class Card:
    """The card of the plan: this machine's, or one that is only named.

    Attributes:
        memory: Without the model.
        link: Measured, given or assumed.
        assumed: The link as words, if it is assumed from the card's interface.
    """

    spec: DeviceSpec
    memory: DeviceMemory
    link: LinkSpeed | None
    rates: KnownGpu | None
    assumed: str | None = None

    @property
    def why_not_swapped(self) -> str | None:
        """Why nothing is swapped on it; None for a card of which blocks are swapped, and for one that is not known."""
        if self.rates is None or self.rates.why_not_swapped is None:
            return None
        return f"nothing is swapped on {self.spec.name}: {self.rates.why_not_swapped}"

    @property
    def is_unsupported(self) -> bool:
        """Whether nothing is ever swapped on it, not even by a manual count."""
        return self.rates is not None and self.rates.vendor is Vendor.OTHER


def plan(options: Namespace) -> Result:
    """Reads the header, plans, predicts.

    Raises:
        CheckpointError: The file is truncated, unreadable or not a Wan model.
        SettingsError: An option has an impossible value.
        PlanError: No plan fits.
    """
    checkpoint, card = checkpoint_of(options), _card(options)
    tokens = _tokens(options, checkpoint.architecture)
    beside = [read_checkpoint(Path(name)).model for name in options.beside]
    settings = settings_of(options, checkpoint.architecture, card)
    readings = readings_of(checkpoint.model, card, host_of(options.ram, options.available_ram, card))
    readings = replace(
        readings, disk=None if options.disk is None else DiskSpeed(options.disk * 1e9, options.disk * 1e9)
    )
    known = known_of(checkpoint, card, tokens)
    alone = readings.host.available_bytes
    why_not = card.why_not_swapped if card.is_unsupported or options.blocks_to_swap is None else None
    try:
        readings, locked = with_beside(beside, settings, readings, known)
        inputs = inputs_of(checkpoint.model, settings, once_loaded(checkpoint.model, readings), known, locked)
        decided = make_plan(checkpoint.model, inputs)
        if decided.file_bytes and readings.disk is None:
            is_named = options.gpu is not None or options.vram is not None
            first = model_files(Path(options.model))[0]
            disk = ASSUMED_DISK if is_named else measure_disk(str(first), cache_dir=cache_dir())
            readings = replace(readings, disk=disk)
            decided = make_plan(checkpoint.model, replace(inputs, disk=disk))
    except PlanError as failure:
        taken = f"; --beside takes {format_bytes(alone - readings.host.available_bytes)} of the RAM" if beside else ""
        raise PlanError(
            f"{f'{why_not}; ' if why_not else ''}{failure} (--ram and --vram change the machine of the plan{taken})"
        ) from failure
    if UNIFIED in decided.reasons:
        said = why_not or UNIFIED
        reasons = tuple(said if text == UNIFIED else text for text in decided.reasons)
        decided = replace(decided, reasons=reasons, remarks=(said, *decided.remarks))
    data = _data(checkpoint, decided)
    data |= {"card": card.spec.name, "vram_bytes": card.memory.total_bytes, "tokens": tokens}
    data |= {"link_assumed": card.assumed}
    data |= {"beside_bytes": sum(model.nbytes for model in beside)}
    data |= {"beside_host_bytes": alone - readings.host.available_bytes}
    return Result(data, _text(options, checkpoint, decided, readings, card), succeeded=decided.fits is not False)


def checkpoint_of(options: Namespace) -> CheckpointProfile:
    """The model of the options, with its modules and LoRAs."""
    modules, loras = map(Path, options.module), map(Path, options.lora)
    return read_checkpoint(Path(options.model), modules=[*modules], loras=[*loras])


def with_beside(
    beside: Sequence[ModelProfile], settings: SwapSettings, readings: Readings, known: Known
) -> tuple[Readings, int]:
    """The machine with these models in the host too, and the bytes that their own plans page-lock."""
    locked = 0
    for model in beside:
        readings = once_loaded(model, readings)
        decided = make_plan(model, inputs_of(model, settings, readings, replace(known, compute_ms=None), locked))
        locked += decided.pinned_bytes
        readings = _less(readings, decided.added_bytes)
    return readings, locked


def once_loaded(model: ModelProfile, readings: Readings) -> Readings:
    """The machine when the loader has copied into memory what it does not leave in the model's file.

    Raises:
        PlanError: There is not enough memory for that.
    """
    if model.anonymous_bytes > readings.host.available_bytes:
        raise PlanError(
            f"not enough RAM: {format_bytes(model.anonymous_bytes)} needed for weights that the loader copies into "
            f"memory, {format_bytes(readings.host.available_bytes)} available; close other "
            "programs, or take a smaller or quantised model"
        )
    return _less(readings, model.anonymous_bytes)


def _less(readings: Readings, nbytes: int) -> Readings:
    return replace(readings, host=replace(readings.host, available_bytes=readings.host.available_bytes - nbytes))


def inputs_of(
    model: ModelProfile, settings: SwapSettings, readings: Readings, known: Known, locked_bytes: int
) -> PlanInputs:
    """Inputs of a plan for a machine of which other models page-lock so many bytes."""
    inputs = plan_inputs(model, settings, readings)
    return replace(
        inputs,
        pin_budget_bytes=max(0, inputs.pin_budget_bytes - locked_bytes),
        activations=known.activations,
        timing=replace(inputs.timing, compute_ms=known.compute_ms),
    )


def _tokens(options: Namespace, architecture: WanArchitecture) -> int | None:
    """Tokens of a forward: those of the whole video, or of one context window."""
    if options.shape is None:
        if options.context_window is not None:
            raise SettingsError("--context-window: the size of the video is unknown; give it with --shape")
        return None
    return tokens_of(architecture, parse_shape(options.shape), options.context_window)


def tokens_of(architecture: WanArchitecture, shape: tuple[int, int, int], window: int | None) -> int:
    """Tokens of a forward for a video of this width, height and number of frames, or for one window of it.

    Args:
        architecture: The model's sizes.
        shape: Width, height, frames.
        window: Frames of a context window; None for the whole video.

    Raises:
        SettingsError: The model cannot have this size or window.
    """
    width, height, frames = shape
    tokens = tokens_for(architecture, width, height, frames)
    if window is None:
        return tokens
    try:
        return min(tokens, tokens_for(architecture, width, height, window))
    except SettingsError as cause:
        raise SettingsError(str(cause).replace("frames:", "--context-window:")) from cause


def settings_of(options: Namespace, architecture: WanArchitecture, card: Card) -> SwapSettings:
    """The settings that the options ask for.

    Raises:
        SettingsError: The model has fewer blocks than are to be swapped.
    """
    settings = SwapSettings(vram_threshold_percent=options.vram_threshold_percent)
    count = parse_count(options.blocks_to_swap, architecture.blocks)
    if count is None or card.is_unsupported:
        return settings
    vace = {"half": architecture.vace_blocks // 2, "all": architecture.vace_blocks}.get(options.blocks_to_swap, 0)
    return replace(settings, auto_hardware_tuning=False, blocks_to_swap=count, vace_blocks_to_swap=vace)


def _card(options: Namespace) -> Card:
    """The card that the options name, else this machine's."""
    link = None if options.link is None else LinkSpeed(((1, options.link * 1e9),), None)
    if options.gpu is not None or options.vram is not None:
        return named_card(options.gpu, vram=options.vram, ram=options.ram, link=link)
    device = choose_device("auto")
    memory = read_device_memory(device)
    if memory is None:
        raise SettingsError("no GPU in this machine: give one with --vram 12GB or --gpu 'RTX 4090'")
    spec, rates = probe_device(device), None
    with contextlib.suppress(ValueError):  # of an unknown GPU, memory and link are known and only durations are not
        rates = find_gpu(spec.name, total_bytes=spec.total_bytes)
    return Card(spec, memory, link or measure_link(device, cache_dir=cache_dir()), rates)


def named_card(gpu: str | None, *, vram: str | None, ram: str | None, link: LinkSpeed | None) -> Card:
    """A card by its name, its memory or both, with nothing in use; without `link`, its own interface gives one.

    Raises:
        SettingsError: No card has this name, and its memory is not given.
    """
    size = None if vram is None else parse_size("--vram", vram)
    try:
        known = None if gpu is None else find_gpu(gpu, total_bytes=size)
    except ValueError as cause:
        if size is None:
            message = f"--gpu: {cause}; for a GPU that is not known, give its memory, such as --vram 16GB"
            raise SettingsError(message) from cause
        known = None
    name = gpu or "a GPU" if known is None or size is not None else known.name
    if size is None and known is not None:
        shared = read_host_memory().physical_bytes if ram is None else parse_size("--ram", ram)
        size = known.total_bytes or shared
    assert size is not None, "without --vram the GPU is known"
    assumed = None
    if link is None and known is not None and known.link_bytes_per_second is not None:
        link = LinkSpeed(((1, known.link_bytes_per_second),), None)
        assumed = f"assumed: {known.pcie}, {format_speed(known.link_bytes_per_second)}; --link changes it"
    spec = DeviceSpec(
        name,
        vendor_of(name) if known is None else known.vendor,
        torch_device="",
        is_integrated=known is not None and known.why_not_swapped is not None,
        total_bytes=size,
    )
    return Card(spec, DeviceMemory(size, size, _GIVEN), link, known, assumed)


def host_of(ram: str | None, available_ram: str | None, card: Card) -> HostMemory:
    """This machine's host, or one with this much memory, all of it available unless that is given too.

    Of a named GPU that shares the host's memory, the host has what the GPU has.
    """
    host = read_host_memory()
    is_shared = card.memory.source == _GIVEN and card.rates is not None and card.rates.shares_memory
    if ram is not None or is_shared:
        size = card.memory.total_bytes if ram is None else parse_size("--ram", ram)
        host = replace(host, physical_bytes=size, available_bytes=size, cgroup_limit_bytes=None)
    if available_ram is None:
        return host
    available, most = parse_size("--available-ram", available_ram), host.cgroup_limit_bytes or host.physical_bytes
    if available > most:
        figures = f"expected at most the {format_bytes(most)} of RAM, got {format_bytes(available)}"
        raise SettingsError(f"--available-ram: {figures}; give more with --ram")
    return replace(host, available_bytes=available)


@dataclass(frozen=True, slots=True)
class Known:
    """What is computed of a forward before any has run; None is unknown."""

    compute_ms: tuple[float, ...] | None = None
    activations: Activations | None = None


def readings_of(model: ModelProfile, card: Card, host: HostMemory) -> Readings:
    """The machine when the model's other weights are on the card."""
    free = card.memory.free_bytes - model.other_bytes
    if free < 0:
        figures = f"{format_bytes(model.other_bytes)} needed, {format_bytes(card.memory.free_bytes)} free"
        message = f"not enough VRAM for the weights outside the blocks: {figures}"
        raise SettingsError(f"{message}; take a larger GPU (--vram) or a smaller model")
    return Readings(spec=card.spec, memory=replace(card.memory, free_bytes=free), host=host, link=card.link)


def known_of(checkpoint: CheckpointProfile, card: Card, tokens: int | None) -> Known:
    """Compute time and activations of a forward of so many tokens."""
    model, architecture = checkpoint.model, checkpoint.architecture
    if tokens is None:
        return Known()
    activations = Activations(
        nbytes=activation_bytes(architecture, tokens, checkpoint.forward_options), is_measured=False
    )
    if card.rates is None or card.link is None:  # times are predicted together or not at all
        return Known(activations=activations)
    linear, attention = block_flops(architecture, tokens)
    block_ms = card.rates.compute_ms(linear, attention)
    return Known(None if block_ms is None else _durations(model, block_ms), activations)


def _durations(model: ModelProfile, block_ms: float) -> tuple[float, ...]:
    """The duration of each block: of modules beside the blocks, a block's in proportion to their bytes."""
    whole = max(block.nbytes for block in model.blocks if not is_beside(block.name))
    return tuple(
        block_ms * min(1.0, block.nbytes / whole) if is_beside(block.name) else block_ms for block in model.blocks
    )


def _data(checkpoint: CheckpointProfile, decided: SwapPlan) -> dict[str, object]:
    model, forward = checkpoint.model, decided.predicted
    return {
        "family": checkpoint.family,
        "blocks": len(model.blocks),
        "blocks_to_swap": decided.swapped_count,
        "swapped": list(decided.swapped_indices),
        "slots": decided.slots,
        "slot_bytes": decided.slot_bytes,
        "own_slots": list(decided.own_slots),
        "resident_bytes": decided.resident_bytes,
        "window_bytes": decided.window_bytes,
        "device_bytes": decided.device_bytes,
        "budget_bytes": decided.budget_bytes,
        "block_bytes": model.block_bytes,
        "other_bytes": model.other_bytes,
        "slab_bytes": decided.slab_bytes,
        "staging_bytes": decided.staging_bytes,
        "pinned_bytes": decided.pinned_bytes,
        "host_bytes": model.anonymous_bytes + decided.added_bytes,
        "added_bytes": decided.added_bytes,
        "anonymous_bytes": _unlocked_bytes(model, decided),
        "file_bytes": decided.file_bytes,
        "host_tiers": sorted({tier.value for tier in decided.tiers if tier is not None}),
        "streams": decided.streams,
        "streamed_bytes_per_forward": decided.streamed_bytes,
        "predicted_compute_ms": None if forward is None else forward.compute,
        "predicted_transfer_ms": None if forward is None else forward.transferred,
        "predicted_stall_ms": decided.stall_ms,
        "activation_bytes": decided.activation_bytes,
        "fits": decided.fits,
        "over_ceiling": decided.over_ceiling,
        "dtypes": dict(checkpoint.dtypes),
        "reasons": list(decided.reasons),
    }


def _unlocked_bytes(model: ModelProfile, decided: SwapPlan) -> int:
    """Host memory for the blocks that the system cannot drop and that is not page-locked."""
    return max(0, model.anonymous_bytes + decided.added_bytes - decided.pinned_bytes)


def bound_of(decided: SwapPlan) -> str | None:
    """What decides how long a forward takes; None if that is unknown."""
    forward = decided.predicted
    if forward is None:
        return None
    if forward.stall <= BOUND_BY_COPIES * forward.elapsed:
        return "computation"
    return "disk" if decided.file_bytes else "link"


def _answer(model: ModelProfile, decided: SwapPlan, left: int) -> str:
    """The result in one sentence or three."""
    if decided.fits is False:
        return (
            f"It does not fit: {format_bytes(max(0, -left))} of VRAM are missing; take fewer frames, or a smaller size."
        )
    forward, vram = decided.predicted, model.other_bytes + decided.device_bytes
    known = decided.activation_bytes is not None
    does = "It fits" if known else "The weights fit"
    if known and left < 0:
        does = f"It fits only with {format_bytes(-left)} of the reserve"
    used = f"VRAM {format_bytes(vram + (decided.activation_bytes or 0))}{'' if known else ' without the computation'}"
    ram = format_bytes(model.anonymous_bytes + decided.added_bytes)
    text = f"{does}: {blocks_in_words(decided)}. {used}, RAM {ram}."
    if forward is None:
        return text
    bound = {"computation": "the GPU's computation", "link": "the copies", "disk": "the disk"}[bound_of(decided) or ""]
    return (
        f"{text} A pass of the model takes {forward.elapsed / 1e3:.1f} s, bound by {bound}; a step with CFG takes two."
    )


def _text(options: Namespace, checkpoint: CheckpointProfile, decided: SwapPlan, readings: Readings, card: Card) -> str:
    model, activations = checkpoint.model, decided.activation_bytes
    reserve = int(SAFETY_RESERVE * card.memory.total_bytes)
    idle = decided.limit_bytes - decided.device_bytes - (activations or 0) - reserve
    limit = f"{format_bytes(decided.budget_bytes)}; --vram-threshold-percent {options.vram_threshold_percent:g}"
    rows = [
        ("model", f"{checkpoint.family}, {format_bytes(model.block_bytes)} of blocks"),
        ("card", f"{card.spec.name}, {format_bytes(card.memory.total_bytes)}"),
        ("  other use", format_bytes(card.memory.total_bytes - readings.memory.free_bytes)),
        ("  blocks on the GPU", format_bytes(decided.resident_bytes)),
        ("  streaming", format_bytes(decided.window_bytes)),
        ("  computation", "unknown: give --shape" if activations is None else f"{format_bytes(activations)} expected"),
        ("  reserve", format_bytes(reserve)),
        ("  free" if idle >= 0 else "  missing", format_bytes(abs(idle))),
        ("limit for the blocks", limit),
        ("locked RAM", format_bytes(decided.pinned_bytes)),
        ("other RAM", format_bytes(_unlocked_bytes(model, decided))),
        ("in each pass of the model", f"{format_bytes(decided.streamed_bytes)} copied to the GPU"),
    ]
    if decided.file_bytes:
        rows.append(("", f"{format_bytes(decided.file_bytes)} of that read from the model's file"))
    rows += [("link", card.assumed)] if card.assumed is not None else []
    if readings.disk is ASSUMED_DISK:
        rows.append(("disk", "assumed: NVMe, 3.5 GB/s; --disk changes it"))
    forward = decided.predicted
    if forward is None:
        wanted = [("--gpu", card.rates), ("--link", card.link), ("--shape", options.shape)]
        missing = " and ".join(name for name, known in wanted if known is None)
        why = f"give {missing}" if missing else "the speed of copies in this machine's RAM is unknown"
        if options.gpu is not None and (card.rates is None or card.rates.linear_flops is None):
            why = f"the speed of {card.spec.name} is unknown"
        rows.append(("time of a pass", f"unknown: {why}"))
    else:
        part = "" if options.context_window is None else f"for a context window of {options.context_window} frames "
        at = f"{part}at {options.shape}, with the speed assumed for this GPU"
        rows.append(("computation", f"{forward.compute:,.0f} ms {at}"))
        rows.append(("copies", f"{forward.transferred:,.0f} ms"))
        rows.append(("waiting", expected_waits(decided, forward) or "nothing is copied"))
    details = plan_details(decided) if options.verbose else ()
    remarks = (f"- {text}" for text in decided.remarks)
    return "\n".join([_answer(model, decided, idle), "", pairs(rows), "", *remarks, *details]).rstrip()
