"""Runs jobs in order in a thread beside the host thread."""

from __future__ import annotations

import _thread
import contextlib
import queue
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..errors import BlockSwapError
from .failures import staged_failure


class Job(Protocol):
    """Work handed to a worker."""

    def run(self) -> None:
        """Does the work, unless it has been done: another job of the same worker needs it first."""

    def wait(self) -> None:
        """Blocks the host until the work is done; raises what it raised."""

    def join(self) -> bool:
        """Blocks the host until the work has ended, also in failure; returns whether it succeeded."""

    def forget(self) -> None:
        """Drops work that was forgotten, or its error: with the job they are a cycle, which may hold device memory."""


class Worker(Protocol):
    """Runs jobs one at a time, in parallel with the host thread: first those of `submit`, in order, then those of
    `submit_idle`, in order.
    """

    def submit(self, work: Callable[[], None]) -> Job:
        """Queues `work`."""

    def submit_idle(self, work: Callable[[], None]) -> Job:
        """Queues work that is done when nothing else is queued, or when it is waited for."""

    def cancel_idle(self) -> None:
        """Forgets the idle work that has not begun; the host waits for none of it any more."""

    def stop(self) -> None:
        """Finishes the queued jobs and ends."""


class _ThreadJob:
    """Flags and queues only: an interrupt inside Python's Event, Condition or executor can leave their locks held.

    Args:
        work: The work.
        promote: Called before the host waits; None for a job that is in the queue already.
    """

    def __init__(self, work: Callable[[], None], promote: Callable[[_ThreadJob], None] | None = None) -> None:
        self._work: Callable[[], None] | None = work
        self._promote = promote
        self._failure: BaseException | None = None
        self._succeeded = True
        self._over = Flag()

    def run(self) -> None:
        # Finished work must not keep the slot that it filled alive: device memory must be free at release.
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `wait`
            self._succeeded, self._failure = False, failure
        finally:
            self._over.set()

    def wait(self) -> None:
        self._wait()
        failure = self._take_failure()
        if failure is None:
            return
        try:
            if isinstance(failure, BlockSwapError) or not isinstance(failure, Exception):
                raise failure
            raise staged_failure(failure) from failure
        finally:
            del failure  # its traceback holds this frame: the cycle would hold device memory

    @property
    def was_interrupted(self) -> bool:
        """Whether an interrupt ended the work, which happens in the host thread only."""
        return self._failure is not None and not isinstance(self._failure, Exception)

    def join(self) -> bool:
        self._wait()
        self._take_failure()
        return self._succeeded

    def forget(self) -> None:
        self._work = None
        self._take_failure()

    def _wait(self) -> None:
        if self._promote is not None and not self._over.is_set:
            self._promote(self)
        self._over.wait()

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
"""Identifiers of the threads that do work for jobs; some may have ended."""


def join_workers() -> None:
    """Called in a thread that a job waits for: a finalizer that runs there must not wait for jobs."""
    running.add(_thread.get_ident())


def leave_workers() -> None:
    """Called in that thread when no job waits for it any more."""
    running.discard(_thread.get_ident())


class ThreadWorker:
    """One thread that ends with the process. Copies by torch release the GIL, so that the host thread keeps running.

    Raises:
        RuntimeError: The system has no thread left.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_ThreadJob | None] = queue.SimpleQueue()
        self._idle: deque[_ThreadJob] = deque()
        self._ended = Flag()
        # Thread.start would wait for an Event.
        _thread.start_new_thread(_work_off, (self._jobs, self._idle, self._ended))

    def submit(self, work: Callable[[], None]) -> Job:
        job = _ThreadJob(work)
        self._jobs.put(job)
        return job

    def submit_idle(self, work: Callable[[], None]) -> Job:
        job = _ThreadJob(work, promote=self._jobs.put)
        self._idle.append(job)
        self._jobs.put(_ThreadJob(_nothing))  # wakes the thread
        return job

    def cancel_idle(self) -> None:
        self._idle.clear()

    def stop(self) -> None:
        self._jobs.put(None)
        self._ended.wait()


def _nothing() -> None: ...


def _work_off(jobs: queue.SimpleQueue[_ThreadJob | None], idle: deque[_ThreadJob], ended: Flag) -> None:
    join_workers()
    try:
        while (job := _next(jobs, idle)) is not None:
            job.run()
            del job
    finally:
        leave_workers()
        ended.set()


def _next(jobs: queue.SimpleQueue[_ThreadJob | None], idle: deque[_ThreadJob]) -> _ThreadJob | None:
    """The next job, None to end; waits for one."""
    with contextlib.suppress(queue.Empty):
        return jobs.get_nowait()
    try:
        return idle.popleft()
    except IndexError:
        return jobs.get()


class InlineWorker:
    """For devices without streams: the host thread does each job at once, and idle jobs when they are waited for."""

    def submit(self, work: Callable[[], None]) -> Job:
        job = _ThreadJob(work)
        job.run()
        if job.was_interrupted:
            job.wait()  # now, and not where the next forward needs the work
        return job

    def submit_idle(self, work: Callable[[], None]) -> Job:
        return _ThreadJob(work, promote=_ThreadJob.run)

    def cancel_idle(self) -> None:
        """Idle work begins when it is waited for."""

    def stop(self) -> None:
        """No job is queued."""


def run_outside_workers(work: Callable[[], None]) -> None:
    """Runs work that waits for jobs; in its own thread if it is called in one that a job waits for, where the garbage
    collector may run a finalizer.
    """
    if _thread.get_ident() in running:
        _thread.start_new_thread(work, ())
    else:
        work()
