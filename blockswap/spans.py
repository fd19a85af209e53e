"""Span: a period of a forward, a block's compute, a stall or a copy; sums over spans; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FORWARD = "forward"
COMPUTE = "compute"
STALL = "stall"
COPY = "copy"


@dataclass(frozen=True, slots=True)
class Span:
    """One period, in milliseconds from the start of the trace.

    Attributes:
        lane: `forward`, `compute`, `stall`, or `copy 0`, `copy 1`, … for the copy streams.
        block: The block that ran, was waited for, or was copied; for a forward, its number.
    """

    lane: str
    block: int
    begin_ms: float
    end_ms: float

    @property
    def duration_ms(self) -> float:
        """Length in milliseconds."""
        return self.end_ms - self.begin_ms


def total_ms(spans: Iterable[Span], lane: str) -> float:
    """Sum of the periods in one lane."""
    return sum(span.duration_ms for span in spans if span.lane == lane)


def busy_ms(spans: Iterable[Span], lane: str) -> float:
    """Time in which at least one of the lanes whose names begin with `lane` was busy."""
    busy, until = 0.0, float("-inf")
    for span in sorted((s for s in spans if s.lane.startswith(lane)), key=lambda span: span.begin_ms):
        busy += max(0.0, span.end_ms - max(until, span.begin_ms))
        until = max(until, span.end_ms)
    return busy
