"""Which blocks a plan swaps, through how many slots, from where, what it promises, and when it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from wanvideo_enhanced_blockswap.blockswap.plan.budget import MemoryBudget
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import spread_bytes
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, HostTier, PlanInputs, SwapPlan, Timing
from wanvideo_enhanced_blockswap.hardware.records import DiskSpeed
from wanvideo_enhanced_blockswap.hardware.units import GIB, MIB, format_bytes, format_count

generated = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same examples in every run, on machines of any speed."""

PLENTY = 1 << 50
MORE_THAN_IS_LEFT = (
    "the blocks take {} of VRAM, more than the {} that vram_threshold_percent and the computation leave them"
)
ASKED = PlanInputs(
    device_total_bytes=PLENTY,
    device_free_bytes=PLENTY,
    host_available_bytes=PLENTY,
    host_room_bytes=PLENTY,
    pin_budget_bytes=PLENTY,
)
"""What is read plays no part where a budget is given."""

BALANCE = 33 * 8 * MIB / 40e-3
"""Link speed at which copying 33 blocks of 8 MB takes as long as computing 40 blocks of 1 ms."""


def block(index: int, *sizes: int, small: int = 0, prefix: str = "blocks.") -> BlockProfile:
    """A block with streamed tensors of these sizes and one small tensor."""
    tensors = [TensorProfile(f"w{i}", size, Placement.STREAMED) for i, size in enumerate(sizes)]
    return BlockProfile(f"{prefix}{index}", (*tensors, TensorProfile("scale", small, Placement.SMALL)))


def stored(count: int, size: int = 8 * MIB, *, in_file: int = 8 * MIB) -> ModelProfile:
    """A model of equal blocks, of each of which so many bytes are in a file."""
    parts = [TensorProfile("w0", in_file, Placement.STREAMED, in_file=True)] if in_file else []
    parts += [TensorProfile("w1", size - in_file, Placement.STREAMED)] if size > in_file else []
    return ModelProfile(tuple(BlockProfile(f"blocks.{i}", tuple(parts)) for i in range(count)))


def equal(count: int, size: int = 8 * MIB, *, vace: int = 0) -> ModelProfile:
    """A model of equal blocks, VACE blocks first."""
    first = [block(i, size, prefix="vace_blocks.") for i in range(vace)]
    return ModelProfile((*first, *(block(i, size) for i in range(count))))


def budget(weights: int = PLENTY, *, limit: int = PLENTY, host: int = PLENTY, available: int = PLENTY) -> MemoryBudget:
    """What may be spent on weights, on the device at all, on the host, and on the host at all."""
    return MemoryBudget(
        weight_bytes=weights, limit_bytes=limit, host_bytes=host, host_limit_bytes=available, reason="as tested"
    )


def asking(**changes: Any) -> PlanInputs:
    """Inputs that ask for this."""
    return dataclasses.replace(ASKED, **changes)


def timing(profile: ModelProfile, pinned: float, *, compute_ms: float = 1.0, **options: Any) -> Timing:
    """The same compute time for every block, and a link."""
    return Timing(compute_ms=(compute_ms,) * len(profile.blocks), pinned_bytes_per_s=pinned, **options)


def ceil(size: int, granularity: int) -> int:
    return (size + granularity - 1) // granularity * granularity


def slab(sizes: Sequence[int]) -> int:
    """Bytes of tensors laid one behind the other on a grid of 256."""
    return sum(ceil(size, 256) for size in sizes[:-1]) + sizes[-1]


def device_weights(blocks: Sequence[Sequence[int]], small: Sequence[int], swapped: Sequence[bool], slots: int) -> int:
    """Device memory of residents, small tensors and window, worked out from the sizes of the tensors alone."""
    slabs = [ceil(slab(sizes), 512) for sizes in blocks]
    inside = [size for size, is_swapped in zip(slabs, swapped, strict=True) if is_swapped]
    window = min(slots, len(inside)) * max(inside, default=0)
    return sum(slabs) - sum(inside) + window + ceil(slab(small), 512)


def spreads(blocks: Sequence[Sequence[int]]) -> list[list[bool]]:
    """The ways to swap a share of the bytes, from none to all."""
    sizes = [slab(sizes) for sizes in blocks]
    return [list(spread_bytes(sizes, share)) for share in range(len(blocks) + 1)]


SIZES = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=4), min_size=1, max_size=12)
"""Bytes of the streamed tensors of each block."""

SHARE = st.floats(0, 1.1)
"""Part of a memory that a budget is."""


def model(blocks: Sequence[Sequence[int]]) -> ModelProfile:
    """A model of blocks with these streamed tensors, and a small one of 4 bytes each."""
    return ModelProfile(tuple(block(i, *sizes, small=4) for i, sizes in enumerate(blocks)))


# Automatic: which and how many


