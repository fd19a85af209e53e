"""Checksums of debug mode: what they find, and that they are not taken without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from run_bench import BLOCK, Bench, X
from toys import window_of
from wanvideo_enhanced_blockswap.blockswap import SwapSettings
from wanvideo_enhanced_blockswap.blockswap.engine.binding import BlockBinding
from wanvideo_enhanced_blockswap.blockswap.engine.others import MOST_ADOPTIONS
from wanvideo_enhanced_blockswap.blockswap.engine.swapper import checksum
from wanvideo_enhanced_blockswap.blockswap.errors import TransferError

DEBUG = SwapSettings(debug_mode=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_a_checksum_is_of_the_bytes_wherever_they_lie(dtype: torch.dtype, count: int) -> None:
    data = torch.randint(0, 255, (count * dtype.itemsize + 64,), dtype=torch.uint8)
    here = data[16 : 16 + count * dtype.itemsize].view(dtype)
    assert checksum(here) == checksum(here.clone())


@pytest.mark.parametrize("at", [0, 500, 999])
def test_one_changed_byte_changes_a_checksum(at: int) -> None:
    data = torch.randint(0, 255, (1000,), dtype=torch.uint8)
    before = checksum(data)
    data[at] += 1
    assert checksum(data) != before


def swapped_block(bench: Bench) -> int:
    plan = bench.run.plan
    assert plan is not None
    return plan.swapped_indices[1]


def test_debug_mode_finds_weights_that_another_node_has_edited_through_data() -> None:
    bench = Bench(room=5, settings=DEBUG)
    bench.forward(times=3)
    block = swapped_block(bench)
    bench.model.blocks[block].up.data.view(-1)[3] += 1.0
    with pytest.raises(TransferError, match=rf"blocks\.{block}\.up has other bytes on the GPU than in RAM"):
        bench.forward(times=2)


def test_without_debug_mode_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanvideo_enhanced_blockswap.blockswap.engine.swapper.check_slot", None)  # would raise
    Bench(room=5).forward(times=3)


def test_debug_mode_finds_a_slot_that_does_not_hold_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(room=5, settings=DEBUG)
    bench.forward(times=3)
    window = window_of(bench.run.session)
    real = type(bench.simulation.streams).reads

    def spoil(self, memory, nbytes, stream):
        real(self, memory, nbytes, stream)
        window[0][0] ^= 1

    monkeypatch.setattr(type(bench.simulation.streams), "reads", spoil)
    with pytest.raises(TransferError, match="has other bytes on the GPU than in RAM"):
        bench.forward(times=2)


def replaces_a_weight_inside(bench: Bench, block: int) -> Callable[..., None]:
    """A hook on a block that puts an equal weight in the place of a later block's, once."""
    done: list[bool] = []

    def replace(*_: object) -> None:
        if not done:
            done.append(True)
            later = bench.model.blocks[block]
            later.up = torch.nn.Parameter(later.up.detach().clone(), requires_grad=False)

    return replace


def test_debug_mode_compares_also_after_weights_were_replaced_inside_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(room=5, settings=DEBUG)
    bench.forward(times=2)
    first = swapped_block(bench)
    handle = bench.model.blocks[0].register_forward_hook(replaces_a_weight_inside(bench, first))
    compared: list[str] = []
    monkeypatch.setattr(
        "wanvideo_enhanced_blockswap.blockswap.engine.swapper.check_slot", lambda name, *_: compared.append(name)
    )
    bench.forward()
    handle.remove()
    assert bench.run.session.adoptions == 2
    expected = [f"blocks.{block}" for block in bench.run.plan.swapped_indices if block >= first]  # type: ignore[union-attr]
    assert compared[-len(expected) :] == expected


def test_a_weight_that_is_replaced_again_while_it_is_placed_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    monkeypatch.setattr(BlockBinding, "is_unchanged", lambda _: False)
    bench.forward()
    assert bench.run.session.others.gave_up
    assert bench.run.session.others.moved == {"a weight of blocks.0": MOST_ADOPTIONS}
    monkeypatch.undo()
    bench.forward(times=2)
    bench.run.release()
    bench.forward(times=2)
    assert not bench.run.session.others.moved


def test_debug_mode_gives_the_same_outputs_and_an_edit_in_place_is_followed() -> None:
    bench = Bench(room=5, settings=DEBUG)
    bench.forward(times=4)
    with torch.no_grad():
        bench.model.blocks[swapped_block(bench)].up.mul_(2.0)
    with torch.inference_mode(), bench.run.forward():
        result = bench.model(X)
    assert not torch.equal(result, bench.expected)
    assert BLOCK
