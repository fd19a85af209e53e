"""Where an engine is measured, what is measured there, and the steps that are taken."""

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
    """What the steps of one engine at one shape took; None where it cannot be told.

    Attributes:
        latents: What came out of the steps, on the host.
        step_ms: Median duration of a step by the device's clock, the host free to run ahead.
        wall_ms: Median duration of a step by the host's clock, the host waiting at the end of each.
        held_bytes: Device memory allocated before the steps.
        peak_bytes: The most that was allocated in them.
        reserved_bytes: The most that torch's allocator held of the device in them.
        driver_bytes: Device memory in use by the driver's account, less what was before the model was built.
        host_bytes: By how much the host's available memory had shrunk.
        pinned_bytes: Host memory that was page-locked.
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
    """One device, as engines and their measurement need it."""

    device: torch.device
    clock: str
    """Whose milliseconds `step_ms` are: of the device's `events`, of the host's clock (`wall`), or `virtual`."""

    def backend(self, *, overlap: bool) -> Backend:
        """For a session of ours whose copies do or do not have streams of their own."""

    def place(self, module: nn.Module) -> None:
        """Moves a module to the device, as `module.to(device)` does."""

    def bring_back(self, module: nn.Module) -> None:
        """Moves a module to ordinary host memory, as `module.to("cpu")` does."""

    def time_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Blocks that no session of ours runs take their time as well."""

    def measure(self, engine: Engine, model: nn.Module, shape: Shape, inputs: Inputs, *, steps: int) -> Figures:
        """Takes `steps` steps, after some that warm up."""


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
        inputs: What to start from; of the texts the positive one is used.
        steps: Number of steps.
        forward: What each forward is wrapped in.
        around: What each step is wrapped in.
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
