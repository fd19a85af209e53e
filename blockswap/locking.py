"""Page-locking beside the host thread: while one slab is locked, the next is filled."""

from __future__ import annotations

import threading

from .pages import PageMemory, PinBudget, Registrar


class Locking:
    """Pages that are being locked, in a thread that ends with it.

    The driver walks every page, and lets Python's other threads run meanwhile.

    Args:
        pages: What is locked, once it has been filled; a refusal is followed by one more try.
        registrar: Locks it.
        budget: What is locked counts there.
    """

    def __init__(self, pages: PageMemory, registrar: Registrar, budget: PinBudget) -> None:
        self._pages = pages
        self._registrar = registrar
        self._budget = budget
        self._code = 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._lock, name="blockswap locking", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no thread
            self._thread = None
            self._lock()

    def result(self) -> int:
        """Waits until it is done; 0, or the driver's error code. Raises what locking raised."""
        if self._thread is not None:
            try:
                self._thread.join()
            except BaseException:
                self._thread.join()  # an interrupt has ended the wait, and not the lock
                raise
        if self._failure is not None:
            raise self._failure
        return self._code

    def _lock(self) -> None:
        try:
            self._code = lock(self._pages, self._registrar, self._budget)
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `result`
            self._failure = failure


def lock(pages: PageMemory, registrar: Registrar, budget: PinBudget) -> int:
    """Locks pages, with one retry; 0, or the driver's error code."""
    return pages.pin(registrar, budget) and pages.pin(registrar, budget)
