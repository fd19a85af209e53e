"""A real device, measured by its own clock and memory counts."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import CudaStreams, InlineStreams, Streams
from wanvideo_enhanced_blockswap.commands.demo import DeviceMeter
from wanvideo_enhanced_blockswap.commands.wan_model import Inputs
from wanvideo_enhanced_blockswap.hardware import read_host_memory

from .engine import Engine
from .testbed import Figures, Shape, denoise
from .usage import Usage, copied_in, pinned_by_torch


class DeviceTestbed:
    """See `Testbed`.

    Args:
        device: Any but the CPU.
        warmup: Steps before the timed ones.
    """

    def __init__(self, device: torch.device, *, warmup: int) -> None:
        self._usage = Usage(device)
        self.device = device
        self.clock = "events" if device.type == "cuda" else "wall"
        self._warmup = warmup
        self._meter = DeviceMeter(device)
        self._pins = PinBudget(read_host_memory().pin_budget_bytes)
        self._module: Any = torch.get_device_module(device)

    def backend(self, *, overlap: bool) -> Backend:
        return backend_for(self.device, pin_budget=self._pins)

    def place(self, module: nn.Module) -> None:
        module.to(self.device)

    def bring_back(self, module: nn.Module) -> None:
        module.to("cpu")

    def time_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Does nothing: real blocks take their own time."""

    def measure(self, engine: Engine, model: nn.Module, shape: Shape, inputs: Inputs, *, steps: int) -> Figures:
        forward = engine.forward
        self._forget_other_shapes()
        denoise(model, inputs, steps=self._warmup, forward=forward)
        self._module.synchronize()
        gc.collect()
        held = self._meter.allocated()
        self._meter.reset_peak()
        clock = _DeviceClock(self.device)
        # The host does not wait between steps: memory that grows when the host runs ahead is counted.
        latents = denoise(model, inputs, steps=steps, forward=forward, around=clock.lap).cpu()
        peak, reserved = self._meter.peak(), self._peak_reserved()
        walls: list[float] = []

        @contextlib.contextmanager
        def waited_for() -> Iterator[None]:
            begin = time.perf_counter()
            yield
            self._module.synchronize()
            walls.append((time.perf_counter() - begin) * 1e3)

        denoise(model, inputs, steps=steps, forward=forward, around=waited_for)
        taken = self._usage.device_bytes(), self._usage.host_bytes()  # before the profiler, which takes memory itself
        with copied_in(self._meter) as moved:
            denoise(model, inputs, steps=1, forward=forward)
            self._module.synchronize()
        return Figures(
            latents=latents,
            step_ms=statistics.median(clock.laps_ms()),
            wall_ms=statistics.median(walls),
            held_bytes=held,
            peak_bytes=peak,
            reserved_bytes=reserved,
            driver_bytes=taken[0],
            host_bytes=taken[1],
            pinned_bytes=pinned_by_torch(self.device) + engine.pinned_bytes,
            moved=moved(),
        )

    def _forget_other_shapes(self) -> None:
        """Frees the memory that torch's allocator keeps from other shapes."""
        empty_cache = getattr(self._module, "empty_cache", None)
        if empty_cache is not None:
            empty_cache()

    def _peak_reserved(self) -> int | None:
        reserved = getattr(self._module, "max_memory_reserved", None)
        return None if reserved is None else int(reserved(self.device))


class _DeviceClock:
    """Laps between marks on the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self._streams: Streams = CudaStreams(device, count=0) if device.type == "cuda" else InlineStreams(device)
        self._laps: list[tuple[object, object]] = []

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        begin = self._streams.mark(self._streams.current())
        yield
        self._laps.append((begin, self._streams.mark(self._streams.current())))

    def laps_ms(self) -> list[float]:
        """Milliseconds of each lap."""
        return [self._streams.elapsed_ms(*lap) for lap in self._laps]
