"""The ring's orders written out, what holds of any run, what is learnt, and the step times it promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import (
    Expectation,
    ForwardTime,
    Ring,
    Step,
    VirtualTime,
    mean_forward,
    spread,
    steady_time,
)

generated = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same examples in every run, on machines of any speed."""

END = "end"
"""Ends a forward; a block's number starts one."""

GRID = list(itertools.product((30, 40, 48), (25, 50, 75, 100), (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)))
"""Blocks, percent of them swapped, transfer time of a block over its compute time."""

NEAR_BALANCE = list(itertools.product((30, 40, 48), (70, 80, 90), (1.1, 1.2, 1.25, 1.4)))
"""Where the copies of a forward take about as long as its compute."""

VACE = 15
"""VACE blocks of the 14B model."""

SKIPS = [(1, "first"), (1, "middle"), (3, "middle"), (3, "last")]
"""How many blocks are skipped, and where."""

over_the_grid = pytest.mark.parametrize(("count", "percent", "ratio"), GRID)


def written(step: Step) -> str:
    """A step in short: `-1` slot 1 is given back, `3>0` block 3 into slot 0, `@0` the block runs in slot 0."""
    parts = [] if step.released is None else [f"-{step.released}"]
    parts += [f"{onload.block}>{onload.slot}" for onload in step.onloads]
    parts += [] if step.slot is None else [f"@{step.slot}"]
    return " ".join(parts)


def drive(ring: Ring, events: Iterable[int | str]) -> list[str]:
    """The steps of a run."""
    return [written(ring.leave() if event == END else ring.enter(int(event))) for event in events]


def mask(picture: str) -> list[bool]:
    """Blocks as a picture: `x` is swapped, `.` is resident."""
    return [letter == "x" for letter in picture]


def over_bound(swapped: Sequence[bool], ratio: float, patterns: Sequence[Sequence[int]], *, slots: int = 2) -> float:
    """Mean forward of a long run over the larger of what computing and what copying the blocks that ran takes."""
    count = len(swapped)
    time = VirtualTime(Ring(swapped, slots=slots), compute=[1.0] * count, transfer=[ratio] * count)
    ran = [block for pattern in patterns for block in pattern]
    bound = max(len(ran), ratio * sum(swapped[block] for block in ran)) / len(patterns)
    return steady_time(time, patterns).elapsed / bound


