"""ForwardLog: counts a session's forwards and decides in which of them every block is timed."""

from __future__ import annotations

import sys
from collections.abc import Container

from .holdings import Holdings
from .spans import FORWARD
from .trace import Trace

EVERY_FORWARD = range(sys.maxsize)
"""For `traced`."""


class ForwardLog:
    """Forwards since the last adopt.

    Args:
        traced: As for `SwapSession`.

    Attributes:
        traced: The same; may be set between forwards.
        trace: What was recorded; None if nothing is.
        forwards: Forwards that ended well and ran a block.
        empty_forwards: Forwards that ended well and ran none.
        all_forwards: The former of all adopts together.
        all_empty_forwards: The latter of all adopts together.
    """

    def __init__(self, traced: Container[int] | None) -> None:
        self.traced = traced
        self._began: object = None
        self.trace: Trace | None = None
        self.forwards = self.all_forwards = 0
        self.empty_forwards = self.all_empty_forwards = 0

    def start(self, holds: Holdings) -> None:
        """An adopt: everything counts from here; what it prefetches belongs to the first forward."""
        assert holds.transfer is not None
        self.forwards = self.empty_forwards = 0
        if self.traced is not None:
            self.trace = Trace(holds.transfer.streams)
            self.trace.start()
            holds.transfer.trace = self.trace if 0 in self.traced else None

    def begin(self, holds: Holdings) -> None:
        """A forward begins: its time is taken, and what happens in it if it is one of those that are traced."""
        swapper, transfer = holds.swapper, holds.transfer
        assert swapper is not None
        assert transfer is not None
        swapper.entered = 0
        if self.trace is not None and self.traced is not None:
            swapper.trace = transfer.trace = self.trace if self.forwards in self.traced else None
            self._began = transfer.mark()

    def end(self, holds: Holdings) -> None:
        """A forward has ended well."""
        assert holds.swapper is not None
        assert holds.transfer is not None
        if not holds.swapper.entered:
            self.empty_forwards += 1
            self.all_empty_forwards += 1
            return
        if self.trace is not None:
            self.trace.add(FORWARD, self.forwards, self._began, holds.transfer.mark())
            self.trace.read_reached()  # or the events of a long run would pile up
        self.forwards += 1
        self.all_forwards += 1
