"""A simulated device: forwards run on the host, and the engine's simulation times their copies.

The forwards compute a corner of the video, which uses every weight; durations follow from the whole video's size.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import SETTLING_FORWARDS
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedWorker, simulated_backend
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware, SimulatedStreams
from wanvideo_enhanced_blockswap.commands.demo import Moved
from wanvideo_enhanced_blockswap.commands.wan_model import Inputs, Preset

from .engine import Engine
from .testbed import Figures, Shape, denoise

TEXT_TOKENS = 512

FRAMES, ROWS, COLUMNS = 1, 4, 4
"""Size of the computed corner of the latents: four tokens."""
WORDS = 4
"""Number of computed text tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCard:
    """Speeds chosen so that a block of the small preset takes longer to copy than to compute in a small video, and the
    other way round in a large one.

    Attributes:
        flops: Floating-point operations per second.
        pinned_bytes_per_s: From page-locked memory to the card.
        pageable_bytes_per_s: Between ordinary memory and the card, either way.
        host_copy_bytes_per_s: From ordinary to page-locked memory.
    """

    flops: float = 5e12
    pinned_bytes_per_s: float = 25e9
    pageable_bytes_per_s: float = 8e9
    host_copy_bytes_per_s: float = 20e9


def block_flops(preset: Preset, shape: Shape) -> float:
    """Floating-point operations of a Wan block's forward at batch 1: two for each weight and token that uses it (the
    keys and values of cross-attention use the text), and four for each channel of each pair in the two attentions.
    """
    width, height, frames = shape
    tokens = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    channels = preset.heads * preset.head_width
    linear = 2 * tokens * (6 * channels**2 + 2 * channels * preset.ffn_width) + 2 * TEXT_TOKENS * 2 * channels**2
    return linear + 4 * tokens * (tokens + TEXT_TOKENS) * channels


def corner(inputs: Inputs) -> Inputs:
    """A corner of the video and the first words of the texts: the whole takes long on processors without bf16."""
    texts = (inputs.positive, inputs.negative)
    return Inputs(inputs.latents[..., :FRAMES, :ROWS, :COLUMNS], *(text[:, :WORDS] for text in texts))


class SimulatedTestbed:
    """See `Testbed`. Times are virtual and the same on every machine.

    Args:
        preset: The model's dimensions, which give the duration of a block.
        warmup: Steps before the timed ones; raised to the number after which times repeat.
        card: The simulated card.
    """

    clock = "virtual"

    def __init__(self, preset: Preset, *, warmup: int, card: SimulatedCard | None = None) -> None:
        self.device = torch.device("cpu")
        self.card = card or SimulatedCard()
        self._preset = preset
        self._warmup = warmup
        self._streams = self._open(streams=1)
        self._worker = SimulatedWorker(self._streams)
        self._held_bytes = self._peak_bytes = 0
        self._moved = Moved()

    def backend(self, *, overlap: bool) -> Backend:
        self._streams = self._open(streams=1 if overlap else 0)
        self._worker = SimulatedWorker(self._streams)
        return replace(simulated_backend(self._streams), make_worker=lambda _: self._worker)

    def place(self, module: nn.Module) -> None:
        nbytes = self._wait_for_pageable(module)
        self._moved.to_device += nbytes
        self._held_bytes += nbytes
        self._peak_bytes = max(self._peak_bytes, self._held_bytes)

    def bring_back(self, module: nn.Module) -> None:
        nbytes = self._wait_for_pageable(module)
        self._moved.to_host += nbytes
        self._held_bytes -= nbytes

    def time_blocks(self, blocks: Sequence[nn.Module]) -> None:
        for i, block in enumerate(blocks):
            block.register_forward_hook(self._compute(i))

    def measure(self, engine: Engine, model: nn.Module, shape: Shape, inputs: Inputs, *, steps: int) -> Figures:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more threads wait for each other in a small model, most of all on a busy machine
        try:
            return self._measure(engine, model, shape, inputs, steps)
        finally:
            torch.set_num_threads(threads)

    def _measure(self, engine: Engine, model: nn.Module, shape: Shape, inputs: Inputs, steps: int) -> Figures:
        streams = self._streams
        inputs = corner(inputs)
        compute_ms = block_flops(self._preset, shape) / self.card.flops * 1e3
        streams.hardware = replace(streams.hardware, default_compute_ms=compute_ms)
        denoise(model, inputs, steps=max(self._warmup, SETTLING_FORWARDS), forward=engine.forward)
        held = self._held_bytes + streams.allocated_bytes
        self._peak_bytes, streams.peak_bytes = self._held_bytes, streams.allocated_bytes
        durations: list[float] = []
        before = self._moved_so_far()

        @contextlib.contextmanager
        def timed() -> Iterator[None]:
            begin = streams.compute_stream.now_ms
            yield
            durations.append(streams.compute_stream.now_ms - begin)

        latents = denoise(model, inputs, steps=steps, forward=engine.forward, around=timed)
        after = self._moved_so_far()
        return Figures(
            latents=latents,
            step_ms=statistics.median(durations),
            held_bytes=held,
            peak_bytes=self._peak_bytes + streams.peak_bytes,
            pinned_bytes=engine.pinned_bytes,
            moved=Moved(
                (after.to_device - before.to_device) // steps,
                (after.to_host - before.to_host) // steps,
            ),
        )

    def _open(self, *, streams: int) -> SimulatedStreams:
        hardware = SimulatedHardware(
            link_bytes_per_ms=self.card.pinned_bytes_per_s / 1e3,
            host_copy_bytes_per_ms=self.card.host_copy_bytes_per_s / 1e3,
        )
        return SimulatedStreams(hardware, count=streams)

    def _wait_for_pageable(self, module: nn.Module) -> int:
        """Adds a copy that compute waits for; returns its bytes."""
        nbytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        self._streams.compute_stream.now_ms += nbytes / self.card.pageable_bytes_per_s * 1e3
        return nbytes

    def _compute(self, block: int) -> Callable[..., None]:
        def compute(module: nn.Module, arguments: object, output: object) -> None:
            self._streams.computed(block, self._streams.compute_stream)

        return compute

    def _moved_so_far(self) -> Moved:
        self._worker.stop()  # finishes all jobs, also late ones
        return Moved(self._moved.to_device + self._streams.copied_bytes, self._moved.to_host)
