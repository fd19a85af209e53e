"""One copy of a slab through the engine's transfer, timed on an idle device and beside matrix products.

A copy lasts from the mark before its first chunk to the mark behind its last one, so that the host's calls for each
chunk are in it: of a small copy they are most. Beside matrix products it waits for nothing that is queued after its
slot was free, and that was before the products were queued.
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
"""After these no repeat begins."""
SIDES = (4096, 8192)
"""Rows and columns of the matrices. Three of 4096 take 96 MiB, more than the caches of most GPUs; on a fast one,
smaller products would be over before the host had queued the next with its mark, some 0.02 ms later."""
LONG_ENOUGH_MS = 1.0
"""Beyond it the next side is not needed: `MOST_PRODUCTS` of these cover the slowest copies that are worth measuring."""
BF16_CAPABILITY = (8, 0)
"""NVIDIA's first generation that multiplies bf16 (Ampere); torch gives every AMD card a higher number."""
TIMED_PRODUCTS = 5
BESIDE = 8
"""Products that a copy should have beside it, by whose time the side is chosen: those at its ends do not count."""
COVER = 2.0
"""Products are queued for so many times the duration of the idle copy."""
HEAD_MS = 4.0
"""And for this much more, in which the host queues the rest of them and the copy's chunks."""
LEAST_PRODUCTS = 4
MOST_PRODUCTS = 400
"""A stream takes about a thousand kernels and marks; then the host waits, and the copy would begin late."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Products:
    """Matrix products for the compute stream.

    Attributes:
        multiply: Queues one.
        each_ms: How long one takes on an otherwise idle device.
    """

    multiply: Callable[[Streams], object]
    each_ms: float

    def count_for(self, copy_ms: float) -> int:
        """How many run at least as long as a copy that takes `copy_ms` alone."""
        wanted = math.ceil((COVER * copy_ms + HEAD_MS) / self.each_ms)
        return min(MOST_PRODUCTS, max(LEAST_PRODUCTS, wanted))


@dataclass(frozen=True, slots=True)
class Beside:
    """A copy beside matrix products.

    Attributes:
        copy_ms: Its duration.
        slowdown: Duration of the products that ran wholly beside it over that of the same ones alone, less one; None
            if it was over before one had run.
    """

    copy_ms: float
    slowdown: float | None


@contextlib.contextmanager
def window(streams: Streams, slot_bytes: int) -> Iterator[Transfer]:
    """A transfer with one slot; no copy is under way any more at the end, however it is reached.

    Raises:
        DeviceMemoryError: The device has not so much left.
    """
    transfer = Transfer(streams)
    try:
        transfer.open_window(slots=1, slot_bytes=slot_bytes)
        yield transfer
    finally:
        try:
            transfer.reset()  # an interrupt may have struck between a copy and its event
        finally:
            transfer.close_window()


def make_products(streams: Streams) -> tuple[Products, ...]:
    """Products of growing matrices, at least one.

    Raises:
        RuntimeError: The device has no memory for the matrices, or its libraries do not multiply them.
    """
    made: list[Products] = []
    for side in SIDES:
        multiply = _multiplication(streams.device, side)
        made.append(Products(multiply, _each_ms(streams, multiply)))
        if made[-1].each_ms >= LONG_ENOUGH_MS:
            break
    return tuple(made)


def choose_products(made: Sequence[Products], copy_ms: float) -> Products:
    """The largest of which `BESIDE` fit beside a copy that takes `copy_ms` alone, or else the smallest."""
    fitting = [products for products in made if BESIDE * products.each_ms <= copy_ms]
    return fitting[-1] if fitting else made[0]


def idle_ms(transfer: Transfer, slab: Slab) -> float:
    """Milliseconds of a copy on an idle device; 0 if the device's clock saw none."""
    return _typical(transfer.streams, lambda: _copy_ms(_run(transfer, slab, None, 0)))


def beside_products(transfer: Transfer, slab: Slab, products: Products, *, count: int) -> Beside | None:
    """A copy beside `count` products; None if they were over before it was."""
    samples = _samples(transfer.streams, lambda: _beside_once(transfer, slab, products, count))
    covered = [sample for sample in samples if sample is not None]
    if not covered:
        return None
    slowdowns = [sample.slowdown for sample in covered if sample.slowdown is not None]
    return Beside(
        statistics.median(sample.copy_ms for sample in covered), statistics.median(slowdowns) if slowdowns else None
    )


def _beside_once(transfer: Transfer, slab: Slab, products: Products, count: int) -> Beside | None:
    # Each product is held against the one at its own place in a run without a copy, just before: a GPU at full power
    # lowers its clock from one product to the next.
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
    """Spans of `count` products on the compute stream and of a copy beside them, of those that are given."""
    streams = transfer.streams
    trace = transfer.trace = Trace(streams)
    with streams.guard():
        trace.start()
        if products is not None:
            _queue(streams, trace, products.multiply, count)
        if slab is not None:
            transfer.start(0, slab, block=0)
            # Behind the products: the slot is free for the next copy once both are over.
            transfer.wait(0)
            transfer.release(0)
        over = streams.event()
        streams.record(over, streams.current())
        streams.host_wait(over)  # reading the spans waits as well, but not in virtual time
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
    """Milliseconds of a product with nothing beside it."""

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
    """When the first chunk began and the last one ended."""
    chunks = _lane(spans, COPY)
    return min(span.begin_ms for span in chunks), max(span.end_ms for span in chunks)


def _copy_ms(spans: tuple[Span, ...]) -> float:
    begin, end = _ends(spans)
    return end - begin


def _typical(streams: Streams, take: Callable[[], float]) -> float:
    return statistics.median(_samples(streams, take))


def _samples(streams: Streams, take: Callable[[], T]) -> list[T]:
    """What `take` gives, after once that is not counted, as often as the time for one figure allows."""
    if streams.device.type == "cpu":
        return [take()]  # virtual time is the same every time
    begin = time.perf_counter()
    take()
    samples = [take()]
    while len(samples) < REPEATS and time.perf_counter() - begin < SECONDS_PER_FIGURE:
        samples.append(take())
    return samples
