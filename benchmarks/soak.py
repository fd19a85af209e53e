"""Many runs in one process with random settings, videos, interrupts, faults: outputs stay right, memory does not grow.

    python -m benchmarks.soak [--runs 200] [--seed 0] [--json]

The demo's small model runs on the simulated device, through SwapRun as in ComfyUI. After each run device memory must be
empty; host memory, open files and threads must not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm
from wanvideo_enhanced_blockswap.blockswap import SwapRun, SwapSettings, Workload, blocks_of
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, Inputs, build, make_inputs

TESTS = Path(__file__).parents[1] / "tests"
SHAPES = ((64, 64, 5), (96, 64, 5), (128, 96, 5))
WARM_UP = 20
"""Runs before memory is compared: by then libraries have their buffers, and slabs of every size exist."""
FLAT = 0.01
CARD_BYTES = 48 << 20
"""Room for half of the model under the default ceiling."""
PIN_BYTES = 12 << 20

TROUBLES = ("none", "none", "interrupt", "out of memory", "error in a block", "fault", "interrupted fault")


@dataclass(slots=True)
class Tally:
    """What happened.

    Attributes:
        troubles: How often each kind was tried.
        outcomes: Number of runs with right outputs, and with each type of error.
        wrong: Outputs that differ from the unswapped model's.
        rss_bytes: Host memory of the process each time a run was closed.
        left_bytes: The most device memory left after a run.
        files: Open files after each run.
        threads: Threads after each run.
    """

    troubles: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    rss_bytes: list[int] = field(default_factory=list)
    left_bytes: int = 0
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


class Soak:
    """A model, its device, and runs of it.

    Args:
        seed: Seed of all random choices.
        folder: Where debug mode writes traces.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        if str(TESTS) not in sys.path:
            sys.path.insert(0, str(TESTS))
        from simulated_machine import SimulatedMachine
        from toys import Simulation

        self.random = random.Random(seed)
        self.model = build(PRESETS["small"], seed=seed)
        self.blocks = blocks_of(self.model)
        self.inputs = [make_inputs(PRESETS["small"], shape, torch.device("cpu"), seed=seed) for shape in SHAPES]
        self.truth = [self._forward(inputs) for inputs in self.inputs]
        hardware = SimulatedHardware(link_bytes_per_ms=4e6, default_compute_ms=1.0, seed=seed)
        self.simulation = Simulation(hardware=hardware, streams=2, pin_bytes=PIN_BYTES)
        self.machine = SimulatedMachine(self.simulation, CARD_BYTES, link_speed=4e9)
        self.folder = folder
        self.tally = Tally()
        self.run = self._new_run()

    def once(self) -> None:
        """One run: some forwards, with or without trouble, then its release."""
        trouble = self.random.choice(TROUBLES)
        self.tally.troubles[trouble] += 1
        self.run.use(self._settings())
        try:
            with self._trouble(trouble):
                for _ in range(self.random.randint(1, 3)):
                    self._swapped(self.random.randrange(len(SHAPES)))
                self.run.release()
            self.tally.outcomes["right"] += 1
        except (BlockSwapError, KeyboardInterrupt, ArithmeticError) as failure:
            self.tally.outcomes[type(failure).__name__] += 1
            self.run.release()
        is_closed = self.random.random() < 1 / 4
        if is_closed:
            self.run.close()
            self.run = self._new_run()
        self._measure(is_closed=is_closed)

    def _settings(self) -> SwapSettings:
        is_auto = self.random.random() < 1 / 2
        return SwapSettings(
            auto_hardware_tuning=is_auto,
            blocks_to_swap=self.random.randint(0, len(self.blocks)),
            enable_cuda_optimization=self.random.random() < 3 / 4,
            enable_dram_optimization=self.random.random() < 3 / 4,
            vram_threshold_percent=self.random.choice((30.0, 50.0, 90.0)),
            debug_mode=self.random.random() < 1 / 4,
        )

    def _new_run(self) -> SwapRun:
        return SwapRun(
            self.blocks, SwapSettings(), self.machine, self.simulation.backend, root=self.model, trace_dir=self.folder
        )

    def _swapped(self, index: int) -> None:
        """One forward, repeated with a smaller plan if memory runs out, as the gate does."""
        workload = Workload(tokens=SHAPES[index][0] * SHAPES[index][1])
        for _ in range(3):
            try:
                with torch.inference_mode(), self.run.forward(workload):
                    output = self._forward(self.inputs[index])
            except torch.OutOfMemoryError as failure:
                said = str(failure)
            else:
                self.tally.wrong += not torch.equal(output, self.truth[index])
                return
            self.run.shrink(said)

    def _forward(self, inputs: Inputs) -> torch.Tensor:
        with torch.inference_mode():
            time = torch.full((1,), 500.0)
            return self.model(inputs.latents, time, inputs.positive, return_dict=False)[0]

    @contextlib.contextmanager
    def _trouble(self, kind: str) -> Iterator[None]:
        if kind == "none":
            yield
        elif "fault" in kind:
            from faults import INTERRUPTED, PLACES, Armed

            place = self.random.choice(PLACES if kind == "fault" else INTERRUPTED)
            with Armed(place, self.random.randint(0, 60)).at(self):
                yield
        else:
            error: Any = {
                "interrupt": KeyboardInterrupt,
                "out of memory": torch.OutOfMemoryError,
                "error in a block": ZeroDivisionError,
            }[kind]
            block = self.random.choice(self.blocks)[1]
            with _failing_once(block, after=self.random.randint(0, 2), error=error):
                yield

    def _measure(self, *, is_closed: bool) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc only; elsewhere freed memory may stay
            ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        if is_closed:  # an open run keeps the slabs of its last plan, whose sizes differ
            self.tally.rss_bytes.append(process.memory_info().rss)
        self.tally.left_bytes = max(self.tally.left_bytes, self.simulation.streams.allocated_bytes)
        self.tally.files.append(process.num_fds() if hasattr(process, "num_fds") else 0)
        self.tally.threads.append(process.num_threads())
        for file in self.folder.iterdir():
            file.unlink()


