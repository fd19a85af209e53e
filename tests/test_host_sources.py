"""What a slab remembers of its source, and what happens to its bytes when tensors change."""

from __future__ import annotations

import gc

import pytest
import torch
from test_host import PAGE, PAGEABLE, PINNED, Recorder, point, put, store_with, weights
from wanvideo_enhanced_blockswap.blockswap import PinBudget
from wanvideo_enhanced_blockswap.blockswap.host.store import HostStore
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedStreams


def test_living_storage_handed_out_again_is_not_copied_again() -> None:
    source = weights(5000)[0]
    store = store_with(None)
    first = store.put(0, [torch.nn.Parameter(source, requires_grad=False)], tier=PAGEABLE)
    version = first.pages.tensor._version
    first.views[0].untyped_storage()[0] = 77  # a mark that a second copy would wipe out
    again = store.put(0, [torch.nn.Parameter(source, requires_grad=False)], tier=PAGEABLE)
    assert again is first
    assert again.pages.tensor[0] == 77
    assert again.pages.tensor._version == version


def test_living_storage_that_was_edited_is_copied_again() -> None:
    source = weights(5000)[0]
    store = store_with(None)
    store.put(0, [torch.nn.Parameter(source, requires_grad=False)], tier=PAGEABLE)
    source.add_(1)
    slab = store.put(0, [torch.nn.Parameter(source, requires_grad=False)], tier=PAGEABLE)
    assert torch.equal(slab.views[0], source)


def test_living_storage_that_was_edited_in_inference_mode_is_copied_again() -> None:
    store = store_with(None)
    with torch.inference_mode():
        source = torch.randn(5000)
        store.put(0, [source.detach()], tier=PAGEABLE)
        source.add_(1)
        slab = store.put(0, [source.detach()], tier=PAGEABLE)
    assert torch.equal(slab.views[0], source)


@pytest.mark.parametrize("shares_version", [True, False])
def test_a_source_handed_out_again_wins_over_edits_made_to_its_master(shares_version: bool) -> None:
    source = weights(5000)[0]
    parameter = torch.nn.Parameter(source if shares_version else source.data, requires_grad=False)
    store = store_with(None)
    point([parameter], store.put(0, [parameter], tier=PAGEABLE))
    parameter.add_(1)
    slab = store.put(0, [torch.nn.Parameter(source, requires_grad=False)], tier=PAGEABLE)
    assert torch.equal(slab.views[0], source)


def test_other_storage_at_the_place_of_one_that_went_is_copied() -> None:
    store = store_with(None)
    for seed in range(5):
        slab = store.put(0, weights(5000, seed=seed), tier=PAGEABLE)
        assert torch.equal(slab.views[0], weights(5000, seed=seed)[0])


def test_tensors_that_changed_places_within_a_slab_keep_their_bytes() -> None:
    one, other = weights(1000, 1000)
    truth = one.clone(), other.clone()
    store = store_with(None)
    point([one, other], store.put(0, [one, other], tier=PAGEABLE))
    point([other, one], store.put(0, [other, one], tier=PAGEABLE))
    assert torch.equal(one, truth[0])
    assert torch.equal(other, truth[1])


def test_tensors_that_changed_places_between_slabs_keep_their_bytes() -> None:
    one, other = weights(1000, 1000)
    truth = one.clone(), other.clone()
    store = store_with(None)
    for block, tensor in enumerate((one, other)):
        point([tensor], store.put(block, [tensor], tier=PAGEABLE))
    for block, tensor in enumerate((other, one)):
        point([tensor], store.put(block, [tensor], tier=PAGEABLE))
    assert torch.equal(one, truth[0])
    assert torch.equal(other, truth[1])


def test_a_tensor_kept_aside_keeps_its_bytes_when_another_takes_its_place() -> None:
    kept, patched = weights(1000, 1000)
    truth = kept.clone()
    store = store_with(None)
    point([kept], store.put(0, [kept], tier=PAGEABLE))
    store.put(0, [patched], tier=PAGEABLE)
    assert torch.equal(kept, truth)


def test_fresh_tensors_of_the_same_layout_reuse_the_locked_pages() -> None:
    registrar = Recorder()
    store = store_with(registrar)
    for seed in range(3):
        put(store, 0, weights(5000, seed=seed), tier=PINNED)
    assert registrar.names == ["register"]


def test_tensors_of_another_layout_get_a_slab_of_their_own_and_the_old_one_is_unlocked() -> None:
    registrar = Recorder()
    store = store_with(registrar)
    put(store, 0, weights(5000), tier=PINNED)
    put(store, 0, weights(100), tier=PINNED)
    gc.collect()
    assert list(registrar.locked.values()) == [PAGE]
    assert store.budget.used_bytes == PAGE


def test_a_slab_is_written_again_only_after_its_last_copy() -> None:
    streams = SimulatedStreams()
    store = HostStore(streams, Recorder(), PinBudget(1 << 40))
    slab = put(store, 0, weights(1024), tier=PINNED)
    with streams.guard():
        slot, event = streams.allocate(4096), streams.event()
        streams.wait(streams.copy_streams[0], recorded(streams, streams.compute_stream))
        streams.copy(slot, slab.pages.tensor, streams.copy_streams[0])
        streams.record(event, streams.copy_streams[0])
    slab.pages.in_flight[:] = [event]
    put(store, 0, weights(1024, seed=1), tier=PINNED)
    assert torch.equal(slot.view(torch.float32), weights(1024)[0])


def recorded(streams: SimulatedStreams, stream: object) -> object:
    event = streams.event()
    streams.record(event, stream)
    return event
