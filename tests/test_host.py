"""Host memory of swapped blocks: exact slabs, one copy of each byte, page-locked while and only while it is needed."""

from __future__ import annotations

import gc
import logging
import mmap
import sys
import weakref
from collections.abc import Sequence

import pytest
import torch
from wanvideo_enhanced_blockswap.blockswap import PinBudget
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.engine.binding import bind
from wanvideo_enhanced_blockswap.blockswap.errors import HostMemoryError
from wanvideo_enhanced_blockswap.blockswap.host import pages
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.host.store import HostStore
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

PAGE = mmap.PAGESIZE
PINNED, STAGED, PAGEABLE = HostTier.PINNED, HostTier.STAGED, HostTier.PAGEABLE


class Recorder:
    """A registrar that keeps every call, with the byte found at the pointer at that moment.

    Args:
        results: What the calls of `register` return, in order; 0 when they have run out.
        otherwise: What they return then.
    """

    def __init__(self, *results: int, otherwise: int = 0) -> None:
        self.results = list(results)
        self.otherwise = otherwise
        self.calls: list[tuple[str, int]] = []
        self.locked: dict[int, int] = {}
        self.bytes_at_lock: list[torch.Tensor] = []
        self.readable_at_unlock: list[int] = []

    def register(self, pointer: int, nbytes: int) -> int:
        self.calls.append(("register", nbytes))
        self.bytes_at_lock.append(bytes_at(pointer, nbytes))
        result = self.results.pop(0) if self.results else self.otherwise
        if result == 0:
            self.locked[pointer] = nbytes
        return result

    def unregister(self, pointer: int) -> int:
        self.calls.append(("unregister", self.locked[pointer]))
        self.readable_at_unlock.append(int(is_mapped(pointer)))
        del self.locked[pointer]
        return 0

    def consume_error(self) -> None:
        self.calls.append(("consume_error", 0))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def bytes_at(pointer: int, nbytes: int) -> torch.Tensor:
    """A copy of the bytes at an address."""
    import ctypes

    return torch.frombuffer(bytearray(ctypes.string_at(pointer, nbytes)), dtype=torch.uint8)


