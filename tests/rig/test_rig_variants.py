"""In the real wrapper, every variant swapped gives the unswapped latents, at the cost that its plan announces."""

from __future__ import annotations

import pytest
from comfy_client import Comfy
from rig_figures import streams, swapped_bytes, to_device, to_host
from rig_runs import COUNTS, HALF, Runs
from rig_variants import BLOCKS, SLG_SKIPS, VACE_BLOCKS, VARIANTS

pytestmark = pytest.mark.rig

CACHES = ("teacache", "magcache", "easycache")
STAYS = [name for name in VARIANTS if name.startswith("stays")]
ENDS = [name for name in VARIANTS if name not in STAYS]

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_count = pytest.mark.parametrize("count", COUNTS)


@every_count
@every_variant
def test_latents_are_those_of_the_unswapped_model(runs: Runs, variant: str, count: object) -> None:
    assert runs.of(variant, count).latents == runs.unswapped(variant).latents


@every_variant
def test_the_wrappers_forward_leaves_its_arguments_alone(comfy: Comfy, variant: str) -> None:
    outcome = comfy.run(VARIANTS[variant], arguments=True)
    assert not hasattr(outcome, "error"), outcome.error
    assert outcome.kept_arguments
    assert all(outcome.kept_arguments)


@every_count
@every_variant
def test_no_block_weight_is_copied_back(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    assert run.d2h_bytes in to_host(variant, run, unswapped)


@every_count
@every_variant
def test_the_device_gets_what_the_plan_streams_and_places(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    assert run.h2d_bytes in to_device(variant, run, unswapped)


@every_count
@every_variant
def test_blocks_are_placed_once_a_run(runs: Runs, variant: str, count: object) -> None:
    run = runs.of(variant, count)
    assert {one["adoption"] for one in run.forwards} == {1}


@every_count
@every_variant
def test_as_many_blocks_are_swapped_as_were_asked_for(runs: Runs, variant: str, count: object) -> None:
    vace = VACE_BLOCKS if VARIANTS[variant].get("vace") else 0
    for plan in runs.of(variant, count).plans.values():
        swapped = sum(plan["swapped"])
        if count == "auto":
            assert 1 < swapped < BLOCKS + vace
        else:
            assert swapped == count + count * vace // BLOCKS


@every_count
@every_variant
def test_what_is_swapped_has_come_through_slots_by_the_sessions_own_count(
    runs: Runs, variant: str, count: object
) -> None:
    run = runs.of(variant, count)
    for model, onloaded in enumerate(run.onloaded_bytes):
        plan = run.plans[f"{model}.1"]
        ran = sum(one["model"] == model and bool(one["blocks"]) for one in run.forwards)
        skipped = SLG_SKIPS * ran // 2 if variant == "skipped_layers" else 0
        times = ran if streams(plan) else 1
        slot, whole = plan["slot_bytes"], times * swapped_bytes(plan)
        assert whole - skipped * slot <= onloaded <= whole + (plan["slots"] + skipped) * slot
        assert onloaded > 0


@pytest.mark.parametrize("count", [HALF, BLOCKS, "auto"])
@every_variant
def test_a_swapped_run_moves_other_bytes_than_an_unswapped_one(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    assert run.h2d_bytes > 1.2 * unswapped.h2d_bytes
    assert run.peak_bytes < 0.8 * unswapped.peak_bytes


@every_count
@every_variant
def test_weights_take_no_more_device_memory_than_planned(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    for model, block_bytes in enumerate(unswapped.block_bytes):
        plan = run.plans[f"{model}.1"]
        assert run.peak_bytes <= 1.02 * (unswapped.peak_bytes - block_bytes + plan["device_bytes"])


@every_variant
def test_swapping_all_peaks_at_most_one_block_and_the_small_tensors_above_the_wrappers_own(
    runs: Runs, variant: str
) -> None:
    run, native = runs.of(variant, BLOCKS), runs.native(variant)
    above = max(plan["slot_bytes"] + sum(plan["small_bytes"]) for plan in run.plans.values())
    assert run.peak_bytes <= 1.02 * native.peak_bytes + above


@every_count
@pytest.mark.parametrize("variant", ENDS)
def test_after_a_run_the_transformer_is_the_wrappers_own(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    assert run.counters == unswapped.counters == [[-1, -1, 0]] * len(unswapped.block_bytes)
    assert run.places == unswapped.places
    assert not run.has_own_forward


@every_count
@pytest.mark.parametrize("variant", [name for name in ENDS if name != "main_device"])
def test_after_a_run_the_device_memory_is_free(runs: Runs, variant: str, count: object) -> None:
    assert runs.of(variant, count).after_bytes <= runs.unswapped(variant).after_bytes


@every_count
@pytest.mark.parametrize("variant", STAYS)
def test_a_model_that_stays_keeps_what_was_planned(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    (block_bytes,), (plan,) = unswapped.block_bytes, run.plans.values()
    assert run.after_bytes == pytest.approx(unswapped.after_bytes - block_bytes + plan["device_bytes"], rel=0.02)


@every_count
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("compiled")])
def test_a_changed_count_compiles_no_block_anew(runs: Runs, variant: str, count: object) -> None:
    assert runs.of(variant, count).graphs == runs.unswapped(variant).graphs


@every_variant
def test_swapped_blocks_are_held_once(runs: Runs, variant: str) -> None:
    run = runs.of(variant, BLOCKS)
    streamed = sum(swapped_bytes(plan) for plan in run.plans.values())
    assert streamed <= run.slab_bytes <= 1.01 * streamed


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rig_runs_the_wrappers_own_swapping(runs: Runs, variant: str) -> None:
    native, unswapped = runs.native(variant), runs.unswapped(variant)
    assert native.latents == unswapped.latents
    assert native.d2h_bytes > sum(unswapped.block_bytes)


@pytest.mark.parametrize("variant", CACHES)
def test_the_rigs_caches_leave_whole_forwards_out(runs: Runs, variant: str) -> None:
    blocks = [one["blocks"] for one in runs.unswapped(variant).forwards]
    assert 0 < blocks.count(0) < len(blocks)
    assert [one["blocks"] for one in runs.of(variant, BLOCKS).forwards] == blocks


def test_the_rigs_accelerator_is_the_wrappers_device(runs: Runs) -> None:
    assert runs.unswapped("stays").places == ["hpu"]
