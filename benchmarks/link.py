"""Host-to-device bandwidth by size, copy streams and kind of host memory, on an idle device and during matrix products.

    python -m benchmarks.link [--device cuda] [--sizes 64KiB,…] [--streams 1,2,…] [--no-busy] [--json] [--markdown FILE]

The engine makes the copies: its transfer copies a slab of whole pages, page-locked at its exact size or ordinary, into
a slot, divided between the copy streams. `benchmarks/copies.py` says what is timed. Without a CUDA or HIP device the
device is simulated and the time is virtual.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import Streams
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import (
    BlockSwapError,
    DeviceMemoryError,
    HostMemoryError,
    SettingsError,
)
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import simulated_backend
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware, SimulatedStreams
from wanvideo_enhanced_blockswap.commands.options import choose_device
from wanvideo_enhanced_blockswap.hardware import KIB, MIB, parse_bytes, read_host_memory
from wanvideo_enhanced_blockswap.hardware.pinning import register_result

from .copies import Products, beside_products, choose_products, idle_ms, make_products, window
from .link_table import BUSY, IDLE, Row, tables
from .machine import origin

SIZES = (64 * KIB, MIB, 16 * MIB, 64 * MIB, 512 * MIB)
STREAMS = (1, 2, 4, 8, 16)
MOST_STREAMS = 32
"""Streams that torch has for a device; for more it returns the same ones again."""
KNEE = 0.98
"""Share of the best speed at which fewer streams are as good."""
SECONDS = 40.0
"""No measurement starts after this time: over the slowest link, a riser's single lane, one takes several seconds."""
HARDWARE = SimulatedHardware(link_bytes_per_ms=25e6, default_compute_ms=0.25)
"""The simulated device: the bandwidth of PCIe 4.0 x16, and a matrix product of 0.25 ms."""
SIMULATED = (
    "Pageable memory is not measured: the simulated device copies from both kinds of host memory at one speed. Its "
    "copies and kernels do not share memory bandwidth."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is measured: every combination of these."""

    sizes: tuple[int, ...] = SIZES
    streams: tuple[int, ...] = STREAMS
    tiers: tuple[HostTier, ...] = (HostTier.PINNED, HostTier.PAGEABLE)
    busy: bool = True


def backend_of(device: torch.device) -> Backend:
    """The engine's backend; for the CPU, that of a simulated device."""
    if device.type == "cpu":
        simulated = simulated_backend(SimulatedStreams(HARDWARE))
        return replace(simulated, open_streams=lambda count, overlap: SimulatedStreams(HARDWARE, count=count))
    return backend_for(device, pin_budget=PinBudget(read_host_memory().pin_budget_bytes))


def pinned_bytes_per_s(
    device: torch.device, *, size_bytes: int = SIZES[-1], streams: Sequence[int] = STREAMS
) -> tuple[int, float]:
    """The fewest copy streams that come within `KNEE` of the best speed from page-locked memory on an idle device, and
    this best speed in bytes per second.

    Args:
        device: Target of the copies.
        size_bytes: Size of one copy.
        streams: Numbers of streams to try.

    Raises:
        BlockSwapError: No speed could be measured.
    """
    asked = Asked(sizes=(size_bytes,), streams=tuple(streams), tiers=(HostTier.PINNED,), busy=False)
    rows = LinkBench(backend_of(device), asked).rows(quiet=True)
    found = {row.streams: row.gbytes_per_s for row in rows if row.gbytes_per_s is not None}
    if not found:
        raise BlockSwapError(f"the link to {device} could not be measured: {rows[0].reason}")
    best = max(found.values())
    return min(count for count, speed in found.items() if speed >= KNEE * best), best * 1e9


class LinkBench:
    """Measures one device's link.

    Args:
        backend: The device.
        asked: What to measure.
    """

    def __init__(self, backend: Backend, asked: Asked) -> None:
        self._backend = backend
        self._asked = asked
        self._loads = (IDLE, BUSY) if asked.busy else (IDLE,)
        self._products: tuple[Products, ...] = ()
        self._why_no_products = ""
        self._ends = 0.0

    def rows(self, *, quiet: bool) -> list[Row]:
        """All figures, by size, memory, streams and load. No page stays locked, even after an error."""
        self._ends = time.perf_counter() + SECONDS
        if self._asked.busy:
            try:
                self._products = make_products(self._open(1))
            except RuntimeError as failure:  # no memory, or the vendor's library has no such product
                self._why_no_products = f"no matrix product can run: {_first_line(failure)}"
        sizes = tqdm(self._asked.sizes, unit="size", disable=quiet or None)
        return [row for size in sizes for row in self._of_size(size)]

    def _open(self, count: int) -> Streams:
        return self._backend.open_streams(count, True)  # noqa: FBT003 - copies overlap compute

    def _of_size(self, size: int) -> list[Row]:
        try:
            pages = self._make_pages(size)
        except HostMemoryError as failure:
            rows = [row for tier in self._asked.tiers for row in self._empty(size, tier)]
            return [left for row in rows for left in self._left_out(row, _first_line(failure))]
        try:
            return [row for tier in self._asked.tiers for row in self._of_tier(pages, size, tier)]
        finally:
            pages.unpin()

    def _make_pages(self, size: int) -> PageMemory:
        """Ordinary memory, written once: untouched pages all map to one page of zeros.

        Raises:
            HostMemoryError: The host has less memory available.
        """
        is_simulated = self._backend.device.type == "cpu"
        needed, available = size * (2 if is_simulated else 1), read_host_memory().available_bytes
        if needed > available:  # an overcommitting system would end the process at the first write
            raise HostMemoryError(f"not enough RAM: {needed:,} bytes needed, {available:,} available")
        pages = PageMemory(size, self._open(self._asked.streams[0]))
        pages.tensor.fill_(1)
        return pages

    def _of_tier(self, pages: PageMemory, size: int, tier: HostTier) -> list[Row]:
        pages.unpin()
        why_not = self._lock(pages) if tier is HostTier.PINNED else None
        slab = Slab(pages, size, (), tier)
        return [
            found
            for row in self._empty(size, tier)
            for found in (self._measure(row, slab) if why_not is None else self._left_out(row, why_not))
        ]

    def _lock(self, pages: PageMemory) -> str | None:
        """Page-locks; returns the reason if it is refused."""
        registrar, budget = self._backend.registrar, self._backend.pin_budget
        if registrar is None:
            return f"nothing can be page-locked for {self._backend.device}"
        if pages.size > budget.left_bytes:
            return f"{pages.size:,} bytes are more than the {budget.left_bytes:,} that may be page-locked here"
        result = pages.pin(registrar, budget)
        return f"{pages.size:,} bytes could not be page-locked: {register_result(result)}" if result else None

    def _empty(self, size: int, tier: HostTier) -> list[Row]:
        return [Row(size_bytes=size, streams=count, memory=tier.value) for count in self._asked.streams]

    def _left_out(self, row: Row, reason: str) -> list[Row]:
        return [replace(row, load=load, reason=reason) for load in self._loads]

    def _measure(self, row: Row, slab: Slab) -> list[Row]:
        """The figures of one size, kind of memory and number of streams."""
        if time.perf_counter() > self._ends:
            return self._left_out(row, f"the time limit of {SECONDS:.0f} s was over")
        streams = self._open(row.streams)
        assert slab.pages is not None
        slab.pages.settle()
        slab.pages.use(streams)
        try:
            with window(streams, row.size_bytes) as transfer:
                copy_ms = idle_ms(transfer, slab)
                if copy_ms <= 0:
                    return self._left_out(row, "the copy was too short for the device's clock")
                idle = replace(row, gbytes_per_s=_gbytes_per_s(row.size_bytes, copy_ms))
                return [idle, self._beside(row, transfer, slab, copy_ms)] if self._asked.busy else [idle]
        except DeviceMemoryError as failure:
            return self._left_out(row, _first_line(failure))

    def _beside(self, row: Row, transfer: Transfer, slab: Slab, copy_ms: float) -> Row:
        row = replace(row, load=BUSY)
        if not self._products:
            return replace(row, reason=self._why_no_products)
        products = choose_products(self._products, copy_ms)
        count = products.count_for(copy_ms)
        found = beside_products(transfer, slab, products, count=count)
        if found is None:
            return replace(row, reason=f"{count} products of {products.each_ms:.2f} ms ended before the copy")
        row = replace(row, gbytes_per_s=_gbytes_per_s(row.size_bytes, found.copy_ms))
        if found.slowdown is None:
            return replace(row, reason="slowdown unknown: the copy ended before one product had run")
        return replace(row, product_slowdown=round(found.slowdown, 4) + 0.0)  # turns -0.0 into 0.0


def _gbytes_per_s(nbytes: int, ms: float) -> float:
    return round(nbytes / ms / 1e6, 4)


def _first_line(failure: BaseException) -> str:
    """The cause alone: the advice in the message is for runs in ComfyUI."""
    return str(failure).split("\n")[0].split(";")[0]


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({parse_bytes(part) for part in text.split(",")}))
    except ValueError as cause:
        raise argparse.ArgumentTypeError(str(cause)) from cause
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1 byte, got {text!r}")
    return sizes