@generated
@given(SIZES, SHARE, st.sampled_from([True, False]))
def test_the_fewest_blocks_that_fit_are_swapped(blocks: list[list[int]], share: float, overlap: bool) -> None:
    count, slots, small = len(blocks), 2 if overlap else 1, [4] * len(blocks)
    weights = int(share * device_weights(blocks, small, [False] * count, 0))
    ways = spreads(blocks)
    fitting = [
        way
        for way in ways
        if device_weights(blocks, small, way, slots) <= weights and (not any(way) or sum(way) > slots)
    ]
    plan = make_plan(model(blocks), asking(overlap=overlap), budget(weights))
    assert list(plan.swapped) == next(iter(fitting), ways[-1])
    assert plan.over_ceiling == (not fitting)


@generated
@given(SIZES, SHARE, st.floats(1e4, 1e8), st.floats(0.001, 10))
def test_with_three_slots_too_the_fewest_blocks_that_fit_are_swapped(
    blocks: list[list[int]], share: float, speed: float, compute_ms: float
) -> None:
    profile, count, small = model(blocks), len(blocks), [4] * len(blocks)
    weights = int(share * device_weights(blocks, small, [False] * count, 0))
    request = asking(timing=timing(profile, speed, compute_ms=compute_ms))
    plan = make_plan(profile, request, budget(weights))
    fewer = [way for way in spreads(blocks) if plan.slots < sum(way) < plan.swapped_count]
    assert all(device_weights(blocks, small, way, plan.slots) > weights for way in fewer)


@generated
@given(SIZES, SHARE, st.floats(1e4, 1e8), st.none() | st.integers(1, 5))
def test_auto_never_swaps_as_few_blocks_as_there_are_slots_unless_nothing_fits(
    blocks: list[list[int]], share: float, speed: float, slots: int | None
) -> None:
    profile = model(blocks)
    weights = int(share * device_weights(blocks, [4] * len(blocks), [False] * len(blocks), 0))
    plan = make_plan(profile, asking(slots=slots, timing=timing(profile, speed)), budget(weights))
    assert plan.swapped_count == 0 or plan.swapped_count > plan.slots or plan.over_ceiling


@pytest.mark.parametrize("spare", [0, 1, GIB])
def test_a_model_that_fits_is_left_alone(spare: int) -> None:
    plan = make_plan(equal(40), asking(), budget(40 * 8 * MIB + 512 * 20 + spare))
    assert (plan.swapped_count, plan.slots, plan.streamed_bytes, plan.pinned_bytes) == (0, 0, 0, 0)


def test_one_byte_less_than_the_model_needs_is_enough_to_swap() -> None:
    profile = equal(40)
    exact = make_plan(profile, asking(), budget()).device_bytes
    counts = [make_plan(profile, asking(), budget(size)).swapped_count for size in (exact, exact - 1)]
    assert counts == [0, 3]


@pytest.mark.parametrize("available_gib", [3.1, 5.3, 8.2, 10.9])
def test_the_count_is_that_of_the_brief_and_the_two_blocks_that_the_window_holds(available_gib: float) -> None:
    size, count, available = 350 * MIB, 40, int(available_gib * GIB)
    overflow = count * size - available
    brief = max(1, int(overflow / size) + 1)
    assert make_plan(equal(count, size), asking(), budget(available)).swapped_count == brief + 2


def test_where_nothing_fits_every_block_is_swapped_through_two_slots_and_it_is_said() -> None:
    plan = make_plan(equal(40), asking(), budget(10 * MIB))
    assert (plan.swapped_count, plan.slots, plan.over_ceiling) == (40, 2, True)
    assert MORE_THAN_IS_LEFT.format("16.0 MB", "10.0 MB") in plan.remarks


def test_auto_does_not_read_the_manual_count_of_vace_blocks() -> None:
    profile, weights = equal(8, vace=4), budget(80 * MIB)
    plans = [make_plan(profile, asking(vace_blocks_to_swap=count), weights) for count in (0, 1, 4)]
    assert plans[0] == plans[1] == plans[2]


# Manual


@pytest.mark.parametrize(
    ("main", "vace", "expected"),
    [
        (0, 0, "....|........"),
        (2, 0, "....|...x...x"),
        (0, 2, ".x.x|........"),
        (3, 1, "...x|..x..x.x"),
        (8, 4, "xxxx|xxxxxxxx"),
    ],
)
def test_vace_blocks_and_main_blocks_are_counted_and_spread_apart(main: int, vace: int, expected: str) -> None:
    plan = make_plan(equal(8, vace=4), asking(blocks_to_swap=main, vace_blocks_to_swap=vace), budget())
    picture = "".join("x" if is_swapped else "." for is_swapped in plan.swapped)
    assert f"{picture[:4]}|{picture[4:]}" == expected


