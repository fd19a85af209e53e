"""Compares virtual times of all that can be timed without a GPU with the stored ones: a slower schedule is found.

    python -m benchmarks.baseline [--write]

Our engines and the plain swap run a small model on the simulated device (`benchmarks.compare`), the schedule runs its
grid (`benchmarks.schedule_grid`), and the link is measured on the simulated device (`benchmarks.link`). The figures are
the same on every machine, so each difference comes from the code: repair what makes a figure worse; store a better one
with `--write`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from . import schedule_grid
from .compare.cells import EQUAL, REFERENCE, RESIDENT, SHAPES, Task
from .compare.engines import OURS
from .compare.worker import run
from .link import Asked, LinkBench, backend_of

KEPT = Path(__file__).with_name("baseline.json")
SWAPS = (6, 9, 12)
STEPS, WARMUP = 3, 1
TOLERANCE = 1e-4
"""Share by which a figure may differ: figures are stored with six digits."""


def measure() -> dict[str, float]:
    """Each figure by its name; less is better for all of them."""
    return dict(sorted((*_compared(), *_scheduled(), *_copied())))


def _compared() -> Iterator[tuple[str, float]]:
    """Milliseconds of a step, its peak of device memory in bytes, and the bytes that it copies to the device."""
    with tempfile.TemporaryDirectory() as folder:
        for engine in OURS:
            for swapped in (0,) if engine == RESIDENT else SWAPS:
                task = Task(
                    engine=engine,
                    swapped=swapped,
                    model="small",
                    dtype="bfloat16",
                    shapes=SHAPES,
                    device="cpu",
                    streams=1,
                    steps=STEPS,
                    warmup=WARMUP,
                    folder=folder,
                )
                for row in run(task):
                    name = f"{engine}, {swapped} of 12 swapped, {row.shape}"
                    assert row.output in (EQUAL, REFERENCE), f"{name}: {row.reason or row.output}"
                    yield f"{name}: step ms", _rounded(row.step_ms)
                    yield f"{name}: device bytes", _rounded(row.peak_bytes)
                    yield f"{name}: bytes to the device", _rounded(row.to_device_bytes)


def _scheduled() -> Iterator[tuple[str, float]]:
    """Step time over the bound: mean and worst cell of each group."""
    for group, cells in schedule_grid.groups().items():
        ratios = [schedule_grid.ratio_to_bound(cell) for cell in cells]
        yield f"schedule, {group}: mean ratio to the bound", _rounded(sum(ratios) / len(ratios))
        yield f"schedule, {group}: worst ratio to the bound", _rounded(max(ratios))


def _copied() -> Iterator[tuple[str, float]]:
    """Milliseconds of copies from page-locked memory."""
    asked = Asked(sizes=(1 << 20, 1 << 24), streams=(1, 4), busy=False)
    for row in LinkBench(backend_of(torch.device("cpu")), asked).rows(quiet=True):
        if row.gbytes_per_s is not None and row.memory == "pinned":
            ms = row.size_bytes / row.gbytes_per_s / 1e6
            yield f"copy of {row.size_bytes:,} bytes on {row.streams} streams: ms", _rounded(ms)


def _rounded(figure: float | None) -> float:
    assert figure is not None
    return float(f"{figure:.6g}")


def differences(found: Mapping[str, float], kept: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Figures worse than the stored ones, and figures that are new or better; a sentence each."""
    worse, other = [], []
    for name in sorted({*found, *kept}):
        if name not in found:
            worse.append(f"{name}: not measured any more, was {kept[name]:g}")
        elif name not in kept:
            other.append(f"{name}: {found[name]:g} is new")
        elif found[name] > kept[name] * (1 + TOLERANCE):
            worse.append(f"{name}: {found[name]:g} is worse than {kept[name]:g}")
        elif found[name] < kept[name] * (1 - TOLERANCE):
            other.append(f"{name}: {found[name]:g} is better than {kept[name]:g}")
    return worse, other


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a figure differs from the stored one; with `--write`, stores the new figures and returns 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.baseline", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the present figures")
    options = parser.parse_args(arguments)
    found = measure()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    worse, other = differences(found, kept)
    for line in (*worse, *other):
        print(line)
    if options.write:
        KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} figures stored")
        return 0
    print(f"{len(found)} figures: {len(worse)} worse, {len(other)} better or new")
    return 1 if worse or other else 0


if __name__ == "__main__":
    sys.exit(main())
