"""The real wrapper on torch.cuda's streams, over tests/pretend_cuda: right, in order, and nothing stays page-locked.

RIG_DEVICE=cuda COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m pytest -m rig tests/rig/test_rig_cuda.py

COMFYUI_PYTHON has the CUDA build of torch that tests/pretend_cuda names.
"""

from __future__ import annotations

import pytest
from comfy_client import ON_CUDA, Comfy
from rig_figures import to_host
from rig_runs import HALF, Runs
from rig_variants import BLOCKS, FAMILIES, VARIANTS, ours

pytestmark = [pytest.mark.rig, pytest.mark.skipif(not ON_CUDA, reason="needs RIG_DEVICE=cuda, see its docstring")]

COUNTS = (HALF, BLOCKS, "auto")

BESIDE = ("s2v", "one_to_all", "uni3c_offload", "animate", "controlnet", "ovi", "multitalk")
"""Families with weights beside their blocks, of the wrapper's own classes and real loaders here, too."""

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_count = pytest.mark.parametrize("count", COUNTS)


@pytest.fixture(scope="module")
def comfy(comfy_without_us: Comfy) -> Comfy:
    comfy_without_us.load_package()
    return comfy_without_us


@pytest.fixture(scope="module")
def runs(comfy: Comfy) -> Runs:
    return Runs(comfy)


@pytest.fixture(scope="module")
def families(comfy: Comfy) -> Runs:
    return Runs(comfy, FAMILIES)


@every_variant
@every_count
def test_latents_are_those_of_the_unswapped_model(runs: Runs, variant: str, count: object) -> None:
    assert runs.of(variant, count).latents == runs.unswapped(variant).latents


@every_variant
@every_count
def test_no_two_accesses_to_the_same_bytes_are_out_of_order(runs: Runs, variant: str, count: object) -> None:
    assert runs.unswapped(variant).violations == []
    assert runs.of(variant, count).violations == []


@every_variant
@every_count
def test_blocks_are_swapped_over_several_copy_streams(runs: Runs, variant: str, count: object) -> None:
    for plan in runs.of(variant, count).plans.values():
        assert sum(plan["swapped"]) > plan["slots"] > 1
        assert plan["streams"] > 1


@every_variant
@every_count
def test_no_block_weight_is_copied_back(runs: Runs, variant: str, count: object) -> None:
    run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    assert run.d2h_bytes in to_host(variant, run, unswapped)


@every_variant
@every_count
def test_only_what_the_sessions_keep_is_page_locked(runs: Runs, variant: str, count: object) -> None:
    run = runs.of(variant, count)
    assert 0 < run.locked_bytes == run.pinned_bytes


@pytest.mark.parametrize(
    ("family", "count"),
    # MultiTalk's audio projection has its real size here: two slots of it are more than the tiny model.
    [(family, count) for family in BESIDE for count in COUNTS if (family, count) != ("multitalk", "auto")],
)
def test_what_is_beside_the_blocks_streams_in_order(comfy: Comfy, families: Runs, family: str, count: object) -> None:
    run, unswapped = families.of(family, count), families.unswapped(family)
    assert (run.latents, run.violations) == (unswapped.latents, unswapped.violations)
    assert unswapped.violations == []
    assert 0 < run.locked_bytes == run.pinned_bytes


def test_a_second_model_takes_over_locked_memory_where_both_do_not_fit(comfy: Comfy) -> None:
    case = VARIANTS["two_experts"]
    truth = comfy.run(case)
    largest = max(truth.block_bytes)
    fits_one = case | {"swap": ours(BLOCKS), "pin_bytes": largest * 6 // 5}
    first, *later = (comfy.run(fits_one, cached=index > 0) for index in range(3))
    assert first.locks - first.unlocks == BLOCKS  # the link may have been measured, too
    for run in (first, *later):
        assert (run.latents, run.violations) == (truth.latents, [])
        assert 0 < run.locked_bytes == run.pinned_bytes <= largest
        assert run.slab_fills == 2 * BLOCKS
    assert {(run.locks, run.unlocks) for run in later} == {(0, 0)}


def test_nothing_stays_page_locked_without_the_models(comfy: Comfy) -> None:
    assert comfy.run(VARIANTS["stays"], swap=ours(HALF)).locked_bytes > 0
    assert comfy.run(VARIANTS["bf16"]).locked_bytes == 0
