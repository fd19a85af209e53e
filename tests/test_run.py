"""A run plans by itself, looks at what came of it, and plans again where that pays."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_machine import CARD, SimulatedMachine
from toys import Simulation, toy
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.planner import Limits, Workload
from wanvideo_enhanced_blockswap.blockswap.run import MOST_REPLANS, TIMED_FORWARDS, SwapRun
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.blockswap.simulated import SimulatedHardware
from wanvideo_enhanced_blockswap.hardware import Sampler

COUNT = 8
BLOCK = 512 * 6  # two matrices of 16 x 24 floats, 1,536 bytes each
SMALL_VIDEO, LARGE_VIDEO = Workload(tokens=100), Workload(tokens=900)
X = torch.linspace(-1.0, 1.0, 32).reshape(2, 16)


class Bench:
    """A toy model, a simulated card that holds `room` blocks under the defaults, and a run of them."""

    def __init__(
        self,
        room: float,
        *,
        settings: SwapSettings | None = None,
        compute_ms: float = 1.0,
        link_ms: float = 0.5,
        limits: Limits | None = None,
        count: int = COUNT,
        sampler: Sampler | None = None,
        trace_dir: Path | None = None,
    ) -> None:
        self.model = toy(count)
        self.expected = toy(count)(X)
        speed = BLOCK / link_ms  # bytes per ms
        hardware = SimulatedHardware(link_bytes_per_ms=speed, default_compute_ms=compute_ms)
        self.simulation = Simulation(hardware=hardware)
        # The ceiling of 50 % is the smallest term: 0.9 x 0.9 of the card is more.
        self.machine = SimulatedMachine(
            self.simulation, int(2 * (room * BLOCK + 256 * count + 512)), link_speed=speed * 1e3
        )
        self.run = SwapRun(
            self.model.named,
            settings or SwapSettings(),
            self.machine,
            self.simulation.backend,
            root=self.model,
            limits=limits,
            sampler=sampler,
            trace_dir=trace_dir,
        )

    def forward(self, workload: Workload | None = SMALL_VIDEO, *, times: int = 1) -> None:
        for _ in range(times):
            with torch.inference_mode(), self.run.forward(workload):
                result = self.model(X)
                self.machine.run_peak()
            assert torch.equal(result, self.expected)

    @property
    def swapped(self) -> int:
        assert self.run.plan is not None
        return self.run.plan.swapped_count


def test_a_run_keeps_under_its_budget_and_measures_what_the_weights_take() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    plan = bench.run.plan
    assert plan is not None
    assert 2 < plan.swapped_count < COUNT
    assert bench.run.found.weight_bytes == plan.device_bytes <= plan.budget_bytes
    assert bench.simulation.streams.peak_bytes == plan.device_bytes


def test_the_link_is_measured_once_and_only_for_a_plan_that_copies() -> None:
    fits, swaps = Bench(room=20), Bench(room=5)
    for bench in (fits, swaps):
        bench.forward()
        bench.run.release()
        bench.forward()
    assert (fits.machine.measured, swaps.machine.measured) == (0, 1)


def test_planning_again_while_our_weights_are_on_the_card_gives_the_same_plan() -> None:
    bench = Bench(room=5)
    bench.forward(times=6)
    plan = bench.run.plan
    other = bench.run.planner.consider()
    assert plan is not None
    assert (other.swapped, other.slots, other.budget_bytes) == (plan.swapped, plan.slots, plan.budget_bytes)
    assert bench.run.found.replans == []
    assert bench.run.session.adoptions == 1


def test_after_the_first_full_step_durations_and_stall_are_known_and_agree_with_the_prediction() -> None:
    bench = Bench(room=5, link_ms=0.8)
    bench.forward(times=TIMED_FORWARDS.stop)
    run = bench.run.found
    assert run.observed is not None
    assert run.prediction is not None
    assert run.observed.compute_ms == pytest.approx((1.0,) * COUNT)
    assert run.observed.forward_ms == pytest.approx(run.prediction.elapsed)
    assert run.observed.stall_ms == pytest.approx(run.prediction.stall)


def test_when_the_first_step_shows_that_three_slots_are_faster_the_plan_is_made_anew() -> None:
    # Near balance: 32 of 40 blocks swapped over a link on which the transfer of 33 takes as long as all compute.
    bench = Bench(room=10, link_ms=40 / 33, count=40)
    bench.forward()
    before = bench.run.plan
    bench.forward(times=6)
    after = bench.run.plan
    assert before is not None
    assert after is not None
    assert (before.slots, after.slots) == (2, 3)
    assert after.device_bytes <= after.budget_bytes
    assert len(bench.run.found.replans) == 1
    assert "a forward is expected to take" in bench.run.found.replans[0]


def test_activations_that_leave_less_room_than_was_expected_swap_more_blocks() -> None:
    bench = Bench(room=5)
    bench.machine.activation_bytes = int(0.6 * bench.machine.total_bytes)
    bench.forward()
    fewer = bench.swapped
    bench.forward(times=6)
    assert bench.swapped > fewer
    assert "are left for them now" in bench.run.found.replans[0]
    plan = bench.run.plan
    assert plan is not None
    assert plan.device_bytes + bench.machine.activation_bytes <= 0.9 * bench.machine.total_bytes


def test_what_activations_took_is_remembered_for_the_next_run_of_that_shape_and_no_other() -> None:
    bench = Bench(room=5)
    bench.machine.activation_bytes = int(0.6 * bench.machine.total_bytes)
    bench.forward(times=6)
    more = bench.swapped
    bench.run.release()
    bench.machine.activation_bytes = 0
    bench.forward(LARGE_VIDEO)
    fewer = bench.swapped
    bench.run.release()
    bench.forward(SMALL_VIDEO)
    assert (bench.swapped, bench.run.found.replans) == (more, [])
    assert fewer < more


def test_a_larger_video_is_planned_for_before_its_first_forward_and_a_smaller_one_later_changes_nothing() -> None:
    bench = Bench(room=5)
    bench.forward(SMALL_VIDEO, times=2)
    fewer = bench.swapped
    large = replace(LARGE_VIDEO, expected_activation_bytes=int(0.6 * bench.machine.total_bytes))
    bench.forward(large)
    more = bench.swapped
    bench.forward(SMALL_VIDEO)
    bench.forward(large)
    assert fewer < more == bench.swapped
    assert bench.run.session.adoptions == 2


def test_memory_that_others_take_swaps_more_blocks_and_memory_they_give_back_waits_for_the_next_run() -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    fewer = bench.swapped
    bench.machine.others_bytes = 2 * BLOCK
    bench.forward(times=2)
    more = bench.swapped
    bench.machine.others_bytes = 0
    bench.forward(times=2)
    assert fewer < bench.swapped == more
    bench.run.release()
    bench.forward()
    assert bench.swapped == fewer


def test_torchs_unused_cache_and_a_hundredth_of_the_card_change_nothing() -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    bench.machine.cache_bytes = 3 * BLOCK
    bench.machine.others_bytes = bench.machine.total_bytes // 101
    bench.forward(times=4)
    assert (bench.run.session.adoptions, bench.run.found.replans) == (1, [])


def test_where_the_host_has_no_room_for_more_swapped_blocks_the_plan_is_kept_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(room=5, limits=Limits(originals_stay=True))
    bench.forward(times=2)
    before = bench.swapped
    bench.machine.others_bytes, bench.machine.host_available_bytes = 2 * BLOCK, 0
    bench.forward(times=2)
    assert (bench.swapped, bench.run.session.adoptions) == (before, 1)
    assert any("the plan is kept" in record.message for record in caplog.records)


def test_plans_do_not_follow_one_another_without_end() -> None:
    bench = Bench(room=6)
    for step in range(12):
        bench.machine.others_bytes = step * BLOCK // 3
        bench.forward()
    assert len(bench.run.found.replans) == MOST_REPLANS


def test_a_lora_that_is_added_is_planned_for_with_its_bytes() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    fewer = bench.swapped
    bench.run.release()
    for block in bench.model.blocks:
        block.register_buffer("lora_diff", torch.zeros(BLOCK // 4))
    bench.forward(times=4)
    assert bench.swapped > fewer
    assert bench.run.found.observed is not None


def test_weights_replaced_in_the_middle_of_a_run_start_the_observation_anew() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    assert bench.run.found.observed is not None
    block = bench.model.blocks[3]
    block.up = torch.nn.Parameter(block.up.detach().clone().cpu(), requires_grad=False)
    bench.forward()
    assert (bench.run.found.observed, bench.run.session.adoptions) == (None, 2)


def test_by_hand_nothing_but_settings_changes_the_plan() -> None:
    manual = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=4)
    bench = Bench(room=8, settings=manual, link_ms=3.0)
    bench.forward(times=4)
    bench.machine.others_bytes = 4 * BLOCK
    bench.forward(LARGE_VIDEO, times=4)
    assert (bench.swapped, bench.run.session.adoptions) == (4, 1)
    bench.run.use(replace(manual, blocks_to_swap=6))
    bench.forward()
    assert (bench.swapped, bench.run.found.replans) == (6, ["the settings have changed"])
    bench.run.use(replace(manual, blocks_to_swap=6))
    bench.forward()
    assert bench.run.session.adoptions == 2


@pytest.mark.parametrize(
    ("limits", "pinned", "overlap"),
    [
        (Limits(may_pin=False), 0, True),
        (Limits(may_overlap=False), 0, False),
    ],
)
def test_what_is_forbidden_from_outside_is_not_done(limits: Limits, pinned: int, overlap: bool) -> None:
    bench = Bench(room=5, limits=limits)
    bench.forward(times=3)
    plan = bench.run.plan
    assert plan is not None
    assert (bench.run.session.pinned_bytes, plan.overlap) == (pinned, overlap)


def test_memory_asked_to_be_left_free_is_left_free() -> None:
    bench = Bench(room=5, limits=Limits(reserve_bytes=7 * BLOCK))
    bench.forward()
    plan = bench.run.plan
    assert plan is not None
    assert plan.device_bytes <= bench.machine.total_bytes - 7 * BLOCK


def test_a_link_that_a_run_contradicts_is_measured_again_at_the_next_and_only_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    bench.machine.link_speed *= 2  # what was measured is twice what the copies will reach
    bench.forward(times=5)
    assert bench.machine.measured == 1
    assert bench.run.planner.link is not None
    assert bench.run.planner.link.best()[1] == pytest.approx(bench.machine.link_speed / 2)
    for _ in range(3):
        bench.run.release()
        bench.forward(times=5)
    assert bench.machine.measured == 2
    assert sum("the link is measured again" in record.message for record in caplog.records) == 1


def interrupt(module: torch.nn.Module, arguments: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_forward_teaches_nothing_and_the_next_is_right() -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    bench.model.blocks[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.forward()
    bench.model.blocks[4]._forward_pre_hooks.clear()
    bench.forward(times=4)
    assert bench.run.found.observed is not None


def test_a_run_that_is_dropped_leaves_nothing_on_the_device_and_no_page_locked() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    alive = weakref.ref(bench.run.session)
    del bench.run
    gc.collect()
    assert alive() is None
    assert (bench.simulation.streams.allocated_bytes, bench.simulation.registrar.locked) == (0, {})


# The report


class CountingSampler(Sampler):
    """Samples that are taken at once, from readers that answer alike."""

    def __init__(self) -> None:
        class Readers:
            def gpu_percent(self) -> float:
                return 80.0

            def vram_used_bytes(self) -> int:
                return 3 * BLOCK

            def rss_bytes(self) -> int:
                return 4 * BLOCK

            def host_available_bytes(self) -> int:
                return 5 * BLOCK

        super().__init__(CARD, interval_s=60.0, open_readers=lambda _spec: contextlib.nullcontext(Readers()))


def test_the_report_sets_what_came_beside_what_was_predicted() -> None:
    bench = Bench(room=5, link_ms=0.8)
    bench.forward(times=5)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    plan, measured = report.plan, report.measured
    assert (measured.forwards, measured.empty_forwards, measured.timed_forwards) == (5, 0, 2)
    assert measured.peak_weight_bytes == plan.device_bytes
    assert measured.returned_bytes == 0
    # Five forwards, and the window that was prefetched for a sixth.
    assert measured.onloaded_bytes == BLOCK * (5 * plan.swapped_count + plan.slots)
    assert measured.slab_bytes == plan.slab_bytes
    assert measured.pinned_bytes == plan.pinned_bytes
    assert report.prediction is not None
    assert measured.forward_ms == pytest.approx(report.prediction.elapsed)
    assert measured.copy_bytes_per_s == pytest.approx(bench.machine.link_speed)
    assert [times.compute_ms for times in measured.blocks] == [pytest.approx(1.0)] * COUNT
    assert all((times.copy_ms is not None) == times.swapped for times in measured.blocks)


def test_each_run_counts_for_itself_and_the_forwards_of_all_its_plans_count() -> None:
    bench = Bench(room=5)
    bench.forward(times=3)
    bench.run.release()
    bench.forward(times=2)
    bench.machine.others_bytes = 2 * BLOCK
    bench.forward(times=2)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert (report.measured.forwards, len(report.measured.replans)) == (4, 1)
    assert report.measured.onloaded_bytes < BLOCK * COUNT * 6


def test_a_summary_of_at_most_12_lines_is_logged_when_a_run_is_over_and_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    bench.forward(times=4)
    bench.run.release()
    bench.run.release()
    said = [record.getMessage() for record in caplog.records if "swapped (" in record.getMessage()]
    assert len(said) == 1
    assert 3 < len(said[0].splitlines()) <= 12
    assert said[0].startswith("Model on RTX 4090: 5 of 8 blocks swapped (5 pinned), 2 slots")


def test_debug_mode_logs_the_briefs_lines_a_table_of_blocks_and_writes_a_trace(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True), trace_dir=tmp_path)
    bench.forward(times=4)
    bench.run.release()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "Auto configuration completed:\n   Model: 6,152 parameters, 0.0MB, 8 layers\n   VRAM: 0.0/0.0MB" in text
    assert "Config: blocks_to_swap=5, streams=1, ratio=90%" in text
    assert re.search(r"blocks\.7 +pinned +1\.0", text)
    (file,) = tmp_path.iterdir()
    events = json.loads(file.read_text())["traceEvents"]
    assert sum(event.get("cat") == "forward" for event in events) == 4
    assert bench.run.last_report is not None
    assert bench.run.last_report.notes == (f"trace: {file}",)


def test_a_trace_that_cannot_be_written_is_a_note_and_no_failure(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True), trace_dir=in_the_way)
    bench.forward(times=4)
    bench.run.release()
    assert bench.run.last_report is not None
    assert str(in_the_way) in bench.run.last_report.notes[0]


def test_the_device_is_watched_from_the_first_forward_to_the_release_and_no_thread_is_left() -> None:
    bench = Bench(room=5, sampler=CountingSampler())
    before = threading.active_count()
    for _ in range(2):
        bench.forward(times=2)
        assert threading.active_count() == before + 1
        bench.run.release()
        assert threading.active_count() == before
        assert bench.run.last_report is not None
        samples = bench.run.last_report.measured.samples
        assert samples is not None
        assert (samples.gpu_percent_max, samples.vram_used_peak_bytes) == (80.0, 3 * BLOCK)


@pytest.mark.parametrize("end", ["close", "drop", "fail"])
def test_no_thread_is_left_however_a_run_ends(end: str) -> None:
    before = threading.active_count()
    bench = Bench(room=5, sampler=CountingSampler())
    bench.forward()
    if end == "close":
        bench.run.close()
    elif end == "drop":
        del bench.run
        gc.collect()
    else:
        bench.model.blocks[4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench.forward()
        bench.run.release()
    assert threading.active_count() == before


def test_a_plan_that_is_refused_starts_no_thread() -> None:
    bench = Bench(room=5, sampler=CountingSampler())
    before = threading.active_count()
    bench.machine.others_bytes = bench.machine.total_bytes
    with pytest.raises(PlanError):
        bench.forward()
    assert threading.active_count() == before
    bench.machine.others_bytes = 0
    bench.forward()
    bench.run.close()
