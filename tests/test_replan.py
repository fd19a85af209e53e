"""When another plan replaces the present one: each reason for it, and each reason against it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toys import fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import ForwardTime
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.replan import observe, why_replace
from wanvideo_enhanced_blockswap.blockswap.spans import COMPUTE, COPY, FORWARD, STALL, Span

PROFILE = profile_model(toy(6).named).profile


def plan(
    swapped: int, *, slots: int = 2, budget: int = 1 << 40, over: bool = False, ms: float | None = None
) -> SwapPlan:
    forward = None if ms is None else ForwardTime(ms, ms, 0.0, 0.0, 0.0)
    made = fixed_plan([i < swapped for i in range(6)], slots=2)(PROFILE)
    return replace(made, budget_bytes=budget, over_ceiling=over, predicted=forward)


def time(ms: float) -> ForwardTime:
    return ForwardTime(ms, ms, 0.0, 0.0, 0.0)


TOTAL = 20 * plan(3).device_bytes


@pytest.mark.parametrize(
    ("present", "other", "predicted", "said"),
    [
        pytest.param(plan(3), plan(3), time(10), None, id="the same plan"),
        pytest.param(plan(3), plan(5, budget=100), None, "are left for them now", id="memory has shrunk"),
        pytest.param(plan(5), plan(3, budget=100), None, None, id="shrunk, but the other takes more"),
        pytest.param(plan(3), plan(4, ms=9.4), time(10), "should take 9 ms, not 10 ms", id="6 % faster"),
        pytest.param(plan(3), plan(4, ms=9.6), time(10), None, id="4 % faster"),
        pytest.param(plan(3), plan(4, ms=5), None, None, id="nobody knows how long the present one takes"),
        pytest.param(plan(3), plan(4), time(10), None, id="nobody knows how long the other takes"),
        pytest.param(plan(5), plan(3, over=True, ms=5), time(10), None, id="faster, but over the ceiling"),
        pytest.param(plan(6, over=True), plan(4), None, "the weights fit now", id="what was over fits now"),
    ],
)
def test_another_plan_takes_over_for_memory_or_time_and_not_for_less(
    present: SwapPlan, other: SwapPlan, predicted: ForwardTime | None, said: str | None
) -> None:
    why = why_replace(present, other, total_bytes=TOTAL, predicted=predicted)
    assert (why is None) if said is None else (why is not None and said in why)


def test_a_hundredth_of_the_card_is_no_reason() -> None:
    present = plan(3)
    tight = plan(5, budget=present.device_bytes - TOTAL // 101)
    short = plan(5, budget=present.device_bytes - TOTAL // 99)
    assert why_replace(present, tight, total_bytes=TOTAL, predicted=None) is None
    assert why_replace(present, short, total_bytes=TOTAL, predicted=None) is not None


def spans() -> list[Span]:
    """Three forwards of two blocks, 10 ms apart; in each, block 1 is waited for 1 ms and copied in 4 ms."""
    found = []
    for number in range(3):
        start = 10.0 * number
        slow = 2.0 if number == 0 else 1.0  # the first warms up
        found += [
            Span(COMPUTE, 0, start, start + 2 * slow),
            Span(COPY + " 0", 1, start, start + 4),
            Span(COPY + " 1", 1, start + 1, start + 4),
            Span(STALL, 1, start + 3, start + 3 + slow),
            Span(COMPUTE, 1, start + 4, start + 4 + slow),
            Span(FORWARD, number, start, start + 8 * slow),
        ]
    return found


def test_what_traced_forwards_show_leaves_out_the_one_that_warms_up() -> None:
    seen = observe(spans(), slab_bytes=[0, 4_000_000], timed=range(1, 3), traced=range(3))
    assert seen is not None
    assert (seen.forwards, seen.forward_ms, seen.stall_ms) == (2, 8.0, 1.0)
    assert seen.compute_ms == (2.0, 1.0)
    assert seen.copied_bytes_per_s == pytest.approx(1e9)


def test_nothing_is_shown_before_the_timed_forwards_are_over() -> None:
    early = [span for span in spans() if (span.lane, span.block) != (FORWARD, 2)]
    assert observe(early, slab_bytes=[0, 1], timed=range(1, 3), traced=range(3)) is None


def test_a_block_that_did_not_run_leaves_durations_unknown() -> None:
    some = [span for span in spans() if (span.lane, span.block) != (COMPUTE, 0)]
    seen = observe(some, slab_bytes=[0, 1], timed=range(1, 3), traced=range(3))
    assert seen is not None
    assert seen.compute_ms is None