def is_mapped(pointer: int) -> bool:
    """Whether the system has a page at this address."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        ranges = [line.split(" ", 1)[0].split("-") for line in maps]
    return any(int(begin, 16) <= pointer < int(end, 16) for begin, end in ranges)


def store_with(registrar: Recorder | None, *, limit: int = 1 << 40, budget: PinBudget | None = None) -> HostStore:
    return HostStore(InlineStreams(torch.device("cpu")), registrar, budget or PinBudget(limit))


def weights(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def put(store: HostStore, block: int, tensors: Sequence[torch.Tensor], *, tier: HostTier) -> Slab:
    """The slab when it has been locked."""
    slab = store.put(block, tensors, tier=tier)
    store.finish_locking()
    return slab


def point(tensors: Sequence[torch.Tensor], slab: Slab) -> None:
    """What the swapper does with a slab."""
    bind(tensors, slab.views)
    slab.watch(tensors)


@pytest.mark.parametrize("elements", [1, 1024, 1025, 3 * 1024, 5000])
def test_a_slab_has_the_fewest_whole_pages_that_hold_it(elements: int) -> None:
    slab = store_with(None).put(0, weights(elements), tier=PAGEABLE)
    assert slab.pages.size == -(-elements * 4 // PAGE) * PAGE
    assert slab.pages.tensor.nbytes == slab.pages.size
    assert slab.pages.tensor.data_ptr() % PAGE == 0


def test_tensors_lie_one_behind_the_other_each_aligned_to_256_bytes() -> None:
    slab = store_with(None).put(0, weights(1, 64, 65, 3), tier=PAGEABLE)
    offsets = [view.data_ptr() - slab.pages.tensor.data_ptr() for view in slab.views]
    assert offsets == [0, 256, 512, 1024]
    assert slab.used_bytes == 1024 + 12


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(600.0).view(20, 30).T,
        torch.arange(600.0).view(20, 30)[:, ::3],
        torch.arange(20.0)[:, None].expand(20, 30),
        torch.arange(600.0).view(2, 3, 10, 10).to(memory_format=torch.channels_last),
        torch.arange(112).to(torch.uint8).view(torch.float8_e4m3fn),
        torch.arange(200).to(torch.int8),
        torch.arange(200) % 3 == 0,
        torch.randn(20, 30, dtype=torch.complex64),
        torch.tensor(2.5),
    ],
    ids=["transposed", "every third", "expanded", "channels last", "fp8", "int8", "bool", "complex", "scalar"],
)
def test_a_master_has_the_bytes_strides_shape_and_dtype_of_its_source(tensor: torch.Tensor) -> None:
    view = store_with(None).put(0, [tensor], tier=PAGEABLE).views[0]
    assert (view.dtype, view.shape, view.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(view.to(torch.complex128), tensor.to(torch.complex128))


def test_slab_memory_made_inside_inference_mode_is_a_normal_tensor_that_a_worker_may_read_and_write() -> None:
    with torch.inference_mode():
        slab = store_with(None).put(0, [torch.randn(8)], tier=PAGEABLE)
    assert not slab.pages.tensor.is_inference()


def test_each_byte_is_held_once() -> None:
    tensor = weights(5000)[0]
    storage = weakref.ref(tensor.untyped_storage())
    watch = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    point([tensor], store_with(None).put(0, [tensor], tier=PAGEABLE))
    assert watch.expired()
    assert storage() is None


def test_a_slab_is_filled_before_it_is_locked() -> None:
    registrar, tensors = Recorder(), weights(700, 300)
    slab = put(store_with(registrar), 0, tensors, tier=PINNED)
    assert torch.equal(registrar.bytes_at_lock[0], slab.pages.tensor)
    assert torch.equal(registrar.bytes_at_lock[0][:2800].view(torch.float32), tensors[0])


def test_a_slab_is_locked_once_at_its_exact_size() -> None:
    registrar, tensors = Recorder(), weights(5000)
    store = store_with(registrar)
    for _ in range(3):
        put(store, 0, tensors, tier=PINNED)
    assert registrar.calls == [("register", 5 * PAGE)]
    assert store.budget.used_bytes == 5 * PAGE


def test_release_unlocks_and_leaves_the_bytes_where_parameters_point() -> None:
    registrar, tensors = Recorder(), weights(700, 300)
    truth = [tensor.clone() for tensor in tensors]
    store = store_with(registrar)
    point(tensors, put(store, 0, tensors, tier=PINNED))
    store.release()
    gc.collect()
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0
    assert all(map(torch.equal, tensors, truth))


def test_pages_are_unlocked_before_they_are_unmapped_when_nobody_closed() -> None:
    registrar, tensors = Recorder(), weights(5000)
    store = store_with(registrar)
    put(store, 0, tensors, tier=PINNED)
    pointer = store.slabs[0].pages.tensor.data_ptr()
    del store, tensors
    gc.collect()
    assert registrar.readable_at_unlock == [1]
    assert registrar.locked == {}
    assert not is_mapped(pointer)


def test_pages_that_only_a_parameter_holds_are_unlocked_before_they_are_unmapped() -> None:
    registrar, budget, tensors = Recorder(), PinBudget(1 << 40), weights(5000)
    truth = tensors[0].clone()
    store = store_with(registrar, budget=budget)
    point(tensors, put(store, 0, tensors, tier=PINNED))
    pointer = tensors[0].data_ptr()
    del store
    gc.collect()
    assert torch.equal(tensors[0], truth)
    del tensors
    gc.collect()
    assert registrar.readable_at_unlock == [1]
    assert budget.used_bytes == 0
    assert not is_mapped(pointer)


def test_pages_caught_in_a_reference_cycle_are_unlocked_when_it_is_collected() -> None:
    registrar = Recorder()
    store = store_with(registrar)
    put(store, 0, weights(10), tier=PINNED)
    knot: list[object] = [store]
    knot.append(knot)
    del store, knot
    gc.collect()
    assert registrar.locked == {}


def test_two_stores_share_one_pin_budget() -> None:
    budget = PinBudget(3 * PAGE)
    one, other = (store_with(Recorder(), budget=budget) for _ in range(2))
    assert put(one, 0, weights(2 * PAGE // 4), tier=PINNED).tier is PINNED
    assert put(other, 0, weights(2 * PAGE // 4), tier=PINNED).tier is STAGED
    assert budget.used_bytes == 2 * PAGE
    assert "4,096" in other.refusals[0]
    one.release()
    assert budget.left_bytes == 3 * PAGE


@pytest.mark.parametrize("code", [1, 2, 801])
def test_a_refusal_is_tried_again_once_and_then_not_for_the_rest(code: int, caplog: pytest.LogCaptureFixture) -> None:
    registrar = Recorder(otherwise=code)
    store = store_with(registrar)
    with caplog.at_level(logging.WARNING):
        tiers = [put(store, block, weights(10), tier=PINNED).tier for block in range(4)]
    assert tiers == [STAGED] * 4
    assert registrar.names == ["register", "consume_error"] * 2
    assert [f"code {code}" in record.getMessage() for record in caplog.records] == [True]


def test_a_retry_that_succeeds_is_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    registrar = Recorder(2)
    store = store_with(registrar)
    assert put(store, 0, weights(10), tier=PINNED).tier is PINNED
    assert registrar.names == ["register", "consume_error", "register"]
    assert store.refusals == []
    assert not caplog.records


def test_a_refusal_midway_gives_locked_slabs_back_for_staging() -> None:
    registrar = Recorder(0, 0, 0, otherwise=2)
    store = store_with(registrar)
    for block in range(5):
        put(store, block, weights(10), tier=PINNED)
    registrar.results, registrar.otherwise = [0, 0], 2
    staging = store.make_staging()
    assert [page.is_pinned for page in staging] == [True, True]
    assert [store.slabs[block].tier for block in range(5)] == [PINNED, STAGED, STAGED, STAGED, STAGED]
    assert len(registrar.locked) == 3


def test_without_room_for_staging_the_rest_is_pageable_and_nothing_stays_locked() -> None:
    registrar = Recorder(otherwise=1)
    store = store_with(registrar)
    for block in range(3):
        put(store, block, weights(10), tier=PINNED)
    assert store.make_staging() == []
    assert {slab.tier for slab in store.slabs.values()} == {PAGEABLE}
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0


def test_the_second_staging_slab_refused_gives_the_first_back() -> None:
    registrar = Recorder(0, otherwise=2)
    store = store_with(registrar)
    store.put(0, weights(10), tier=STAGED)
    assert store.make_staging() == []
    assert registrar.locked == {}
    assert store.budget.used_bytes == 0


class Capacity(Recorder):
    """Locks six ranges at a time, as a driver with a limit does."""

    def register(self, pointer: int, nbytes: int) -> int:
        self.otherwise = 2 if len(self.locked) == 6 else 0
        return super().register(pointer, nbytes)


def test_adopting_again_after_a_refusal_does_not_lose_more_locked_slabs_each_time() -> None:
    store = store_with(Capacity())
    tensors = [weights(10, seed=block) for block in range(8)]
    locked = []
    for _ in range(3):
        store.use(store.streams)  # as each adopt does
        for block, tensor in enumerate(tensors):
            point(tensor, put(store, block, tensor, tier=PINNED))
        staging = store.make_staging()
        locked.append(sum(slab.tier is PINNED for slab in store.slabs.values()))
        for page in staging:
            page.unpin()
    assert locked == [4, 4, 4]


def test_room_that_another_store_gave_back_is_used_at_the_next_adopt() -> None:
    budget = PinBudget(2 * PAGE)
    one, other = (store_with(Recorder(), budget=budget) for _ in range(2))
    tensors = weights(2 * PAGE // 4)
    put(one, 0, weights(2 * PAGE // 4), tier=PINNED)
    point(tensors, put(other, 0, tensors, tier=PINNED))
    other.make_staging()
    one.release()
    other.use(other.streams)  # as each adopt does
    assert put(other, 0, tensors, tier=PINNED).tier is PINNED


def test_a_store_without_a_registrar_falls_to_pageable_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    store = store_with(None)
    put(store, 0, weights(10), tier=PINNED)
    assert store.make_staging() == []
    assert store.slabs[0].tier is PAGEABLE
    assert not caplog.records


def test_a_system_without_memory_is_said_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fileno: int, length: int, **options: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages, "_Pages", refuse)
    with pytest.raises(HostMemoryError, match=r"refused 20,480 bytes.*close other programs"):
        PageMemory(5000 * 4, InlineStreams(torch.device("cpu")))


def advice_of(pages: PageMemory) -> set[str]:
    """The kernel's flags of the pages."""
    with open("/proc/self/smaps", encoding="ascii") as maps:
        inside = False
        for line in maps:
            first = line.split(" ", 1)[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= pages.tensor.data_ptr() < end
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError("the pages are not mapped")


def test_an_interrupt_behind_the_driver_s_lock_leaves_nothing_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    registrar, budget, page = Recorder(), PinBudget(1 << 20), PageMemory(PAGE, InlineStreams(torch.device("cpu")))
    monkeypatch.setattr(PinBudget, "take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        page.pin(registrar, budget)
    assert (registrar.locked, page.is_pinned, budget.used_bytes) == ({}, False, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's flags are Linux's")
def test_locked_pages_are_neither_inherited_by_a_fork_nor_made_huge() -> None:
    budget = PinBudget(1 << 30)
    pages = PageMemory(1 << 16, InlineStreams(torch.device("cpu")))
    assert "dc" not in advice_of(pages)
    pages.pin(Recorder(), budget)
    assert {"dc", "nh"} <= advice_of(pages)  # do not copy on fork, no huge pages
    pages.unpin()
    assert "dc" not in advice_of(pages)
    assert pages.pin(Recorder(2), budget) == 2
    assert "dc" not in advice_of(pages)


def test_no_garbage_is_collected_between_a_refused_lock_and_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    class Asked(Recorder):
        def consume_error(self) -> None:
            enabled.append(gc.isenabled())

    PageMemory(1, InlineStreams(torch.device("cpu"))).pin(Asked(2), PinBudget(1 << 20))
    assert (enabled, gc.isenabled()) == ([False], True)


def test_on_windows_pages_are_the_heap_s_and_unlock_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    registrar, budget = Recorder(), PinBudget(1 << 30)
    monkeypatch.setattr(pages, "_anonymous_pages", pages.heap_pages)
    memory = PageMemory(PAGE + 1, InlineStreams(torch.device("cpu")))
    assert (memory.tensor.data_ptr() % PAGE, memory.tensor.nbytes) == (0, 2 * PAGE)
    memory.tensor.fill_(7)
    memory.pin(registrar, budget)
    view = memory.tensor[5:10]
    del memory
    gc.collect()
    assert registrar.names == ["register"]  # a parameter may outlive the memory's own object
    assert view.tolist() == [7] * 5
    del view
    assert registrar.names == ["register", "unregister"]
    assert registrar.readable_at_unlock == [1]
    assert budget.used_bytes == 0


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError()])
def test_a_refusal_of_host_memory_is_our_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_: int) -> None:
        raise error

    monkeypatch.setattr(pages, "_anonymous_pages", refuse)
    with pytest.raises(HostMemoryError, match=r"the system refused 4,096 bytes") as failure:
        PageMemory(1, InlineStreams(torch.device("cpu")))
    assert failure.value.__cause__ is error
