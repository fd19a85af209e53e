"""What a steady automatic forward costs the host: few files, few Python calls, one preparation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from run_bench import SMALL_VIDEO, Bench
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.run.machine import LastKnownReadings
from wanvideo_enhanced_blockswap.blockswap.run.run import SwapRun
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar

PACKAGE = Path(sys.modules["wanvideo_enhanced_blockswap"].__file__ or "").parent
TESTS = Path(__file__).parent
MOST_CALLS = 250
MOST_FILES = 15


def of_the_model(frame: FrameType) -> bool:
    """Whether a call belongs to the model: made by torch's modules, or by the test that is the model's user."""
    file = Path(frame.f_code.co_filename)
    return TESTS in file.parents or "torch" in file.parts


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Python calls by file, those of the model and of its user left out."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and not of_the_model(frame):
            calls[frame.f_code.co_filename] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


class Guard:
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class Paced(InlineStreams):
    """Every mark comes a millisecond behind the one before, so that no forward is slower than another."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._now = 0.0

    def guard(self) -> AbstractContextManager[object]:
        return Guard()  # in the place of torch.cuda.device, whose calls are torch's

    def mark(self, stream: str) -> float:
        self._now += 1e-3
        return self._now


@pytest.fixture
def steady() -> Bench:
    """Eight blocks of which some are swapped, on a device without streams, after its plan has settled."""
    bench = Bench(room=5)
    backend = bench.simulation.backend
    streams = Paced()
    in_place = Backend(
        torch.device("cpu"),
        lambda count, overlap: streams,
        SimulatedRegistrar(),
        backend.pin_budget,
        backend.make_worker,
    )
    bench.run = SwapRun(bench.model.named, bench.run.planner.settings, bench.machine, in_place, root=bench.model)
    bench.forward(times=12)
    assert 0 < bench.swapped < 8
    return bench


def test_a_steady_forward_enters_few_files_and_makes_few_calls(steady: Bench) -> None:
    with counted_calls() as calls:
        steady.forward()
    files = {name for name in calls if PACKAGE in Path(name).parents}
    assert len(files) <= MOST_FILES, sorted(files)
    assert calls.total() <= MOST_CALLS, calls.most_common()


def test_a_forward_is_prepared_once_and_reads_the_card_once(steady: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    for name in ("memory", "host", "link", "unused_cache_bytes"):
        real = getattr(LastKnownReadings, name)
        monkeypatch.setattr(
            LastKnownReadings, name, lambda self, name=name, real=real: asked.update([name]) or real(self)
        )
    started = []
    real_start = steady.run.planner.start
    monkeypatch.setattr(type(steady.run.planner), "start", lambda self, one: started.append(one) or real_start(one))
    steady.run.prepare(SMALL_VIDEO)
    steady.forward()
    assert started == [SMALL_VIDEO]
    assert asked == {"memory": 1, "unused_cache_bytes": 1}
    steady.forward()
    assert len(started) == 2
