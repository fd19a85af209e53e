"""What a run's hint promises is what the next run with that vram_threshold_percent does."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from run_bench import BLOCK, COUNT, LARGE_VIDEO, SMALL_VIDEO, Bench
from wanvideo_enhanced_blockswap.blockswap.engine.others import Others
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Limits
from wanvideo_enhanced_blockswap.blockswap.run.history import Workload
from wanvideo_enhanced_blockswap.blockswap.run.planner import MOST_PERCENT, WORTH_A_HINT, Planner
from wanvideo_enhanced_blockswap.blockswap.run.report import Hint, RunReport, Step
from wanvideo_enhanced_blockswap.blockswap.run.text import hint_text, summary
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings

PERCENTS = (40.0, 50.0, 52.5, 65.0)


def report_of(bench: Bench) -> RunReport:
    bench.run.release()
    assert bench.run.last_report is not None
    return bench.run.last_report


def hinted(bench: Bench) -> Hint | None:
    """The hint of a run of some forwards."""
    bench.forward(times=5)
    return report_of(bench).hint


def waiting(room: float = 5, *, percent: float = 50.0, activations: float = 0, **options: Any) -> Bench:
    """A run that waits for copies, on a card that has room for more than the default leaves."""
    settings = SwapSettings(vram_threshold_percent=percent, **options.pop("settings", {}))
    bench = Bench(room, settings=settings, **{"link_ms": 3.0, **options})
    bench.machine.activation_bytes = int(activations * BLOCK)
    return bench


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("activations", [0, 1, 3])
@pytest.mark.parametrize("link_ms", [1.5, 3.0])
@pytest.mark.parametrize("room", [4, 5, 6])
def test_the_hinted_percent_keeps_the_blocks_and_saves_the_time_that_were_promised(
    room: float, link_ms: float, activations: float, percent: float
) -> None:
    bench = waiting(room, percent=percent, activations=activations, link_ms=link_ms)
    bench.forward(times=5)
    before = report_of(bench)
    hint = before.hint
    assert before.measured.forward_ms is not None
    if hint is None:
        assert least_wait(bench, before) >= (1 - WORTH_A_HINT) * before.measured.forward_ms
        return
    assert percent < hint.percent <= MOST_PERCENT
    assert hint.percent % 5 == 0
    bench.run.use(replace(bench.run.planner.settings, vram_threshold_percent=float(hint.percent)))
    bench.forward(times=5)
    after = report_of(bench)
    assert after.measured.forward_ms is not None
    assert before.plan.streaming_count - after.plan.streaming_count >= hint.blocks > 0
    assert before.measured.forward_ms - after.measured.forward_ms == pytest.approx(hint.saved_ms, rel=0.1)
    assert (after.measured.replans, after.notes, after.plan.over_ceiling) == ((), (), False)
    peak = after.plan.device_bytes + bench.machine.activation_bytes
    assert peak <= bench.machine.total_bytes
    # Nothing is left that would save as much, and a hint never goes back.
    assert after.hint is None or after.hint.percent > hint.percent
    assert after.hint is None or after.hint.saved_ms < hint.saved_ms


def least_wait(bench: Bench, before: RunReport) -> float:
    """Duration of a forward with the highest percent, found by running it."""
    bench.run.use(replace(bench.run.planner.settings, vram_threshold_percent=float(MOST_PERCENT)))
    bench.forward(times=5)
    duration = report_of(bench).measured.forward_ms
    assert duration is not None
    return duration


def test_the_lowest_percent_is_named_that_gives_as_much() -> None:
    hint = hinted(waiting(5))
    assert hint is not None
    lower, same = (waiting(5, percent=float(percent)) for percent in (hint.percent - 5, hint.percent))
    lower.forward(times=5)
    same.forward(times=5)
    first, second = report_of(lower).measured.forward_ms, report_of(same).measured.forward_ms
    assert first is not None
    assert second is not None
    assert first > second


def test_what_stayed_free_is_what_the_card_had_left_at_the_peak() -> None:
    bench = waiting(5, activations=1)
    hint = hinted(bench)
    plan = bench.run.plan
    assert hint is not None
    assert plan is not None
    assert hint.free_bytes == bench.machine.total_bytes - plan.device_bytes - BLOCK


def test_the_time_is_that_of_a_step_where_steps_are_known() -> None:
    plain, stepped = waiting(5), waiting(5)
    for number in (1, 2, 3):
        stepped.forward(times=2, step=Step(number, 3))
    of_a_pass, of_a_step = hinted(plain), report_of(stepped).hint
    assert of_a_pass is not None
    assert of_a_step is not None
    assert of_a_step.saved_ms == pytest.approx(2 * of_a_pass.saved_ms)
    assert hint_text(of_a_step).endswith(" ms a step.")
    assert hint_text(of_a_pass).endswith(" ms a pass of the model.")


def test_the_hint_is_a_line_of_the_summary_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = waiting(5)
    hint = hinted(bench)
    assert hint is not None
    assert f"\nhint: {hint_text(hint)}" in caplog.records[-1].getMessage()
    assert bench.run.last_report is not None
    assert f"hint: {hint_text(hint)}" in summary(bench.run.last_report).splitlines()


# No hint


@pytest.mark.parametrize(
    "bench",
    [
        pytest.param(lambda: waiting(5, settings={"auto_hardware_tuning": False, "blocks_to_swap": 5}), id="manual"),
        pytest.param(lambda: waiting(20), id="all blocks are on the GPU"),
        pytest.param(lambda: waiting(5, link_ms=0.3), id="the GPU never waits"),
        pytest.param(lambda: waiting(5, activations=5), id="activations decide"),
        pytest.param(lambda: waiting(5, percent=80.0), id="the share of the available memory decides"),
        pytest.param(lambda: waiting(5, percent=float(MOST_PERCENT)), id="the percent is the highest"),
        pytest.param(lambda: waiting(5, limits=Limits(must_swap_all=True)), id="all must be swapped"),
    ],
)
def test_there_is_no_hint_where_the_percent_does_not_decide(bench: Any) -> None:
    assert hinted(bench()) is None


@pytest.mark.parametrize(("room", "link_ms"), [(3, 1.05), (3, 1.1), (3.5, 1.05), (4, 1.1)])
def test_a_hint_names_blocks_where_a_third_slot_would_gain_as_well(room: float, link_ms: float) -> None:
    hint = hinted(waiting(room, link_ms=link_ms))
    assert hint is None or hint.blocks > 0


def test_there_is_no_hint_before_anything_was_measured() -> None:
    bench = waiting(5)
    bench.forward()
    assert report_of(bench).hint is None


def test_there_is_no_hint_where_the_peak_is_expected_and_not_measured() -> None:
    bench = waiting(5)
    bench.machine.peak_bytes = lambda: None  # type: ignore[assignment, return-value, method-assign]
    bench.forward(Workload(tokens=100, expected_activation_bytes=BLOCK), times=5)
    report = report_of(bench)
    assert (report.activation_bytes, report.measured.activation_bytes) == (BLOCK, None)
    assert report.measured.stall_ms
    assert report.hint is None


def test_there_is_no_hint_after_others_moved_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = waiting(5)
    bench.forward(times=5)
    with monkeypatch.context() as patch:
        patch.setattr(Others, "text", "another node moved a weight")
        assert report_of(bench).hint is None
    assert hinted(bench) is not None


def test_there_is_no_hint_after_memory_ran_out_until_other_settings_are_tried() -> None:
    bench = waiting(5)
    bench.forward(times=2)
    bench.run.shrink("out of memory")
    bench.forward(times=8)  # the plan is larger again once the peak is known, and that one is timed
    report = report_of(bench)
    assert report.measured.forward_ms is not None
    assert report.measured.stall_ms
    assert report.hint is None
    bench.run.use(SwapSettings(vram_threshold_percent=45.0))
    assert hinted(bench) is not None


def test_a_larger_video_in_the_same_run_decides_what_is_left() -> None:
    bench = waiting(5)
    bench.forward(SMALL_VIDEO, times=3)
    bench.machine.activation_bytes = 5 * BLOCK
    bench.forward(LARGE_VIDEO)
    bench.machine.activation_bytes = 0
    bench.forward(SMALL_VIDEO, times=4)
    assert report_of(bench).hint is None


def test_there_is_no_hint_beside_a_note_that_advises_the_opposite() -> None:
    bench = waiting(5)
    bench.forward(times=6)
    hardware = bench.simulation.streams.hardware
    bench.simulation.streams.hardware = replace(hardware, link_bytes_per_ms=hardware.link_bytes_per_ms / 8)
    bench.machine.cache_bytes = bench.machine.memory().free_bytes  # torch holds it, and nothing is free
    bench.forward(times=4)
    report = report_of(bench)
    assert any("lower vram_threshold_percent" in note for note in report.notes)
    assert report.hint is None


def test_a_run_that_failed_has_no_hint() -> None:
    bench = waiting(5)
    bench.forward(times=5)
    bench.run.release(ValueError("the sampler failed"))
    assert bench.run.last_report is not None
    assert bench.run.last_report.hint is None
    assert hinted(bench) is not None


@pytest.mark.parametrize(
    "options", [{"link_ms": 0.3}, {"settings": {"auto_hardware_tuning": False, "blocks_to_swap": 5}}]
)
def test_no_plan_is_made_for_a_hint_that_cannot_be(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    bench = waiting(5, **options)
    bench.forward(times=5)
    monkeypatch.setattr(Planner, "_read", lambda _: pytest.fail("the machine was read"))
    assert report_of(bench).hint is None
    assert COUNT > bench.swapped > 0
