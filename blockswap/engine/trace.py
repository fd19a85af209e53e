"""Trace: when blocks, copies and forwards ran, in the device's own time."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..device.failures import translate_device_errors
from ..device.streams import Streams
from ..spans import FORWARD, Span

if TYPE_CHECKING:  # both record in a trace
    from .others import OneAtATime
    from .swapper import BlockSwapper
    from .transfer import Transfer

EVERY_FORWARD = range(sys.maxsize)
"""For `traced`: all forwards."""

MOST_SPANS = 200_000
"""Spans that are kept: those of about 1,000 forwards of 40 blocks (14B) with two copy streams."""


@dataclass(slots=True)
class Trace:
    """Records marks while blocks run and turns them into spans later, since reading a mark waits for the device.

    Spans are kept until the next `start`. The staging worker adds its copies while the host thread collects.

    Attributes:
        streams: Where the marks are recorded.
        dropped: Number of spans beyond `MOST_SPANS`, which were not recorded.
        forward_ms: Duration of each forward that the device has passed, in order.
    """

    streams: Streams
    _marks: deque[tuple[str, int, Any, Any]] = field(default_factory=deque)
    _spans: list[Span] = field(default_factory=list)
    _origin: Any = None
    dropped: int = 0
    forward_ms: list[float] = field(default_factory=list)

    @translate_device_errors("a trace was beginning")
    def start(self) -> None:
        """Drops all spans; their times count from here on."""
        self._marks, self._spans, self.forward_ms = deque(), [], []
        with self.streams.guard():
            self._origin = self.streams.mark(self.streams.current())

    def add(self, lane: str, block: int, begin: Any, end: Any) -> None:
        """Records a span between two marks."""
        if len(self._marks) + len(self._spans) < MOST_SPANS:
            self._marks.append((lane, block, begin, end))
        else:
            self.dropped += 1

    def read_reached(self) -> None:
        """Makes spans of the marks that the device has passed; does not wait."""
        while self._marks and self.streams.reached(self._marks[0][3]):
            self._read(*self._marks.popleft())

    @translate_device_errors("a trace was being read")
    def collect(self) -> tuple[Span, ...]:
        """The spans that the device has passed, in the order of `add`; does not wait."""
        self.read_reached()
        return tuple(self._spans)

    @translate_device_errors("a trace was being read")
    def spans(self) -> tuple[Span, ...]:
        """All spans so far, in the order of `add`; waits until the device has passed the last."""
        while self._marks:
            self._read(*self._marks.popleft())
        return tuple(self._spans)

    def _read(self, lane: str, block: int, begin: Any, end: Any) -> None:
        read = self.streams.elapsed_ms
        span = Span(lane, block, read(self._origin, begin), read(self._origin, end))
        self._spans.append(span)
        if lane == FORWARD:
            self.forward_ms.append(span.end_ms - span.begin_ms)


class ForwardLog:
    """Counts forwards and records when they ran, from each adopt on.

    Args:
        traced: As for `SwapSession`.

    Attributes:
        traced: The same; may be set between forwards.
        trace: The trace; None before the first adopt, or if nothing is traced.
        forwards: Forwards that ended well and ran a block.
        empty_forwards: Forwards that ended well and ran none.
        all_forwards: `forwards` of all adopts together.
        all_empty_forwards: `empty_forwards` of all adopts together.
    """

    def __init__(self, traced: Container[int] | None) -> None:
        self.traced = traced
        self._began: object = None
        self.trace: Trace | None = None
        self.forwards = self.all_forwards = 0
        self.empty_forwards = self.all_empty_forwards = 0

    def start(self, transfer: Transfer) -> None:
        """Counts from here on, at an adopt; the copies that it prefetches belong to the first forward."""
        self.forwards = self.empty_forwards = 0
        if self.traced is not None:
            self.trace = Trace(transfer.streams)
            self.trace.start()
            transfer.trace = self.trace if 0 in self.traced else None

    def begin(self, swapper: BlockSwapper | OneAtATime, transfer: Transfer) -> None:
        """Starts a forward's time, and records its blocks if it is one of those that are traced."""
        if self.trace is not None and self.traced is not None:
            swapper.trace = transfer.trace = self.trace if self.forwards in self.traced else None
            self._began = transfer.mark()

    def end(self, swapper: BlockSwapper | OneAtATime, transfer: Transfer) -> None:
        """Counts a forward that ended well."""
        if not swapper.entered:
            self.empty_forwards += 1
            self.all_empty_forwards += 1
            return
        if self.trace is not None:
            self.trace.add(FORWARD, self.forwards, self._began, transfer.mark())
            self.trace.read_reached()  # so that the events of a long run do not pile up
        self.forwards += 1
        self.all_forwards += 1
