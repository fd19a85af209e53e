"""A toy model on a simulated card, and runs of it."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import torch
from simulated_machine import CARD, SimulatedMachine
from toys import Simulation, toy
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Limits
from wanvideo_enhanced_blockswap.blockswap.run.history import Workload
from wanvideo_enhanced_blockswap.blockswap.run.report import Step
from wanvideo_enhanced_blockswap.blockswap.run.run import SwapRun
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware
from wanvideo_enhanced_blockswap.hardware import Sampler
from wanvideo_enhanced_blockswap.hardware.monitor import GPU_PERCENT, HOST_AVAILABLE_BYTES, RSS_BYTES, VRAM_USED_BYTES

COUNT = 8
BLOCK = 512 * 6  # two matrices of 16 x 24 floats, 1,536 bytes each
SMALL_VIDEO, LARGE_VIDEO = Workload(tokens=100), Workload(tokens=900)
X = torch.linspace(-1.0, 1.0, 32).reshape(2, 16)


class Bench:
    """A toy model, a simulated card that holds `room` blocks under the defaults, and a run of them."""

    def __init__(
        self,
        room: float,
        *,
        settings: SwapSettings | None = None,
        compute_ms: float = 1.0,
        link_ms: float = 0.5,
        limits: Limits | None = None,
        count: int = COUNT,
        sampler: Sampler | None = None,
        trace_dir: Path | None = None,
        pin_bytes: int = 1 << 40,
    ) -> None:
        self.model = toy(count)
        self.expected = toy(count)(X)
        speed = BLOCK / link_ms  # bytes per ms
        hardware = SimulatedHardware(link_bytes_per_ms=speed, default_compute_ms=compute_ms)
        self.simulation = Simulation(hardware=hardware, pin_bytes=pin_bytes)
        # The ceiling of 50 % is the smallest term: 0.9 x 0.9 of the card is more.
        self.machine = SimulatedMachine(
            self.simulation, int(2 * (room * BLOCK + 256 * count + 512)), link_speed=speed * 1e3
        )
        self.run = SwapRun(
            self.model.named,
            settings or SwapSettings(),
            self.machine,
            self.simulation.backend,
            root=self.model,
            limits=limits,
            sampler=sampler,
            trace_dir=trace_dir,
        )

    def forward(self, workload: Workload | None = SMALL_VIDEO, *, times: int = 1, step: Step | None = None) -> None:
        for _ in range(times):
            with torch.inference_mode(), self.run.forward(workload, step=step):
                result = self.model(X)
                self.machine.run_peak()
            assert torch.equal(result, self.expected)

    @property
    def swapped(self) -> int:
        assert self.run.plan is not None
        return self.run.plan.swapped_count


class CountingSampler(Sampler):
    """Samples taken without delay, from readers with constant answers."""

    def __init__(self) -> None:
        figures = {GPU_PERCENT: 80.0, VRAM_USED_BYTES: 3 * BLOCK, RSS_BYTES: 4 * BLOCK, HOST_AVAILABLE_BYTES: 5 * BLOCK}
        readings = [(name, partial(float, figure)) for name, figure in figures.items()]
        super().__init__(CARD, interval_s=60.0, open_readings=lambda _spec: contextlib.nullcontext(readings))


def interrupt(module: torch.nn.Module, arguments: object) -> None:
    raise KeyboardInterrupt


def near_balance(**options: object) -> Bench:
    """40 blocks of which the first step shows that a third slot is faster."""
    return Bench(room=10, link_ms=40 / 33, count=40, **options)  # type: ignore[arg-type]
