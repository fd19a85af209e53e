"""Through the gate, every way to run the wrapper gives the unswapped latents and copies no weight back."""

from __future__ import annotations

import gc

import pytest
import standin
import torch
from gate_bench import BLOCKS, DEVICE, VACE_BLOCKS, GateBench, allocated, arguments, block_bytes, is_as_new, sampled
from standin import Workflow, swap_args
from standin.measuring import unswapped
from toys import small_bytes
from wanvideo_enhanced_blockswap.blockswap.model.groups import is_beside

pytestmark = pytest.mark.usefixtures("pretend_stats")

LOOPS = {"multitalk", "multitalk_kept", "multitalk_lora_unmerged", "multitalk_lora_merged", "multitalk_gguf"}
LOOPS |= {"animate_loop", "animate_loop_fp8_scaled"}
EXPERTS = {name for name in standin.VARIANTS if name.startswith("two_experts")}
STEP_BYTES = 8 * 10 * (BLOCKS + VACE_BLOCKS) * 4
"""The LoRA step counters of all layers, a long integer each, once for each time that a run is released."""
ALL = BLOCKS


@pytest.mark.parametrize("count", [1, 2, ALL, None])
@pytest.mark.parametrize("variant", standin.VARIANTS)
def test_latents_are_those_of_the_unswapped_model_and_no_weight_is_copied_back(
    bench: GateBench, variant: str, count: int | None
) -> None:
    truth = unswapped(variant, DEVICE)
    workflow = bench.workflow(variant, arguments(count))
    first = sampled(workflow)
    assert torch.equal(first.latents, truth.latents)
    assert torch.equal(workflow.sample(), truth.second)
    runs = [bench.gate.run_of(transformer) for transformer in workflow.transformers]
    for run in runs:
        assert run is not None
        assert run.session.counters.returned_bytes <= STEP_BYTES
    # Hints of VACE blocks that are swapped by hand go to the host, as with native swapping.
    hints = 0 if count is None or "vace" not in variant else 2 * truth.latents.nbytes * 1000
    # Stand-In's layers are on the device when the first run starts, and only then; a slab samples what it is given.
    found = 2 * BLOCKS * 4 * workflow.transformer.dim**2 if variant == "stand_in_unmerged" else 0
    assert first.d2h_bytes <= truth.d2h_bytes + STEP_BYTES + hints + found
    if count in (2, ALL):
        assert first.h2d_bytes != truth.h2d_bytes, "a run that did not swap must not pass"


@pytest.mark.parametrize("variant", standin.VARIANTS)
def test_the_one_block_that_is_asked_for_comes_through_a_slot_and_no_other_does(bench: GateBench, variant: str) -> None:
    workflow = bench.workflow(variant, arguments(1))
    workflow.sample()
    for transformer in workflow.transformers:
        run = bench.gate.run_of(transformer)
        assert run is not None
        plan, profile, counters = run.plan, run.planner.profile, run.session.counters
        assert plan is not None
        assert profile is not None
        slabs = [profile.blocks[i].slab_bytes for i in plan.swapped_indices]
        residents = [b for b, swapped in zip(profile.blocks, plan.swapped, strict=True) if not swapped]
        # One VACE block besides, or all that is beside the blocks: then they take turns in one slot.
        beside = sum(is_beside(block.name) for block in profile.blocks)
        assert len(slabs) == (2 if transformer.vace_layers is not None else 1) + beside
        if len(slabs) == 1:
            assert (counters.onloads, counters.onloaded_bytes) == (
                run.session.adoptions,
                run.session.adoptions * slabs[0],
            )
        assert counters.onloads >= run.session.adoptions * len(slabs)
        small = sum(small_bytes(block) for block in profile.blocks)
        placed = sum(block.streamed_bytes for block in residents) + small
        resident = [i for i, swapped in enumerate(plan.swapped) if not swapped]
        aligned = profile.small_device_bytes + profile.resident_device_bytes(resident)
        assert placed <= counters.placed_bytes / run.session.adoptions <= aligned


@pytest.mark.parametrize("asked", [("txt",), ("img",), ("txt", "img")], ids="_".join)
@pytest.mark.parametrize("variant", ["image", "fp32", "fp8_scaled", "gguf", "lora_unmerged", "compiled", "vace"])
def test_embeddings_that_go_to_the_host_cost_what_they_cost_with_native_swapping(
    bench: GateBench, variant: str, asked: tuple[str, ...]
) -> None:
    widgets = {f"offload_{name}_emb": True for name in asked}
    truth = unswapped(variant, DEVICE)
    more = []
    for without, with_them in (
        (arguments(2), arguments(2, **widgets)),
        (swap_args(3, vace_blocks_to_swap=2), swap_args(3, vace_blocks_to_swap=2, **widgets)),
    ):
        costs = [sampled(bench.workflow(variant, args)) for args in (without, with_them)]
        assert all(torch.equal(cost.latents, truth.latents) for cost in costs)
        more.append([getattr(costs[1], name) - getattr(costs[0], name) for name in ("h2d_bytes", "d2h_bytes")])
    assert more[0] == more[1]
    # Only one of the models has image embeddings.
    assert (min(more[0]) > 0) is ("txt" in asked or variant == "image")


