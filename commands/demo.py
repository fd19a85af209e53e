"""`demo`: a real Wan transformer denoises, first unswapped, then swapped; outputs, bytes and times are compared."""

from __future__ import annotations

import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch

from ..blockswap.errors import SettingsError
from ..blockswap.model.layout import ModelProfile
from ..blockswap.model.profile import profile_model
from ..blockswap.model.wan import tokens_for
from ..blockswap.plan.make_plan import make_plan, weight_bytes
from ..blockswap.plan.swap_plan import SwapPlan, Timing
from ..hardware import MIB, format_bytes, measure_link, probe_device, read_device_memory, read_host_memory
from ..hardware.pinning import PinBudget
from .cache import cache_dir
from .demo_report import Demonstration, report
from .device import choose_device
from .memory import card_inputs
from .picture import check_picture, draw_timeline
from .result import Result
from .stage import FORWARDS_PER_STEP, DeviceStage, Run, Stage
from .wan import PRESETS, build, make_inputs, refuse_if_too_large
from .words import parse_count, parse_shape, parse_size

SIMULATED_RATIO = 0.67
"""Transfer over compute time of a block on the simulated device, unless `--link` says otherwise: that of Wan 14B in
bf16 at 832x480, 17 frames, on an RTX 4090 over PCIe 4.0 x16 (28 ms over 42 ms, from assumed rates). A CPU's compute is
too slow for any real link's speed to show a thing."""


def demo(options: Namespace) -> Result:
    """Runs the demo.

    Raises:
        SettingsError: An option has a value that cannot be meant.
        HostMemoryError: The host cannot hold the preset.
        PlanError: No plan fits.
    """
    device, preset, host = choose_device(options.device), PRESETS[options.preset], read_host_memory()
    asked = parse_count(options.blocks_to_swap, preset.layers)
    shape = preset.shape if options.shape is None else parse_shape(options.shape)
    tokens_for(preset.architecture, *shape)  # refuses a shape that is not one
    check_picture(Path(options.picture))
    is_simulated = device.type == "cpu"
    refuse_if_too_large(options.preset, preset, available_bytes=host.available_bytes, is_simulated=is_simulated)
    model = build(preset, seed=options.seed)
    inputs = make_inputs(preset, shape, device, seed=options.seed)
    make_stage = Stage if is_simulated else DeviceStage
    stage = make_stage(model, inputs, device, steps=options.steps, quiet=options.json)
    profile = profile_model(stage.blocks, root=model).profile
    vram_bytes = _vram_bytes(options.vram, profile, device)
    card = card_inputs(profile, vram_bytes, host, held_bytes=profile.block_bytes)
    unswapped, compute_ms = stage.run_unswapped()
    timing = _timing(options, device, compute_ms, profile.blocks[0].slab_bytes)
    # Only CUDA, HIP and the simulated device have streams and page-locking.
    overlaps = device.type in ("cpu", "cuda")
    asks = replace(card, blocks_to_swap=asked, overlap=overlaps, pin=overlaps, slots=options.slots, timing=timing)
    decided = make_plan(profile, asks)
    swapped = stage.run_swapped(decided, timing, PinBudget(host.pin_budget_bytes))
    swapped.weight_bytes -= unswapped.above_weights_bytes
    title = f"{options.preset}: {decided.swapped_count} of {len(decided.swapped)} blocks swapped, the last step"
    draw_timeline(swapped.spans, Path(options.picture), title=title)
    shown = _compare(unswapped, swapped, decided, profile, stage, timing, options.picture)
    title = f"{shown.device}, {format_bytes(vram_bytes)} of memory{'' if options.vram else ' (for this demo; --vram)'}"
    return report(shown, decided, card=title)


def _vram_bytes(asked: str | None, profile: ModelProfile, device: torch.device) -> int:
    """Memory of the card: what was asked for; else so much that half of the blocks fit under the node's threshold."""
    memory = read_device_memory(device)
    there = None if memory is None else memory.total_bytes
    if asked is None:
        half = 2 * (profile.other_bytes + profile.small_device_bytes + MIB) + profile.block_bytes
        return half if there is None else min(half, there)
    size = parse_size("--vram", asked)
    if there is not None and size > there:
        raise SettingsError(
            f"--vram expects at most the {format_bytes(there)} of {device} but got {format_bytes(size)}"
        )
    return size


def _timing(options: Namespace, device: torch.device, compute_ms: tuple[float, ...], block_bytes: int) -> Timing:
    """Speeds that the plan is predicted from: measured where there is a device, assumed where it is simulated."""
    if device.type == "cpu":
        speed = block_bytes / (SIMULATED_RATIO * statistics.mean(compute_ms) / 1e3)
        speed = speed if options.link is None else options.link * 1e9
        return Timing(compute_ms=compute_ms, pinned_bytes_per_s=speed, streams=options.streams or 1)
    link = measure_link(device, cache_dir=cache_dir())
    if not link.pinned:
        return Timing(compute_ms=compute_ms, pageable_bytes_per_s=link.pageable)
    best, speed = link.best()
    return Timing(
        compute_ms=compute_ms,
        pinned_bytes_per_s=speed,
        pageable_bytes_per_s=link.pageable,
        streams=options.streams or best,
    )


def _compare(
    unswapped: Run, swapped: Run, decided: SwapPlan, profile: ModelProfile, stage: Stage, timing: Timing, picture: str
) -> Demonstration:
    return Demonstration(
        outputs_equal=torch.equal(unswapped.latents, swapped.latents),
        weights_d2h_bytes=swapped.moved.to_host - unswapped.moved.to_host,
        h2d_bytes=swapped.moved.to_device - unswapped.moved.to_device,
        planned_weight_bytes=decided.device_bytes,
        peak_weight_bytes=swapped.weight_bytes,
        unswapped_weight_bytes=weight_bytes(profile, (False,) * len(profile.blocks), 0),
        swapped_bytes=sum(profile.blocks[i].streamed_bytes for i in decided.swapped_indices),
        slab_bytes=swapped.slab_bytes,
        pinned_bytes=swapped.pinned_bytes,
        blocks=len(decided.swapped),
        blocks_swapped=decided.swapped_count,
        slots=decided.slots,
        stall_ms_per_forward=statistics.median(swapped.stall_ms) / FORWARDS_PER_STEP,
        planned_stall_ms_per_forward=decided.stall_ms,
        step_ms=statistics.median(swapped.step_ms),
        unswapped_step_ms=statistics.median(unswapped.step_ms),
        clock=stage.clock,
        device="simulated" if stage.clock == "virtual" else probe_device(stage.device).name,
        measured_by=stage.measured_by,
        picture=picture,
        link_bytes_per_s=timing.pinned_bytes_per_s or timing.pageable_bytes_per_s,
    )
