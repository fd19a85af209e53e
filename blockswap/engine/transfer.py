"""Onload, wait, release: the order of copies and kernels, in eight happens-before rules.

[Note: happens-before]

Actors: the host thread, the staging worker, the compute stream C (the current stream at each block's begin) and the
copy streams K1..n. An event stands for its last record. The comments `Rule 1` to `Rule 8` mark the lines that keep
them.

1. Slots are allocated on C; a slot's free event is recorded on C then, and every K waits for it before its first copy.
   The same holds for residents, which the worker copies on a K after one event behind all their allocations.
2. A copy into a slot waits for the slot's free event, and for every ready event of its previous content.
3. A block on C waits for all ready events of its slot. If C is another stream than before, it waits for the old one.
4. A slot's free event is recorded on C when the next block begins or the forward ends, exceptions included.
5. The window and residents are given up only after C, and the stream they were allocated on, waits for every K.
6. A slab is written, unregistered or freed only after the host has waited for its last copy.
7. The worker writes a staging slab after a host-side wait for its last copy to the device; C is told to wait for a
   ready event only after the worker has recorded it.
8. Streams, events and memory belong to one device, and calls run with that device current.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import record_function

from ..device.streams import Streams
from ..device.worker import Job
from ..host.pages import PageMemory
from ..host.slabs import ComingSlab, Slab
from ..host.staging import UnlockedCopies
from ..model.layout import align
from ..plan.swap_plan import HostTier
from ..spans import COPY
from .trace import Trace

CHUNK_ALIGNMENT = 4096
"""A slab is cut for the copy streams at multiples of these bytes: whole pages, so that no two copies read one page."""


@dataclass(slots=True)
class Slot:
    """One device buffer of the window, with the events that guard it.

    Attributes:
        memory: uint8, `(slot_bytes,)`.
        free: Recorded on C when the block that used the slot has ended.
        ready: One per copy stream, recorded after its chunk.
        pending: The ready events of the current content.
        consumed: Whether C waits for `pending`, so that `free`, recorded after that wait, covers them.
        filling: The staging job that fills the slot, until the worker has recorded `pending`.
        filled_bytes: Bytes of the current content.
        block: The block of the current content, for labels.
        chunks: Per number of bytes, made once: copy stream, view of the slot and place in the source of each chunk. Not
            views of the source, which would keep its memory after its last use.
    """

    memory: torch.Tensor
    free: Any
    ready: tuple[Any, ...]
    pending: tuple[Any, ...] = ()
    consumed: bool = True
    filling: Job | None = None
    filled_bytes: int = 0
    block: int = -1
    chunks: dict[int, list[tuple[Any, torch.Tensor, slice]]] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    """What has been copied.

    Attributes:
        onloads: Copies of a slab into a slot.
        onloaded_bytes: Bytes of the onloads.
        placed_bytes: Bytes of residents and small tensors, copied to the device at adopt, with their alignment.
        returned_bytes: Bytes copied back to the host: only buffers that a forward has changed, never weights.
    """

    onloads: int = 0
    onloaded_bytes: int = 0
    placed_bytes: int = 0
    returned_bytes: int = 0


class Transfer:
    """A window of slots on one device, filled from slabs. See [Note: happens-before].

    For each block, inside the streams' guard, the caller calls `computed` for the previous block, `follow`, `release`
    and `start` as the ring requires, then `wait`.

    Args:
        streams: The device's primitives.
        counters: Counts the copies; new counters if None.

    Attributes:
        unlocked: Copies what is not page-locked or not filled yet; None to copy all slabs in the host thread.
        host_copies: The host thread copies filled slabs itself, even those that are not page-locked.
        trace: Receives the spans of copies; None records nothing. May change between blocks.
    """

    def __init__(self, streams: Streams, counters: Counters | None = None) -> None:
        self.streams = streams
        self.counters = counters or Counters()
        self.unlocked: UnlockedCopies | None = None
        self.host_copies = False
        self.trace: Trace | None = None
        self._slots: tuple[Slot, ...] = ()
        self._allocated: Any = None  # behind the allocations beside the window
        self._compute: Any = None  # the stream that the last block was queued on
        self._home: Any = None  # the stream that memory was allocated on, and to which the allocator returns it

    def open_window(self, sizes: Sequence[int]) -> None:
        """Allocates the window.

        Args:
            sizes: Bytes of each slot.

        Raises:
            DeviceMemoryError: The device cannot hold all slots; `close_window` gives up those it holds.
        """
        with self.streams.guard():  # Rule 8
            self._home = self._compute = self.streams.current()
            for slot_bytes in sizes:
                # One by one, so that `close_window` gives up the slots before one that fails.
                free, *ready = (self.streams.event() for _ in range(1 + len(self.streams.copy_streams)))
                slot = Slot(self.streams.allocate(slot_bytes), free, tuple(ready))
                self._slots = (*self._slots, slot)
                self.streams.record(slot.free, self._compute)  # Rule 1

    def close_window(self) -> None:
        """Gives the window up; the device waits for a prefetch in flight, the host does not."""
        with self.streams.guard():  # Rule 8
            succeeded = self._join_worker()
            for event in self._drain_to_compute():
                if not succeeded:
                    self.streams.host_wait(event)  # Rule 6: a failed job has left no event behind
            slots, self._slots = self._slots, ()
            for slot in slots:
                self.streams.free(slot.memory)

    @property
    def window(self) -> tuple[torch.Tensor, ...]:
        """Each slot's memory, uint8 `(its bytes,)`."""
        return tuple(slot.memory for slot in self._slots)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory beside the window, uint8 `(nbytes,)`.

        Raises:
            DeviceMemoryError: The device has less left.
        """
        with self.streams.guard():  # Rule 8
            return self.streams.allocate(nbytes)

    def note_allocations(self) -> None:
        """All memory beside the window has been allocated: from now on, copies to it may run on a copy stream."""
        with self.streams.guard():  # Rule 8
            self._allocated = self.streams.event()
            self.streams.record(self._allocated, self.streams.current())  # Rule 1

    def place(self, memory: torch.Tensor, source: PageMemory, nbytes: int) -> Any:
        """Queues a copy of the first `nbytes` of `source` to memory beside the window; returns the event behind it.

        The copy runs on the compute stream until `note_allocations`, then on a copy stream: see `wait_placed`.
        """
        with self.streams.guard():  # Rule 8
            stream = self.streams.current() if self._allocated is None else self.streams.copy_streams[0]
            if self._allocated is not None:
                self.streams.wait(stream, self._allocated)  # Rule 1
            copied = self.streams.event()
            self.streams.copy(memory[:nbytes], source.tensor[:nbytes], stream)
            self.streams.record(copied, stream)
            source.in_flight.append(copied)  # Rule 6
        self.counters.placed_bytes += nbytes
        return copied

    def wait_placed(self, copied: Any) -> None:
        """Makes all later work on the compute stream wait for a copy of `place`."""
        self.follow()
        self.streams.wait(self._compute, copied)  # Rule 3

    def settle_placed(self) -> None:
        """After an exception in `place`: waits on the host for all its copies."""
        with self.streams.guard():  # Rule 8
            for stream in (self.streams.current(), self.streams.copy_streams[0]):
                copied = self.streams.event()
                self.streams.record(copied, stream)
                self.streams.host_wait(copied)  # Rule 6: an interrupted copy has left no event with its source

    def free(self, memory: torch.Tensor) -> None:
        """Gives up memory beside the window; call `close_window` first."""
        with self.streams.guard():  # Rule 8
            self.streams.free(memory)

    def mark(self) -> Any:
        """Records a point in time on the compute stream, for the trace."""
        with self.streams.guard():  # Rule 8
            return self.streams.mark(self.streams.current())

    def computed(self, block: int, index: int | None) -> None:
        """All kernels of `block`, which read slot `index` unless that is None, have been queued."""
        if index is not None:
            slot = self._slots[index]
            self.streams.reads(slot.memory, slot.filled_bytes, self._compute)
        self.streams.computed(block, self._compute)

    def follow(self) -> None:
        """Reads the compute stream again, before a block and after a forward; a new one waits for the previous one."""
        before, self._compute = self._compute, self.streams.current()
        if before is not None and self._compute != before:
            self._wait_for(self._compute, before)  # Rule 3

    def release(self, index: int) -> None:
        """The block in slot `index` has ended: the slot may be overwritten."""
        self.streams.record(self._slots[index].free, self._compute)  # Rule 4

    def start(self, index: int, slab: Slab | ComingSlab, *, block: int) -> None:
        """Starts to copy the slab of `block` into slot `index`; returns at once, unless the host thread copies pageable
        memory.
        """
        slot, nbytes = self._slots[index], slab.used_bytes
        if slot.filling is not None:
            self._await_worker(slot)
        is_direct = slab.tier is HostTier.PINNED or (self.host_copies and slab.tier is HostTier.PAGEABLE)
        if isinstance(slab, Slab) and (is_direct or self.unlocked is None):
            assert slab.pages is not None, "the file tier needs a worker"
            slab.pages.in_flight[:] = self._copy_chunks(slot, slab.pages.tensor, nbytes, block)
        else:
            assert self.unlocked is not None, "the worker fills slabs"
            slot.filling = self.unlocked.submit(slab, lambda source: self._copy_chunks(slot, source, nbytes, block))
        slot.block, slot.filled_bytes = block, nbytes
        self.counters.onloads += 1
        self.counters.onloaded_bytes += nbytes

    def wait(self, index: int) -> None:
        """Makes all later work on the compute stream wait until slot `index` is filled."""
        slot = self._slots[index]
        if slot.filling is not None:
            self._await_worker(slot)  # Rule 7
        for event in slot.pending:
            self.streams.wait(self._compute, event)  # Rule 3
        slot.consumed = True
        self.streams.reads(slot.memory, slot.filled_bytes, self._compute)

    def _drain_to_compute(self) -> list[Any]:
        """Makes the compute stream wait for the copy streams, and the home stream for both, so that their memory may be
        given up. Returns the events behind the copies.
        """
        self.follow()
        compute = self._compute
        events = [self._wait_for(compute, copies) for copies in self.streams.copy_streams]  # Rule 5
        if self._home is not None and self._home != compute:
            self._wait_for(self._home, compute)  # Rule 5
        return events

    def _wait_for(self, stream: Any, other: Any) -> Any:
        """Makes `stream` wait for everything queued on `other`; returns the event between them."""
        event = self.streams.event()
        self.streams.record(event, other)
        self.streams.wait(stream, event)
        return event

    def reset(self) -> None:
        """After an exception at any point: waits on the host for all copies, then empties and frees every slot."""
        with self.streams.guard():  # Rule 8
            self._join_worker()
            for event in self._drain_to_compute():
                self.streams.host_wait(event)  # Rule 6: an interrupted copy has left no event with its slab
            compute = self.streams.current()
            for slot in self._slots:
                slot.pending, slot.consumed, slot.filled_bytes = (), True, 0
                self.streams.record(slot.free, compute)  # Rule 4

    def close(self) -> None:
        """Gives up the window and the staging slabs, and ends the worker."""
        unlocked, self.unlocked = self.unlocked, None
        try:
            self.close_window()
        finally:
            if unlocked is not None:
                unlocked.close()

    def _copy_chunks(self, slot: Slot, source: torch.Tensor, nbytes: int, block: int) -> tuple[Any, ...]:
        """Queues copies of `source` into `slot`, one chunk per copy stream; returns the events behind them. The worker
        calls it for slabs that are not page-locked.
        """
        chunks = slot.chunks.get(nbytes)
        if chunks is None:
            chunks = slot.chunks[nbytes] = self._cut(slot, nbytes)
        before = () if slot.consumed else slot.pending
        slot.pending, slot.consumed = slot.ready[: len(chunks)], False
        for copies, _, _ in chunks:
            self.streams.wait(copies, slot.free)  # Rules 1 and 2
            for previous in before:
                self.streams.wait(copies, previous)  # Rule 2
        trace = self.trace  # read once for all chunks: the host may change it while the worker copies
        for i, (copies, target, part) in enumerate(chunks):
            begin = None if trace is None else self.streams.mark(copies)
            self.streams.copy(target, source[part], copies)
            if trace is not None:
                trace.add(f"{COPY} {i}", block, begin, self.streams.mark(copies))
            self.streams.record(slot.pending[i], copies)
        return slot.pending

    def _cut(self, slot: Slot, nbytes: int) -> list[tuple[Any, torch.Tensor, slice]]:
        """For each copy stream that gets a chunk: the stream, the chunk of the slot, its place in the source."""
        copies = self.streams.copy_streams
        chunk = align(max(-(-nbytes // len(copies)), self.streams.least_chunk_bytes), CHUNK_ALIGNMENT)
        parts = [slice(begin, min(begin + chunk, nbytes)) for begin in range(0, nbytes, chunk)]
        with torch.inference_mode(mode=False):
            return [(stream, slot.memory[part], part) for stream, part in zip(copies, parts, strict=False)]

    def _await_worker(self, slot: Slot) -> None:
        """Waits until the worker has recorded the slot's ready events; raises what the worker raised."""
        assert slot.filling is not None
        slot.filling.wait()
        slot.filling = None  # only now: `reset` joins a job whose wait was interrupted

    def _join_worker(self) -> bool:
        """Waits for the worker, which queues copies until then, and drops its errors; whether all jobs succeeded."""
        succeeded = True
        for slot in self._slots:
            if slot.filling is not None:
                succeeded = slot.filling.join() and succeeded
                slot.filling = None  # only now: an interrupt ends the wait, but not the job
        return succeeded


class LabelledTransfer:
    """The steps of a transfer under labels in a profiler's trace, each with the index of its block."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def start(self, index: int, slab: Slab | ComingSlab, *, block: int) -> None:
        with record_function(f"blockswap::onload ({block})"):
            self._transfer.start(index, slab, block=block)

    def wait(self, index: int) -> None:
        with record_function(f"blockswap::wait ({self._transfer._slots[index].block})"):
            self._transfer.wait(index)

    def release(self, index: int) -> None:
        with record_function(f"blockswap::release ({self._transfer._slots[index].block})"):
            self._transfer.release(index)
