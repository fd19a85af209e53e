"""A run plans by itself, looks at what came of it, and plans again where that pays."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from run_bench import BLOCK, COUNT, LARGE_VIDEO, SMALL_VIDEO, Bench, interrupt
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Limits
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HeldMemory, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.replan import MOST_REPLANS
from wanvideo_enhanced_blockswap.blockswap.run.run import TIMED_FORWARDS
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import MIB, DiskSpeed


def test_a_run_keeps_under_its_budget_and_measures_what_the_weights_take() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    plan = bench.run.plan
    assert plan is not None
    assert 2 < plan.swapped_count < COUNT
    assert bench.run._stats.weight_bytes == plan.device_bytes <= plan.budget_bytes
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
    other = bench.run.planner.consider(bench.run.session.held)
    assert plan is not None
    assert (other.swapped, other.slots, other.budget_bytes) == (plan.swapped, plan.slots, plan.budget_bytes)
    assert bench.run._stats.replans == []
    assert bench.run.session.adoptions == 1


def test_after_the_first_full_step_durations_and_stall_are_known_and_agree_with_the_prediction() -> None:
    bench = Bench(room=5, link_ms=3.0)
    bench.forward(times=TIMED_FORWARDS.stop)
    run = bench.run._stats
    assert run.observation is not None
    assert run.prediction is not None
    assert run.observation.compute_ms == pytest.approx((1.0,) * COUNT)
    assert run.observation.forward_ms == pytest.approx(run.prediction.elapsed)
    assert run.observation.stall_ms == pytest.approx(run.prediction.stall)
    assert run.prediction.stall > 1.0


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
    assert len(bench.run._stats.replans) == 1
    assert "a pass of the model should take" in bench.run._stats.replans[0]


def test_activations_that_leave_less_room_than_was_expected_swap_more_blocks() -> None:
    bench = Bench(room=5)
    bench.machine.activation_bytes = int(0.6 * bench.machine.total_bytes)
    bench.forward()
    fewer = bench.swapped
    bench.forward(times=6)
    assert bench.swapped > fewer
    assert "are left for them now" in bench.run._stats.replans[0]
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
    assert (bench.swapped, bench.run._stats.replans) == (more, [])
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
    assert (bench.run.session.adoptions, bench.run._stats.replans) == (1, [])


def test_where_no_plan_fits_any_more_the_plan_is_kept_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(held: HeldMemory) -> SwapPlan:
        raise PlanError("not enough RAM")

    bench = Bench(room=5)
    bench.forward(times=2)
    before = bench.swapped
    monkeypatch.setattr(bench.run.planner, "consider", refuse)
    bench.machine.others_bytes = 2 * BLOCK
    bench.forward(times=2)
    assert (bench.swapped, bench.run.session.adoptions) == (before, 1)
    assert any("the plan is kept" in record.message for record in caplog.records)


def test_plans_do_not_follow_one_another_without_end() -> None:
    bench = Bench(room=6)
    for step in range(12):
        bench.machine.others_bytes = step * BLOCK // 3
        bench.forward()
    assert len(bench.run._stats.replans) == MOST_REPLANS


def test_a_lora_that_is_added_is_planned_for_with_its_bytes() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    fewer = bench.swapped
    bench.run.release()
    for block in bench.model.blocks:
        block.register_buffer("lora_diff", torch.zeros(BLOCK // 4))
    bench.forward(times=4)
    assert bench.swapped > fewer
    assert bench.run._stats.observation is not None


def test_weights_replaced_in_the_middle_of_a_run_start_the_observation_anew() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    assert bench.run._stats.observation is not None
    block = bench.model.blocks[3]
    block.up = torch.nn.Parameter(block.up.detach().clone().cpu(), requires_grad=False)
    bench.forward()
    assert (bench.run._stats.observation, bench.run.session.adoptions) == (None, 2)


def test_by_hand_nothing_but_settings_changes_the_plan() -> None:
    manual = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=4)
    bench = Bench(room=8, settings=manual, link_ms=3.0)
    bench.forward(times=4)
    bench.machine.others_bytes = 4 * BLOCK
    bench.forward(LARGE_VIDEO, times=4)
    assert (bench.swapped, bench.run.session.adoptions) == (4, 1)
    bench.run.use(replace(manual, blocks_to_swap=6))
    bench.forward()
    assert (bench.swapped, bench.run._stats.replans) == (6, ["the settings have changed"])
    bench.run.use(replace(manual, blocks_to_swap=6))
    bench.forward()
    assert bench.run.session.adoptions == 2


@pytest.mark.parametrize(
    ("limits", "pinned", "overlap"),
    [
        (Limits(pin=False), 0, True),
        (Limits(overlap=False), 0, False),
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


def test_a_link_that_a_run_contradicts_counts_as_that_run_has_shown_it(caplog: pytest.LogCaptureFixture) -> None:
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
    assert bench.machine.measured == 1
    assert sum("plans use the new speed" in record.message for record in caplog.records) == 1


def test_an_interrupted_forward_teaches_nothing_and_the_next_is_right() -> None:
    bench = Bench(room=5)
    bench.forward(times=2)
    bench.model.blocks[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.forward()
    bench.model.blocks[4]._forward_pre_hooks.clear()
    bench.forward(times=4)
    assert bench.run._stats.observation is not None


def test_a_run_that_is_dropped_leaves_nothing_on_the_device_and_no_page_locked() -> None:
    bench = Bench(room=5)
    bench.forward(times=4)
    alive = weakref.ref(bench.run.session)
    del bench.run
    gc.collect()
    assert alive() is None
    assert (bench.simulation.streams.allocated_bytes, bench.simulation.registrar.locked) == (0, {})


def stored(count: int) -> ModelProfile:
    """Blocks of 1 MB in a file."""
    weight = TensorProfile("w", MIB, Placement.STREAMED, in_file=True)
    blocks = tuple(BlockProfile(f"blocks.{i}", (weight,)) for i in range(count))
    return ModelProfile(blocks, files=("wan.safetensors", "lora.safetensors"))


@pytest.mark.parametrize(("host_mib", "read"), [(100, False), (7, True)])
def test_the_disk_is_measured_once_and_only_for_a_plan_that_reads_from_it(host_mib: int, read: bool) -> None:
    bench = Bench(room=5)
    bench.machine.total_bytes, bench.machine.host_available_bytes = 10 * MIB, host_mib * MIB
    planner, profile = bench.run.planner, stored(8)
    for _ in range(2):
        plan = planner(profile, HeldMemory())
        assert (plan.file_bytes > 0) == read
    assert bench.machine.disks == ["wan.safetensors"] * read
    assert bench.machine.measured == 1
    planner.workload = SMALL_VIDEO
    planner.history.of(SMALL_VIDEO).compute_ms = (1.0,) * 8
    predicted, again = planner(profile, HeldMemory()), planner.consider(HeldMemory())
    assert predicted.predicted is not None
    assert planner.predict(predicted) == predicted.predicted
    assert again == predicted
    assert predicted.file_bytes_per_s == (bench.machine.link_speed / 4 if read else None)


def test_a_disk_whose_speed_cannot_be_measured_leaves_the_prediction_unknown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> DiskSpeed:
        raise OSError("no such disk")

    bench = Bench(room=5)
    bench.machine.total_bytes, bench.machine.host_available_bytes = 10 * MIB, 7 * MIB
    monkeypatch.setattr(bench.machine, "disk", fail)
    plan = bench.run.planner(stored(8), HeldMemory())
    assert (plan.file_bytes > 0, plan.file_bytes_per_s, plan.predicted) == (True, None, None)
    assert sum("the speed of the disk cannot be read" in record.message for record in caplog.records) == 1


def test_what_a_run_has_added_to_host_memory_counts_as_available_to_its_next_plan() -> None:
    bench = Bench(room=5)
    bench.machine.total_bytes, bench.machine.host_available_bytes = 10 * MIB, 7 * MIB
    host, planner = bench.machine.host(), bench.run.planner
    first = planner(stored(8), HeldMemory())
    held = HeldMemory(
        slab_bytes=first.slab_bytes,
        staging_bytes=first.staging_bytes,
        pinned_bytes=first.pinned_bytes,
        added_bytes=first.added_bytes,
    )
    left = replace(host, available_bytes=host.available_bytes - first.added_bytes)
    bench.machine.host = lambda: left  # type: ignore[method-assign]
    assert planner(stored(8), held) == first
    assert planner(stored(8), HeldMemory()).added_bytes < first.added_bytes
