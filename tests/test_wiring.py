"""Nodes that do not go together: one line says why and what to do; what can run gives the unswapped latents."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import standin
import torch
import wanvideo_enhanced_blockswap as package
from fake_comfyui import HPU, ours, sampled, warnings
from standin import Workflow, swap_args
from standin.measuring import places, unswapped
from wanvideo_enhanced_blockswap import nodes as node_module
from wanvideo_enhanced_blockswap.blockswap.errors import WrapperError
from wanvideo_enhanced_blockswap.blockswap.wrapper.wiring import OURS_WIN, THEIRS_WIN

NODES = package.NODE_CLASS_MAPPINGS
SWAP, PLAN, REPORT = (NODES[f"WanVideoEnhancedBlockSwap{name}"] for name in ("", "Plan", "Report"))
SetBlockSwap = standin.NODE_CLASS_MAPPINGS["WanVideoSetBlockSwap"]

NATIVE = swap_args(3, vace_blocks_to_swap=1)
"""What the wrapper's own node gives."""


def native_model() -> SimpleNamespace:
    """A MODEL as ComfyUI's own loader gives it."""
    transformer = torch.nn.Module()
    transformer.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    kind = type("WAN21", (), {"diffusion_model": transformer})
    model = SimpleNamespace(model=kind(), model_options={"transformer_options": {}}, patches={})
    model.clone = lambda: model
    return model


# Both kinds of swapping