@pytest.mark.parametrize(
    ("name", "asked", "count"), [("blocks_to_swap", 48, 8), ("blocks_to_swap", 9, 8), ("vace_blocks_to_swap", 15, 4)]
)
def test_a_count_above_the_models_is_cut_and_said(name: str, asked: int, count: int) -> None:
    request = dataclasses.replace(asking(blocks_to_swap=0), **{name: asked})
    plan = make_plan(equal(8, vace=4), request, budget())
    assert plan.swapped_count == count
    assert f"{name} is cut from {asked} to {count}, the number of blocks the model has" in plan.reasons


@pytest.mark.parametrize(("main", "vace"), [(8, 4), (0, 0), (3, 2)])
def test_a_count_that_the_model_has_is_not_said_to_be_cut(main: int, vace: int) -> None:
    plan = make_plan(equal(8, vace=4), asking(blocks_to_swap=main, vace_blocks_to_swap=vace), budget())
    assert not any("cut" in reason for reason in plan.reasons)


@pytest.mark.parametrize("count", [1, 2])
def test_a_manual_count_that_fills_its_slots_moves_nothing_and_says_so(count: int) -> None:
    plan = make_plan(equal(8), asking(blocks_to_swap=count), budget())
    assert (plan.slots, plan.streamed_bytes) == (count, 0)
    assert f"with {format_count(count, 'block')} swapped nothing streams, and no VRAM is saved" in plan.remarks


