"""Inputs that change while the real wrapper keeps its model, and inputs that do not go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from comfy_client import Comfy
from rig_figures import to_host
from rig_runs import HALF, Runs
from rig_variants import BLOCKS, COMPILED, FAMILIES, VARIANTS, native, ours
from workflow_schema import Workflow, recorded

pytestmark = pytest.mark.rig

LARGEST_COUNT = 48
"""That the widget takes."""

MOST_ADOPTIONS = 3
"""In a row, when others undo each."""


def test_changed_counts_take_effect_with_the_loader_cached(comfy: Comfy, runs: Runs) -> None:
    case = VARIANTS["set_block_swap"]
    counts = [BLOCKS, HALF, 1, BLOCKS]
    changed = [comfy.run(case, swap=ours(count), cached=index > 0) for index, count in enumerate(counts)]
    fresh = [runs.of("set_block_swap", count) for count in counts]
    for name in ("latents", "h2d_bytes", "d2h_bytes", "peak_bytes", "after_bytes"):
        assert [getattr(run, name) for run in changed] == [getattr(run, name) for run in fresh], name


@pytest.mark.parametrize("variant", ["set_block_swap", "lora_unmerged", "gguf"])
def test_both_kinds_of_swapping_take_turns_on_one_cached_model(comfy: Comfy, runs: Runs, variant: str) -> None:
    case = VARIANTS[variant] | {"swap_at": "set"}
    swaps = [native(), ours(HALF), native(), ours(BLOCKS)]
    first, ours_first, second, ours_second = (
        comfy.run(case, swap=swap, cached=index > 0) for index, swap in enumerate(swaps)
    )
    truth = runs.unswapped(variant)
    assert {run.latents for run in (first, ours_first, second, ours_second)} == {truth.latents}
    assert (second.h2d_bytes, second.d2h_bytes) == (first.h2d_bytes, first.d2h_bytes)
    assert second.peak_bytes == pytest.approx(first.peak_bytes, rel=0.01)
    assert second.counters == first.counters != [[-1, -1, 0]]
    for run in (ours_first, ours_second):
        run.how = None
        assert run.counters == [[-1, -1, 0]]
        assert run.d2h_bytes in to_host(variant, run, truth)


def test_a_count_above_the_models_swaps_every_block(comfy: Comfy, runs: Runs) -> None:
    every = runs.of("bf16", BLOCKS)
    run = comfy.run(VARIANTS["bf16"], swap=ours(LARGEST_COUNT, vace_blocks_to_swap=15))
    assert (run.latents, run.h2d_bytes, run.peak_bytes) == (every.latents, every.h2d_bytes, every.peak_bytes)


@pytest.mark.parametrize(
    "widgets",
    [
        {"debug_mode": True},
        {"enable_cuda_optimization": False},
        {"enable_dram_optimization": False},
        {"offload_txt_emb": True, "offload_img_emb": True},
    ],
    ids=lambda widgets: "_".join(widgets),
)
def test_no_widget_changes_the_latents(comfy: Comfy, runs: Runs, widgets: dict[str, Any]) -> None:
    assert comfy.latents(VARIANTS["bf16"], swap=ours(HALF, **widgets)) == runs.unswapped("bf16").latents


def test_with_vram_management_both_are_refused_ours_in_our_words_and_the_next_run_is_right(
    comfy: Comfy, runs: Runs
) -> None:
    load = VARIANTS["bf16"]["load"] | {"vram_management_args": {"offload_percent": 1.0}}
    theirs = comfy.run(VARIANTS["bf16"], load=load, swap=native())
    refused = comfy.run(VARIANTS["bf16"], load=load, swap=ours(HALF))
    assert "vram_management_args" in theirs.error
    assert refused.error.startswith("WrapperError: swapped blocks cannot run with vram_management_args")
    assert comfy.latents(VARIANTS["bf16"], swap=ours(HALF)) == runs.unswapped("bf16").latents


def test_behind_vram_management_we_refuse_in_one_line_what_the_wrapper_cannot_run_and_the_next_run_is_right(
    comfy: Comfy, runs: Runs
) -> None:
    """With a merged LoRA: of other models the weights are on meta when its loader manages them, and that fails."""
    load = VARIANTS["lora_merged"]["load"] | {"vram_management_args": {"offload_percent": 1.0}}
    refused = comfy.run(VARIANTS["lora_merged"], load=load, swap=ours(HALF), swap_at="set")
    assert refused.error.startswith("WrapperError: swapped blocks cannot run with vram_management_args")
    assert refused.forwards == []
    assert comfy.latents(VARIANTS["lora_merged"], swap=ours(HALF)) == runs.unswapped("lora_merged").latents


@pytest.mark.parametrize("count", [None, 0, HALF, BLOCKS], ids=["automatic", "all stay", "half", "all stream"])
@pytest.mark.parametrize("mover", ["points elsewhere", "replaces", "offloads"])
def test_a_pack_that_moves_weights_costs_three_adoptions_at_most_and_is_named_in_one_warning(
    comfy: Comfy, runs: Runs, mover: str, count: int | None
) -> None:
    case = VARIANTS["bf16"] | {"sample": {"steps": 4}}
    run = comfy.run(case, swap=ours(count), mover=mover, texts=True)
    assert run.latents == comfy.latents(case)
    assert max(forward["adoption"] for forward in run.forwards) <= MOST_ADOPTIONS
    (warning,) = run.warnings
    assert re.match(
        r"blocks\.\d+\.\S+ was moved, replaced or edited by ComfyUI-Mover while the model runs; remove", warning
    )
    assert re.search(r"note: ComfyUI-Mover moved, replaced or edited blocks\.\d+\.", run.report_text)
    assert comfy.latents(VARIANTS["bf16"], swap=ours(count), cached=True) == runs.unswapped("bf16").latents


@pytest.mark.parametrize("variant", ["bf16", "fp8_scaled", "lora_merged"])
def test_with_both_kinds_of_swapping_the_one_at_set_block_swap_holds(comfy: Comfy, runs: Runs, variant: str) -> None:
    truth = runs.unswapped(variant)
    theirs = comfy.run(VARIANTS[variant], swap=native(BLOCKS + 1), swap_at="set", also=ours(HALF))
    assert (theirs.latents, theirs.plans) == (truth.latents, {})
    for name in ("h2d_bytes", "d2h_bytes", "peak_bytes"):
        assert getattr(theirs, name) == pytest.approx(getattr(runs.native(variant), name), rel=0.01), name
    run = comfy.run(VARIANTS[variant], swap=ours(HALF), swap_at="set", also=native())
    assert run.latents == truth.latents
    for name in ("h2d_bytes", "d2h_bytes", "peak_bytes", "plans", "counters"):
        assert getattr(run, name) == getattr(runs.of(variant, HALF), name), name


@pytest.mark.parametrize("variant", ["bf16", "fp8_scaled"])
def test_text_embeddings_that_go_to_the_host_cost_what_they_cost_with_native_swapping(
    comfy: Comfy, runs: Runs, variant: str
) -> None:
    asked = {"offload_txt_emb": True}
    natively = native(BLOCKS + 1)
    natively["inputs"] |= asked
    ours_with, theirs_with = (comfy.run(VARIANTS[variant], swap=swap) for swap in (ours(HALF, **asked), natively))
    assert ours_with.latents == theirs_with.latents == runs.unswapped(variant).latents
    for name in ("h2d_bytes", "d2h_bytes"):
        more = getattr(ours_with, name) - getattr(runs.of(variant, HALF), name)
        assert more == getattr(theirs_with, name) - getattr(runs.native(variant), name) > 0, name


def test_cuda_graphs_are_refused_with_what_to_do_and_the_next_run_is_right(comfy: Comfy, runs: Runs) -> None:
    load = VARIANTS["bf16"]["load"] | {"compile_args": COMPILED | {"mode": "max-autotune"}}
    refused = comfy.run(VARIANTS["bf16"], load=load, swap=ours(HALF), swap_at="set")
    assert "max-autotune-no-cudagraphs" in refused.error
    assert comfy.latents(VARIANTS["bf16"], swap=ours(HALF)) == runs.unswapped("bf16").latents


def test_with_load_device_main_device_a_second_run_copies_no_block_to_the_host(comfy: Comfy, runs: Runs) -> None:
    case = VARIANTS["main_device"] | {"swap": ours(BLOCKS)}
    first, second = (comfy.run(case, cached=cached) for cached in (False, True))
    (block_bytes,) = runs.unswapped("main_device").block_bytes
    assert second.latents == first.latents == runs.unswapped("main_device").latents
    assert second.d2h_bytes == pytest.approx(first.d2h_bytes - block_bytes, rel=0.01)
    assert second.peak_bytes <= 1.01 * runs.of("bf16", BLOCKS).peak_bytes


def test_a_lora_that_comes_and_goes_on_a_cached_model_is_applied_when_it_is_there(comfy: Comfy, runs: Runs) -> None:
    plain, lora = VARIANTS["one_forward_a_step"], VARIANTS["lora_set"]
    swap = {"swap": ours(HALF), "swap_at": "set"}
    seen = [comfy.latents(case, cached=index > 0, **swap) for index, case in enumerate([plain, lora, plain, lora])]
    truth = [comfy.latents(case, cached=index > 0) for index, case in enumerate([plain, lora, plain, lora])]
    assert seen == truth
    assert truth[0] != truth[1] == runs.unswapped("lora_set").latents


def test_a_larger_video_on_a_cached_model_gives_the_unswapped_latents(comfy: Comfy) -> None:
    sizes = [{}, {"width": 96}, {"num_frames": 9}]
    truth = [comfy.latents(VARIANTS["bf16"], size=size, cached=index > 0) for index, size in enumerate(sizes)]
    limit = {"swap": ours(None), "limit_bytes": 128 << 20}
    seen = [comfy.latents(VARIANTS["bf16"], size=size, cached=index > 0, **limit) for index, size in enumerate(sizes)]
    assert seen == truth


EXAMPLES = Path(__file__).parents[2] / "example_workflows"

SAMPLER = recorded(EXAMPLES.parent / "tests" / "object_info" / "wrapper.json")["WanVideoSampler"]

STAND_FOR = {
    "01": VARIANTS["lora_unmerged"],
    "02": VARIANTS["lora_unmerged"],
    "03": VARIANTS["lora_unmerged"],
    "04": VARIANTS["gguf"],
    "05": VARIANTS["vace"],
    "06": VARIANTS["lora_unmerged"],
    "07": FAMILIES["multitalk"],
    "08": FAMILIES["humo"],
    "09": FAMILIES["animate"],
    "10": FAMILIES["longcat_avatar"],
}
"""The tiny model that each example is tried with."""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name[:2])
def test_the_samplers_of_each_example_run_as_they_are_set_and_give_the_unswapped_latents(
    comfy: Comfy, path: Path
) -> None:
    for node in Workflow.read(path).of_type("WanVideoSampler"):
        widgets = {widget.name: value for widget, value in SAMPLER.widgets(node["widgets_values"])}
        sample = {name: widgets[name] for name in ("steps", "cfg", "shift", "scheduler", "start_step", "end_step")}
        case = STAND_FOR[path.name[:2]] | {"sample": sample}
        run = comfy.run(case, swap=ours(None), texts=True)
        assert run.latents == comfy.latents(case)
        steps = len(range(sample["steps"])[sample["start_step"] : sample["end_step"] % (sample["steps"] + 1)])
        assert re.match(rf"run \d+, \d\d:\d\d: {steps} steps?; ", run.report_text)
