"""What is compared: engines, numbers of swapped blocks, shapes; and what is said of each."""

from __future__ import annotations

from dataclasses import dataclass

from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.commands.options import parse_count
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, Preset

RESIDENT = "resident"

SHAPES = ("64x64x1", "96x96x5", "128x128x9")
"""From a video in which a copy of the small model's block takes longer than its compute to one where it takes less."""

REFERENCE, EQUAL, FIRST = "reference", "equal", "first to finish"
"""Outputs: the resident model's; the same; that of the engine the others are held against, since resident has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process: one engine, one number of swapped blocks, all shapes.

    Attributes:
        engine: Its name.
        swapped: Number of swapped blocks.
        model: Name of the preset.
        dtype: Of the weights and the latents.
        shapes: As WxHxF.
        device: Name of the device; `cpu` is simulated.
        streams: Copy streams of our engine.
        steps: Steps that count.
        warmup: Steps before these.
        folder: Where outputs are kept to be compared, and what is found is written.
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

    @property
    def preset(self) -> Preset:
        """The model's dimensions."""
        return PRESETS[self.model]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine at one shape. Figures are None where it did not run, or where the device does not tell.

    Attributes:
        engine: Its name.
        shape: WxHxF.
        swapped: Number of swapped blocks.
        reason: Why there are no figures; empty if there are.
        clock: Of `step_ms`: `events` of the device, `wall`, or `virtual`.
        step_ms: Median step, the host free to run ahead.
        wall_ms: Median step by the host's clock, the host waiting at each end.
        bound_ms: The longer of the resident model's step and of the link time of the swapped blocks' bytes.
        peak_bytes: Device memory allocated at most.
        reserved_bytes: Device memory that torch's allocator held at most.
        driver_bytes: Device memory in use by the driver's account, less what was before the model was built.
        weights_bytes: `peak_bytes` less what the resident model's step takes above its weights.
        host_bytes: By how much the host's available memory had shrunk.
        pinned_bytes: Host memory that was page-locked.
        to_device_bytes: Copied to the device in one step.
        to_host_bytes: Copied back in one step.
        output: `equal` to the resident model's latents, or how far from them at most.
        versions: Of the packages that make the engine.
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
        SettingsError: One is no such number.
    """
    counts = {parse_count(part.strip(), blocks) for part in text.split(",")}
    if 0 in counts:
        raise SettingsError(f"--swap expects numbers of blocks from 1 to {blocks} but got 0: {RESIDENT} swaps none")
    return tuple(sorted(count for count in counts if count))
