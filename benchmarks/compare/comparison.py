"""Runs every engine in its own process and collects the rows."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from wanvideo_enhanced_blockswap.commands.options import choose_device
from wanvideo_enhanced_blockswap.commands.wan_model import expected_bytes
from wanvideo_enhanced_blockswap.hardware import measure_link

from benchmarks.link import pinned_bytes_per_s

from .cells import RESIDENT, Row, Task, preset_of
from .simulated_testbed import SimulatedCard
from .worker import ROWS, write_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What to compare; fields as in `Task`, and:

    Attributes:
        engines: Names.
        swaps: Numbers of swapped blocks.
        timeout_s: Seconds that one process may take.
        quiet: Show no progress bar.
    """

    model: str
    dtype: str
    shapes: tuple[str, ...]
    swaps: tuple[int, ...]
    engines: tuple[str, ...]
    device: str
    steps: int
    warmup: int
    timeout_s: float
    quiet: bool
    blocks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Results of a comparison.

    Attributes:
        streams: Number of copy streams with the fastest link.
        link_bytes_per_s: The link's speed with these.
        block_bytes: Bytes of one block's weights.
        rows: One for each engine, number of swapped blocks and shape.
    """

    streams: int
    link_bytes_per_s: float
    block_bytes: float
    rows: tuple[Row, ...]


def compare(asked: Comparison) -> Iterator[Found]:
    """Runs engine by engine; yields the results so far after each."""
    streams, link = _link(choose_device(asked.device))
    preset, dtype = preset_of(asked.model, asked.blocks), getattr(torch, asked.dtype)
    block_bytes = expected_bytes(preset) / preset.layers / torch.bfloat16.itemsize * dtype.itemsize
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bar = tqdm(tasks(asked, streams=streams, folder=folder), unit="engine", disable=asked.quiet or None)
        for task in bar:
            bar.set_postfix_str(f"{task.engine}, {task.swapped} swapped")
            rows += run_apart(task, timeout_s=asked.timeout_s)
            yield Found(
                streams=streams,
                link_bytes_per_s=link,
                block_bytes=block_bytes,
                rows=complete(rows, block_bytes=block_bytes, link_bytes_per_s=link),
            )


def _link(device: torch.device) -> tuple[int, float]:
    if device.type == "cpu":
        return 1, SimulatedCard().pinned_bytes_per_s
    # In its own process, so that this one does not keep the device memory of the measurement.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured_link, device).result()


def measured_link(device: torch.device) -> tuple[int, float]:
    """Number of copy streams with the fastest link from page-locked memory, and its bytes per second; for a device
    without streams, the pageable speed.
    """
    if device.type == "cuda":
        return pinned_bytes_per_s(device)
    return 1, measure_link(device).pageable or 0.0


def tasks(asked: Comparison, *, streams: int, folder: str) -> list[Task]:
    """A task for each process, the resident model first, because the others are compared with it."""
    ways = [
        (engine, swapped)
        for engine in sorted(asked.engines, key=lambda name: name != RESIDENT)
        for swapped in ((0,) if engine == RESIDENT else asked.swaps)
    ]
    return [
        Task(
            engine=engine,
            swapped=swapped,
            model=asked.model,
            dtype=asked.dtype,
            shapes=asked.shapes,
            device=asked.device,
            streams=streams,
            steps=asked.steps,
            warmup=asked.warmup,
            folder=folder,
            blocks=asked.blocks,
        )
        for engine, swapped in ways
    ]


def run_apart(task: Task, *, timeout_s: float) -> Iterator[Row]:
    """Runs a task in its own process; a row for each shape, with a reason if the process has written none."""
    folder = Path(task.folder)
    (folder / ROWS).unlink(missing_ok=True)
    write_task(task, folder / "task.json")
    command = [sys.executable, "-m", "benchmarks.compare.worker", str(folder / "task.json")]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        reason = "" if ended.returncode == 0 else _last_words(ended)
    except subprocess.TimeoutExpired:
        reason = f"not finished after {timeout_s:.0f} s; raise --timeout"
    found = (folder / ROWS).read_text(encoding="utf-8").splitlines() if (folder / ROWS).exists() else []
    rows = {row["shape"]: Row(**row) for row in map(json.loads, found)}
    for shape in task.shapes:
        missing = Row(engine=task.engine, shape=shape, swapped=task.swapped, reason=reason or "it wrote no figures")
        yield rows.get(shape, missing)


def _last_words(ended: subprocess.CompletedProcess[str]) -> str:
    if ended.returncode < 0:
        return f"ended by signal {-ended.returncode}"
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with exit code {ended.returncode}"


def complete(rows: Sequence[Row], *, block_bytes: float, link_bytes_per_s: float) -> tuple[Row, ...]:
    """The rows with the bound and the device memory of the weights, which follow from the resident model's row.

    Args:
        rows: As measured.
        block_bytes: Bytes of one block's weights.
        link_bytes_per_s: As measured.
    """
    resident = {row.shape: row for row in rows if row.engine == RESIDENT and not row.reason}

    def completed(row: Row) -> Row:
        base = resident.get(row.shape)
        if row.reason or base is None or base.step_ms is None:
            return row
        assert row.peak_bytes is not None
        assert base.peak_bytes is not None
        assert base.held_bytes is not None
        link_ms = row.swapped * block_bytes / link_bytes_per_s * 1e3 if link_bytes_per_s else 0.0
        above = base.peak_bytes - base.held_bytes
        return replace(row, bound_ms=max(base.step_ms, link_ms), weights_bytes=row.peak_bytes - above)

    return tuple(completed(row) for row in rows)
