"""Weights that are not in page-locked memory: a worker copies or reads them while the host thread goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ..device.worker import Job, Worker
from ..model.layout import slab_offsets
from ..model.tensors import span_bytes
from ..plan.swap_plan import HostTier
from .pages import PageMemory
from .slabs import ComingSlab, Slab
from .store import HostStore


class UnlockedCopies:
    """Copies slabs that are not page-locked, or not filled yet, and blocks of the file tier, in a worker.

    The driver copies pageable memory in the thread that asks for it, after all that the copy stream waits for. In the
    host thread, no kernel could be queued until the block before is done.

    Args:
        store: Has the slabs.
        worker: Runs the copies.
        staging_bytes: Size of a staging slab, as planned; 0 if none is planned.
        locked: Whether the plan locks staging slabs.

    Attributes:
        worker: The same.
        slabs: The staging slabs, used in turn; empty until one is needed.
    """

    def __init__(self, store: HostStore, worker: Worker, *, staging_bytes: int, locked: bool) -> None:
        self._store = store
        self.worker = worker
        self.slabs: list[PageMemory] = []
        self._staging_bytes = staging_bytes if locked else 0
        self._locked = locked
        self._turn = 0

    def submit(self, slab: Slab | ComingSlab, copy: Callable[[torch.Tensor], tuple[Any, ...]]) -> Job:
        """Queues a job: `copy` the slab to the device, through the next staging slab if its tier needs one.

        Args:
            slab: The slab; the job fills it first if that is still to be done.
            copy: Queues copies from host memory, uint8, to the device; returns the events behind them.
        """

        def work() -> None:
            with self._store.streams.guard():  # Rule 8
                filled = slab if isinstance(slab, Slab) else slab.take()
                source = self._source(filled)
                source.in_flight[:] = copy(source.tensor)
                if source is not filled.pages and source not in self.slabs:
                    source.settle()  # before it goes, where an error could not be raised

        return self.worker.submit(work)

    def settle(self) -> None:
        """Once all slabs are filled: makes the staging slabs that are needed, unless there are some."""
        if self._store.is_lock_refused or self._staging_bytes:
            self.drain()  # first: slabs that a job may be copying are unlocked, and a job may make staging slabs itself
        if not self.slabs:
            self.slabs = self._store.make_staging(locked=self._locked)

    def drain(self) -> None:
        """Forgets the idle jobs that have not begun and waits until the worker has done all others."""
        self.worker.cancel_idle()
        last = self.worker.submit(lambda: None)
        try:
            last.join()
        finally:
            last.join()  # again: an interrupt ends the wait, but not the jobs

    def close(self) -> None:
        """Ends the worker, then gives the staging slabs up."""
        with contextlib.ExitStack() as stack:
            for staging in self.slabs:
                stack.callback(staging.unpin)  # each slab, even if another fails
            self.worker.cancel_idle()
            self.worker.stop()

    def _source(self, slab: Slab) -> PageMemory:
        """The memory that a slab is copied from: its own, or the staging slab that has its bytes now."""
        if slab.tier not in (HostTier.STAGED, HostTier.FILE):
            assert slab.pages is not None, "only the file tier has no memory"
            return slab.pages
        if not self.slabs and self._staging_bytes:
            self.slabs, self._staging_bytes = self._store.staging_of(self._staging_bytes), 0  # tries once
        nbytes, staging = slab.used_bytes, None
        if self.slabs and self.slabs[self._turn].size >= nbytes:
            staging, self._turn = self.slabs[self._turn], (self._turn + 1) % len(self.slabs)
        if slab.pages is not None:
            if staging is None:  # a page-lock was refused after the plan was made: see `settle`
                return slab.pages
            staging.settle()  # Rule 7
            self._store.streams.host_copy(staging.tensor[:nbytes], slab.pages.tensor[:nbytes])
            return staging
        staging = staging or PageMemory(nbytes, self._store.streams)
        staging.settle()  # Rule 7
        self._read(slab, staging)
        return staging

    def _read(self, slab: Slab, staging: PageMemory) -> None:
        offsets, _ = slab_offsets(map(span_bytes, slab.views))
        pieces = []
        for region, offset in zip(slab.regions, offsets, strict=True):
            assert region is not None, "the file tier needs each tensor's file"
            pieces.append((region, staging.buffer(offset, region.nbytes)))
        self._store.files.read(pieces)
