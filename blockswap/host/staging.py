"""The staged tier: a worker copies pageable slabs through page-locked staging slabs while the host thread goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..device.streams import Streams
from ..device.worker import Job, Worker
from .pages import PageMemory
from .slabs import Slab


class Staging:
    """Page-locked staging slabs, used in turn, and the worker that fills them.

    Args:
        streams: The device that reads them.
        slabs: Page-locked memory, each as large as the largest staged slab.
        worker: Fills them.
    """

    def __init__(self, streams: Streams, slabs: Sequence[PageMemory], worker: Worker) -> None:
        self._streams = streams
        self.slabs = slabs
        self._worker = worker
        self._turn = 0

    def submit(self, slab: Slab, copy: Callable[[torch.Tensor], tuple[Any, ...]]) -> Job:
        """Queues a job: fill the next staging slab from `slab`, then `copy` it to the device.

        Args:
            slab: A slab that is not page-locked.
            copy: Queues copies from the staging memory, uint8, to the device; returns the events behind them.
        """
        staging = self.slabs[self._turn]
        self._turn = (self._turn + 1) % len(self.slabs)

        def work() -> None:
            with self._streams.guard():  # Rule 8
                staging.settle()  # Rule 7
                nbytes = slab.used_bytes
                self._streams.host_copy(staging.tensor[:nbytes], slab.pages.tensor[:nbytes])
                staging.in_flight[:] = copy(staging.tensor)

        return self._worker.submit(work)

    def close(self) -> None:
        """Ends the worker, then gives the staging slabs up."""
        with contextlib.ExitStack() as stack:
            for staging in self.slabs:
                stack.callback(staging.unpin)  # each slab, even if another fails
            self._worker.stop()
