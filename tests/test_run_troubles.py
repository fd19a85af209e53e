"""What goes wrong in a run, what is learnt of it, and what is not."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from dataclasses import replace

import pytest
import torch
from run_bench import COUNT, LARGE_VIDEO, SMALL_VIDEO, Bench, CountingSampler, X, near_balance
from torch.multiprocessing.reductions import StorageWeakRef
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, DeviceMemoryError
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier
from wanvideo_enhanced_blockswap.blockswap.run.progress import Phase, Progress
from wanvideo_enhanced_blockswap.blockswap.run.run import TIMED_FORWARDS
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import is_driver_refusal


def test_a_new_plan_that_cannot_be_adopted_leaves_the_one_before_in_place_with_a_note() -> None:
    bench = near_balance(sampler=CountingSampler())
    bench.forward(times=3)
    allocate, failures = bench.simulation.streams.allocate, [DeviceMemoryError("no room")]

    def refuse_once(nbytes: int) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return allocate(nbytes)

    bench.simulation.streams.allocate = refuse_once  # type: ignore[method-assign]
    bench.forward(times=3)
    assert failures == []
    plan = bench.run.plan
    assert plan is not None
    assert plan.slots == 2
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert report.measured.forwards == 6
    assert report.notes == ("planning again failed, so that the plan before goes on: no room",)


def test_a_new_plan_that_cannot_be_adopted_holds_no_memory_while_the_one_before_is_placed_again() -> None:
    bench = near_balance()
    bench.forward(times=3)
    allocate, calls = bench.simulation.streams.allocate, itertools.count()
    first: list[StorageWeakRef] = []
    is_gone: list[bool] = []

    def refuse_second(nbytes: int) -> torch.Tensor:
        call = next(calls)
        if call == 1:
            raise DeviceMemoryError("no room")
        if call == 2:
            is_gone.append(first[0].expired())
        memory = allocate(nbytes)
        if call == 0:
            first.append(StorageWeakRef(memory.untyped_storage()))
        return memory

    bench.simulation.streams.allocate = refuse_second  # type: ignore[method-assign]
    bench.forward()
    assert is_gone == [True]


def test_a_forward_that_is_over_is_over_whatever_follows_from_it() -> None:
    bench = near_balance()
    bench.forward(times=TIMED_FORWARDS.stop)
    assert (bench.run._stats.observation is not None, bench.run.session.adoptions) == (True, 1)
    bench.forward()
    assert bench.run.session.adoptions == 2


@pytest.mark.parametrize("fails", ["mark", "record", "current"])
def test_an_error_at_the_begin_of_a_forward_leaves_a_run_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    bench = Bench(room=5)
    bench.forward(times=2)

    def fail(*_arguments: object) -> None:
        raise RuntimeError("the device has hiccups")

    with monkeypatch.context() as patch:
        patch.setattr(bench.simulation.streams, fails, fail)
        with pytest.raises(RuntimeError, match="hiccups"):
            bench.forward()
    bench.run.release()
    bench.forward(times=2)
    bench.run.close()
    assert bench.simulation.streams.allocated_bytes == 0


@pytest.mark.parametrize("what", ["report.RunStats.report", "run.summary"])
def test_a_report_that_fails_costs_neither_the_run_nor_its_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    before = threading.active_count()
    bench = Bench(room=5, sampler=CountingSampler())
    bench.forward(times=2)

    def fail(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(f"wanvideo_enhanced_blockswap.blockswap.run.{what}", fail)
        bench.run.release()
    assert bench.simulation.streams.allocated_bytes == 0
    assert threading.active_count() <= before  # a thread of an earlier test may have ended meanwhile
    assert any("please report this" in record.message and record.exc_info for record in caplog.records)
    bench.forward(times=2)


@pytest.mark.parametrize("can_reset", [True, False])
def test_a_peak_of_something_earlier_is_not_taken_for_activations(can_reset: bool) -> None:
    bench = Bench(room=5)
    bench.machine.can_reset = can_reset
    bench.machine._peak = 2 * bench.machine.total_bytes
    bench.machine.activation_bytes = int(0.6 * bench.machine.total_bytes)
    bench.forward(times=6)
    assert bench.run.planner.is_peak_known is can_reset
    plan = bench.run.plan
    assert plan is not None
    total = plan.device_bytes + bench.machine.activation_bytes
    assert (total <= bench.machine.total_bytes) is can_reset


def test_a_link_that_is_slower_than_measured_is_not_measured_again() -> None:
    bench = near_balance()
    bench.machine.link_speed *= 2
    bench.forward(times=8)
    plan = bench.run.plan
    assert plan is not None
    assert (bench.machine.measured, plan.slots) == (1, 3)
    bench.run.release()
    bench.forward()
    assert bench.machine.measured == 1


def test_memory_that_others_take_where_no_smaller_plan_fits_is_said_once_and_costs_nothing_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(room=3.6)
    bench.forward(times=4)
    bench.machine.others_bytes = int(0.45 * bench.machine.total_bytes)
    bench.forward(times=4)
    considered = []
    real = bench.run.planner.consider
    monkeypatch.setattr(type(bench.run.planner), "consider", lambda self, held: considered.append(1) or real(held))
    bench.forward(times=10)
    assert not considered
    said = [record.message for record in caplog.records if "no smaller plan fits" in record.message]
    assert len(said) == 1
    bench.run.release()
    assert bench.run.last_report is not None
    assert said[0] in bench.run.last_report.notes


def compute_for(bench: Bench, ms: float) -> None:
    """Each block computes for so long from here on."""
    hardware = replace(bench.simulation.streams.hardware, default_compute_ms=ms)
    bench.simulation.streams.hardware = hardware


def test_durations_are_kept_for_the_workload_that_took_them() -> None:
    bench = Bench(room=5)
    bench.forward(SMALL_VIDEO, times=2)
    compute_for(bench, 9.0)
    bench.forward(LARGE_VIDEO, times=4)
    assert bench.run._stats.observation is not None
    assert bench.run._stats.observation.compute_ms == pytest.approx((9.0,) * COUNT)
    seen = bench.run.planner.history
    assert seen.of(LARGE_VIDEO).compute_ms == pytest.approx((9.0,) * COUNT)
    assert seen.of(SMALL_VIDEO).compute_ms is None


def test_a_longer_video_is_no_reason_to_change_a_plan_that_is_right_for_it() -> None:
    bench = near_balance()
    bench.forward(SMALL_VIDEO, times=6)
    adoptions = bench.run.session.adoptions
    compute_for(bench, 9.0)
    bench.forward(LARGE_VIDEO, times=6)
    assert bench.run.session.adoptions == adoptions


def test_the_report_tells_the_median_of_all_forwards_of_the_last_workload() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    compute_for(bench, 10.0)
    bench.forward(times=36)
    bench.run.release()
    assert bench.run.last_report is not None
    assert bench.run.last_report.measured.forward_ms == pytest.approx(80.0)


def test_a_forward_that_warms_up_counts_in_no_duration() -> None:
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True))
    compute_for(bench, 100.0)
    bench.forward()
    compute_for(bench, 1.0)
    bench.forward(times=3)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert [block.compute_ms for block in report.measured.blocks] == [pytest.approx(1.0)] * COUNT


def test_after_a_smaller_plan_has_taken_over_the_report_is_of_that_plan() -> None:
    bench = Bench(room=5)
    bench.machine.activation_bytes = int(0.6 * bench.machine.total_bytes)
    bench.forward(times=6)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert len(report.measured.replans) == 1
    assert report.measured.weight_bytes == report.plan.device_bytes


def test_tiers_in_the_report_are_those_that_the_slabs_are_in() -> None:
    bench = Bench(room=5)
    bench.simulation.registrar._left = 0
    bench.forward(times=4)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert {tier for tier in report.plan.tiers if tier is not None} == {HostTier.PAGEABLE}
    assert report.measured.refusals


def test_pageable_copies_are_no_measure_of_the_page_locked_link() -> None:
    bench = Bench(room=5)
    bench.simulation.registrar._left = 0
    bench.machine.link_speed *= 4
    bench.forward(times=5)
    bench.run.release()
    bench.forward()
    assert bench.machine.measured == 1


def test_what_all_models_may_page_lock_is_a_limit_of_the_plan() -> None:
    bench = Bench(room=5)
    bench.simulation.pin_budget.limit_bytes = 2 * 4096
    bench.forward()
    plan = bench.run.plan
    assert plan is not None
    assert plan.pinned_bytes <= 2 * 4096


@pytest.mark.parametrize("change", [{"offload_txt_emb": True}, {"debug_mode": True}])
def test_settings_that_no_plan_depends_on_adopt_nothing_anew(change: dict[str, bool]) -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    bench.run.use(replace(SwapSettings(), **change))
    bench.forward()
    bench.run.use(replace(SwapSettings(), vram_threshold_percent=70.0))
    bench.run.use(SwapSettings())
    bench.forward()
    assert bench.run.session.adoptions == 1


def test_a_forward_inside_another_is_refused_and_the_outer_one_goes_on() -> None:
    bench = Bench(room=5)
    with torch.inference_mode(), bench.run.forward(SMALL_VIDEO):
        with pytest.raises(BlockSwapError, match="only between two others, but the session is running"):
            bench.run.prepare(LARGE_VIDEO)
        result = bench.model(X)
    assert torch.equal(result, bench.expected)
    assert bench.run.planner.workload == SMALL_VIDEO


def test_a_closed_run_says_that_it_is_closed_and_has_its_report() -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    bench.run.close()
    assert bench.run.last_report is not None
    with pytest.raises(BlockSwapError, match="closed"):
        bench.forward()
    unused = Bench(room=5)
    unused.run.close()
    with pytest.raises(BlockSwapError, match="closed"):
        unused.forward()


def test_a_trace_that_is_full_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanvideo_enhanced_blockswap.blockswap.engine.trace.MOST_SPANS", 100)
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True))
    bench.forward(times=40)
    bench.run.release()
    assert bench.run.last_report is not None
    assert re.search(r"the trace is full: [\d,]+ spans were not recorded", bench.run.last_report.notes[0])


def test_the_marks_of_a_long_run_do_not_pile_up() -> None:
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True))
    bench.forward(times=30)
    trace = bench.run.session.trace
    assert trace is not None
    assert len(trace._marks) < 2 * COUNT


def test_a_refusal_of_the_driver_is_answered_by_less_page_locked_memory_before_a_smaller_plan() -> None:
    bench = Bench(room=5, settings=SwapSettings(auto_hardware_tuning=False, blocks_to_swap=4))
    bench.forward(times=2)
    plan = bench.run.plan
    assert plan is not None
    before, pinned = plan.swapped, plan.pinned_bytes
    assert pinned > 0
    locked = []
    for _ in range(2):
        bench.run.shrink("CUDA error: out of memory", by_driver=True)
        assert bench.run.session.pinned_bytes == 0
        bench.forward()
        locked.append(bench.run.session.pinned_bytes)
        assert bench.run.plan is not None
        assert bench.run.plan.swapped == before
    assert 0 < locked[0] <= pinned // 2
    assert locked[1] == 0
    bench.run.shrink("CUDA error: out of memory", by_driver=True)  # nothing is locked: the plan is to blame
    bench.forward()
    assert bench.swapped == COUNT
    report = bench.run.report()
    assert report is not None
    assert report.measured.replans == (
        *["the driver refused memory: less RAM is locked"] * 2,
        "VRAM ran out",
    )


@pytest.mark.parametrize(
    ("failure", "cause", "expected"),
    [
        (RuntimeError("CUDA error: out of memory"), None, True),
        (DeviceMemoryError("the device ran out of memory"), RuntimeError("CUDA error: out of memory"), True),
        (DeviceMemoryError("not enough VRAM"), torch.OutOfMemoryError("CUDA out of memory."), False),
        (torch.OutOfMemoryError("CUDA out of memory."), None, False),
        (RuntimeError("CUDA error: unspecified launch failure"), None, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), None, False),
    ],
)
def test_the_driver_s_refusal_is_told_from_the_allocator_s(
    failure: Exception, cause: Exception | None, expected: bool
) -> None:
    failure.__cause__ = cause
    assert is_driver_refusal(failure) is expected


def test_other_settings_lock_as_much_as_they_are_allowed_again() -> None:
    bench = Bench(room=5, settings=SwapSettings(auto_hardware_tuning=False, blocks_to_swap=4))
    bench.forward(times=2)
    pinned = bench.run.session.pinned_bytes
    bench.run.shrink("CUDA error: out of memory", by_driver=True)
    bench.run.use(SwapSettings(auto_hardware_tuning=False, blocks_to_swap=3))
    bench.forward()
    assert bench.run.session.pinned_bytes == pinned * 3 // 4


def test_a_run_is_not_released_inside_one_of_its_forwards() -> None:
    bench = Bench(room=5)
    told: list[Progress] = []
    bench.run.watcher = told.append
    with torch.inference_mode(), bench.run.forward(SMALL_VIDEO):
        with pytest.raises(BlockSwapError, match="cannot be released inside one of its forwards"):
            bench.run.release()
        assert torch.equal(bench.model(X), bench.expected)
    bench.run.release()
    assert [progress.phase for progress in told if progress.phase in (Phase.DONE, Phase.STOPPED)] == [Phase.DONE]


def test_a_weight_that_another_node_replaces_is_named_in_log_and_report_with_how_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bench = near_balance()
    bench.forward(times=2)
    for _ in range(2):
        up = bench.model.blocks[3].up
        bench.model.blocks[3].up = torch.nn.Parameter(up.data.clone(), requires_grad=False)
        bench.forward()
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    moved = [note for note in report.notes if "another node" in note]
    assert moved == [
        "another node moved, replaced or edited blocks.3.up (2 times) while the model ran: all blocks were placed "
        "again 2 times; remove or bypass what moves or patches the model"
    ]
    assert caplog.text.count("placing the blocks again: blocks.3.up was moved, replaced or edited by another node") == 2
    bench.forward()
    bench.run.release()
    assert bench.run.last_report is not None
    assert not [note for note in bench.run.last_report.notes if "another node" in note]


def test_a_run_that_others_keep_moving_is_told_on_the_node_and_planned_no_more() -> None:
    bench = near_balance()
    told: list[Progress] = []
    bench.run.watcher = told.append
    bench.forward(times=2)
    for _ in range(3):
        up = bench.model.blocks[3].up
        bench.model.blocks[3].up = torch.nn.Parameter(up.data.clone(), requires_grad=False)
        bench.forward()
    adoptions, forwards = bench.run.session.adoptions, told[-1].run.forwards  # type: ignore[union-attr]
    bench.machine.others_bytes += 2**12
    bench.forward(LARGE_VIDEO, times=4)
    assert bench.run.session.adoptions == adoptions == 3
    bench.run.release()
    sentence = (
        "another node moved, replaced or edited blocks.3.up (3 times) while the model ran: all blocks were placed "
        "again 2 times, and blocks are moved one at a time from then on, which is slow; remove or bypass what moves or "
        "patches the model"
    )
    assert (told[-1].phase, told[-1].text.splitlines()[-1]) == (Phase.DONE, sentence)
    assert told[-1].as_json()["run"]["others"] == sentence  # type: ignore[index]
    assert bench.run.last_report is not None
    assert bench.run.last_report.notes[-1] == sentence
    assert bench.run.last_report.measured.forwards == forwards + 4
    bench.forward(times=2)
    assert bench.run.session.adoptions == 4
    assert told[-1].run.others == ""  # type: ignore[union-attr]
