"""What is compared: engines, numbers of swapped blocks, shapes; and the figures of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.commands.options import parse_count
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, Preset

RESIDENT = "resident"

SHAPES = ("64x64x1", "96x96x5", "128x128x9")
"""From a video in which a block of the small model takes longer to copy than to compute to one where it takes less."""

REFERENCE, EQUAL, FIRST = "reference", "equal", "first to finish"
"""Outputs: the resident model's; equal to it; that of the first engine, if the resident model has no output."""


def preset_of(model: str, blocks: int | None) -> Preset:
    """The preset of this name, with `blocks` blocks of its size if a number is given."""
    preset = PRESETS[model]
    return preset if blocks is None else replace(preset, layers=blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process: one engine, one number of swapped blocks, all shapes.

    Attributes:
        engine: Its name.
        swapped: Number of swapped blocks.
        model: Name of the preset.
        blocks: Number of blocks; None for the preset's own.
        dtype: Type of weights and latents.
        shapes: As WxHxF.
        device: Name of the device; `cpu` is simulated.
        streams: Copy streams of our engine.
        steps: Timed steps.
        warmup: Steps before these.
        folder: Where outputs are kept for the comparison, and results are written.
    """

    engine: str
    swapped: int
    model: str
    dtype: str
    shapes: tuple[str, ...]
    device: str
    streams: int
    steps: int
    warmup: int
    folder: str
    blocks: int | None = None

    @property
    def preset(self) -> Preset:
        """The model's dimensions."""
        return preset_of(self.model, self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine at one shape. A figure is None if the engine did not run or the device does not report it.

    Attributes:
        engine: Its name.
        shape: WxHxF.
        swapped: Number of swapped blocks.
        reason: Why there are no figures; empty if there are.
        clock: Clock of `step_ms`: `events` of the device, `wall`, or `virtual`.
        step_ms: Median step while the host may run ahead.
        wall_ms: Median step by the host's clock, where the host waits at the end of each.
        bound_ms: The longer of the resident model's step and the time to copy the swapped blocks over the link.
        peak_bytes: Most device memory allocated.
        reserved_bytes: Most device memory held by torch's allocator.
        driver_bytes: Device memory by the driver's count, minus what was in use before the model was built.
        weights_bytes: `peak_bytes` minus what the resident model's step takes above its weights.
        host_bytes: Decrease of the host's available memory.
        pinned_bytes: Page-locked host memory.
        to_device_bytes: Copied to the device in one step.
        to_host_bytes: Copied back in one step.
        output: `equal` to the resident model's latents, or the largest difference.
        versions: Versions of the engine's packages.
    """

    engine: str
    shape: str
    swapped: int
    reason: str = ""
    clock: str = ""
    step_ms: float | None = None
    wall_ms: float | None = None
    bound_ms: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    driver_bytes: int | None = None
    weights_bytes: int | None = None
    held_bytes: int | None = None
    host_bytes: int | None = None
    pinned_bytes: int | None = None
    to_device_bytes: int | None = None
    to_host_bytes: int | None = None
    output: str = ""
    versions: str = ""

    @property
    def over_bound(self) -> float | None:
        """`step_ms` over `bound_ms`."""
        return None if self.step_ms is None or not self.bound_ms else self.step_ms / self.bound_ms


def parse_swaps(text: str, blocks: int) -> tuple[int, ...]:
    """Numbers of swapped blocks, from `half,all` or `10,20`, ascending.

    Raises:
        SettingsError: A number is outside the range.
    """
    counts = {parse_count(part.strip(), blocks) for part in text.split(",")}
    if 0 in counts:
        raise SettingsError(
            f"--swap: expected numbers of blocks from 1 to {blocks}, got 0; the engine {RESIDENT} swaps none"
        )
    return tuple(sorted(count for count in counts if count))