def _streams(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    counts = tuple(sorted({int(part) for part in parts if part.isdecimal()}))
    if not all(part.isdecimal() for part in parts) or counts[0] < 1 or counts[-1] > MOST_STREAMS:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 1 to {MOST_STREAMS}, such as 1,2,4; got {text!r}"
        )
    return counts


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text!r}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 0, also if some are missing."""
    parser = argparse.ArgumentParser(prog="benchmarks.link", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu (simulated), cuda or cuda:N")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="sizes of a copy, separated by commas")
    parser.add_argument(
        "--streams", type=_streams, default=STREAMS, help="numbers of copy streams, separated by commas"
    )
    parser.add_argument(
        "--busy", action=argparse.BooleanOptionalAction, default=True, help="measure during matrix products as well"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--markdown", type=_file, help="file for the tables")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    try:
        device = choose_device(options.device)
    except SettingsError as failure:
        parser.error(str(failure))
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected auto, cpu, cuda or cuda:N, got {options.device!r}")
    is_simulated = device.type == "cpu"
    tiers = (HostTier.PINNED,) if is_simulated else (HostTier.PINNED, HostTier.PAGEABLE)
    asked = Asked(sizes=options.sizes, streams=options.streams, tiers=tiers, busy=options.busy)
    rows = LinkBench(backend_of(device), asked).rows(quiet=options.json)
    heading = f"`{' '.join(['python -m benchmarks.link', *words])}`: {origin(device)}"
    notes = [SIMULATED] if is_simulated else []
    text = "\n".join([heading, "", tables(rows), *notes])
    if options.markdown is not None:
        options.markdown.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(
        json.dumps({"heading": heading, "rows": [asdict(row) for row in rows], "notes": notes})
        if options.json
        else text
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
