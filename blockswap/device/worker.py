"""Runs jobs in order in a thread beside the host thread."""

from __future__ import annotations

import _thread
import queue
from collections.abc import Callable
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


class _ThreadJob:
    """Flags and queues only: an interrupt inside Python's Event, Condition or executor can leave their locks held."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._failure: BaseException | None = None
        self._succeeded = True
        self._over = Flag()

    def run(self) -> None:
        # Finished work must not keep the slot that it filled alive: device memory must be free at release.
        work, self._work = self._work, None
        assert work is not None, "a job runs once"
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `wait`
            self._succeeded, self._failure = False, failure
        finally:
            self._over.set()

    def wait(self) -> None:
        self._over.wait()
        failure = self._take_failure()
        if failure is not None:
            raise staged_failure(failure) from failure

    def join(self) -> bool:
        self._over.wait()
        self._take_failure()
        return self._succeeded

    def _take_failure(self) -> BaseException | None:
        """The failure, once. Its traceback holds this job and the slot it filled: kept here, it would be a cycle that
        holds device memory until the garbage collector runs.
        """
        failure, self._failure = self._failure, None
        return failure


class Flag:
    """Set once, by one thread; `wait` in another may be interrupted at any point and called again."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        """Ends every `wait`."""
        self.is_set = True
        self._lock.release()

    def wait(self) -> None:
        """Blocks until it is set."""
        while not self.is_set:  # an interrupt may come after the lock was acquired, so never wait for it alone
            self._lock.acquire(timeout=0.1)


running: set[int] = set()
"""Identifiers of the threads of all workers."""


class ThreadWorker:
    """One thread that ends with the process. Copies by torch release the GIL, so that the host thread keeps running.

    Raises:
        RuntimeError: The system has no thread left.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_ThreadJob | None] = queue.SimpleQueue()
        self._ended = Flag()
        _thread.start_new_thread(_work_off, (self._jobs, self._ended))  # Thread.start would wait for an Event

    def submit(self, work: Callable[[], None]) -> Job:
        job = _ThreadJob(work)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        self._jobs.put(None)
        self._ended.wait()


def _work_off(jobs: queue.SimpleQueue[_ThreadJob | None], ended: Flag) -> None:
    thread = _thread.get_ident()
    running.add(thread)
    try:
        while (job := jobs.get()) is not None:
            job.run()
            del job
    finally:
        running.discard(thread)
        ended.set()


def run_outside_workers(work: Callable[[], None]) -> None:
    """Runs work that waits for jobs of workers; in its own thread if a worker calls this, where the garbage collector
    may run a finalizer.
    """
    if _thread.get_ident() in running:
        _thread.start_new_thread(work, ())
    else:
        work()
