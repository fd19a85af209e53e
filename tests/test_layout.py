"""Bytes of tensors, blocks and models, and where each tensor lies in a slab."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.model.layout import (
    BlockProfile,
    ModelProfile,
    Placement,
    TensorProfile,
    align,
    device_bytes,
    slab_offsets,
    small_cutoff,
)

generated = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same examples in every run, on machines of any speed."""

ONE_OF_EACH = BlockProfile(
    "blocks.0",
    (
        TensorProfile("ffn.0.weight", 1000, Placement.STREAMED),
        TensorProfile("modulation", 70, Placement.SMALL),
        TensorProfile("packed", 600, Placement.FIXED),
        TensorProfile("block_id", 8, Placement.HOST),
        TensorProfile("ffn.2.weight", 300, Placement.STREAMED),
    ),
)


def streamed(*sizes: int, name: str = "blocks.0") -> BlockProfile:
    """A block whose tensors all stream."""
    return BlockProfile(name, tuple(TensorProfile(f"w{i}", size, Placement.STREAMED) for i, size in enumerate(sizes)))


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512), (10**12, 10**12)])
def test_a_size_is_aligned_upwards_to_the_next_multiple(size: int, expected: int) -> None:
    assert align(size, 256) == expected


@pytest.mark.parametrize(
    ("sizes", "offsets", "end"),
    [
        ([], (), 0),
        ([1], (0,), 1),
        ([256, 256], (0, 256), 512),
        ([1, 1], (0, 256), 257),
        ([300, 10, 5], (0, 512, 768), 773),
        ([100, 0, 0, 100], (0, 256, 256, 256), 356),
    ],
)
def test_tensors_lie_one_behind_the_other_at_aligned_offsets(
    sizes: list[int], offsets: tuple[int, ...], end: int
) -> None:
    assert slab_offsets(sizes) == (offsets, end)


@generated
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_no_two_tensors_of_a_slab_overlap_and_none_starts_off_the_grid(sizes: list[int]) -> None:
    offsets, end = slab_offsets(sizes)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(offset % 256 == 0 for offset in offsets)
    assert all(before <= after for before, after in zip(ends, [*offsets[1:], end], strict=True))


@generated
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_a_slab_wastes_less_than_one_alignment_per_tensor(sizes: list[int]) -> None:
    assert slab_offsets(sizes)[1] - sum(sizes) <= 255 * (len(sizes) - 1)


@generated
@given(st.lists(st.integers(16 * 1024, 4 << 20), min_size=1, max_size=24).filter(lambda sizes: sum(sizes) >= 1 << 20))
def test_a_slab_takes_at_most_one_percent_more_host_memory_than_what_it_streams(sizes: list[int]) -> None:
    block = streamed(*sizes)
    assert block.streamed_bytes <= block.slab_host_bytes <= 1.01 * block.streamed_bytes


@pytest.mark.parametrize("size", [1, 4096, 4097, 3 << 20])
def test_a_slab_takes_whole_pages_of_host_memory(size: int) -> None:
    pages, rest = divmod(streamed(size).slab_host_bytes, mmap.PAGESIZE)
    assert (rest, pages) == (0, (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [("nbytes", 1978), ("streamed_bytes", 1300), ("slab_bytes", 1324)],
)
def test_each_placement_is_counted_where_it_lives(attribute: str, expected: int) -> None:
    assert getattr(ONE_OF_EACH, attribute) == expected


@pytest.mark.parametrize(
    ("block_bytes", "small", "streams"),
    [
        pytest.param(13 * 5120 * 5120 * 2, 6 * 5120 * 4, 5120 * 5120 * 2, id="14B bf16"),
        pytest.param(13 * 5120 * 5120 * 9 // 16, 6 * 5120 * 4, 5120 * 5120 * 9 // 16, id="14B Q4_K"),
        pytest.param(19 * 1536 * 1536 * 2, 6 * 1536 * 4, 1536 * 1536 * 2, id="1.3B bf16"),
        pytest.param(19 * 1536 * 1536 * 9 // 16, 6 * 1536 * 4, 1536 * 1536 * 9 // 16, id="1.3B Q4_K"),
        pytest.param(13 * 64 * 64 * 2, 6 * 64 * 2, 64 * 64 * 2, id="width 64"),
    ],
)
def test_the_cut_off_parts_the_modulation_from_the_matrices(block_bytes: int, small: int, streams: int) -> None:
    assert small < small_cutoff(block_bytes) < streams


@pytest.mark.parametrize(
    ("block_bytes", "expected"),
    [(0, 0), (6400, 100), (16 << 20, 256 << 10), (17 << 20, 256 << 10), (1 << 40, 256 << 10)],
)
def test_the_cut_off_is_a_64th_of_the_block_and_256_kib_at_most(block_bytes: int, expected: int) -> None:
    assert small_cutoff(block_bytes) == expected


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_an_allocation_takes_whole_granules_of_device_memory(size: int, expected: int) -> None:
    assert device_bytes(size) == expected


def test_small_tensors_of_all_blocks_share_one_allocation() -> None:
    block = BlockProfile("blocks.0", (TensorProfile("scale", 4, Placement.SMALL),))
    assert ModelProfile((block,) * 10).small_device_bytes == device_bytes(9 * 256 + 4)


def test_each_tensor_that_needs_its_own_storage_takes_an_allocation() -> None:
    block = BlockProfile("blocks.0", (TensorProfile("packed", 4, Placement.FIXED),))
    assert ModelProfile((block,) * 10).small_device_bytes == 10 * 512


@pytest.mark.parametrize("placement", [Placement.STREAMED, Placement.HOST])
def test_what_streams_or_stays_on_the_host_is_no_small_tensor(placement: Placement) -> None:
    assert ModelProfile((BlockProfile("blocks.0", (TensorProfile("w", 999, placement),)),)).small_device_bytes == 0


@pytest.mark.parametrize(
    ("indices", "resident", "slot"),
    [((), 0, 0), ((0,), 512, 512), ((1, 0), 2560, 2048), ((0, 1, 2), 3072, 2048)],
)
def test_residents_take_their_own_bytes_and_a_slot_those_of_the_largest(
    indices: Sequence[int], resident: int, slot: int
) -> None:
    model = ModelProfile((streamed(500), streamed(2000), streamed(1)))
    assert (model.resident_device_bytes(indices), model.slot_bytes(indices)) == (resident, slot)


def test_the_bytes_of_a_model_are_those_of_its_blocks_without_the_rest() -> None:
    assert ModelProfile((ONE_OF_EACH, streamed(22)), other_bytes=10**9).block_bytes == 2000
