"""A run that becomes slow says once why, where it can be known: a full card, or a link that has fallen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_bench import LARGE_VIDEO, SMALL_VIDEO, Bench
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings

BY_HAND = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=4)
"""Automatic tuning would make another plan when the card is full, and start the comparison again."""


def paced(bench: Bench, *, compute_ms: float | None = None, link_ms: float | None = None) -> None:
    """The device computes, or copies a block, in another time from here on."""
    hardware = bench.simulation.streams.hardware
    if compute_ms is not None:
        hardware = replace(hardware, default_compute_ms=compute_ms)
    if link_ms is not None:
        hardware = replace(hardware, link_bytes_per_ms=hardware.link_bytes_per_ms / link_ms)
    bench.simulation.streams.hardware = hardware


def filled(bench: Bench) -> None:
    bench.machine.others_bytes = bench.machine.memory().free_bytes


def notes(bench: Bench) -> tuple[str, ...]:
    report = bench.run.report()
    assert report is not None
    return report.notes


def test_forwards_that_take_three_times_as_long_on_a_full_card_are_told_with_what_to_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(4.5, settings=BY_HAND)
    bench.forward(times=6)
    paced(bench, compute_ms=4.0)
    filled(bench)
    bench.forward(times=4)
    (note,) = [note for note in notes(bench) if "moving VRAM to RAM" in note]
    assert "32 ms instead of the usual 8 ms" in note
    assert "0 B of" in note
    assert "lower vram_threshold_percent, raise blocks_to_swap by 2, or close" in note
    assert sum("moving VRAM to RAM" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(("compute_ms", "is_full"), [(2.5, True), (4.0, False)])
def test_less_than_three_times_or_a_card_with_room_is_no_spill(compute_ms: float, is_full: bool) -> None:
    bench = Bench(4.5, settings=BY_HAND)
    bench.forward(times=6)
    paced(bench, compute_ms=compute_ms)
    if is_full:
        filled(bench)
    bench.forward(times=4)
    assert not any("moving VRAM to RAM" in note for note in notes(bench))


def test_a_larger_video_is_compared_with_its_like() -> None:
    bench = Bench(4.5, settings=BY_HAND)
    bench.forward(SMALL_VIDEO, times=6)
    paced(bench, compute_ms=9.0)
    filled(bench)
    bench.forward(LARGE_VIDEO, times=6)
    assert not any("moving VRAM to RAM" in note for note in notes(bench))


def test_copies_at_less_than_half_of_the_measured_speed_are_told() -> None:
    bench = Bench(4.5, link_ms=0.5)
    paced(bench, link_ms=3.0)
    bench.forward(times=5)
    (note,) = [note for note in notes(bench) if "copies run at" in note]
    assert "MB/s, but 6.1 MB/s were measured before" in note  # a toy's link
    assert "fewer lanes" in note


def test_copies_that_become_slow_in_the_middle_are_timed_again_and_told() -> None:
    bench = Bench(4.5, link_ms=0.5)
    bench.forward(times=6)
    assert not any("copies run at" in note for note in notes(bench))
    paced(bench, link_ms=20.0)
    bench.forward(times=8)
    assert any("copies run at" in note for note in notes(bench))


def test_a_slow_forward_at_the_end_leaves_the_figures_of_those_before_in_the_report() -> None:
    bench = Bench(4.5, settings=BY_HAND)
    bench.forward(times=6)
    before = bench.run.report()
    paced(bench, compute_ms=8.0)
    bench.forward()
    after = bench.run.report()
    assert before is not None
    assert after is not None
    assert (after.measured.stall_ms, after.measured.timed_forwards) == (before.measured.stall_ms, 2)
    assert after.measured.blocks == before.measured.blocks != ()


def test_a_link_as_measured_is_not_told() -> None:
    bench = Bench(4.5, link_ms=3.0)
    bench.forward(times=6)
    assert notes(bench) == ()
