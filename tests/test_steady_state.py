"""In steady state a forward allocates nothing on the device, makes no event and waits for nothing on the host."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest
import torch
import wanvideo_enhanced_blockswap.blockswap as package
from pretend_accelerator import install, is_supported
from toys import Block, Model, alternating, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import simulated_backend
from wanvideo_enhanced_blockswap.blockswap.simulation.races import HOST
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedStreams

COUNT = 6
COSTLY = ("allocate", "free", "event", "host_wait", "elapsed_ms")
"""What a driver takes long for, or what makes the host wait for the device."""


class Counting(SimulatedStreams):
    """Counts by primitive what the host thread asks of the device, which never says that it has reached a mark."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.calls: Counter[str] = Counter()

    def reached(self, mark: float) -> bool:
        return False


def counted(name: str):
    asked = getattr(SimulatedStreams, name)

    def call(streams: Counting, *arguments, **options):
        if streams._actor == HOST:
            streams.calls[name] += 1
        return asked(streams, *arguments, **options)

    return call


for primitive in (*COSTLY, "mark", "record", "wait", "copy"):
    setattr(Counting, primitive, counted(primitive))


def session_of(model: Model, planner, counting: Counting, **options) -> SwapSession:
    return SwapSession(model.named, planner, simulated_backend(counting), root=model, **options)


PLANS = [
    pytest.param(fixed_plan(alternating(COUNT)), 3, id="half"),
    pytest.param(fixed_plan([True] * COUNT), 6, id="all"),
    pytest.param(fixed_plan([True] * COUNT, slots=3), 6, id="three slots"),
    pytest.param(fixed_plan([True] * COUNT, slots=1), 6, id="one slot"),
    pytest.param(fixed_plan([i >= COUNT // 2 for i in range(COUNT)]), 3, id="the last blocks"),
    pytest.param(fixed_plan([True] * COUNT, tiers=HostTier.STAGED), 6, id="staged"),
    pytest.param(fixed_plan([True] * COUNT, slots=COUNT), 0, id="a slot for each"),
]


@pytest.mark.parametrize(("planner", "onloads"), PLANS)
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("traced", [None, range(1)], ids=["untraced", "traced once"])
def test_a_forward_asks_the_device_only_for_copies_and_their_order(
    planner, onloads: int, streams: int, traced: range | None
) -> None:
    counting = Counting(count=streams)
    model, x = toy(COUNT), torch.randn(3, 16)
    with torch.no_grad(), session_of(model, planner, counting, traced=traced) as session:
        for _ in range(3):
            with session.forward():
                model(x)
        before = session.counters.onloads
        counting.calls.clear()
        for _ in range(4):
            with session.forward():
                model(x)
        assert session.counters.onloads - before == 4 * onloads
        assert {name: counting.calls[name] for name in COSTLY} == dict.fromkeys(COSTLY, 0)
        # Start and end of a forward, if any part of the run is traced.
        assert counting.calls["mark"] == (0 if traced is None else 4 * 2)
        # For each copy: its slot's free event and those of its former content; for each block: its ready events.
        assert counting.calls["record"] <= 4 * COUNT * (1 + streams)
        assert counting.calls["wait"] <= 4 * COUNT * (1 + 3 * streams)


def test_the_counters_count() -> None:
    counting, model = Counting(), toy(COUNT)
    with torch.no_grad(), session_of(model, fixed_plan([True] * COUNT), counting) as session:
        with session.forward():
            model(torch.randn(3, 16))
        session.release()
    assert all(counting.calls[name] for name in ("allocate", "free", "event", "copy"))


@pytest.mark.skipif(is_supported() is not None, reason=str(is_supported()))
def test_a_device_with_books_of_its_own_counts_no_allocation_either() -> None:
    hpu = install()
    device = torch.device("hpu", 0)
    model = toy(COUNT)
    backend = backend_for(device, pin_budget=PinBudget(1 << 40))
    planner = fixed_plan([True] * COUNT, slots=1, tiers=HostTier.PAGEABLE, overlap=False)
    with torch.no_grad(), SwapSession(model.named, planner, backend) as session:

        def enter_all() -> None:
            with session.forward():
                for block in range(COUNT):
                    session.enter(block)

        enter_all()
        before, copied = hpu.allocation_count(), hpu.copy_stats()["h2d_bytes"]
        for _ in range(3):
            enter_all()
        assert hpu.allocation_count() == before
        assert hpu.copy_stats()["h2d_bytes"] - copied >= 3 * (COUNT - 1) * 3072


def test_a_slab_is_cut_between_all_copy_streams() -> None:
    counting = SimulatedStreams(count=3)
    copied: Counter[str] = Counter()
    copy = counting.copy

    def noted(target: torch.Tensor, source: torch.Tensor, stream) -> None:
        if stream.name != "compute":  # there, what stays on the device is copied once
            copied[stream.name] += target.nbytes
        copy(target, source, stream)

    counting.copy = noted
    model = Model([Block(96, 192) for _ in range(COUNT)])
    with torch.no_grad(), session_of(model, fixed_plan([True] * COUNT, streams=3), counting) as session:
        for _ in range(2):
            with session.forward():
                model(torch.randn(3, 96))
    assert set(copied) == {"copy 0", "copy 1", "copy 2"}
    assert len(set(copied.values())) == 1


def test_a_forward_makes_few_python_calls_in_few_files() -> None:
    """Of the package alone: 28 calls for a swapped block, 15 for a resident one, and a few for the forward itself."""
    device = torch.device("cpu")
    model, x = toy(8), torch.randn(3, 16)
    planner = fixed_plan(alternating(8), overlap=False, tiers=HostTier.PAGEABLE)
    folder = str(Path(package.__file__).parent)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls[frame.f_code.co_filename] += 1

    backend = backend_for(device, pin_budget=PinBudget(1 << 40))
    with torch.inference_mode(), SwapSession(model.named, planner, backend) as session:
        for _ in range(3):
            with session.forward():
                model(x)
        before = sys.getprofile()
        sys.setprofile(count)
        with session.forward():
            model(x)
        sys.setprofile(before)
    assert calls.total() <= 205
    assert len(calls) <= 8
