"""Whole pages of host memory, page-locked at their exact size."""

from __future__ import annotations

import _thread
import contextlib
import logging
import mmap
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...hardware.pinning import PinBudget, Registrar, collector_paused, register_result
from ..device.streams import Streams
from ..device.worker import Flag, join_workers, leave_workers
from ..errors import HostMemoryError
from ..model.layout import align

logger = logging.getLogger(__name__)


class _CallsBack:
    """Calls back before its memory goes. `weakref.finalize` would call too late: both classes below free their memory
    before weak references are cleared.
    """

    before_unmap: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.before_unmap is not None:
            self.before_unmap()


class _Pages(_CallsBack, mmap.mmap):
    """Anonymous pages."""


class _Heap(_CallsBack, bytearray):
    """Memory of the C library's heap."""


def _anonymous_pages(size: int) -> tuple[_CallsBack, int]:
    """A buffer that holds `size` bytes of whole pages, and their offset in it.

    Raises:
        OSError: The system has no memory for it.
        MemoryError: The same.
    """
    if sys.platform == "win32":
        return heap_pages(size)
    # Private, since Linux by default gives huge pages to private memory only, and filling and locking go page by page.
    pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(pages, "MADV_HUGEPAGE")
    return pages, 0


def heap_pages(size: int) -> tuple[_CallsBack, int]:
    """For Windows, whose `mmap` gives views of the paging file, which no driver promises to lock. ComfyUI locks
    memory of the heap there.
    """
    heap = _Heap(size + mmap.PAGESIZE)
    return heap, -torch.frombuffer(heap, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE


def _advise(pages: Any, *names: str) -> None:
    """Advises the kernel about pages, where the system knows the advice."""
    for name in names:
        advice = getattr(mmap, name, None)
        if advice is not None and isinstance(pages, mmap.mmap):
            with contextlib.suppress(OSError):  # a kernel built without it
                pages.madvise(advice)


class PageMemory:
    """Whole pages of anonymous host memory as a uint8 tensor; can be page-locked.

    Parameters point into the pages, which may therefore outlive this object. Before they are unmapped, the pages
    themselves wait for the last copy and unlock.

    Attributes:
        size: Bytes, in whole pages.
        tensor: The bytes.
        in_flight: Events behind the last copies that read the pages.
    """

    def __init__(self, nbytes: int, streams: Streams) -> None:
        self.size = align(max(nbytes, 1), mmap.PAGESIZE)
        try:
            self._pages, offset = _anonymous_pages(self.size)
        except (OSError, MemoryError) as cause:
            raise HostMemoryError(
                f"not enough RAM: the system refused {self.size:,} bytes for a block's weights; "
                "close other programs or use a quantised model"
            ) from cause
        with torch.inference_mode(mode=False):
            self.tensor = torch.frombuffer(self._pages, dtype=torch.uint8, count=self.size, offset=offset)
        self._offset = offset
        self._use = _Use(self.tensor.data_ptr(), self.size, streams)
        self._pages.before_unmap = self._use.end
        self.in_flight = self._use.in_flight

    @property
    def is_pinned(self) -> bool:
        """Whether the pages are locked."""
        return self._use.lock is not None

    def buffer(self, start: int, nbytes: int) -> memoryview:
        """A part of the bytes for a reader of files; give it up before the pages."""
        return memoryview(self._pages)[self._offset + start : self._offset + start + nbytes]  # type: ignore[arg-type]

    def use(self, streams: Streams) -> None:
        """Sets the device that reads the pages from now on; call `settle` first."""
        self._use.streams = streams

    def settle(self) -> None:
        """Waits on the host until no copy reads the pages, so that they may be written."""
        self._use.settle()

    def pin(self, registrar: Registrar, budget: PinBudget) -> int:
        """Locks the pages; returns 0 or the driver's error code. Fill them first: locking touches every page.

        A forked process does not inherit locked pages. The kernel would copy them at once (Linux commit 70e806e4e645)
        or let the device read stale ones where it does not count references (WSL2). And locked pages are not
        merged into huge pages, since ROCm stops its queues for that.
        """
        _advise(self._pages, "MADV_NOHUGEPAGE", "MADV_DONTFORK")
        result = -1
        try:
            with collector_paused():
                result = registrar.register(self.tensor.data_ptr(), self.size)
                if result != 0:
                    registrar.consume_error()
            if result == 0:
                self._use.lock = registrar, budget
                budget.take(self.size)  # last: nothing takes it back
        except BaseException:
            result, self._use.lock = -1, None
            registrar.unregister(self.tensor.data_ptr())  # the interrupt may have come after the registration
            registrar.consume_error()
            raise
        finally:
            if result != 0:
                _advise(self._pages, "MADV_DOFORK")
        return result

    def unpin(self) -> None:
        """Unlocks the pages after their last copy."""
        if self.is_pinned:
            self._use.unlock()
            _advise(self._pages, "MADV_DOFORK")


@dataclass(slots=True)
class _Use:
    """How the device uses pages: the copies that read them, and their lock. It lives as long as the pages."""

    pointer: int
    size: int
    streams: Streams
    in_flight: list[Any] = field(default_factory=list)
    lock: tuple[Registrar, PinBudget] | None = None

    def settle(self) -> None:
        for event in self.in_flight:
            self.streams.host_wait(event)  # Rule 6
        self.in_flight.clear()
        self.streams.host_writes(self.pointer, self.size)

    def unlock(self) -> None:
        if self.lock is None:
            return
        try:
            self.settle()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # if the device failed, it runs no copy any more
                self.settle()  # an interrupt ends the wait, but not the copy
            raise
        finally:
            self._unregister()

    def _unregister(self) -> None:
        assert self.lock is not None
        (registrar, budget), self.lock = self.lock, None
        try:
            result = registrar.unregister(self.pointer)
        except BaseException:
            registrar.unregister(self.pointer)  # the interrupt may have come first; unregistering twice is harmless
            raise
        finally:
            budget.give_back(self.size)
        if result != 0:
            registrar.consume_error()
            logger.warning("%d bytes of host memory could not be unlocked: %s", self.size, register_result(result))

    def end(self) -> None:
        """Called before the pages are unmapped."""
        try:
            self.settle() if self.lock is None else self.unlock()
        finally:
            self.streams.forget(self.pointer, self.size)


class Locking:
    """One thread that locks one slab's pages while the host thread fills the next slab.

    Locking takes long, since the driver walks every page, but it releases the GIL. The thread or the caller of `result`
    does the work, whichever comes first, so that nothing waits for a thread that an interrupt kept from starting.

    Args:
        pages: Filled pages.
        registrar: Locks them; a refusal is tried again once.
        budget: Counts the locked bytes.
    """

    def __init__(self, pages: PageMemory, registrar: Registrar, budget: PinBudget) -> None:
        self._pages = [pages]  # taken out before they are locked: a thread that is ending must not hold them
        self._registrar = registrar
        self._budget = budget
        self._code = -1
        self._failure: BaseException | None = None
        self._claim = threading.Lock()
        self._over = Flag()

    def start(self) -> None:
        """Starts the thread; if the system has none left, `result` does the work."""
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._lock_in_thread, ())  # Thread.start would wait until the thread runs

    @property
    def is_over(self) -> bool:
        """Whether the work has ended, also in failure."""
        return self._over.is_set

    def result(self) -> int:
        """Waits for the end, through an interrupt too; 0, or the driver's error code. Raises what locking raised."""
        try:
            self._lock()
            self._over.wait()
        finally:
            self._over.wait()  # again: an interrupt ends the wait, but not the work of the driver
        failure, self._failure = self._failure, None
        if failure is None:
            return self._code
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame: the cycle would hold the pages

    def _lock_in_thread(self) -> None:
        join_workers()
        try:
            self._lock()
        finally:
            leave_workers()

    def _lock(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._code = lock(self._pages.pop(), self._registrar, self._budget)
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `result`
            self._failure = failure
        finally:
            self._over.set()


def lock(pages: PageMemory, registrar: Registrar, budget: PinBudget) -> int:
    """Locks pages, with one retry; returns 0 or the driver's error code."""
    return pages.pin(registrar, budget) and pages.pin(registrar, budget)
