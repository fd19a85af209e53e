"""The demo's two runs: the whole model on the device, and the same loop with its blocks swapped."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from ..blockswap.device.backend import Backend, backend_for
from ..blockswap.device.streams import CudaStreams, InlineStreams, Streams
from ..blockswap.engine.session import EVERY_FORWARD, SwapSession
from ..blockswap.model.profile import blocks_of
from ..blockswap.plan.swap_plan import SwapPlan, Timing
from ..blockswap.simulation.backend import simulated_backend
from ..blockswap.simulation.streams import SimulatedHardware, SimulatedStreams
from ..blockswap.spans import STALL, Span, total_ms
from ..hardware.pinning import PinBudget
from .meter import DeviceMeter, Moved
from .wan import Inputs, denoise

FORWARDS_PER_STEP = 2


@dataclass(slots=True)
class Run:
    """What one run of the denoising loop gave.

    Attributes:
        latents: The result.
        step_ms: Duration of each step, by the device's clock.
        stall_ms: Of each step, what compute waited for copies.
        spans: Of the last step.
        moved: Bytes copied between host and device in one step, adopt and release included.
        above_weights_bytes: Device memory that the run took beside the weights, at most.
        weight_bytes: Device memory that block weights took, at most.
        slab_bytes: Host memory of the slabs.
        pinned_bytes: Host memory that was page-locked.
    """

    latents: torch.Tensor
    step_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    spans: tuple[Span, ...] = ()
    moved: Moved = field(default_factory=Moved)
    above_weights_bytes: int = 0
    weight_bytes: int = 0
    slab_bytes: int = 0
    pinned_bytes: int = 0


class Stage:
    """A model, its inputs, and a device with memory of its own.

    Args:
        model: The transformer, on the host.
        inputs: On the device.
        device: Where blocks run.
        steps: Denoising steps of a run.
        quiet: Without a progress bar.
    """

    measured_by = "accounting"
    clock = "virtual"

    def __init__(self, model: nn.Module, inputs: Inputs, device: torch.device, *, steps: int, quiet: bool) -> None:
        self.blocks = blocks_of(model)
        self.device = device
        self._model = model
        self._inputs = inputs
        self._steps = steps
        self._quiet = quiet

    def run_unswapped(self) -> tuple[Run, tuple[float, ...]]:
        """The run that is the truth, and each block's own time in ms."""
        compute_ms = self._time_blocks(InlineStreams(self.device))
        run = Run(self._loop(self._steps, contextlib.nullcontext, lambda: None, "unswapped"))
        run.step_ms = [FORWARDS_PER_STEP * sum(compute_ms)]
        return run, compute_ms

    def run_swapped(self, decided: SwapPlan, timing: Timing, pins: PinBudget) -> Run:
        """The same loop on a simulated device, the blocks swapped as decided; times are virtual.

        Args:
            decided: The plan.
            timing: Duration of each block, and the speed of the link.
            pins: What may be page-locked.
        """
        assert timing.compute_ms is not None
        assert timing.pinned_bytes_per_s is not None
        hardware = SimulatedHardware(
            link_bytes_per_ms=timing.pinned_bytes_per_s / 1e3, compute_ms=dict(enumerate(timing.compute_ms))
        )
        streams = SimulatedStreams(hardware, count=decided.streams)
        backend = simulated_backend(streams, pin_budget=pins)
        run = self._session_run(decided, backend, lambda: streams.compute_stream.now_ms)
        run.moved = self._count_one_step(decided, backend)
        run.weight_bytes = streams.peak_bytes
        return run

    def _time_blocks(self, streams: Streams) -> tuple[float, ...]:
        """Median duration of each block over the forwards of two steps, of which the first warms up."""
        marks: list[list[tuple[object, object]]] = [[] for _ in self.blocks]
        handles = []
        for (_, block), found in zip(self.blocks, marks, strict=True):
            begin = _Begin(streams)
            handles.append(block.register_forward_pre_hook(begin))
            handles.append(block.register_forward_hook(_end(begin, found, streams)))
        self._loop(2, contextlib.nullcontext, lambda: None, "warm-up")
        for handle in handles:
            handle.remove()
        warm = [found[FORWARDS_PER_STEP:] for found in marks]
        return tuple(statistics.median(streams.elapsed_ms(*pair) for pair in found) for found in warm)

    def _session_run(self, decided: SwapPlan, backend: Backend, now_ms: Callable[[], float]) -> Run:
        run = Run(self._inputs.latents)
        with SwapSession(self.blocks, lambda profile, held: decided, backend, traced=EVERY_FORWARD) as session:
            session.adopt()
            assert session.trace is not None
            trace, before = session.trace, now_ms()

            def after_step() -> None:
                nonlocal before
                now = now_ms()
                run.spans = trace.spans()
                run.step_ms.append(now - before)
                run.stall_ms.append(total_ms(run.spans, STALL))
                trace.start()
                before = now_ms()

            trace.start()
            run.latents = self._loop(self._steps, session.forward, after_step, "swapped")
            run.slab_bytes, run.pinned_bytes = session.slab_bytes, session.pinned_bytes
        return run

    def _count_one_step(self, decided: SwapPlan, backend: Backend) -> Moved:
        """Bytes that the engine's own books say were copied in one step, adopt and release included."""
        with SwapSession(self.blocks, lambda profile, held: decided, backend) as session:
            self._loop(1, session.forward, lambda: None, "counting")
        counters = session.counters
        return Moved(counters.onloaded_bytes + counters.placed_bytes, counters.returned_bytes)

    def _loop(
        self,
        steps: int,
        forward: Callable[[], contextlib.AbstractContextManager[object]],
        after_step: Callable[[], object],
        label: str,
    ) -> torch.Tensor:
        with tqdm(total=steps, desc=label, unit="step", disable=self._quiet) as bar:

            def stepped() -> None:
                after_step()
                bar.update()

            return denoise(self._model, self._inputs, steps=steps, forward=forward, after_step=stepped)


