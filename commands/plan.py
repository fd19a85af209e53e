"""`plan`: from a checkpoint file's header alone, what would be swapped on this or that GPU."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from ..blockswap.architecture import block_flops, tokens_for
from ..blockswap.checkpoint import CheckpointProfile, read_checkpoint
from ..blockswap.decision import PlanRequest, SwapPlan, Timing
from ..blockswap.errors import PlanError, SettingsError
from ..blockswap.plan import plan_swap
from ..hardware import (
    KnownGpu,
    find_gpu,
    format_bytes,
    parse_bytes,
    probe_device,
    read_device_memory,
    read_host_memory,
)
from .demo_report import window_text
from .device import choose_device
from .memory import card_budget
from .result import Result, table


def plan(options: Namespace) -> Result:
    """Reads the header, plans, predicts.

    Raises:
        CheckpointError: The file is truncated, unreadable or not a Wan model.
        SettingsError: An option has a value that cannot be meant.
        PlanError: No plan fits.
    """
    checkpoint = read_checkpoint(Path(options.model))
    gpu = _gpu(options.gpu)
    total_bytes, card = _card(options.vram, gpu)
    host = read_host_memory()
    if options.ram is not None:
        ram_bytes = parse_size("--ram", options.ram)
        host = replace(host, physical_bytes=ram_bytes, available_bytes=ram_bytes, cgroup_limit_bytes=None)
    budget = card_budget(checkpoint.model, total_bytes, host, vram_threshold_percent=options.vram_threshold_percent)
    tokens = tokens_for(checkpoint.architecture, *parse_shape(options.shape))
    request = PlanRequest(
        blocks_to_swap=parse_count(options.blocks_to_swap, checkpoint.architecture.blocks),
        vace_blocks_to_swap=checkpoint.architecture.vace_blocks if options.blocks_to_swap == "all" else 0,
        timing=_timing(checkpoint, gpu, tokens, options.link),
    )
    try:
        decided = plan_swap(checkpoint.model, budget, request)
    except PlanError as failure:
        raise PlanError(f"{failure} (--ram and --vram plan for another machine)") from failure
    data = _data(checkpoint, decided) | {"card": card, "vram_bytes": total_bytes, "tokens": tokens}
    return Result(data, _text(options, checkpoint, decided, card, total_bytes))


def parse_size(option: str, text: str) -> int:
    """Bytes, from `12GiB`, `8 GB` and the like."""
    try:
        return parse_bytes(text)
    except ValueError as cause:
        raise SettingsError(f"{option}: {cause}") from cause


def _gpu(name: str | None) -> KnownGpu | None:
    try:
        return None if name is None else find_gpu(name)
    except ValueError as cause:
        raise SettingsError(f"--gpu: {cause}") from cause


def _card(vram: str | None, gpu: KnownGpu | None) -> tuple[int, str]:
    """Memory and name of the card planned for: the one asked for, else the one that is here."""
    if vram is not None:
        return parse_size("--vram", vram), gpu.name if gpu else "a GPU"
    if gpu is not None:
        return gpu.total_bytes, gpu.name
    device = choose_device("auto")
    memory = read_device_memory(device)
    if memory is None:
        raise SettingsError("there is no GPU here to plan for: say --vram 12GiB, or --gpu 'RTX 4090'")
    return memory.total_bytes, probe_device(device).name


def parse_count(asked: str | None, blocks: int) -> int | None:
    """A number of blocks: 0 to `blocks`, `half` or `all`; None, which leaves it to the plan, stays None."""
    if asked is None:
        return None
    named = {"half": blocks // 2, "all": blocks}
    if asked in named:
        return named[asked]
    rule = f"--blocks-to-swap expects a whole number from 0 to {blocks}, the number of blocks, or half or all,"
    try:
        count = int(asked)
    except ValueError:
        raise SettingsError(f"{rule} but got {asked!r}") from None
    if not 0 <= count <= blocks:
        raise SettingsError(f"{rule} but got {count}")
    return count


def parse_shape(shape: str) -> tuple[int, int, int]:
    """Width, height and frames, from `832x480x81`."""
    try:
        width, height, frames = (int(part) for part in shape.lower().split("x"))
    except ValueError:
        raise SettingsError(f"--shape expects WxHxF such as 832x480x81 but got {shape!r}") from None
    return width, height, frames


def _timing(checkpoint: CheckpointProfile, gpu: KnownGpu | None, tokens: int, link: float | None) -> Timing:
    """Durations and speeds; unknown without both a GPU and a link (in GB/s)."""
    if gpu is None or link is None:
        return Timing()
    linear, attention = block_flops(checkpoint.architecture, tokens)
    block_ms = (linear / gpu.linear_flops + attention / gpu.attention_flops) * 1e3
    return Timing(compute_ms=(block_ms,) * len(checkpoint.model.blocks), pinned_bytes_per_s=link * 1e9)


def _data(checkpoint: CheckpointProfile, decided: SwapPlan) -> dict[str, object]:
    model, forward = checkpoint.model, decided.forward
    return {
        "blocks": len(model.blocks),
        "blocks_swapped": decided.swapped_count,
        "swapped": list(decided.swapped_indices),
        "slots": decided.slots,
        "slot_bytes": decided.slot_bytes,
        "block_bytes": model.block_bytes,
        "other_bytes": model.other_bytes,
        "planned_weight_bytes": decided.device_bytes,
        "slab_bytes": decided.slab_bytes,
        "host_bytes": model.block_bytes + decided.staging_bytes,
        "pinned_bytes": decided.pinned_bytes,
        "host_tiers": sorted({tier.value for tier in decided.tiers if tier is not None}),
        "streamed_bytes_per_forward": decided.streamed_bytes,
        "compute_ms_per_forward": None if forward is None else forward.compute,
        "transfer_ms_per_forward": None if forward is None else forward.transferred,
        "stall_ms_per_forward": decided.stall_ms,
        "over_ceiling": decided.over_ceiling,
        "dtypes": dict(checkpoint.dtypes),
        "reasons": list(decided.reasons),
    }


def _text(options: Namespace, checkpoint: CheckpointProfile, decided: SwapPlan, card: str, total_bytes: int) -> str:
    model = checkpoint.model
    rows = [
        ["card", f"{card}, {format_bytes(total_bytes)}"],
        ["blocks", f"{len(model.blocks)}, {format_bytes(model.block_bytes)}"],
        ["outside the blocks", format_bytes(model.other_bytes)],
        ["swapped", f"{decided.swapped_count}, {window_text(decided)}"],
        ["block weights on the device", format_bytes(decided.device_bytes)],
        ["host memory for the blocks", format_bytes(model.block_bytes + decided.staging_bytes)],
        ["page-locked part of it", format_bytes(decided.pinned_bytes)],
        ["copied per forward", format_bytes(decided.streamed_bytes)],
    ]
    forward = decided.forward
    if forward is None:
        missing = " and ".join(
            name for name, given in (("--gpu", options.gpu), ("--link", options.link)) if given is None
        )
        rows.append(["stall per forward", f"unknown: give {missing}"])
    else:
        at = f"at {options.shape}, with the rates assumed for this GPU"
        rows.append(["compute per forward", f"{forward.compute:,.0f} ms {at}"])
        rows.append(["transfer per forward", f"{forward.transferred:,.0f} ms"])
        rows.append(["stall per forward", f"{forward.stall:,.0f} ms"])
    return "\n".join([table([[a, b] for a, b in rows]), "", *(f"- {reason}" for reason in decided.reasons)])
