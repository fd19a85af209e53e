"""What happened when: spans of compute, stall and copies, in the device's own time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .streams import Streams

COMPUTE = "compute"
STALL = "stall"
COPY = "copy"


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of time.

    Attributes:
        lane: `compute`, `stall`, or `copy 0`, `copy 1`, … for the copy streams.
        block: The block that ran, was waited for, or was copied.
        begin_ms: From the begin of the trace.
        end_ms: From the begin of the trace.
    """

    lane: str
    block: int
    begin_ms: float
    end_ms: float

    @property
    def duration_ms(self) -> float:
        """Length in milliseconds."""
        return self.end_ms - self.begin_ms


@dataclass(slots=True)
class Trace:
    """Records marks while it runs and turns them into spans afterwards: reading a mark waits for the device.

    What is recorded is kept until the next `start`.

    Attributes:
        streams: Where the marks are set.
    """

    streams: Streams
    _marks: list[tuple[str, int, Any, Any]] = field(default_factory=list)
    _origin: Any = None

    def start(self) -> None:
        """Forgets what was recorded; time counts from here."""
        self._marks = []
        with self.streams.guard():
            self._origin = self.streams.mark(self.streams.current())

    def add(self, lane: str, block: int, begin: Any, end: Any) -> None:
        """One stretch between two marks."""
        self._marks.append((lane, block, begin, end))

    def spans(self) -> tuple[Span, ...]:
        """All spans so far, in the order they were recorded."""
        read = self.streams.elapsed_ms
        return tuple(
            Span(lane, block, read(self._origin, begin), read(self._origin, end))
            for lane, block, begin, end in self._marks
        )


def total_ms(spans: tuple[Span, ...], lane: str) -> float:
    """Time in one lane."""
    return sum(span.duration_ms for span in spans if span.lane == lane)
