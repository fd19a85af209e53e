"""Slabs that are not page-locked: a worker copies them to the device while the host thread goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..device.streams import Streams
from ..device.worker import Job, Worker
from ..plan.swap_plan import HostTier
from .pages import PageMemory
from .slabs import Slab


class UnlockedCopies:
    """Copies slabs that are not page-locked, in a worker.

    The driver copies pageable memory in the thread that asks for it, after all that the copy stream waits for. In the
    host thread, no kernel could be queued until the block before is done.

    Args:
        streams: The device.
        slabs: Page-locked staging slabs, used in turn, each as large as the largest staged slab; empty if none is
            staged.
        worker: Runs the copies.
    """

    def __init__(self, streams: Streams, slabs: Sequence[PageMemory], worker: Worker) -> None:
        self._streams = streams
        self.slabs = slabs
        self._worker = worker
        self._turn = 0

    def submit(self, slab: Slab, copy: Callable[[torch.Tensor], tuple[Any, ...]]) -> Job:
        """Queues a job: `copy` the slab to the device; if it is staged, through the next staging slab.

        Args:
            slab: A slab that is not page-locked.
            copy: Queues copies from host memory, uint8, to the device; returns the events behind them.
        """
        source = slab.pages
        if slab.tier is HostTier.STAGED:
            source = self.slabs[self._turn]
            self._turn = (self._turn + 1) % len(self.slabs)

        def work() -> None:
            with self._streams.guard():  # Rule 8
                if source is not slab.pages:
                    source.settle()  # Rule 7
                    nbytes = slab.used_bytes
                    self._streams.host_copy(source.tensor[:nbytes], slab.pages.tensor[:nbytes])
                source.in_flight[:] = copy(source.tensor)

        return self._worker.submit(work)

    def close(self) -> None:
        """Ends the worker, then gives the staging slabs up."""
        with contextlib.ExitStack() as stack:
            for staging in self.slabs:
                stack.callback(staging.unpin)  # each slab, even if another fails
            self._worker.stop()
