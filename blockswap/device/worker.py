"""Jobs that run beside the host thread, in order, and the thread that runs them."""

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
        """Blocks the host until the work is over, however it ended; whether it ended well."""


class Worker(Protocol):
    """Runs jobs in the order of `submit`, beside the host thread."""

    def submit(self, work: Callable[[], None]) -> Job:
        """Queues `work`."""

    def stop(self) -> None:
        """Finishes what is queued and ends."""


class _ThreadJob:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._done = threading.Event()
        self._ended_well = True
        self._failure: BaseException | None = None

    def run(self) -> None:
        # Finished work must not keep the slot it filled alive: device memory must be free at release.
        work, self._work = self._work, None
        assert work is not None, "a job runs once"
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - handed to the host thread, which raises it in `wait`
            self._ended_well, self._failure = False, failure
        finally:
            self._done.set()

    def wait(self) -> None:
        self._done.wait()
        failure = self._take_failure()
        if failure is not None:
            raise staged_failure(failure) from failure

    def join(self) -> bool:
        self._done.wait()
        self._take_failure()
        return self._ended_well

    def _take_failure(self) -> BaseException | None:
        """The failure, once. Its traceback holds this job and the slot it filled: kept here, it would be a cycle that
        holds device memory until the garbage collector runs.
        """
        failure, self._failure = self._failure, None
        return failure


class ThreadWorker:
    """One daemon thread. Jobs of torch copies release the GIL, so the host thread runs on beside them."""

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