@pytest.mark.parametrize("variant", ["fp32", "fp8_scaled", "gguf", "lora_merged", "vace", "two_experts"])
def test_the_wrappers_arguments_behind_ours_hold_and_log_and_node_say_so(
    comfy: SimpleNamespace, events: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    workflow = Workflow(variant, device=HPU)
    workflow.load(ours())
    for _ in range(2):
        assert torch.equal(workflow.sample(NATIVE), unswapped(variant, HPU).latents)
    assert workflow.transformer.blocks_to_swap in (2, 3)
    assert node_module.COMFYUI.gate.run_of(workflow.transformer) is None
    assert warnings(caplog) == [THEIRS_WIN]
    assert {(event["node"], event["phase"], event["text"]) for event in events} == {("3", "off", THEIRS_WIN)}


@pytest.mark.parametrize("variant", ["fp32", "fp8_scaled", "gguf", "lora_merged", "vace", "two_experts"])
def test_our_arguments_behind_the_wrappers_hold_and_the_log_says_so(
    comfy: SimpleNamespace, events: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    workflow = Workflow(variant, device=HPU)
    arguments = ours()
    workflow.load(NATIVE)
    for _ in range(2):
        assert torch.equal(workflow.sample(arguments), unswapped(variant, HPU).latents)
    plan = node_module.COMFYUI.gate.run_of(workflow.transformer).plan
    assert plan.swapped_count == 3
    assert warnings(caplog) == [OURS_WIN]
    assert "off" not in {event["phase"] for event in events}


@pytest.mark.parametrize("line", [THEIRS_WIN, OURS_WIN])
def test_what_is_said_of_both_kinds_is_one_line_that_ends_with_the_cure(line: str) -> None:
    assert "\n" not in line
    assert line.endswith("; disconnect one of the two nodes")


def test_one_kind_at_both_places_and_none_at_one_of_them_are_no_fault(
    comfy: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    for at_loader, at_set in ((ours(), ours(unique_id="4")), (ours(), None), (None, ours()), (NATIVE, NATIVE)):
        workflow = Workflow("fp32", device=HPU)
        workflow.load(at_loader)
        assert torch.equal(workflow.sample(at_set), unswapped("fp32", HPU).latents)
    assert warnings(caplog) == []


def test_the_node_that_sets_arguments_is_the_wrappers_own_again_when_the_gate_goes(comfy: SimpleNamespace) -> None:
    before = vars(SetBlockSwap)["loadmodel"]
    ours()
    assert vars(SetBlockSwap)["loadmodel"] is not before
    node_module.COMFYUI.gate.restore()
    assert vars(SetBlockSwap)["loadmodel"] is before


def test_a_wrapper_without_that_node_or_with_another_method_is_swapped_in_all_the_same(
    comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(comfy.classes, "WanVideoSetBlockSwap", type("Renamed", (), {"execute": print}))
    _, latents = sampled(ours())
    del comfy.classes["WanVideoSetBlockSwap"]
    node_module.COMFYUI.gate.restore()
    assert torch.equal(latents, sampled(ours())[1])


def test_the_report_of_a_model_with_another_nodes_arguments_says_what_to_connect(comfy: SimpleNamespace) -> None:
    workflow = Workflow("fp32", device=HPU)
    workflow.load(ours())
    (model,) = SetBlockSwap().loadmodel(workflow.patchers[0], NATIVE)
    workflow.sample(NATIVE)
    said = REPORT().report({}, model)["result"][1]
    assert said == (
        "no block was swapped by WanVideo Enhanced BlockSwap: the block_swap_args are another node's; connect those of "
        "WanVideo Enhanced BlockSwap in their place"
    )
    assert "no step has run with its arguments" in REPORT().report({}, workflow.patchers[0])["result"][1]


def test_a_plan_for_a_model_with_another_nodes_arguments_says_that_it_is_not_followed(comfy: SimpleNamespace) -> None:
    workflow = Workflow("fp32", device=HPU)
    workflow.load(NATIVE)
    *_, text = PLAN().preview(workflow.patchers[0], ours(), 128, 128, 9)["result"]
    assert text.startswith("hpu: 1 block on the GPU, 3 streaming\n")
    assert text.splitlines()[-1].startswith("- the model here has another node's block_swap_args")
    workflow.load(ours())
    assert "another node's" not in PLAN().preview(workflow.patchers[0], ours(), 128, 128, 9)["result"][2]


def test_the_plan_behind_a_bypassed_swap_node_says_what_is_missing(comfy: SimpleNamespace) -> None:
    assert "block_swap_args" not in PLAN.INPUT_TYPES()["required"]
    workflow = Workflow("fp32", device=HPU)
    workflow.load()
    model, arguments, text = PLAN().preview(workflow.patchers[0])["result"]
    assert (model, arguments) == (workflow.patchers[0], None)
    assert text == "nothing is planned: no arguments are connected; connect those of WanVideo Enhanced BlockSwap"


# VRAM management


def test_beside_vram_management_our_arguments_are_refused_in_our_words_at_the_loader_and_on_the_node(
    comfy: SimpleNamespace, events: list[dict[str, Any]]
) -> None:
    workflow = Workflow(replace(standin.VARIANTS["lora_merged"], has_vram_management=True), device=HPU)
    with pytest.raises(WrapperError, match=r"^swapped blocks cannot run with vram_management_args.*disconnect") as why:
        workflow.load(ours())
    assert [(event["node"], event["phase"], event["text"]) for event in events] == [("3", "failed", str(why.value))]
    with pytest.raises(AssertionError, match="block_swap_args and vram_management_args"):
        workflow.load(swap_args(2))


def test_behind_vram_management_our_arguments_are_refused_in_one_line_before_the_run_begins(
    comfy: SimpleNamespace, events: list[dict[str, Any]]
) -> None:
    truth = unswapped("lora_merged", HPU).latents
    workflow = Workflow(replace(standin.VARIANTS["lora_merged"], has_vram_management=True), device=HPU)
    workflow.load()
    arguments = ours()
    for runs in range(1, 3):
        with pytest.raises(WrapperError, match=r"^swapped blocks cannot run with vram_management_args.*disconnect"):
            workflow.sample(arguments)
        assert "meta" not in places(workflow.transformer.blocks), "merged weights are nowhere else"
        assert [event["phase"] for event in events] == ["failed"] * runs
        assert node_module.COMFYUI.gate.run_of(workflow.transformer) is None
    assert torch.equal(workflow.sample(), truth)
    assert torch.equal(sampled(arguments, "lora_merged")[1], truth)


@pytest.mark.parametrize("mark", ["vram_management_enabled", "auto_cpu_offload"])
@pytest.mark.parametrize("at", ["loader", "set"])
def test_a_wrapper_that_loads_models_with_both_is_told_before_weights_move_if_the_transformer_tells(
    comfy: SimpleNamespace, mark: str, at: str
) -> None:
    """Older loaders have refused neither, and have managed models on meta."""
    arguments = ours()
    workflow = Workflow("fp32", device=HPU)
    workflow.load(arguments if at == "loader" else None)
    transformer, model = workflow.transformer, workflow.patchers[0].model
    transformer.vram_management_enabled = mark == "vram_management_enabled"
    model["auto_cpu_offload"] = mark == "auto_cpu_offload"
    with pytest.raises(WrapperError, match="cannot run with vram_management_args, which move the same weights"):
        workflow.sample(None if at == "loader" else arguments)
    if mark == "vram_management_enabled":
        assert places(transformer) == {"meta"}
    transformer.vram_management_enabled = model["auto_cpu_offload"] = False
    assert torch.equal(workflow.sample(arguments), unswapped("fp32", HPU).latents)


# A native MODEL


@pytest.mark.parametrize("node", [PLAN, REPORT])
def test_the_types_forbid_a_native_model_and_tooltips_say_what_to_use(node: Any) -> None:
    kind, options = node.INPUT_TYPES()["required"]["model"]
    assert kind == "WANVIDEOMODEL"
    assert "native MODEL does not fit: ComfyUI offloads its own Wan models by itself" in options["tooltip"]
    assert "WanVideo Model Loader: ComfyUI offloads its own native Wan models (MODEL) by itself" in SWAP.DESCRIPTION


@pytest.mark.parametrize("make", [native_model, lambda: None, lambda: "a model", lambda: SimpleNamespace(model=None)])
def test_a_native_model_that_has_come_past_comfyuis_types_is_told_with_what_to_use(
    comfy: SimpleNamespace, make: Any
) -> None:
    model, samples, arguments = make(), {"samples": torch.zeros(1)}, ours()
    passed_model, passed_arguments, plan = PLAN().preview(model, arguments)["result"]
    assert passed_model is model
    assert passed_arguments is arguments
    passed_samples, report = REPORT().report(samples, model)["result"]
    assert passed_samples is samples
    for text in (plan, report):
        assert "expected a WANVIDEOMODEL, got" in text
        assert "load the file with WanVideo Model Loader" in text
        assert text.endswith("ComfyUI offloads those by itself")
        assert "\n" not in text


def test_our_arguments_set_on_a_native_model_are_told_and_change_nothing(
    comfy: SimpleNamespace, events: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model, arguments = native_model(), ours()
    assert SetBlockSwap().loadmodel(model, arguments) == (model,)
    (said,) = warnings(caplog)
    assert said.startswith("expected a WANVIDEOMODEL, got WAN21; load the file with")
    assert [(event["node"], event["phase"], event["text"]) for event in events] == [("3", "off", said)]
