"""What fails in a session, and what it leaves behind: true weights, nothing locked, no thread."""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import gc
import sys
import threading
import time

import pytest
import torch
from test_session import COUNT, assert_nothing_left, run, truth_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from toys import Simulation, fixed_plan, replan, toy, window_of
from wanvideo_enhanced_blockswap.blockswap import PinBudget
from wanvideo_enhanced_blockswap.blockswap.device import worker
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.device.worker import ThreadWorker
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState, SwapSession
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError, HostMemoryError, PlanError, TransferError
from wanvideo_enhanced_blockswap.blockswap.host import pages
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware


@pytest.mark.parametrize("short", range(0, 26000, 1500))
def test_device_out_of_memory_at_adopt_changes_nothing_and_more_memory_cures_it(short: int) -> None:
    model = toy(COUNT)
    truth, swapped = truth_of(model), [i % 3 == 0 for i in range(COUNT)]
    measure = Simulation()
    with measure.session(toy(COUNT), fixed_plan(swapped)) as session:
        need = session.adopt().device_bytes
    if short >= need:
        short = need - 1
    simulation = Simulation(hardware=SimulatedHardware(memory_bytes=short))
    session = simulation.session(model, fixed_plan(swapped))
    with pytest.raises(DeviceMemoryError):
        session.adopt()
    assert session.state is SessionState.IDLE
    assert_nothing_left(simulation)
    assert torch.equal(truth_of(model), truth)
    object.__setattr__(simulation.streams.hardware, "memory_bytes", need)
    assert torch.equal(run(session, model), truth)
    session.close()
    assert_nothing_left(simulation)


@pytest.mark.parametrize("swapped", [0, 3])
def test_while_the_error_of_an_adopt_is_handled_nothing_is_locked(swapped: int) -> None:
    """Its traceback holds what the adopt made, and a smaller plan may be tried meanwhile."""
    simulation, model = Simulation(hardware=SimulatedHardware(memory_bytes=9000)), toy(6)
    session = simulation.session(model, fixed_plan([i == swapped for i in range(6)]))
    with pytest.raises(DeviceMemoryError) as failure:
        session.adopt()
    assert failure.value is not None
    assert simulation.registrar.locked == {}
    assert simulation.pin_budget.used_bytes == 0


