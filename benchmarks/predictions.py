"""Compares a plan's predictions with measurements: weights on the device, and the time of a step.

    python -m benchmarks.predictions [--device cuda] [--preset 14b] [--shapes …] [--counts …] [--json] [--markdown FILE]

A real Wan transformer denoises at each shape, first whole (which gives each block's duration), then with each number
of swapped blocks. On a CUDA or HIP device torch's allocator counts the memory and the wall clock measures the time.
Without one the device is simulated: it counts the memory, the time is virtual, and the link is assumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Timing
from wanvideo_enhanced_blockswap.commands.demo import FORWARDS_PER_STEP, DeviceStage, Run, Stage
from wanvideo_enhanced_blockswap.commands.options import cache_dir, card_inputs, choose_device, parse_count, parse_shape
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, build, make_inputs
from wanvideo_enhanced_blockswap.hardware import measure_link, read_host_memory
from wanvideo_enhanced_blockswap.hardware.pinning import PinBudget

from .compare.cells import preset_of
from .machine import origin

SHAPES = ("128x128x5", "128x128x9", "192x192x9")
COUNTS = ("quarter", "half", "three quarters", "all")
SIMULATED_RATIO = 2.0
"""Transfer over compute of a block at the smallest shape on the simulated device: transfer takes longer there, compute
at the largest shape."""
NO_LIMIT = 1 << 50
"""Memory of a card that holds everything, because the numbers of blocks are given."""
LIMITS = {"wall": (0.02, 0.10), "virtual": (0.01, 0.01)}
"""Shares by which weights and step time may differ, for each clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One shape and one number of swapped blocks."""

    shape: str
    blocks_swapped: int
    slots: int
    predicted_weight_bytes: int
    measured_weight_bytes: int
    predicted_step_ms: float
    measured_step_ms: float
    predicted_stall_ms: float
    measured_stall_ms: float

    @property
    def weights_off(self) -> float:
        """Measured over predicted, minus 1."""
        return self.measured_weight_bytes / self.predicted_weight_bytes - 1

    @property
    def step_off(self) -> float:
        """Measured over predicted, minus 1."""
        return self.measured_step_ms / self.predicted_step_ms - 1


def measure(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """All rows, shape by shape."""
    preset, shapes, counts = (
        preset_of(options.preset, options.blocks),
        options.shapes.split(","),
        options.counts.split(","),
    )
    rows: list[Row] = []
    model = build(preset, seed=0)
    link: Timing | None = None
    for shape in shapes:
        inputs = make_inputs(preset, parse_shape(shape), device, seed=0)
        make_stage = Stage if device.type == "cpu" else DeviceStage
        stage = make_stage(model, inputs, device, steps=options.steps, quiet=True)
        unswapped, compute_ms = stage.run_unswapped()
        link = link or _link(device, compute_ms, stage.profile.blocks[0].slab_bytes)
        timing = replace(link, compute_ms=compute_ms)
        asked = [_count(count, preset.layers) for count in counts]
        progress = tqdm(asked, desc=shape, unit="run", disable=options.json or None)
        rows += [_row(shape, count, stage, timing, unswapped) for count in progress]
    return rows


def _row(shape: str, asked: int, stage: Stage, timing: Timing, unswapped: Run) -> Row:
    """The plan for `asked` blocks, and the run that follows it."""
    host, profile = read_host_memory(), stage.profile
    inputs = card_inputs(profile, NO_LIMIT, host)
    plan = make_plan(profile, replace(inputs, blocks_to_swap=asked, timing=timing))
    assert plan.predicted is not None
    assert timing.compute_ms is not None
    run = stage.run_swapped(plan, timing, PinBudget(host.pin_budget_bytes))
    if not torch.equal(run.latents, unswapped.latents):
        raise SystemExit(f"the outputs differ at {shape} with {asked} blocks swapped")
    outside_ms = statistics.median(unswapped.step_ms) - FORWARDS_PER_STEP * sum(timing.compute_ms)
    return Row(
        shape=shape,
        blocks_swapped=plan.swapped_count,
        slots=plan.slots,
        predicted_weight_bytes=plan.device_bytes,
        measured_weight_bytes=run.weight_bytes - unswapped.above_weights_bytes,
        predicted_step_ms=FORWARDS_PER_STEP * plan.predicted.elapsed + outside_ms,
        measured_step_ms=statistics.median(run.step_ms[1:]),
        predicted_stall_ms=FORWARDS_PER_STEP * plan.predicted.stall,
        measured_stall_ms=statistics.median(run.stall_ms[1:]),
    )


def _link(device: torch.device, compute_ms: tuple[float, ...], block_bytes: int) -> Timing:
    """The measured link; on the simulated device, the link that gives `SIMULATED_RATIO`."""
    if device.type == "cpu":
        speed = block_bytes / (SIMULATED_RATIO * statistics.mean(compute_ms) / 1e3)
        return Timing(pinned_bytes_per_s=speed)
    measured = measure_link(device, cache_dir=cache_dir())
    streams, speed = measured.best()
    return Timing(pinned_bytes_per_s=speed, pageable_bytes_per_s=measured.pageable, streams=streams)


def _count(text: str, blocks: int) -> int:
    named = {"quarter": blocks // 4, "three quarters": blocks * 3 // 4}
    count = named[text] if text in named else parse_count(text, blocks)
    assert count is not None
    return count


def markdown(rows: Sequence[Row]) -> str:
    """A table for a document."""
    lines = [
        "| shape | swapped | slots | weights predicted | measured | off | step predicted | measured | off | stall "
        "predicted | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.shape} | {row.blocks_swapped} | {row.slots} | {row.predicted_weight_bytes:,} | "
        f"{row.measured_weight_bytes:,} | {row.weights_off:+.2%} | {row.predicted_step_ms:,.1f} ms | "
        f"{row.measured_step_ms:,.1f} ms | {row.step_off:+.2%} | {row.predicted_stall_ms:,.1f} ms | "
        f"{row.measured_stall_ms:,.1f} ms |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every prediction is within its limit."""
    parser = argparse.ArgumentParser(prog="benchmarks.predictions", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu (simulated), cuda or cuda:N")
    parser.add_argument("--preset", default="small", choices=tuple(PRESETS))
    parser.add_argument("--blocks", type=int, help="number of blocks of the preset's size (default: as many as it has)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="WxHxF, separated by commas")
    parser.add_argument(
        "--counts", default=",".join(COUNTS), help="numbers, quarter, half, three quarters, all, separated by commas"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    if options.blocks is not None and options.blocks < 2:
        parser.error(f"--blocks: expected 2 or more, so that half can be swapped, got {options.blocks}")
    try:
        device = choose_device(options.device)
        for shape in options.shapes.split(","):
            parse_shape(shape)
        for count in options.counts.split(","):
            _count(count, preset_of(options.preset, options.blocks).layers)
    except SettingsError as cause:
        parser.error(str(cause).replace("--blocks-to-swap", "--counts").replace("--shape:", "--shapes:"))
    rows = measure(options, device)
    weights, step = LIMITS["virtual" if device.type == "cpu" else "wall"]
    broken = sum(abs(row.weights_off) > weights or abs(row.step_off) > step for row in rows)
    command = " ".join(["python -m benchmarks.predictions", *words])
    heading = f"`{command}`, preset {options.preset}: {origin(device)}"
    worst = max(abs(row.weights_off) for row in rows), max(abs(row.step_off) for row in rows)
    said = f"Worst: weights {worst[0]:.2%} (limit {weights:.0%}), step {worst[1]:.2%} (limit {step:.0%})."
    text = f"{heading}\n\n{markdown(rows)}\n{said}\n"
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    print(
        json.dumps({"heading": heading, "rows": [asdict(row) for row in rows], "broken": broken})
        if options.json
        else text
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