@generated
@given(st.integers(1, 48).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_swapped_blocks_are_spread_evenly(case: tuple[int, int]) -> None:
    count, swapped = case
    indices = make_plan(equal(count), asking(blocks_to_swap=swapped), budget()).swapped_indices
    gaps = {after - before for before, after in itertools.pairwise([*indices, indices[0] + count])}
    assert len(indices) == swapped
    assert max(gaps) - min(gaps) <= 1


def test_a_manual_count_is_kept_over_the_budget_and_said() -> None:
    plan = make_plan(equal(8), asking(blocks_to_swap=5), budget(30 * MIB))
    assert (plan.swapped_count, plan.over_ceiling) == (5, True)
    assert MORE_THAN_IS_LEFT.format("40.0 MB", "30.0 MB") in plan.remarks


# Bytes


@generated
@given(SIZES, st.integers(0, 12), st.integers(1, 4))
def test_device_bytes_are_exactly_residents_small_tensors_and_slots(
    blocks: list[list[int]], count: int, slots: int
) -> None:
    plan = make_plan(model(blocks), asking(blocks_to_swap=count, slots=slots), budget())
    assert plan.device_bytes == device_weights(blocks, [4] * len(blocks), plan.swapped, slots)


@generated
@given(SIZES, st.integers(0, 12), st.integers(1, 4))
def test_streamed_bytes_are_the_slabs_of_the_swapped_blocks(blocks: list[list[int]], count: int, slots: int) -> None:
    plan = make_plan(model(blocks), asking(blocks_to_swap=count, slots=slots), budget())
    expected = sum(slab(blocks[i]) for i in plan.swapped_indices)
    assert plan.streamed_bytes == (expected if plan.swapped_count > slots else 0)


TENSORS = st.lists(st.integers(16 * 1024, 4 * MIB), min_size=1, max_size=24).filter(lambda sizes: sum(sizes) >= MIB)


@generated
@given(st.lists(TENSORS, min_size=1, max_size=8), st.integers(1, 8))
def test_slabs_take_at_most_one_percent_more_than_what_is_streamed(blocks: list[list[int]], count: int) -> None:
    plan = make_plan(model(blocks), asking(blocks_to_swap=count), budget())
    streamed = sum(sum(blocks[i]) for i in plan.swapped_indices)
    assert streamed <= plan.slab_bytes <= 1.01 * streamed


# Slots


@pytest.mark.parametrize(
    ("count", "speed", "slots"),
    [
        pytest.param(33, BALANCE, 3, id="near balance"),
        pytest.param(33, 4 * BALANCE, 2, id="a fast link"),
        pytest.param(33, BALANCE / 4, 2, id="a slow link"),
        pytest.param(2, BALANCE, 2, id="two swapped blocks"),
        pytest.param(1, BALANCE, 1, id="one swapped block"),
    ],
)
def test_a_third_slot_is_taken_where_it_pays_alone(count: int, speed: float, slots: int) -> None:
    profile = equal(40)
    plan = make_plan(profile, asking(blocks_to_swap=count, timing=timing(profile, speed)), budget())
    assert plan.slots == slots


@generated
@given(SIZES, SHARE, st.floats(1e4, 1e8), st.floats(0.001, 10))
def test_a_third_slot_is_taken_only_where_the_forward_is_faster_than_with_two(
    blocks: list[list[int]], share: float, speed: float, compute_ms: float
) -> None:
    profile = model(blocks)
    weights = budget(int(share * device_weights(blocks, [4] * len(blocks), [False] * len(blocks), 0)))
    request = asking(timing=timing(profile, speed, compute_ms=compute_ms))
    chosen, two = (make_plan(profile, dataclasses.replace(request, slots=slots), weights) for slots in (None, 2))
    assert chosen.predicted is not None
    assert two.predicted is not None
    assert chosen == two if chosen.slots <= 2 else chosen.predicted.elapsed < two.predicted.elapsed


def test_a_third_slot_that_is_worth_one_block_more_is_said_with_what_would_fit_and_what_it_saves() -> None:
    """40 blocks of 8 MB: 7 residents and a window of 2 slots take as much as 6 residents and one of 3."""
    profile, weights = equal(40), budget(73 * MIB)
    request = asking(timing=timing(profile, BALANCE))
    plan, two = (make_plan(profile, dataclasses.replace(request, slots=slots), weights) for slots in (None, 2))
    assert (plan.swapped_count, plan.slots, two.swapped_count) == (34, 3, 33)
    assert plan.device_bytes == two.device_bytes == 72 * MIB
    assert plan.predicted is not None
    assert two.predicted is not None
    saved = 1 - plan.predicted.elapsed / two.predicted.elapsed
    assert plan.reasons[0] == (
        f"34 of 40 blocks are swapped, 1 more than the 33 that fit, since a third slot saves {saved:.1%} of a "
        "forward: 72.0 MB of 73.0 MB"
    )
    assert 0.005 < saved < 0.1
    assert two.reasons[0] == "33 of 40 blocks are swapped, the fewest that fit: 72.0 MB of 73.0 MB"


@generated
@given(SIZES, SHARE, st.floats(1e4, 1e8), st.floats(0.001, 10))
def test_who_reads_that_the_fewest_are_swapped_can_believe_it(
    blocks: list[list[int]], share: float, speed: float, compute_ms: float
) -> None:
    profile = model(blocks)
    weights = budget(int(share * device_weights(blocks, [4] * len(blocks), [False] * len(blocks), 0)))
    request = asking(timing=timing(profile, speed, compute_ms=compute_ms))
    plan, two = (make_plan(profile, dataclasses.replace(request, slots=slots), weights) for slots in (None, 2))
    said = [reason for reason in plan.reasons if "the fewest that fit" in reason]
    more = [reason for reason in plan.reasons if f"1 more than the {two.swapped_count} that fit" in reason]
    if plan.swapped_count and not plan.over_ceiling:
        assert (len(said), len(more)) == ((1, 0) if plan.swapped_count == two.swapped_count else (0, 1))


@pytest.mark.parametrize("pin_mib", [100, 0], ids=["mostly staged", "pageable"])
@pytest.mark.parametrize("count", [None, 33])
def test_no_third_slot_is_taken_where_the_tiers_that_can_be_had_make_it_no_faster(
    pin_mib: int, count: int | None
) -> None:
    profile, spend = equal(40), budget(100 * MIB)
    slower = {"pageable_bytes_per_s": BALANCE / 2, "host_copy_bytes_per_s": BALANCE / 3}
    speeds = timing(profile, BALANCE, **slower)
    request = asking(blocks_to_swap=count, pin_budget_bytes=pin_mib * MIB, timing=speeds)
    assert make_plan(profile, request, spend) == make_plan(profile, dataclasses.replace(request, slots=2), spend)


def test_a_third_slot_that_the_budget_does_not_hold_is_not_taken() -> None:
    profile = equal(40)
    request = asking(blocks_to_swap=33, timing=timing(profile, BALANCE))
    exact = make_plan(profile, request, budget()).device_bytes
    slots = [make_plan(profile, request, budget(size)).slots for size in (exact, exact - 1)]
    assert slots == [3, 2]


@pytest.mark.parametrize("vace", [0, 4])
@pytest.mark.parametrize(
    ("asked", "slots"), [(7, 3), (8, 2), (48, 2)], ids=["all but one", "all of them", "more than there are"]
)
def test_who_asks_for_every_block_gets_two_slots_even_where_a_third_would_pay(
    asked: int, slots: int, vace: int
) -> None:
    """Two are one block more than the wrapper's own swapping of all blocks holds."""
    sizes = [4 * MIB, 12 * MIB] * 4
    first = [block(i, 8 * MIB, prefix="vace_blocks.") for i in range(vace)]
    profile = ModelProfile((*first, *(block(i, size) for i, size in enumerate(sizes))))
    request = asking(
        blocks_to_swap=asked, vace_blocks_to_swap=vace, timing=timing(profile, 8 * MIB / 1e-3, compute_ms=1.0)
    )
    plan, two, three = (make_plan(profile, dataclasses.replace(request, slots=n), budget()) for n in (None, 2, 3))
    assert two.predicted is not None
    assert three.predicted is not None
    assert three.predicted.elapsed < 0.99 * two.predicted.elapsed
    assert plan.slots == slots
    largest = max(each.slab_bytes for each in profile.blocks)
    if slots == 2:
        assert plan.device_bytes == 2 * largest + profile.small_device_bytes


@pytest.mark.parametrize("known", [{}, {"compute_ms": (1.0,) * 40}, {"pinned_bytes_per_s": BALANCE}])
def test_without_known_speeds_there_are_two_slots(known: dict[str, Any]) -> None:
    request = asking(blocks_to_swap=33, timing=Timing(**known))
    assert make_plan(equal(40), request, budget()).slots == 2


@pytest.mark.parametrize(("asked", "count", "slots"), [(1, 8, 1), (4, 8, 4), (4, 3, 3)])
def test_slots_that_are_asked_for_are_taken(asked: int, count: int, slots: int) -> None:
    plan = make_plan(equal(8), asking(blocks_to_swap=count, slots=asked), budget())
    assert plan.slots == slots


@pytest.mark.parametrize("count", [None, 5])
def test_without_overlap_there_is_one_slot_one_stream_and_nothing_page_locked(count: int | None) -> None:
    profile = equal(8)
    speeds = timing(profile, BALANCE, pageable_bytes_per_s=BALANCE / 2, streams=8)
    plan = make_plan(profile, asking(blocks_to_swap=count, overlap=False, timing=speeds), budget(50 * MIB))
    assert plan.swapped_count > 0
    assert (plan.slots, plan.streams, plan.overlap, plan.pinned_bytes) == (1, 1, False, 0)
    assert set(plan.tiers) <= {None, HostTier.PAGEABLE}


# Host tiers


def tiers(plan: SwapPlan) -> list[HostTier | None]:
    """Host tiers of the swapped blocks."""
    return [tier for tier, is_swapped in zip(plan.tiers, plan.swapped, strict=True) if is_swapped]


@pytest.mark.parametrize(
    ("pin_mib", "pinned", "staged", "pageable", "locked_mib"),
    [
        pytest.param(80, 10, 0, 0, 80, id="all"),
        pytest.param(79, 7, 3, 0, 72, id="all but some, which go through two staging slabs"),
        pytest.param(24, 1, 9, 0, 24, id="one"),
        pytest.param(16, 0, 10, 0, 16, id="the staging slabs alone"),
        pytest.param(15, 1, 0, 9, 8, id="no room for staging slabs"),
        pytest.param(7, 0, 0, 10, 0, id="none"),
    ],
)
def test_the_pin_budget_decides_the_tiers(
    pin_mib: int, pinned: int, staged: int, pageable: int, locked_mib: int
) -> None:
    plan = make_plan(equal(12), asking(blocks_to_swap=10, pin_budget_bytes=pin_mib * MIB), budget())
    counts = [tiers(plan).count(tier) for tier in (HostTier.PINNED, HostTier.STAGED, HostTier.PAGEABLE)]
    assert (counts, plan.pinned_bytes) == ([pinned, staged, pageable], locked_mib * MIB)


@pytest.mark.parametrize(
    ("pin_mib", "said"),
    [(79, "3 of 10 streaming blocks are copied in two steps"), (15, "9 of 10 streaming blocks are copied more slowly")],
)
def test_a_tier_below_the_best_is_said_with_numbers(pin_mib: int, said: str) -> None:
    plan = make_plan(equal(12), asking(blocks_to_swap=10, pin_budget_bytes=pin_mib * MIB), budget())
    assert f"80.0 MB of locked RAM needed, {pin_mib}.0 MB allowed: {said}" in plan.remarks


def test_page_locking_that_is_switched_off_leaves_all_pageable() -> None:
    plan = make_plan(equal(12), asking(blocks_to_swap=10, pin=False), budget())
    assert (set(tiers(plan)), plan.pinned_bytes, plan.staging_bytes) == ({HostTier.PAGEABLE}, 0, 0)


@pytest.mark.parametrize("pin", [0, 24 * MIB, PLENTY])
def test_resident_blocks_have_no_host_tier(pin: int) -> None:
    plan = make_plan(equal(12), asking(blocks_to_swap=5, pin_budget_bytes=pin), budget())
    assert [tier is not None for tier in plan.tiers] == list(plan.swapped)


@st.composite
def pin_cases(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Blocks, how many of them are swapped, and a pin budget between nothing and a little more than all of them."""
    blocks = draw(st.lists(st.lists(st.integers(1, 40_000), min_size=1, max_size=2), min_size=1, max_size=12))
    wanted = sum(ceil(slab(sizes), mmap.PAGESIZE) for sizes in blocks)
    return blocks, draw(st.integers(1, len(blocks))), draw(st.integers(0, wanted + mmap.PAGESIZE))


@generated
@given(pin_cases())
def test_never_more_is_page_locked_than_the_pin_budget(case: tuple[list[list[int]], int, int]) -> None:
    blocks, count, pin = case
    plan = make_plan(model(blocks), asking(blocks_to_swap=count, pin_budget_bytes=pin), budget())
    assert plan.staging_bytes <= plan.pinned_bytes <= pin


@generated
@given(pin_cases())
@example(([[9 * mmap.PAGESIZE]] * 11 + [[10 * mmap.PAGESIZE]], 12, 108 * mmap.PAGESIZE))
def test_page_locked_bytes_are_the_pinned_slabs_and_two_staging_slabs(case: tuple[list[list[int]], int, int]) -> None:
    blocks, count, pin = case
    plan = make_plan(model(blocks), asking(blocks_to_swap=count, pin_budget_bytes=pin), budget())
    pages = [ceil(slab(sizes), mmap.PAGESIZE) for sizes in blocks]
    pinned = [size for size, tier in zip(pages, plan.tiers, strict=True) if tier is HostTier.PINNED]
    staged = [size for size, tier in zip(pages, plan.tiers, strict=True) if tier is HostTier.STAGED]
    assert plan.staging_bytes == 2 * max(staged, default=0)
    assert plan.pinned_bytes == sum(pinned) + plan.staging_bytes


# Blocks in a file


@pytest.mark.parametrize(
    ("room_mib", "pin_mib", "pinned", "locked_mib"),
    [
        pytest.param(80, 80, 10, 80, id="room for all"),
        pytest.param(79, 80, 7, 72, id="room for all but one, and two staging slabs"),
        pytest.param(40, 80, 3, 40, id="room for some"),
        pytest.param(80, 40, 3, 40, id="room for all, of which some may be locked"),
        pytest.param(16, 80, 0, 16, id="room for the staging slabs"),
        pytest.param(0, 80, 0, 16, id="no room"),
    ],
)
def test_as_many_blocks_as_memory_holds_are_page_locked_and_the_others_are_read_from_their_file(
    room_mib: int, pin_mib: int, pinned: int, locked_mib: int
) -> None:
    asked = asking(blocks_to_swap=10, pin_budget_bytes=pin_mib * MIB)
    plan = make_plan(stored(12), asked, budget(host=room_mib * MIB))
    counts = [tiers(plan).count(tier) for tier in (HostTier.PINNED, HostTier.FILE)]
    assert counts == [pinned, 10 - pinned]
    assert plan.pinned_bytes == plan.added_bytes == locked_mib * MIB
    assert (plan.anonymous_bytes, plan.file_bytes, plan.slab_bytes) == (0, (10 - pinned) * 8 * MIB, pinned * 8 * MIB)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pin": False}, "RAM is not locked, since it is not possible here: copies are slower"),
        (
            {"pin": False, "wants_pin": False},
            "RAM is not locked, since enable_dram_optimization is off: copies are slower",
        ),
        ({"overlap": False}, "copying and computing take turns, so RAM is not locked"),
        ({"pin_budget_bytes": 15 * MIB}, "80.0 MB of locked RAM needed, 15.0 MB allowed"),
    ],
)
@pytest.mark.parametrize(("room_mib", "slabs"), [(79, 7), (16, 0), (0, 0)])
def test_where_nothing_can_be_locked_the_same_holds_for_ordinary_memory(
    changes: dict[str, Any], why: str, room_mib: int, slabs: int
) -> None:
    plan = make_plan(stored(12), asking(blocks_to_swap=10, **changes), budget(host=room_mib * MIB))
    assert [tiers(plan).count(tier) for tier in (HostTier.PAGEABLE, HostTier.FILE)] == [slabs, 10 - slabs]
    assert (plan.pinned_bytes, plan.staging_bytes, plan.slab_bytes) == (0, 16 * MIB, slabs * 8 * MIB)
    assert plan.anonymous_bytes == plan.added_bytes == (slabs + 2) * 8 * MIB
    assert any(why in remark for remark in plan.remarks)


def test_with_room_for_all_slabs_what_may_not_be_locked_stays_in_memory() -> None:
    plan = make_plan(stored(12), asking(blocks_to_swap=10, pin_budget_bytes=15 * MIB), budget(host=80 * MIB))
    assert [tiers(plan).count(tier) for tier in (HostTier.PINNED, HostTier.PAGEABLE)] == [1, 9]
    assert (plan.added_bytes, plan.file_bytes, plan.staging_bytes) == (80 * MIB, 0, 0)


def test_blocks_that_are_read_from_their_file_are_reported_with_what_is_needed_and_what_there_is() -> None:
    asked = asking(blocks_to_swap=10, host_available_bytes=50 * MIB)
    plan = make_plan(stored(12), asked, budget(host=40 * MIB))
    assert (
        "80.0 MB of RAM needed, 40.0 MB of 50.0 MB available may be taken: "
        "7 of 10 streaming blocks are read from the model's file"
    ) in plan.remarks


def test_a_block_of_which_a_part_is_in_no_file_is_never_read_from_a_file() -> None:
    plan = make_plan(stored(12, in_file=2 * MIB), asking(blocks_to_swap=10), budget(host=30 * MIB))
    assert HostTier.FILE not in tiers(plan)
    assert (plan.file_bytes, plan.added_bytes, plan.pinned_bytes) == (0, 20 * MIB, 80 * MIB)


COLD, WARM = BALANCE / 4, BALANCE / 2


@pytest.mark.parametrize(
    ("room_mib", "pin_mib", "speed"),
    [
        pytest.param(40, 80, COLD, id="the cache has no room for what is read"),
        pytest.param(96, 40, WARM, id="the cache keeps what is read"),
        pytest.param(95, 40, COLD, id="the cache lacks a mebibyte"),
        pytest.param(80, 80, None, id="nothing is read"),
    ],
)
def test_reads_have_the_speed_of_the_cache_where_it_keeps_the_blocks_and_else_that_of_the_disk(
    room_mib: int, pin_mib: int, speed: float | None
) -> None:
    asked = asking(blocks_to_swap=10, pin_budget_bytes=pin_mib * MIB, disk=DiskSpeed(COLD, WARM))
    plan = make_plan(stored(12), asked, budget(host=room_mib * MIB))
    assert plan.file_bytes_per_s == speed


@pytest.mark.parametrize(
    ("disk", "is_known"), [(DiskSpeed(COLD, WARM), True), (DiskSpeed(None, WARM), False), (None, False)]
)
def test_an_unknown_speed_of_the_disk_makes_the_prediction_unknown(disk: DiskSpeed | None, is_known: bool) -> None:
    profile = stored(12)
    asked = asking(blocks_to_swap=10, disk=disk, timing=timing(profile, BALANCE))
    assert (make_plan(profile, asked, budget(host=40 * MIB)).predicted is not None) == is_known


@pytest.mark.parametrize(
    ("pin", "overlap", "block_ms"),
    [
        pytest.param(True, True, 4.0, id="read into one staging slab while the other is copied"),
        pytest.param(False, True, 6.0, id="read, then copied, beside the computation"),
        pytest.param(False, False, 7.0, id="read, then copied, then computed"),
    ],
)
def test_a_forward_that_reads_all_blocks_takes_as_long_as_its_slowest_part(
    pin: bool, overlap: bool, block_ms: float
) -> None:
    profile = stored(12)
    speeds = timing(profile, 8 * MIB / 1e-3, pageable_bytes_per_s=8 * MIB / 2e-3)
    disk = DiskSpeed(8 * MIB / 4e-3, None)
    asked = asking(blocks_to_swap=12, pin=pin, overlap=overlap, disk=disk, timing=speeds)
    plan = make_plan(profile, asked, budget(host=0))
    assert plan.predicted is not None
    assert plan.predicted.elapsed == pytest.approx(12 * block_ms)


# Prediction


@pytest.mark.parametrize(
    ("pin", "request_", "known"),
    [
        (PLENTY, asking(), {"compute_ms"}),
        (PLENTY, asking(), {"pinned_bytes_per_s", "pageable_bytes_per_s", "host_copy_bytes_per_s"}),
        (PLENTY, asking(), {"compute_ms", "pageable_bytes_per_s", "host_copy_bytes_per_s"}),
        (PLENTY, asking(pin=False), {"compute_ms", "pinned_bytes_per_s", "host_copy_bytes_per_s"}),
        (30 * MIB, asking(), {"compute_ms", "pinned_bytes_per_s", "pageable_bytes_per_s"}),
        (PLENTY, asking(overlap=False), {"compute_ms", "pinned_bytes_per_s"}),
    ],
    ids=["no link", "no compute time", "pinned", "pageable", "staged", "without overlap"],
)
def test_a_stall_is_unknown_where_compute_or_the_link_is(pin: int, request_: PlanInputs, known: set[str]) -> None:
    speeds = {name: (1.0,) * 12 if name == "compute_ms" else BALANCE for name in known}
    request = dataclasses.replace(request_, blocks_to_swap=10, timing=Timing(**speeds))
    plan = make_plan(equal(12), dataclasses.replace(request, pin_budget_bytes=pin), budget())
    assert (plan.predicted, plan.stall_ms) == (None, None)


@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_fits_never_stalls_whatever_the_link(known: bool) -> None:
    profile = equal(12)
    request = asking(timing=Timing(compute_ms=(1.0,) * 12, pinned_bytes_per_s=BALANCE if known else None))
    assert make_plan(profile, request, budget()).stall_ms == 0


@pytest.mark.parametrize(
    ("speed", "elapsed_ms"), [(8 * MIB / 2e-3, 24.0), (8 * MIB / 4e-3, 48.0), (8 * MIB / 0.5e-3, 12.0)]
)
def test_a_forward_takes_the_longer_of_compute_and_transfer(speed: float, elapsed_ms: float) -> None:
    profile = equal(12)
    plan = make_plan(profile, asking(blocks_to_swap=12, timing=timing(profile, speed)), budget())
    assert plan.predicted is not None
    assert plan.predicted.elapsed == pytest.approx(elapsed_ms)
    assert plan.stall_ms == pytest.approx(elapsed_ms - 12)


@pytest.mark.parametrize("streams", [1, 4])
def test_the_copy_streams_are_those_that_the_link_was_measured_with(streams: int) -> None:
    plan = make_plan(equal(8), asking(blocks_to_swap=5, timing=Timing(streams=streams)), budget())
    assert plan.streams == streams


@pytest.mark.parametrize("nbytes", [None, 0, 3 * GIB])
def test_unknown_activations_stay_unknown_and_known_ones_are_kept(nbytes: int | None) -> None:
    activations = None if nbytes is None else Activations(nbytes=nbytes, is_measured=True)
    assert make_plan(equal(4), asking(activations=activations), budget()).activation_bytes == nbytes


# Refusals


def test_a_window_that_the_device_cannot_hold_is_refused_with_numbers() -> None:
    profile = equal(40, 100 * MIB)
    with pytest.raises(PlanError) as caught:
        make_plan(profile, asking(), budget(150 * MIB, limit=199 * MIB))
    said = ("200.0 MB needed", "0 blocks on the GPU, 40 streaming", "199.0 MB not in use by others", "quantised")
    assert all(part in str(caught.value) for part in said)


@pytest.mark.parametrize("count", [None, 5])
def test_a_device_that_holds_the_plan_to_the_last_byte_is_enough(count: int | None) -> None:
    profile = equal(8)
    request = asking(blocks_to_swap=count)
    need = make_plan(profile, request, budget(40 * MIB)).device_bytes
    assert make_plan(profile, request, budget(40 * MIB, limit=need)).device_bytes == need
    with pytest.raises(PlanError, match="not enough VRAM"):
        make_plan(profile, request, budget(40 * MIB, limit=need - 1))


@pytest.mark.parametrize(("host", "tier"), [(16 * MIB, HostTier.STAGED), (16 * MIB - 1, HostTier.PAGEABLE)])
def test_a_host_without_room_for_staging_slabs_gets_pageable_blocks_and_no_refusal(host: int, tier: HostTier) -> None:
    plan = make_plan(equal(8), asking(blocks_to_swap=5, pin_budget_bytes=30 * MIB), budget(host=host))
    assert tier in plan.tiers
    assert plan.added_bytes == plan.staging_bytes <= host
    assert any("40.0 MB of locked RAM needed, 30.0 MB allowed" in remark for remark in plan.remarks)


def test_where_device_and_host_share_one_memory_nothing_is_swapped_and_the_plan_says_why() -> None:
    spend = budget(8 * MIB, host=0)
    plan = make_plan(equal(8), asking(is_unified=True), spend)
    assert (plan.swapped_count, plan.over_ceiling) == (0, True)
    assert plan.reasons[0] == "device and host share one memory: swapping frees nothing, so it is off"
    assert make_plan(equal(8), asking(is_unified=True, blocks_to_swap=3), spend).swapped_count == 3


@pytest.mark.parametrize(
    ("in_file", "need"),
    [
        pytest.param(8 * MIB, 16 * MIB, id="two staging slabs through which the file is read"),
        pytest.param(4 * MIB, 20 * MIB, id="the part of the slabs that is in a file, where the rest is in none"),
    ],
)
def test_a_host_that_lacks_one_byte_of_the_least_is_refused_with_numbers(in_file: int, need: int) -> None:
    def plan(available: int) -> SwapPlan:
        return make_plan(stored(8, in_file=in_file), asking(blocks_to_swap=5), budget(host=0, available=available))

    assert plan(need).added_bytes == need
    with pytest.raises(PlanError, match="not enough RAM") as caught:
        plan(need - 1)
    said = (f"{format_bytes(need)} more needed", f"{format_bytes(need - 1)} available")
    assert all(part in str(caught.value) for part in said)


def test_blocks_that_are_in_no_file_need_no_more_host_memory_than_they_have() -> None:
    plan = make_plan(equal(8), asking(blocks_to_swap=5), budget(host=0, available=0))
    assert (plan.added_bytes, plan.slab_bytes, plan.pinned_bytes) == (0, 40 * MIB, 40 * MIB)


@pytest.mark.parametrize("count", [None, 0, 5])
def test_a_model_without_blocks_is_refused(count: int | None) -> None:
    with pytest.raises(PlanError, match="the model has no blocks"):
        make_plan(ModelProfile(()), asking(blocks_to_swap=count), budget())
