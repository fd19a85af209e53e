"""Page-locking beside the host thread: while one slab is locked, the next is filled."""

from __future__ import annotations

import _thread
import threading

from .pages import PageMemory, PinBudget, Registrar


class Locking:
    """Pages that are locked in a thread, which ends with that.

    The driver walks every page, and lets Python's other threads run meanwhile. Whoever comes first does the work, the
    thread or who asks for the result: a thread that an interrupt has kept from being started is not waited for.

    Args:
        pages: What is locked, once it has been filled; a refusal is followed by one more try.
        registrar: Locks it.
        budget: What is locked counts there.
    """

    def __init__(self, pages: PageMemory, registrar: Registrar, budget: PinBudget) -> None:
        self._pages = pages
        self._registrar = registrar
        self._budget = budget
        self._code = -1
        self._failure: BaseException | None = None
        self._claim = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """Begins; where the system gives no thread, `result` does the work."""
        try:
            _thread.start_new_thread(self._lock, ())  # unlike Thread.start, it waits for nothing
        except RuntimeError:
            return

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way any more."""
        return self._over.is_set()

    def result(self) -> int:
        """Waits until it is over, interrupted or not; 0, or the driver's error code. Raises what locking raised."""
        try:
            self._lock()
            self._over.wait()
        except BaseException:
            self._over.wait()  # an interrupt has ended the wait, and not the lock
            raise
        failure, self._failure = self._failure, None
        if failure is None:
            return self._code
        try:
            raise failure
        finally:
            del failure  # its traceback, which has this frame, would hold the pages

    def _lock(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._code = lock(self._pages, self._registrar, self._budget)
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `result`
            self._failure = failure
        finally:
            self._over.set()


def lock(pages: PageMemory, registrar: Registrar, budget: PinBudget) -> int:
    """Locks pages, with one retry; 0, or the driver's error code."""
    return pages.pin(registrar, budget) and pages.pin(registrar, budget)