UNPATCHED = ["fp32", "bf16", "fp16", "fp8", "fp8_at_load", "lora_merged", "image", "compiled", "lynx"]


@pytest.mark.parametrize("variant", UNPATCHED)
def test_an_unpatched_model_copies_back_what_lies_outside_its_blocks_once_and_nothing_else(
    bench: GateBench, variant: str
) -> None:
    truth = unswapped(variant, DEVICE)
    workflow = bench.workflow(variant, arguments(ALL))
    assert sampled(workflow).d2h_bytes == truth.d2h_bytes - block_bytes(workflow.transformer)


PATCHED = ["fp8_scaled", "gguf", "lora_unmerged", "lora_set", "lora_fp8_scaled", "lora_gguf", "forcing_fp8_scaled"]


@pytest.mark.parametrize("variant", PATCHED)
def test_a_patched_model_copies_nothing_back_but_step_counters(bench: GateBench, variant: str) -> None:
    truth = unswapped(variant, DEVICE)
    cost = sampled(bench.workflow(variant, arguments(ALL)))
    assert truth.d2h_bytes <= cost.d2h_bytes <= truth.d2h_bytes + STEP_BYTES


@pytest.mark.parametrize("variant", [name for name in standin.VARIANTS if "stays" not in name])
def test_with_all_blocks_swapped_the_peak_is_the_wrappers_own_or_less(bench: GateBench, variant: str) -> None:
    native = Workflow(variant, device=DEVICE)
    native.load(swap_args(ALL + 1, vace_blocks_to_swap=VACE_BLOCKS))
    theirs = sampled(native)
    del native
    workflow = bench.workflow(variant, arguments(ALL))
    ours = sampled(workflow)
    profile = bench.run_of(workflow).planner.profile
    assert profile is not None
    block = max(block.nbytes for block in profile.blocks)
    assert ours.peak <= 1.02 * theirs.peak + block + profile.small_device_bytes


@pytest.mark.parametrize("count", [1, 2, ALL, None])
@pytest.mark.parametrize("variant", [name for name in standin.VARIANTS if name not in LOOPS | EXPERTS])
def test_a_run_adopts_once_for_each_time_that_the_wrapper_loads(
    bench: GateBench, variant: str, count: int | None
) -> None:
    workflow = bench.workflow(variant, arguments(count))
    for runs in (1, 2):
        workflow.sample()
        assert bench.run_of(workflow).session.adoptions == runs


@pytest.mark.parametrize("count", [2, ALL])
@pytest.mark.parametrize("variant", ["fp32", "bf16", "fp8_scaled", "lora_fp8_scaled", "context_windows", "skip_layers"])
def test_bytes_to_the_device_are_streamed_bytes_of_each_forward_and_the_rest_once(
    bench: GateBench, variant: str, count: int
) -> None:
    truth = unswapped(variant, DEVICE)
    workflow = bench.workflow(variant, arguments(count))
    cost = sampled(workflow)
    run = bench.run_of(workflow)
    profile, report, plan = run.planner.profile, run.last_report, run.plan
    assert profile is not None
    assert report is not None
    assert plan is not None
    slot = plan.slot_bytes
    skipped = 3 * count if variant == "skip_layers" else 0
    streamed = plan.streamed_bytes * report.measured.forwards
    residents = sum(b.streamed_bytes for b, swapped in zip(profile.blocks, plan.swapped, strict=True) if not swapped)
    small = sum(small_bytes(b) for b in profile.blocks)
    outside = truth.h2d_bytes - profile.block_bytes
    expected = streamed + residents + small + outside
    aligned = plan.device_bytes - residents - small  # the window, and what aligns the others in their buffers
    assert 0.99 * expected - skipped * slot <= cost.h2d_bytes <= 1.01 * expected + aligned + skipped * slot


@pytest.mark.parametrize("variant", standin.VARIANTS)
def test_a_model_without_our_arguments_meets_nothing_of_ours(bench: GateBench, variant: str) -> None:
    truth = unswapped(variant, DEVICE)
    workflow = bench.workflow(variant, None)
    seen = []
    workflow.transformer.register_forward_pre_hook(lambda module, _: seen.append("forward" in vars(module)))
    cost = sampled(workflow)
    assert torch.equal(cost.latents, truth.latents)
    assert seen
    assert not any(seen)
    assert bench.gate.run_of(workflow.transformer) is None


@pytest.mark.parametrize("variant", [name for name in standin.VARIANTS if "stays" not in name])
def test_when_a_run_is_over_nothing_of_ours_is_on_the_device_or_the_transformer(bench: GateBench, variant: str) -> None:
    without = bench.workflow(variant, None)
    left = [(without.sample(), allocated())[1] for _ in range(2)]
    del without
    gc.collect()
    workflow = bench.workflow(variant, arguments(2))
    assert all((workflow.sample(), allocated())[1] <= left[i] for i in range(2))
    assert is_as_new(workflow.transformer)
