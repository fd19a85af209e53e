"""Runs jobs in order in a thread beside the host thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from .failures import staged_failure


class Job(Protocol):
    """Work handed to a worker."""

    def wait(self) -> None:
        """Blocks the host until the work is done; raises what it raised."""

    def join(self) -> bool:
        """Blocks the host until the work has ended, also in failure; returns whether it succeeded."""


class Worker(Protocol):
    """Runs jobs in the order of `submit`, in parallel with the host thread."""

    def submit(self, work: Callable[[], None]) -> Job:
        """Queues `work`."""

    def stop(self) -> None:
        """Finishes the queued jobs and ends."""


@dataclass(frozen=True, slots=True)
class _ThreadJob:
    future: Future[None]

    def wait(self) -> None:
        failure = self.future.exception()
        if failure is not None:
            raise staged_failure(failure) from failure

    def join(self) -> bool:
        return self.future.exception() is None


THREAD_NAME = "blockswap staging"


class ThreadWorker:
    """One thread. Copies by torch release the GIL, so that the host thread keeps running meanwhile.

    Raises:
        RuntimeError: The system has no thread left.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)
        self._executor.submit(int).result()  # starts the thread: `submit` queues its job even if that fails

    def submit(self, work: Callable[[], None]) -> Job:
        return _ThreadJob(self._executor.submit(work))

    def stop(self) -> None:
        self._executor.shutdown()


def run_outside_workers(work: Callable[[], None]) -> None:
    """Runs work that waits for jobs of workers; in its own thread if a worker calls this, where the garbage collector
    may run a finalizer.
    """
    if threading.current_thread().name.startswith(THREAD_NAME):
        threading.Thread(target=work, name="blockswap finalizer").start()
    else:
        work()
