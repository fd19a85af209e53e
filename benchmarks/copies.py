"""One copy of a slab through the engine's transfer, timed on an idle device and during matrix products.

A copy lasts from the mark before its first chunk to the mark after its last one. So it includes the host's calls for
each chunk, which take most of the time of a small copy. Its slot is free before the matrix products are queued, so the
copy does not wait for them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from wanvideo_enhanced_blockswap.blockswap.device.streams import Streams
from wanvideo_enhanced_blockswap.blockswap.engine.trace import Trace
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.spans import COMPUTE, COPY, Span

REPEATS = 9
SECONDS_PER_FIGURE = 0.2
"""No repeat starts after this time."""
SIDES = (4096, 8192)
"""Rows and columns of the matrices. Three of 4096 take 96 MB, more than the caches of most GPUs. On a fast GPU,
smaller products would end before the host has queued the next one with its mark, some 0.02 ms later."""
LONG_ENOUGH_MS = 1.0
"""A product this long needs no larger side: `MOST_PRODUCTS` of them cover the slowest copies worth measuring."""
BF16_CAPABILITY = (8, 0)
"""NVIDIA's first generation that multiplies bf16 (Ampere); torch gives every AMD card a higher number."""
TIMED_PRODUCTS = 5
BESIDE = 8
"""Products that should run during a copy, from which the side follows: those at its ends do not count."""
COVER = 2.0
"""Duration of the queued products, over that of the copy on an idle device."""
HEAD_MS = 4.0
"""Added to it: time in which the host queues the other products and the copy's chunks."""
LEAST_PRODUCTS = 4
MOST_PRODUCTS = 400
"""A stream holds about a thousand kernels and marks; beyond that the host waits, and the copy would start late."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Products:
    """Matrix products for the compute stream.

    Attributes:
        multiply: Queues one product.
        each_ms: Duration of one on an otherwise idle device.
    """

    multiply: Callable[[Streams], object]
    each_ms: float

    def count_for(self, copy_ms: float) -> int:
        """How many products to queue for a copy that takes `copy_ms` alone."""
        wanted = math.ceil((COVER * copy_ms + HEAD_MS) / self.each_ms)
        return min(MOST_PRODUCTS, max(LEAST_PRODUCTS, wanted))


@dataclass(frozen=True, slots=True)
class Beside:
    """A copy during matrix products.

    Attributes:
        copy_ms: Its duration.
        slowdown: Duration of the products that ran entirely during the copy, over that of the same ones alone, minus
            1; None if the copy ended before one had run.
    """

    copy_ms: float
    slowdown: float | None


@contextlib.contextmanager
def window(streams: Streams, slot_bytes: int) -> Iterator[Transfer]:
    """A transfer with one slot; at the end, also after an error, no copy is under way.

    Raises:
        DeviceMemoryError: The device has less memory left.
    """
    transfer = Transfer(streams)
    try:
        transfer.open_window((slot_bytes,))
        yield transfer
    finally:
        try:
            transfer.reset()  # an interrupt may have come between a copy and its event
        finally:
            transfer.close_window()


def make_products(streams: Streams) -> tuple[Products, ...]:
    """Products of growing size, at least one.

    Raises:
        RuntimeError: The device has no memory for the matrices, or its libraries cannot multiply them.
    """
    made: list[Products] = []
    for side in SIDES:
        multiply = _multiplication(streams.device, side)
        made.append(Products(multiply, _each_ms(streams, multiply)))
        if made[-1].each_ms >= LONG_ENOUGH_MS:
            break
    return tuple(made)


def choose_products(made: Sequence[Products], copy_ms: float) -> Products:
    """The largest products of which `BESIDE` fit into `copy_ms`, the duration of a copy alone; else the smallest."""
    fitting = [products for products in made if BESIDE * products.each_ms <= copy_ms]
    return fitting[-1] if fitting else made[0]


def idle_ms(transfer: Transfer, slab: Slab) -> float:
    """Milliseconds of a copy on an idle device; 0 if it is too short for the device's clock."""
    return _typical(transfer.streams, lambda: _copy_ms(_run(transfer, slab, None, 0)))