@pytest.mark.parametrize("struck", ["copy", "record"])
@pytest.mark.parametrize("index", range(3))
def test_an_interrupt_while_a_block_is_placed_leaves_no_copy_behind(
    struck: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation, model = Simulation(lateness=1.0), toy(4)
    streams, session = simulation.streams, simulation.session(model, fixed_plan([True, False, False, True]))
    original, place, placing, left = getattr(streams, struck), Transfer.place, [False], [index]

    def noted(*arguments: object) -> None:
        placing[0] = True
        place(*arguments)
        placing[0] = False

    def striking(*arguments: object) -> None:
        if struck == "copy":
            original(*arguments)
        if placing[0]:
            left[0] -= 1
            if left[0] < 0:
                placing[0] = False
                raise KeyboardInterrupt
        if struck == "record":
            original(*arguments)

    monkeypatch.setattr(Transfer, "place", noted)
    monkeypatch.setattr(streams, struck, striking)
    with pytest.raises(KeyboardInterrupt):
        session.adopt()  # the registrar finds memory that is unlocked under a copy
    assert_nothing_left(simulation)


@pytest.mark.parametrize("pages_had", range(5))
def test_a_host_that_refuses_memory_leaves_true_weights_and_nothing_registered(
    pages_had: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, simulation = toy(4), Simulation(refuse_after=2)
    truth, left, real = truth_of(model), [pages_had], pages._Pages

    def stingy(*arguments: int, **options: int) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(12, "Cannot allocate memory")
        return real(*arguments, **options)

    session = simulation.session(model, fixed_plan([True] * 4))
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_Pages", stingy)
        with pytest.raises(HostMemoryError, match=r"the system refused [\d,]+ bytes for a block's weights"):
            session.adopt()
    assert_nothing_left(simulation)
    assert torch.equal(truth_of(model), truth)
    assert torch.equal(run(session, model), truth)
    session.close()


@pytest.mark.parametrize("locks", range(6))
def test_page_locking_refused_midway_still_computes_the_same(locks: int) -> None:
    model, simulation = toy(5), Simulation(refuse_after=locks)
    truth = truth_of(model)
    with simulation.session(model, fixed_plan([True] * 5)) as session:
        for _ in range(3):
            assert torch.equal(run(session, model), truth)
        assert bool(session.refusals) == (locks < 5)
    assert_nothing_left(simulation)


def test_a_plan_that_cannot_be_made_leaves_the_session_usable() -> None:
    model, simulation = toy(3), Simulation()
    truth = truth_of(model)

    def impossible(profile: object, held: object) -> None:
        raise PlanError("no plan fits")

    with simulation.session(model, fixed_plan([True] * 3)) as session:
        run(session, model)
        with pytest.raises(PlanError):
            replan(session, impossible)
        assert session.state is SessionState.IDLE
        replan(session, fixed_plan([False] * 3))
        assert torch.equal(run(session, model), truth)


def test_a_larger_weight_that_does_not_fit_fails_clearly_and_a_smaller_one_then_runs() -> None:
    model, simulation = toy(4), Simulation()
    with simulation.session(model, fixed_plan([True] * 4)) as session:
        run(session, model)
        limit = session.plan.device_bytes
        object.__setattr__(simulation.streams.hardware, "memory_bytes", limit)
        small = model.blocks[2].up
        model.blocks[2].up = nn.Parameter(torch.randn(500, 16), requires_grad=False)
        with pytest.raises(DeviceMemoryError):
            run(session, model)
        model.blocks[2].up = small
        assert torch.equal(run(session, model), truth_of(model))
    assert_nothing_left(simulation)


@pytest.mark.parametrize("ends", ["release", "close", "forward"])
def test_a_staged_copy_that_fails_is_said_and_ends_nothing_for_good(ends: str) -> None:
    model, simulation = toy(4), Simulation(lateness=1.0)
    truth = truth_of(model)
    session = simulation.session(model, fixed_plan([True] * 4, tiers=HostTier.STAGED))
    run(session, model)
    host_copy = simulation.streams.host_copy

    def fail(*arguments: object) -> None:
        raise TransferError("the host copy failed")

    simulation.streams.host_copy = fail
    with contextlib.suppress(TransferError):
        run(session, model) if ends == "forward" else getattr(session, ends)()
    simulation.streams.host_copy = host_copy
    if ends != "close":
        assert torch.equal(run(session, model), truth)
    session.close()
    assert_nothing_left(simulation)
    assert torch.equal(truth_of(model), truth)


def threaded(registrar: SimulatedRegistrar) -> Backend:
    """Copies in a real thread, over host memory."""
    device = torch.device("cpu")
    return Backend(
        device, lambda count, overlap: InlineStreams(device), registrar, PinBudget(1 << 40), lambda _: ThreadWorker()
    )


def staging_threads() -> list[int]:
    return sorted(worker.running & sys._current_frames().keys())


def test_a_real_worker_computes_the_same_and_no_thread_is_left_after_close() -> None:
    model, registrar = toy(COUNT), SimulatedRegistrar()
    truth = truth_of(model)
    session = SwapSession(model.named, fixed_plan([True] * COUNT, tiers=HostTier.STAGED), threaded(registrar))
    for round_ in range(20):
        assert torch.equal(run(session, model), truth)
        assert len(staging_threads()) == 1
        if round_ % 7 == 0:
            session.release()
            assert staging_threads() == []
    session.close()
    assert staging_threads() == []
    assert registrar.locked == {}


def test_a_real_worker_that_fails_is_said_and_no_thread_is_left_after_close() -> None:
    model, registrar = toy(COUNT), SimulatedRegistrar()
    truth = truth_of(model)
    backend = threaded(registrar)
    streams = InlineStreams(backend.device)
    broken = Backend(backend.device, lambda *_: streams, registrar, backend.pin_budget, backend.make_worker)
    session = SwapSession(model.named, fixed_plan([True] * COUNT, tiers=HostTier.STAGED), broken)
    run(session, model)

    def fail(*arguments: object) -> None:
        raise RuntimeError("the disk is on fire")

    streams.host_copy = fail
    with pytest.raises(TransferError, match=r"a copy to the device failed in the worker: the disk is on fire"):
        run(session, model)
    del streams.host_copy
    assert torch.equal(run(session, model), truth)
    session.close()
    assert staging_threads() == []
    assert registrar.locked == {}


@pytest.mark.parametrize("tier", HostTier)
def test_a_session_and_model_dropped_without_close_leave_nothing_registered(tier: HostTier) -> None:
    model, simulation = toy(4), Simulation()
    run(simulation.session(model, fixed_plan([True] * 4, tiers=tier)), model)
    del model
    gc.collect()
    assert simulation.registrar.locked == {}
    assert simulation.pin_budget.used_bytes == 0


@pytest.mark.parametrize("tier", HostTier)
def test_a_session_dropped_without_close_leaves_nothing_registered_while_its_model_lives(tier: HostTier) -> None:
    model, simulation = toy(4), Simulation()
    truth = truth_of(model)
    run(simulation.session(model, fixed_plan([True] * 4, tiers=tier)), model)
    gc.collect()
    assert simulation.registrar.locked == {}
    assert torch.equal(truth_of(model), truth)


def test_a_session_dropped_without_close_leaves_no_thread() -> None:
    model, registrar = toy(4), SimulatedRegistrar()
    run(SwapSession(model.named, fixed_plan([True] * 4, tiers=HostTier.STAGED), threaded(registrar)), model)
    gc.collect()
    for thread in staging_threads():
        thread.join(timeout=1)
    assert staging_threads() == []


@torch.inference_mode()
def test_a_worker_that_failed_holds_no_slot_when_its_error_is_gone() -> None:
    model, x = toy(4), torch.randn(2, 16)
    streams = InlineStreams(torch.device("cpu"))
    backend = dataclasses.replace(
        Simulation().backend, make_worker=lambda _: ThreadWorker(), open_streams=lambda count, overlap: streams
    )
    copy, left = streams.copy, [4]

    def fail_in_time(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("the link is down")
        copy(*arguments)

    streams.copy = fail_in_time
    session = SwapSession(model.named, fixed_plan([True] * 4, tiers=HostTier.STAGED), backend)
    session.adopt()
    window = [StorageWeakRef(memory.untyped_storage()) for memory in window_of(session)]
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(TransferError, match="the link is down"), session.forward():
            model(x)
        session.close()
        assert all(memory.expired() for memory in window)
    finally:
        gc.enable()


@torch.inference_mode()
def test_an_interrupted_wait_for_the_worker_leaves_no_copy_behind() -> None:
    """The job is still running: its slot is free only after it."""
    simulation, model, x = Simulation(lateness=1.0), toy(4), torch.randn(2, 16)
    truth = model(x)
    with simulation.session(model, fixed_plan([True] * 4, slots=1, tiers=HostTier.STAGED)) as session:
        session.adopt()
        job = session._holds.transfer._slots[0].filling
        job.wait = raise_interrupt
        with pytest.raises(KeyboardInterrupt), session.forward():
            model(x)
        assert job._done is not None
        del job.wait
        with session.forward():
            assert torch.equal(model(x), truth)


@torch.inference_mode()
def test_an_interrupted_clean_up_knows_its_jobs_still() -> None:
    """The second try of the clean-up waits for the job whose wait was interrupted in the first."""
    simulation, model = Simulation(lateness=1.0), toy(4)
    with simulation.session(model, fixed_plan([True] * 4, slots=1, tiers=HostTier.STAGED)) as session:
        session.adopt()
        job = session._holds.transfer._slots[0].filling
        wait, left = job.join, [1]

        def interrupted_once() -> bool:
            left[0] -= 1
            return raise_interrupt() if left[0] == 0 else wait()

        job.join = interrupted_once
        with pytest.raises(KeyboardInterrupt), session.forward():
            raise ValueError
        assert job._done is not None


def raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("allocations", [1, 2, 3])
def test_memory_that_weights_are_gathered_in_is_unlocked_although_the_failure_is_kept(
    allocations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, simulation = toy(4), Simulation()
    allocate, left = simulation.streams.allocate, [allocations]

    def refuse(nbytes: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise DeviceMemoryError("no room")
        return allocate(nbytes)

    monkeypatch.setattr(simulation.streams, "allocate", refuse)
    session = simulation.session(model, fixed_plan([False, True, False, False], slots=1))
    with pytest.raises(DeviceMemoryError) as failure:
        session.adopt()
    assert failure.value is not None  # its traceback holds the swapper
    assert_nothing_left(simulation)
    session.close()


def test_a_session_that_the_collector_finds_in_its_own_worker_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finalizer waits for the worker's jobs, of which one is being run."""
    forgotten, copies = threading.Event(), InlineStreams.copy

    def collect(streams: InlineStreams, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        if threading.current_thread() is not threading.main_thread() and forgotten.wait(10):
            gc.collect()
        copies(streams, target, source, stream)

    monkeypatch.setattr(InlineStreams, "copy", collect)
    model = toy(4)
    truth, streams = truth_of(model), InlineStreams(torch.device("cpu"))
    backend = Backend(streams.device, lambda *_: streams, None, PinBudget(0), lambda _: ThreadWorker())
    session = SwapSession(model.named, fixed_plan([True] * 4, tiers=HostTier.PAGEABLE), backend)
    session.adopt(wait=False)
    holds = session._holds
    cycle: list[object] = [session]
    cycle.append(cycle)
    gc.disable()
    try:
        del session, cycle
        forgotten.set()
        until = time.monotonic() + 10
        while holds.store is not None or holds.transfer is not None or holds.swapper is not None:
            assert time.monotonic() < until, "the worker waits for itself"
            time.sleep(0.01)
    finally:
        gc.enable()
    assert torch.equal(truth_of(model), truth)


def test_a_worker_without_a_thread_has_queued_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            ThreadWorker()
    one = ThreadWorker()
    one.submit(lambda: ran.append(True)).wait()
    one.stop()
    assert ran == [True]


def test_a_wait_that_is_interrupted_after_its_lock_was_acquired_can_be_repeated() -> None:
    flag = worker.Flag()
    flag.set()
    assert flag._lock.acquire(timeout=1)  # what an interrupted wait leaves
    flag.wait()
    one = ThreadWorker()
    for _ in range(3):
        job = one.submit(lambda: None)
        job.wait()
        assert job.join()
    one.stop()
    one._ended.wait()
