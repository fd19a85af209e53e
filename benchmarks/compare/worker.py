"""The process of one engine: runs it at every shape, and writes each row at once.

python -m benchmarks.compare.worker TASK.json
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from wanvideo_enhanced_blockswap.commands.options import choose_device, parse_shape
from wanvideo_enhanced_blockswap.commands.wan_model import Inputs, build, make_inputs

from .cells import EQUAL, FIRST, REFERENCE, RESIDENT, Row, Task
from .device_testbed import DeviceTestbed
from .engine import Engine, NotOfferedError
from .engines import make_engine
from .simulated_testbed import SimulatedTestbed
from .testbed import Figures, Testbed

SEED = 0
ROWS = "rows.jsonl"


def read_task(path: Path) -> Task:
    """A task as `write_task` has written it."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Task(**{**stored, "shapes": tuple(stored["shapes"])})


def write_task(task: Task, path: Path) -> None:
    """Writes what `read_task` reads."""
    path.write_text(json.dumps(asdict(task)), encoding="utf-8")


def run(task: Task) -> Iterator[Row]:
    """A row for each shape, one after the other."""
    device = choose_device(task.device)
    testbed: Testbed = (
        SimulatedTestbed(task.preset, warmup=task.warmup)
        if device.type == "cpu"
        else DeviceTestbed(device, warmup=task.warmup)
    )
    try:
        engine = make_engine(task, testbed)
        model = build(task.preset, seed=SEED, dtype=getattr(torch, task.dtype))
        engine.place(model, device, swapped=task.swapped)
    except NotOfferedError as why:
        for shape in task.shapes:
            yield Row(engine=task.engine, shape=shape, swapped=task.swapped, reason=str(why))
        return
    try:
        for shape in task.shapes:
            size = parse_shape(shape)
            inputs = _inputs(task, size, device)
            figures = testbed.measure(engine, model, size, inputs, steps=task.steps)
            yield _row(task, shape, engine, testbed, figures)
    finally:
        engine.close()


def _inputs(task: Task, shape: tuple[int, int, int], device: torch.device) -> Inputs:
    made = make_inputs(task.preset, shape, device, seed=SEED)
    dtype = getattr(torch, task.dtype)
    return Inputs(made.latents.to(dtype), made.positive.to(dtype), made.negative.to(dtype))


def _row(task: Task, shape: str, engine: Engine, testbed: Testbed, figures: Figures) -> Row:
    return Row(
        engine=task.engine,
        shape=shape,
        swapped=task.swapped,
        clock=testbed.clock,
        step_ms=figures.step_ms,
        wall_ms=figures.wall_ms,
        peak_bytes=figures.peak_bytes,
        reserved_bytes=figures.reserved_bytes,
        driver_bytes=figures.driver_bytes,
        held_bytes=figures.held_bytes,
        host_bytes=figures.host_bytes,
        pinned_bytes=figures.pinned_bytes,
        to_device_bytes=None if figures.moved is None else figures.moved.to_device,
        to_host_bytes=None if figures.moved is None else figures.moved.to_host,
        output=_compare(figures.latents, Path(task.folder) / f"{shape}.pt", task.engine),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in engine.packages),
    )


def _compare(latents: torch.Tensor, reference: Path, engine: str) -> str:
    """How the latents differ from those of the first engine, which are stored."""
    if not reference.exists():
        torch.save(latents, reference)
        return REFERENCE if engine == RESIDENT else FIRST
    expected = torch.load(reference, weights_only=True)
    if torch.equal(latents, expected):
        return EQUAL
    if not bool(latents.isfinite().all()):
        return "not finite"
    return f"differs by up to {float((latents.float() - expected.float()).abs().max()):.3g}"


def main(arguments: Sequence[str]) -> int:
    """Appends a line of JSON for each row to the task's folder."""
    task = read_task(Path(arguments[0]))
    with (Path(task.folder) / ROWS).open("a", encoding="utf-8") as file:
        for row in run(task):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
