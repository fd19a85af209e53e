"""The host's side of a simulated device: worker, page-locking and backend."""

from __future__ import annotations

from collections.abc import Callable

from ...hardware.pinning import PinBudget, Registrar
from ..device.backend import Backend
from ..device.failures import staged_failure
from ..device.worker import Job
from ..errors import BlockSwapError
from .races import Clock
from .streams import SimulatedStreams


class _SimulatedJob:
    def __init__(self, worker: SimulatedWorker, work: Callable[[], None]) -> None:
        self._worker = worker
        self._work: Callable[[], None] | None = work
        self._submitted, _ = worker.streams.now()
        self._done: tuple[Clock, float] | None = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        streams = self._worker.streams
        with streams.acting_as_worker(self._submitted):
            work, self._work = self._work, None
            if work is None:
                return
            try:
                work()
            except BaseException as failure:
                self._failure = failure
                if not isinstance(failure, RuntimeError):
                    raise  # an interrupt, which reaches the host thread
            finally:
                self._done = streams.now()

    def wait(self) -> None:
        self._done_in_time()
        failure, self._failure = self._failure, None
        if isinstance(failure, BlockSwapError):
            raise failure
        if failure is not None:
            raise staged_failure(failure) from failure

    def join(self) -> bool:
        self._done_in_time()
        return self._failure is None

    def forget(self) -> None:
        self._work = self._failure = None

    def _done_in_time(self) -> None:
        self._worker.run_until(self)
        assert self._done is not None
        self._worker.streams.wait_until(*self._done)


class SimulatedWorker:
    """The worker. The random generator decides whether a job runs at once, or only when it is waited for."""

    def __init__(self, streams: SimulatedStreams) -> None:
        self.streams = streams
        self._jobs: list[_SimulatedJob] = []
        self._idle: list[_SimulatedJob] = []

    def submit(self, work: Callable[[], None]) -> Job:
        job = _SimulatedJob(self, work)
        self._jobs.append(job)
        if self.streams.lands_now():
            self.run_until(job)
        return job

    def submit_idle(self, work: Callable[[], None]) -> Job:
        self._idle.append(_SimulatedJob(self, work))
        job = self._idle[-1]
        while self._idle and not self._jobs and self.streams.lands_now():
            self._idle.pop(0).run()
        return job

    def cancel_idle(self) -> None:
        self._idle.clear()

    def stop(self) -> None:
        while self._jobs:
            self._jobs.pop(0).run()

    def run_until(self, job: _SimulatedJob) -> None:
        """Runs jobs in order until `job` is done; an idle job comes after those that are queued."""
        while job in self._jobs or (self._jobs and job in self._idle):
            self._jobs.pop(0).run()
        if job in self._idle:
            self._idle.remove(job)
            job.run()


class SimulatedRegistrar:
    """Page-locking that counts and can refuse.

    Args:
        refuse_after: Number of locks after which every further one fails with code 2; None never fails.
        streams: The device whose copies must be over when memory is unlocked; None checks nothing.
    """

    def __init__(self, *, refuse_after: int | None = None, streams: SimulatedStreams | None = None) -> None:
        self.locked: dict[int, int] = {}
        self._streams = streams
        if streams is not None:
            streams.locked = self.locked
        self._left = refuse_after

    def register(self, pointer: int, nbytes: int) -> int:
        if self._left is not None:
            if self._left <= 0:
                return 2
            self._left -= 1
        if pointer in self.locked:
            return 712
        self.locked[pointer] = nbytes
        return 0

    def unregister(self, pointer: int) -> int:
        nbytes = self.locked.pop(pointer, None)
        if nbytes is None:
            return 713
        if self._streams is not None:
            self._streams.host_writes(pointer, nbytes)
        return 0

    def consume_error(self) -> None:
        """No error stays pending."""


def simulated_backend(
    streams: SimulatedStreams, *, pin_budget: PinBudget | None = None, registrar: Registrar | None = None
) -> Backend:
    """A backend whose device is `streams`, for any plan."""
    return Backend(
        streams.device,
        open_streams=lambda count, overlap: streams,
        registrar=registrar or SimulatedRegistrar(streams=streams),
        pin_budget=pin_budget or PinBudget(1 << 62),
        make_worker=lambda _: SimulatedWorker(streams),
    )
