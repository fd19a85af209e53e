"""Runs jobs in order in a thread beside the host thread."""

from __future__ import annotations

import queue
import threading
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
    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._done = threading.Event()
        self._succeeded = False
        # Its traceback holds this job and the slot that the job fills. `wait` and `join` clear it: the cycle would hold
        # device memory until the garbage collector runs.
        self._failure: BaseException | None = None

    def run(self) -> None:
        # Finished work must not keep its slot alive: `release` promises that the device memory is free.
        work, self._work = self._work, None
        assert work is not None, "a job runs once"
        try:
            work()
            self._succeeded = True
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `wait`
            self._failure = failure
        finally:
            self._done.set()

    def wait(self) -> None:
        self._done.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise staged_failure(failure) from failure

    def join(self) -> bool:
        self._done.wait()
        self._failure = None
        return self._succeeded


class ThreadWorker:
    """One daemon thread. Copies by torch release the GIL, so that the host thread keeps running meanwhile."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_ThreadJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work_off, args=(self._jobs,), name="blockswap staging", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> Job:
        job = _ThreadJob(work)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()


def _work_off(jobs: queue.SimpleQueue[_ThreadJob | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job