class DeviceStage(Stage):
    """The same on a real device, whose own books and clock are read."""

    clock = "wall"

    def __init__(self, model: nn.Module, inputs: Inputs, device: torch.device, *, steps: int, quiet: bool) -> None:
        super().__init__(model, inputs, device, steps=steps, quiet=quiet)
        self._meter = DeviceMeter(device)
        self.measured_by = self._meter.measured_by

    def run_unswapped(self) -> tuple[Run, tuple[float, ...]]:
        self._model.to(self.device)
        streams: Streams = (
            CudaStreams(self.device, count=0) if self.device.type == "cuda" else InlineStreams(self.device)
        )
        compute_ms = self._time_blocks(streams)
        run = Run(self._inputs.latents)
        with self._meter.count_copies() as moved:
            self._loop(1, contextlib.nullcontext, lambda: None, "counting")
            run.moved = moved()
        before = self._meter.allocated()
        self._meter.reset_peak()
        times = [self._now_ms()]
        run.latents = self._loop(self._steps, contextlib.nullcontext, lambda: times.append(self._now_ms()), "unswapped")
        run.step_ms = [end - begin for begin, end in itertools.pairwise(times)]
        run.above_weights_bytes = self._meter.peak() - before
        self._model.to("cpu")
        return run, compute_ms

    def run_swapped(self, decided: SwapPlan, timing: Timing, pins: PinBudget) -> Run:
        """The same loop with the blocks swapped as decided; the times are the device's own."""
        self._move_rest()
        before = self._meter.allocated()
        self._meter.reset_peak()
        backend = backend_for(self.device, pin_budget=pins)
        run = self._session_run(decided, backend, self._now_ms)
        run.weight_bytes = self._meter.peak() - before
        with self._meter.count_copies() as moved:
            self._count_one_step(decided, backend)
            run.moved = moved()
        return run

    def _move_rest(self) -> None:
        """Everything outside the blocks goes to the device."""
        for module in self._model.children():
            if module is not self._model.blocks:
                module.to(self.device)
        for parameter in self._model.parameters(recurse=False):
            parameter.data = parameter.data.to(self.device)

    def _now_ms(self) -> float:
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter() * 1e3


class _Begin:
    """Marks when a block begins."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.mark: object = None

    def __call__(self, module: nn.Module, arguments: object) -> None:
        self.mark = self._streams.mark(self._streams.current())


def _end(begin: _Begin, found: list[tuple[object, object]], streams: Streams) -> Callable[..., None]:
    def mark(module: nn.Module, arguments: object, output: object) -> None:
        found.append((begin.mark, streams.mark(streams.current())))

    return mark
