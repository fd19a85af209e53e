"""A slab is page-locked while the next one is filled: in order, once each, and never after a release."""

from __future__ import annotations

import _thread
import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch
from test_host import PAGE, PINNED, STAGED, Recorder, store_with, weights
from toys import Simulation, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.host.pages import Locking
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

SECONDS = 30.0
"""Seconds after which a test that waits for another thread fails."""


class Held(Recorder):
    """A registrar that locks nothing until it is let go."""

    def __init__(self, *results: int) -> None:
        super().__init__(*results)
        self.asked = threading.Event()
        self.go = threading.Event()
        self.threads: list[int] = []

    def register(self, pointer: int, nbytes: int) -> int:
        self.threads.append(threading.get_ident())
        self.asked.set()
        assert self.go.wait(SECONDS)
        return super().register(pointer, nbytes)


class Failing(Recorder):
    """A registrar whose first call raises."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self.failure: BaseException | None = failure

    def register(self, pointer: int, nbytes: int) -> int:
        failure, self.failure = self.failure, None
        if failure is None:
            return super().register(pointer, nbytes)
        try:
            raise failure
        finally:
            del failure  # as `Locking` must not, this must not hold what its traceback holds

    def unregister(self, pointer: int) -> int:
        return super().unregister(pointer) if pointer in self.locked else 713


def test_the_next_slab_is_filled_while_one_is_being_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    registrar = Held()
    store = store_with(registrar)
    fill = Slab.fill

    def filled_while_the_other_is_locked(slab: Slab, *arguments) -> None:
        fill(slab, *arguments)
        if len(store.slabs) == 2:
            assert registrar.asked.wait(SECONDS)
            assert registrar.locked == {}
            registrar.go.set()

    monkeypatch.setattr(Slab, "fill", filled_while_the_other_is_locked)
    tensors = [weights(5000, seed=seed) for seed in range(3)]
    for block, one in enumerate(tensors):
        store.put(block, one, tier=PINNED)
    store.finish_locking()
    assert [slab.tier for slab in store.slabs.values()] == [PINNED] * 3
    assert len(registrar.locked) == 3
    assert registrar.threads[0] != threading.get_ident()
    # Locked after it was filled: the bytes were there.
    for (one,), found in zip(tensors, registrar.bytes_at_lock, strict=True):
        assert torch.equal(found[: one.nbytes], weights_bytes(one))


def weights_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_slabs_are_locked_one_after_the_other_and_the_first_refusal_ends_it() -> None:
    registrar = Recorder(0, 2, 2)
    store = store_with(registrar)
    for block in range(4):
        store.put(block, weights(10), tier=PINNED)
    store.finish_locking()
    assert [slab.tier for slab in store.slabs.values()] == [PINNED, STAGED, STAGED, STAGED]
    assert registrar.names == ["register", "register", "consume_error", "register", "consume_error"]


def test_the_pin_budget_counts_the_slab_that_is_being_locked() -> None:
    store = store_with(Recorder(), limit=PAGE)
    tiers = [store.put(block, weights(10), tier=PINNED).tier for block in range(2)]
    store.finish_locking()
    assert tiers[1] is STAGED
    assert [slab.tier for slab in store.slabs.values()] == [PINNED, STAGED]
    assert store.budget.used_bytes == PAGE


def test_memory_beside_the_slabs_leaves_the_budget_whole_while_a_slab_is_being_locked() -> None:
    registrar = Held()
    store = store_with(registrar, limit=PAGE)
    store.put(0, weights(10), tier=PINNED)
    threading.Timer(0.1, registrar.go.set).start()
    assert not store.make_pages(PAGE, beside=0).is_pinned
    assert store.budget.used_bytes == PAGE


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_memory_beside_the_slabs_is_locked_only_if_the_planned_slabs_can_be_too(pages: int) -> None:
    store = store_with(Recorder(), limit=pages * PAGE)
    store.put(0, weights(10), tier=PINNED)
    beside = store.make_pages(PAGE, beside=2 * PAGE)
    assert beside.is_pinned == (pages == 3)
    store.put(1, weights(10), tier=PINNED)
    store.finish_locking()
    assert store.slabs[1].tier is (STAGED if pages == 1 else PINNED)


@pytest.mark.parametrize("give_up", ["release", "unlock", "drop"])
def test_what_is_being_locked_is_unlocked_when_all_is_given_up(give_up: str) -> None:
    registrar = Held()
    store = store_with(registrar)
    store.put(0, weights(10), tier=PINNED)
    assert registrar.asked.wait(SECONDS)
    threading.Timer(0.05, registrar.go.set).start()
    store.drop(0) if give_up == "drop" else getattr(store, give_up)()
    assert registrar.names == ["register", "unregister"]
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0


@pytest.mark.parametrize("failure", [RuntimeError("the driver is gone"), KeyboardInterrupt()])
def test_what_locking_raises_is_raised_in_the_host_thread_and_leaves_nothing(failure: BaseException) -> None:
    registrar = Failing(failure)
    store = store_with(registrar)
    store.put(0, weights(10), tier=PINNED)
    with pytest.raises(type(failure)):
        store.put(1, weights(10), tier=PINNED)
    store.release()
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0


def test_an_interrupt_ends_the_wait_only_when_the_lock_is_over() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        interrupted_while_locking()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted_while_locking() -> None:
    registrar = Held()
    store = store_with(registrar)
    store.put(0, weights(10), tier=PINNED)
    assert registrar.asked.wait(SECONDS)

    def interrupt_amid_the_lock() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        registrar.go.set()

    threading.Thread(target=interrupt_amid_the_lock).start()
    with pytest.raises(KeyboardInterrupt):
        store.finish_locking()
    assert len(registrar.locked) == 1
    store.release()
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0


def test_an_interrupt_before_the_thread_begins_leaves_the_lock_to_who_gives_it_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    registrar = Recorder()
    store = store_with(registrar)
    monkeypatch.setattr(_thread, "start_new_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put(0, weights(10), tier=PINNED)
    store.release()
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0


def test_where_the_system_gives_no_thread_the_host_thread_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refused)
    registrar = Recorder()
    store = store_with(registrar)
    store.put(0, weights(10), tier=PINNED)
    store.finish_locking()
    assert store.slabs[0].tier is PINNED
    assert len(registrar.locked) == 1


def test_a_slab_unlocked_amid_its_lock_is_pageable() -> None:
    registrar = Held()
    store = store_with(registrar)
    slab = store.put(0, weights(10), tier=PINNED)
    registrar.go.set()
    store.unlock()
    assert slab.tier is HostTier.PAGEABLE
    assert not slab.pages.is_pinned


def test_a_lock_that_failed_does_not_keep_the_pages() -> None:
    store = store_with(Failing(RuntimeError("the driver is gone")))
    store.put(0, weights(10), tier=PINNED)
    pages = weakref.ref(store.slabs[0].pages)
    gc.disable()
    try:
        try:  # pytest.raises would hold it
            store.finish_locking()
        except RuntimeError as failure:
            told = str(failure)
        store.release()
        assert told == "the driver is gone"
        ends = time.monotonic() + SECONDS
        while pages() is not None and time.monotonic() < ends:  # the thread has a last step to take
            time.sleep(0.01)
        assert pages() is None
    finally:
        gc.enable()


def test_after_an_adopt_every_slab_is_locked_and_no_thread_is_left() -> None:
    model, simulation = toy(6), Simulation()
    before = threading.active_count()
    with simulation.session(model, fixed_plan([True] * 6)) as session:
        session.adopt()
        assert set(session.tiers.values()) == {HostTier.PINNED}
        assert len(simulation.registrar.locked) == 6
        assert threading.active_count() == before
    assert simulation.registrar.locked == {}


def test_a_lock_can_be_asked_for_twice() -> None:
    store = store_with(Recorder())
    slab = store.put(0, weights(10), tier=STAGED)
    locking = Locking(slab.pages, store.registrar, store.budget)
    assert locking.result() == locking.result() == 0
    store.release()
    assert store.registrar.locked == {}