@contextlib.contextmanager
def _failing_once(block: nn.Module, *, after: int, error: type[BaseException]) -> Iterator[None]:
    left = after

    def fail(module: nn.Module, arguments: object) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise error

    handle = block.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def verdict(tally: Tally) -> dict[str, object]:
    """The figures, and whether the soak has passed."""
    runs = len(tally.files)
    warm = min(WARM_UP, runs // 3)
    closed = tally.rss_bytes[len(tally.rss_bytes) * warm // runs :]
    part = max(1, len(closed) // 5)
    first, last = statistics.median(closed[:part]), statistics.median(closed[-part:])
    grown = last / first - 1
    figures: dict[str, object] = {
        "runs": runs,
        "troubles": dict(tally.troubles),
        "outcomes": dict(tally.outcomes),
        "wrong_outputs": tally.wrong,
        "device_bytes_left": tally.left_bytes,
        "host_bytes_first": int(first),
        "host_bytes_last": int(last),
        "host_growth": grown,
        "files": [tally.files[warm], tally.files[-1]],
        "threads": [tally.threads[warm], tally.threads[-1]],
    }
    is_flat = grown <= FLAT and tally.files[-1] <= tally.files[warm] and tally.threads[-1] <= tally.threads[warm]
    return {**figures, "passed": tally.wrong == 0 and tally.left_bytes == 0 and is_flat}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.runs < 2:
        parser.error(f"--runs: expected 2 or more, to compare the last run with the first, got {options.runs}")
    logging.disable(logging.CRITICAL)  # the faults cause hundreds of warnings
    try:
        with tempfile.TemporaryDirectory() as folder:
            soak = Soak(options.seed, Path(folder))
            for _ in tqdm(range(options.runs), unit="run", disable=options.json or None):
                soak.once()
            soak.run.close()
    finally:
        logging.disable(logging.NOTSET)
    found = verdict(soak.tally)
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
