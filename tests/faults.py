"""Calls from the engine to the outside, each of which can be made to fail at its k-th call."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from run_bench import LARGE_VIDEO, SMALL_VIDEO, Bench
from toys import toy
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, PlanError
from wanvideo_enhanced_blockswap.blockswap.host import pages
from wanvideo_enhanced_blockswap.blockswap.run.run import SwapRun
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar, SimulatedWorker
from wanvideo_enhanced_blockswap.blockswap.simulation.races import WORKER

COUNT = 4
PAGE = 4096
PINNED_PAGES = 3
"""Two staging slabs and one slab: of the swapped blocks one is pinned and the others are staged."""


class DriverError(RuntimeError):
    """What a driver raises when it is asked for something that it cannot do."""


@dataclass(frozen=True)
class Place:
    """Something the engine asks for.

    Attributes:
        name: What is asked for.
        of: The object that is asked, from a bench.
        method: Its method.
        error: What it raises the like of, or the code that it returns.
    """

    name: str
    of: Callable[[Bench], Any]
    method: str
    error: BaseException | int


def _streams(bench: Bench) -> Any:
    return bench.simulation.streams


def _registrar(bench: Bench) -> SimulatedRegistrar:
    return bench.simulation.registrar


def _machine(bench: Bench) -> Any:
    return bench.machine


DRIVER = DriverError("unspecified launch failure")
REFUSED = torch.OutOfMemoryError("out of memory")
NO_MEMORY = OSError(12, "Cannot allocate memory")
FULL_DISK = OSError(28, "No space left on device")
LOST = RuntimeError("the GPU has fallen off the bus")
INTERRUPT = KeyboardInterrupt("the user has pressed Cancel")

DEVICE = ("copy", "record", "wait", "host_wait", "event", "mark", "reached", "elapsed_ms", "host_copy", "current")
READINGS = ("memory", "host", "link", "unused_cache_bytes", "allocated_bytes", "peak_bytes", "reset_peak")

PLACES = [
    Place("device memory", _streams, "allocate", REFUSED),
    *[Place(f"device: {method}", _streams, method, DRIVER) for method in DEVICE],
    Place("page lock: no memory", _registrar, "register", 2),
    Place("page lock: unsupported", _registrar, "register", 801),
    Place("page unlock", _registrar, "unregister", 713),
    *[Place(f"reading: {method}", _machine, method, LOST) for method in READINGS],
    *[
        Place(f"reading without a file: {method}", _machine, method, OSError(24, "Too many open files"))
        for method in READINGS[:2]
    ],
    Place("host memory", lambda _: pages, "_Pages", NO_MEMORY),
    Place("worker", lambda _: SimulatedWorker, "submit", DriverError("can't start new thread")),
    Place("file replaced", lambda _: os, "replace", FULL_DISK),
    Place("folder made", lambda _: Path, "mkdir", FULL_DISK),
]
"""With what each raises by itself."""

INTERRUPTED = [
    Place(f"interrupt at {place.name}", place.of, place.method, INTERRUPT)
    for place in PLACES
    if place.name not in ("device: host_copy", "page lock: no memory", "page lock: unsupported")
    and not place.name.startswith("reading without")
]
"""The same, with an interrupt there. None reaches the worker's thread, which locks pages."""


INJECTED: dict[str, int] = {}
"""Faults by place in this session, printed at its end."""


class Armed:
    """One place that fails at its k-th call, once.

    Attributes:
        has_struck: Whether it has failed.
        raised: What it has raised. New each time: an error keeps the frames that it went through, and what they hold.
    """

    def __init__(self, place: Place, k: int) -> None:
        self.has_struck = False
        self.raised: BaseException | None = None
        self._place = place
        self._k = k

    @contextlib.contextmanager
    def at(self, bench: Bench) -> Iterator[None]:
        """While this lasts, calls are counted."""
        place, calls = self._place, itertools.count()
        target = place.of(bench)
        original = getattr(target, place.method)

        def asked(*arguments: Any, **keywords: Any) -> Any:
            is_worker = bench.simulation.streams._actor == WORKER
            if (is_worker and place.error is INTERRUPT) or next(calls) != self._k:
                return original(*arguments, **keywords)
            self.has_struck = True
            if isinstance(place.error, BaseException):
                self.raised = type(place.error)(*place.error.args)
                raise self.raised
            if place.method == "unregister":
                original(*arguments, **keywords)  # the call fails although the lock is gone
            return place.error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, place.method, asked)
            yield


def new_bench(folder: Path) -> Bench:
    """A run that pins one slab, stages others, measures the link, checks each copy and writes a trace."""
    settings = SwapSettings(debug_mode=True)
    return Bench(2.6, settings=settings, count=COUNT, trace_dir=folder, pin_bytes=PINNED_PAGES * PAGE)


def full_run(bench: Bench) -> None:
    """Everything that a run does: plan, place, forwards that are timed, another video, other settings, report, and a
    second run.
    """
    bench.forward(SMALL_VIDEO, times=4)
    bench.forward(LARGE_VIDEO)
    bench.run.use(SwapSettings(auto_hardware_tuning=False, blocks_to_swap=COUNT, debug_mode=True))
    bench.forward(LARGE_VIDEO)
    bench.run.release()
    bench.forward(SMALL_VIDEO)
    bench.run.close()


def check_afterwards(bench: Bench, failure: BaseException | None, armed: Armed) -> None:
    """The failure is ours and names its cause; nothing is left; the next run is right."""
    if failure is not None:
        assert isinstance(failure, (BlockSwapError, KeyboardInterrupt)), repr(failure)
        assert armed.raised in chain(failure) or isinstance(failure, PlanError), repr(failure)
    if bench.run.session.state.value != "closed":
        if bench.run.session.state.value == "running":
            raise AssertionError("a forward has never ended")
        bench.forward(SMALL_VIDEO)
    bench.run.close()
    assert_nothing_left(bench)
    again = SwapRun(bench.model.named, SwapSettings(), bench.machine, bench.simulation.backend, root=bench.model)
    bench.run = again
    bench.forward(SMALL_VIDEO, times=2)
    again.close()
    assert_nothing_left(bench)


def assert_nothing_left(bench: Bench) -> None:
    assert bench.simulation.streams.allocated_bytes == 0
    assert bench.simulation.registrar.locked == {}
    assert bench.simulation.pin_budget.used_bytes == 0
    fresh = toy(COUNT)
    for (name, found), expected in zip(bench.model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def chain(failure: BaseException | None) -> list[object]:
    """A failure, what it came from and while what it came."""
    found: list[object] = []
    while failure is not None and failure not in found:
        found.append(failure)
        failure = failure.__cause__ or failure.__context__
    return found


def strike(place: Place, k: int, folder: Path) -> bool:
    """One full run in which the place fails at its k-th call, and what comes after; whether it was called so often."""
    bench, armed, failure = new_bench(folder), Armed(place, k), None
    try:
        with armed.at(bench):
            full_run(bench)
    except (BlockSwapError, KeyboardInterrupt) as struck:
        failure = struck
    check_afterwards(bench, failure, armed)
    return armed.has_struck