def without(count: int, skipped: int, where: str) -> list[int]:
    """All blocks but `skipped` neighbours."""
    begin = {"first": 0, "middle": count // 3, "last": count - skipped}[where]
    return [block for block in range(count) if not begin <= block < begin + skipped]


# Ring: orders written out


@pytest.mark.parametrize(
    ("picture", "slots", "events", "expected"),
    [
        pytest.param(
            "xxxx",
            2,
            [0, 1, 2, 3, END, 0, 1],
            ["0>0 1>1 @0", "-0 2>0 @1", "-1 3>1 @0", "-0 0>0 @1", "-1 1>1", "@0", "-0 2>0 @1"],
            id="all swapped, two slots, around the end",
        ),
        pytest.param(
            "xxxx",
            3,
            [0, 1, 2, 3, END, 0],
            ["0>0 1>1 2>2 @0", "-0 3>0 @1", "-1 0>1 @2", "-2 1>2 @0", "-0 2>0", "@1"],
            id="all swapped, three slots",
        ),
        pytest.param(
            ".x.x.x",
            2,
            [0, 1, 2, 3, 4, 5, END, 0, 1, 2],
            ["1>0 3>1", "@0", "-0 5>0", "@1", "-1 1>1", "@0", "-0 3>0", "", "@1", "-1 5>1"],
            id="every second swapped: a slot is given back at the resident block behind",
        ),
        pytest.param(
            "xx",
            1,
            [0, 1, END, 0, END],
            ["0>0 @0", "-0 1>0 @0", "-0 0>0", "@0", "-0"],
            id="one slot",
        ),
        pytest.param("...", 2, [0, 1, 2, END], ["", "", "", ""], id="none swapped"),
        pytest.param(
            "xxxx",
            2,
            [0, 1, 2, 3, END, 0, 2, 3, END],
            [
                "0>0 1>1 @0",
                "-0 2>0 @1",
                "-1 3>1 @0",
                "-0 0>0 @1",
                "-1 1>1",
                "@0",
                "-0 2>1 3>0 @1",
                "-1 0>1 @0",
                "-0 1>0",
            ],
            id="a skipped block loses its slot to the one that runs",
        ),
        pytest.param(
            "xxxx",
            2,
            [0, 3, 1, END],
            ["0>0 1>1 @0", "-0 3>1 @1", "-1 1>0 2>1 @0", "-0 0>1"],
            id="an unannounced block is onloaded at once",
        ),
        pytest.param(
            "xxxx",
            2,
            [0, 0, 1, 1, END],
            ["0>0 1>1 @0", "-0 @0", "-0 2>0 @1", "-1 @1", "-1 0>0"],
            id="a repeated block is not copied again",
        ),
    ],
)
def test_the_steps_of_a_run_are_these(picture: str, slots: int, events: list[int | str], expected: list[str]) -> None:
    assert drive(Ring(mask(picture), slots=slots), events) == expected


@pytest.mark.parametrize("picture", ["x", "xx", ".x.x.", "xxx", "x..x..x"])
@pytest.mark.parametrize("slots", [3, 4, 100])
def test_with_a_slot_for_each_swapped_block_nothing_moves_after_the_first_forward(picture: str, slots: int) -> None:
    ring = Ring(mask(picture), slots=slots)
    forward = [*range(len(picture)), END]
    drive(ring, forward)
    assert not any(">" in step for step in drive(ring, forward * 3))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_forward_that_runs_no_block_changes_nothing(slots: int) -> None:
    ring, other = (Ring(mask("x.xx.xx"), slots=slots) for _ in range(2))
    forward = [*range(7), END]
    drive(ring, forward)
    drive(other, forward)
    assert drive(ring, [END, END]) == ["", ""]
    assert drive(ring, forward * 2) == drive(other, forward * 2)


def test_a_forgotten_block_is_copied_again() -> None:
    ring = Ring(mask("xxxx"), slots=2)
    drive(ring, [0, 1, 2, 3, END])
    ring.forget(0)
    assert ring.content == (None, 1)
    assert drive(ring, [0]) == ["0>0 @0"]


def test_forgetting_a_block_that_no_slot_holds_changes_nothing() -> None:
    ring = Ring(mask("xxxx"), slots=2)
    drive(ring, [0, 1, 2, 3, END])
    ring.forget(3)
    assert ring.content == (0, 1)


@pytest.mark.parametrize("events", [[0, 1, 2], [0, 1, 2, 3, END], [0, 2, 3, END] * 4, []])
def test_a_ring_that_was_reset_is_as_new(events: list[int | str]) -> None:
    ring = Ring(mask("xxxx"), slots=2)
    drive(ring, events)
    ring.reset()
    assert ring.content == (None, None)
    assert drive(ring, [0, 1, 2, 3, END]) == drive(Ring(mask("xxxx"), slots=2), [0, 1, 2, 3, END])


@pytest.mark.parametrize("slots", [0, -1])
def test_a_ring_without_a_slot_for_swapped_blocks_is_refused_with_numbers(slots: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 slot for 2 swapped blocks, got {slots}"):
        Ring(mask("x.x"), slots=slots)


# Ring: what holds of any run

RINGS = st.tuples(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 5))
EVENTS = st.lists(st.tuples(st.sampled_from("eeeeeelfr"), st.integers(0, 11)), max_size=60)


@generated
@given(RINGS, EVENTS)
def test_whatever_runs_the_ring_keeps_its_word(shape: tuple[list[bool], int], events: list[tuple[str, int]]) -> None:
    swapped, slots = shape
    ring = Ring(swapped, slots=slots)
    truth: list[int | None] = [None] * len(ring.content)
    in_use: int | None = None
    for kind, number in events:
        block = number % len(swapped)
        if kind in "fr":
            ring.forget(block) if kind == "f" else ring.reset()
            truth = [None if kind == "r" or held == block else held for held in truth]
            in_use = None if kind == "r" else in_use
        else:
            step = ring.enter(block) if kind == "e" else ring.leave()
            assert step.released == in_use, "what ran is given back, and nothing else"
            in_use = step.slot
            assert (in_use is not None) == (kind == "e" and swapped[block])
            filled = [onload.slot for onload in step.onloads]
            assert len(filled) == len(set(filled)), "a slot is filled once in a step"
            for onload in step.onloads:
                assert onload.slot != in_use or onload.block == block, "no slot is overwritten while in use"
                assert onload.block not in truth, "a block that a slot holds is not copied again"
                truth[onload.slot] = onload.block
            assert in_use is None or truth[in_use] == block, "the block that runs is in the slot that the step names"
        held = [content for content in truth if content is not None]
        assert len(held) == len(set(held)), "no block is in two slots"
        assert ring.content == tuple(truth)


# Expectation

EVERY, A, B, C = 0b1111, 0b1111, 0b1011, 0b0011


def expect_after(forwards: Sequence[int]) -> Expectation:
    """What is expected after forwards that ran these sets of blocks."""
    expected = Expectation(4)
    for forward in forwards:
        for block in range(4):
            if forward >> block & 1:
                expected.runs(block)
        expected.ends()
    return expected


@pytest.mark.parametrize("forwards", [[], [B], [B, C], [A, B], [A, B, A], [A, B, C, A, B]])
def test_every_block_is_expected_until_the_forwards_repeat(forwards: list[int]) -> None:
    expected = expect_after(forwards)
    assert (expected.this_forward, expected.next_forward) == (EVERY, EVERY)


@pytest.mark.parametrize("period", [[B], [A, B], [B, A], [A, B, C], [A, A, B], [A, B, B], [B, B, C]])
@pytest.mark.parametrize("further", [0, 1, 2])
def test_what_repeats_is_learnt_after_two_rounds(period: list[int], further: int) -> None:
    endless, seen = period * 12, 2 * len(period) + further
    expected = expect_after(endless[:seen])
    assert [expected.this_forward, expected.next_forward] == endless[seen : seen + 2]


@pytest.mark.parametrize("empty", [1, 2])
def test_forwards_that_run_nothing_do_not_count(empty: int) -> None:
    forwards = [part for forward in [A, B, A, B] for part in [forward, *[0] * empty]]
    assert expect_after(forwards).this_forward == A


@pytest.mark.parametrize("period", [[B], [A, B, C]])
def test_an_unexpected_block_ends_what_was_learnt_at_once(period: list[int]) -> None:
    expected = expect_after(period * 3 if period == [B] else [*period * 2, A])
    assert expected.this_forward == B
    expected.runs(2)
    assert (expected.this_forward, expected.next_forward) == (EVERY, EVERY)


@pytest.mark.parametrize("surprise", [A, C])
def test_a_forward_other_than_expected_ends_what_was_learnt(surprise: int) -> None:
    expected = expect_after([A, B, A, B, A, surprise] if surprise == C else [B, B, B, surprise])
    assert (expected.this_forward, expected.next_forward) == (EVERY, EVERY)


# Virtual time


def test_a_model_without_swapped_blocks_takes_its_compute_time() -> None:
    time = VirtualTime(Ring(mask("...."), slots=2), compute=[1.0, 2.0, 4.0, 8.0], transfer=[100.0] * 4)
    assert time.forward(range(4)) == ForwardTime(15.0, 15.0, 0.0, 0.0, 0)


def test_the_first_forward_waits_for_its_first_block() -> None:
    time = VirtualTime(Ring(mask("xxx"), slots=2), compute=[1.0] * 3, transfer=[1.0] * 3)
    assert time.forward(range(3)) == ForwardTime(4.0, 3.0, 1.0, 5.0, 5)


def test_one_slot_overlaps_nothing() -> None:
    time = VirtualTime(Ring(mask("xxxx"), slots=1), compute=[1.0] * 4, transfer=[0.5] * 4)
    assert steady_time(time, [range(4)]).elapsed == 4 * 1.5


def test_a_copy_that_blocks_the_host_overlaps_nothing() -> None:
    time = VirtualTime(Ring(mask("xxxx"), slots=2), compute=[1.0] * 4, transfer=[0.5] * 4, blocking=range(4))
    assert steady_time(time, [range(4)]).elapsed == 4 * 1.5


def test_copies_run_one_behind_the_other() -> None:
    time = VirtualTime(Ring(mask("xxxx"), slots=2), compute=[0.0] * 4, transfer=[1.0, 2.0, 4.0, 8.0])
    assert steady_time(time, [range(4)]) == ForwardTime(15.0, 0.0, 15.0, 15.0, 4)


@pytest.mark.parametrize(("slots", "elapsed"), [(1, 3), (2, 2), (3, 2)])
def test_with_two_slots_a_copy_runs_beside_compute(slots: int, elapsed: int) -> None:
    time = VirtualTime(Ring(mask("x" * 8), slots=slots), compute=[1.0] * 8, transfer=[2.0] * 8)
    assert steady_time(time, [range(8)]).elapsed == elapsed * 8


def test_the_mean_of_forwards_is_that_of_each_term() -> None:
    forwards = [ForwardTime(4.0, 3.0, 1.0, 2.0, 5), ForwardTime(2.0, 1.0, 1.0, 0.0, 2)]
    assert mean_forward(forwards) == ForwardTime(3.0, 2.0, 1.0, 1.0, 3.5)


@pytest.mark.parametrize(("compute", "ratio"), [(0.1, 1.1), (0.7, 0.25), (1.0, 1.1)])
def test_a_stall_is_never_negative(compute: float, ratio: float) -> None:
    time = VirtualTime(Ring(spread(48, 33), slots=3), compute=[compute] * 48, transfer=[compute * ratio] * 48)
    assert min(time.forward(range(48)).stall for _ in range(20)) >= 0


# Spread


@generated
@given(st.integers(1, 60).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_swapped_blocks_are_as_evenly_apart_as_whole_numbers_allow(case: tuple[int, int]) -> None:
    count, swapped = case
    indices = [i for i, is_swapped in enumerate(spread(count, swapped)) if is_swapped]
    around = [*indices, indices[0] + count]
    gaps = {after - before for before, after in itertools.pairwise(around)}
    assert len(indices) == swapped
    assert gaps <= {count // swapped, -(-count // swapped)}


@pytest.mark.parametrize(
    ("count", "swapped", "picture"),
    [(6, 0, "......"), (6, 1, ".....x"), (6, 2, "..x..x"), (6, 4, ".xx.xx"), (5, 2, "..x.x"), (6, 6, "xxxxxx")],
)
def test_the_last_block_is_always_among_the_swapped(count: int, swapped: int, picture: str) -> None:
    assert spread(count, swapped) == tuple(mask(picture))


# The step times promised


@over_the_grid
def test_two_slots_reach_the_bound_in_steady_state(count: int, percent: int, ratio: float) -> None:
    assert over_bound(spread(count, count * percent // 100), ratio, [range(count)]) <= 1.01


@pytest.mark.parametrize(("slots", "limit"), [(2, 1.11), (3, 1.01)])
@pytest.mark.parametrize(("count", "percent", "ratio"), NEAR_BALANCE)
def test_near_balance_three_slots_reach_the_bound_and_two_nearly(
    count: int, percent: int, ratio: float, slots: int, limit: float
) -> None:
    assert over_bound(spread(count, count * percent // 100), ratio, [range(count)], slots=slots) <= limit


@over_the_grid
@pytest.mark.parametrize(("skipped", "where"), SKIPS)
def test_blocks_skipped_in_every_second_forward_cost_next_to_nothing(
    count: int, percent: int, ratio: float, skipped: int, where: str
) -> None:
    patterns = [range(count), without(count, skipped, where)]
    assert over_bound(spread(count, count * percent // 100), ratio, patterns) <= 1.05


@over_the_grid
@pytest.mark.parametrize("empty", [1, 2])
def test_forwards_that_run_no_block_cost_next_to_nothing(count: int, percent: int, ratio: float, empty: int) -> None:
    assert over_bound(spread(count, count * percent // 100), ratio, [range(count), *[[]] * empty]) <= 1.05


@over_the_grid
@pytest.mark.parametrize(
    "swapped",
    [
        lambda count, percent: spread(VACE + count, (VACE + count) * percent // 100),
        lambda count, percent: spread(VACE, VACE * percent // 100) + spread(count, count * percent // 100),
    ],
    ids=["spread over all", "spread apart"],
)
def test_vace_blocks_in_every_second_forward_cost_next_to_nothing(
    count: int, percent: int, ratio: float, swapped: Callable[[int, int], tuple[bool, ...]]
) -> None:
    patterns = [range(VACE + count), range(VACE, VACE + count)]
    assert over_bound(swapped(count, percent), ratio, patterns) <= 1.05


@pytest.mark.parametrize("order", [[A, A, B], [A, B, B], [A, B, C]], ids=["AAB", "ABB", "ABC"])
@pytest.mark.parametrize("slots", [2, 3])
def test_three_forwards_in_a_step_cost_next_to_nothing(order: list[int], slots: int) -> None:
    blocks = {A: range(VACE + 30), B: range(VACE, VACE + 30), C: range(VACE, VACE + 27)}
    patterns = [blocks[forward] for forward in order]
    ratios = [over_bound(spread(45, 45 * p // 100), r, patterns, slots=slots) for _, p, r in GRID[:24]]
    assert max(ratios) <= 1.05


def test_a_contiguous_tail_misses_the_bound_that_an_even_spread_reaches() -> None:
    tail = [
        over_bound(mask("." * (count - swapped) + "x" * swapped), ratio, [range(count)])
        for count, percent, ratio in GRID
        if (swapped := count * percent // 100)
    ]
    assert max(tail) >= 1.5
