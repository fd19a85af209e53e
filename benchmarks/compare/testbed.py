"""Where an engine is measured, the figures, and the steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.commands.demo import Moved
from wanvideo_enhanced_blockswap.commands.wan_model import Inputs

from .engine import Engine

Shape = tuple[int, int, int]
"""Width, height and frames of a video."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """Figures of the steps of one engine at one shape; None if unknown.

    Attributes:
        latents: Result of the steps, on the host.
        step_ms: Median duration of a step by the device's clock, while the host may run ahead.
        wall_ms: Median duration of a step by the host's clock, where the host waits at the end of each.
        held_bytes: Device memory allocated before the steps.
        peak_bytes: Most device memory allocated during the steps.
        reserved_bytes: Most device memory held by torch's allocator during the steps.
        driver_bytes: Device memory by the driver's count, minus what was in use before the model was built.
        host_bytes: Decrease of the host's available memory.
        pinned_bytes: Page-locked host memory.
        moved: Bytes copied in one step.
    """

    latents: torch.Tensor
    step_ms: float
    wall_ms: float | None = None
    held_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int | None = None
    driver_bytes: int | None = None
    host_bytes: int | None = None
    pinned_bytes: int = 0
    moved: Moved | None = field(default_factory=Moved)


class Testbed(Protocol):
    """One device, for engines and their measurement."""

    device: torch.device
    clock: str
    """Clock of `step_ms`: the device's `events`, the host's clock (`wall`), or `virtual`."""

    def backend(self, *, overlap: bool) -> Backend:
        """The backend of a session of ours, with or without copy streams."""

    def place(self, module: nn.Module) -> None:
        """Moves a module to the device, as `module.to(device)` does."""

    def bring_back(self, module: nn.Module) -> None:
        """Moves a module to ordinary host memory, as `module.to("cpu")` does."""

    def time_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Adds the compute time of blocks that no session of ours runs."""

    def measure(self, engine: Engine, model: nn.Module, shape: Shape, inputs: Inputs, *, steps: int) -> Figures:
        """Runs `steps` steps after some that warm up."""


def denoise(
    model: nn.Module,
    inputs: Inputs,
    *,
    steps: int,
    forward: Callable[[], contextlib.AbstractContextManager[object]],
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> torch.Tensor:
    """Latents after `steps` Euler steps of one forward each.

    Args:
        model: The transformer.
        inputs: Latents to start from, and texts, of which the positive one is used.
        steps: Number of steps.
        forward: Context of each forward.
        around: Context of each step.
    """
    latents = inputs.latents
    with torch.inference_mode():
        for sigma, following in itertools.pairwise(1.0 - i / steps for i in range(steps + 1)):
            with around():
                noise = torch.full((1,), 1000.0 * sigma, device=latents.device)
                with forward():
                    (flow,) = model(latents, noise, inputs.positive, return_dict=False)
                latents = latents + (following - sigma) * flow
    return latents