def beside_products(transfer: Transfer, slab: Slab, products: Products, *, count: int) -> Beside | None:
    """A copy during `count` products; None if they ended before the copy."""
    samples = _samples(transfer.streams, lambda: _beside_once(transfer, slab, products, count))
    covered = [sample for sample in samples if sample is not None]
    if not covered:
        return None
    slowdowns = [sample.slowdown for sample in covered if sample.slowdown is not None]
    return Beside(
        statistics.median(sample.copy_ms for sample in covered), statistics.median(slowdowns) if slowdowns else None
    )


def _beside_once(transfer: Transfer, slab: Slab, products: Products, count: int) -> Beside | None:
    # Each product is compared with the one at the same position in a run without a copy, just before: a GPU at full
    # power lowers its clock from one product to the next.
    alone = _lane(_run(transfer, None, products, count), COMPUTE)
    spans = _run(transfer, slab, products, count)
    queued, begin, end = _lane(spans, COMPUTE), *_ends(spans)
    if begin < queued[0].begin_ms or queued[-1].end_ms < end:
        return None
    inside = [i for i, span in enumerate(queued) if begin <= span.begin_ms and span.end_ms <= end]
    if not inside:
        return Beside(end - begin, None)
    return Beside(
        end - begin, sum(queued[i].duration_ms for i in inside) / sum(alone[i].duration_ms for i in inside) - 1
    )


def _run(transfer: Transfer, slab: Slab | None, products: Products | None, count: int) -> tuple[Span, ...]:
    """Spans of `count` products on the compute stream and of a copy at the same time; either may be None."""
    streams = transfer.streams
    trace = transfer.trace = Trace(streams)
    with streams.guard():
        trace.start()
        if products is not None:
            _queue(streams, trace, products.multiply, count)
        if slab is not None:
            transfer.start(0, slab, block=0)
            # After the products: the slot is free for the next copy when both have ended.
            transfer.wait(0)
            transfer.release(0)
        over = streams.event()
        streams.record(over, streams.current())
        streams.host_wait(over)  # reading the spans waits too, but not in virtual time
        return trace.spans()


def _queue(streams: Streams, trace: Trace, multiply: Callable[[Streams], object], count: int) -> None:
    compute = streams.current()
    marks = [streams.mark(compute)]
    for _ in range(count):
        multiply(streams)
        marks.append(streams.mark(compute))
    for i, (begin, end) in enumerate(itertools.pairwise(marks)):
        trace.add(COMPUTE, i, begin, end)


def _each_ms(streams: Streams, multiply: Callable[[Streams], object]) -> float:
    """Milliseconds of a product alone."""

    def take() -> float:
        trace = Trace(streams)
        with streams.guard():
            trace.start()
            _queue(streams, trace, multiply, TIMED_PRODUCTS)
            return statistics.median(span.duration_ms for span in trace.spans())

    return _typical(streams, take)


def _multiplication(device: torch.device, side: int) -> Callable[[Streams], object]:
    """Queues a product on the compute stream; a virtual one on a simulated device."""
    if device.type == "cpu":
        return lambda streams: streams.computed(0, streams.current())
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else torch.float16
    one, other = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(one)
    return lambda streams: torch.mm(one, other, out=product)


def _lane(spans: tuple[Span, ...], lane: str) -> list[Span]:
    return [span for span in spans if span.lane.startswith(lane)]


def _ends(spans: tuple[Span, ...]) -> tuple[float, float]:
    """Start of the first chunk and end of the last one."""
    chunks = _lane(spans, COPY)
    return min(span.begin_ms for span in chunks), max(span.end_ms for span in chunks)


def _copy_ms(spans: tuple[Span, ...]) -> float:
    begin, end = _ends(spans)
    return end - begin


def _typical(streams: Streams, take: Callable[[], float]) -> float:
    return statistics.median(_samples(streams, take))


def _samples(streams: Streams, take: Callable[[], T]) -> list[T]:
    """Results of `take`, without the first, as many as the time for one figure allows."""
    if streams.device.type == "cpu":
        return [take()]  # virtual time is the same every time
    begin = time.perf_counter()
    take()
    samples = [take()]
    while len(samples) < REPEATS and time.perf_counter() - begin < SECONDS_PER_FIGURE:
        samples.append(take())
    return samples
