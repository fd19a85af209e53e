"""If we swap nothing, the nodes say why, and what happens instead; they pass on what they get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wanvideo_enhanced_blockswap as package
from fake_comfyui import HPU, ours, sampled, warnings
from standin.measuring import unswapped
from wanvideo_enhanced_blockswap import nodes as node_module
from wanvideo_enhanced_blockswap.blockswap.settings import EVERY_BLOCK, SETTINGS_KEY

NODES = package.NODE_CLASS_MAPPINGS
SWAP, PLAN, REPORT = (NODES[f"WanVideo{name}"] for name in ("EnhancedBlockSwap", "BlockSwapPlan", "BlockSwapReport"))


# Devices and flags without swapping


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (torch.device("cpu"), "cpu: the CPU computes from host memory"),
        (torch.device("mps"), "mps: Apple's GPUs share the host's memory"),
        (torch.device("xpu"), "xpu: Intel GPUs have not been tried"),
        ("dml", "dml: DirectML's tensors cannot be pointed at other memory"),
    ],
)
def test_where_the_node_passes_through_plan_and_report_say_that_and_why(
    comfy: SimpleNamespace, device: Any, why: str
) -> None:
    workflow, _ = sampled(None)
    comfy.set_device(device)
    (arguments,) = SWAP().setargs()
    model, passed, text = PLAN().preview(workflow.patchers[0], arguments)["result"]
    assert (model, passed) == (workflow.patchers[0], None)
    assert text == f"nothing is planned: this device runs without swapping: {why}"
    said = REPORT().report({}, workflow.patchers[0])["result"][1]
    assert said == f"no block was swapped by WanVideo Enhanced BlockSwap: this device runs without swapping: {why}"


def test_a_flag_that_keeps_models_on_the_gpu_is_named_by_plan_and_report(comfy: SimpleNamespace) -> None:
    comfy.flags.highvram = True
    workflow, _ = sampled(None)
    (arguments,) = SWAP().setargs()
    assert arguments is None
    for text in (
        PLAN().preview(workflow.patchers[0], arguments)["result"][2],
        REPORT().report({}, workflow.patchers[0])["result"][1],
    ):
        assert text.endswith(
            "this device runs without swapping: ComfyUI runs with --highvram, which keeps models on the GPU"
        )


def test_without_arguments_and_without_a_reason_for_it_they_are_to_be_connected(comfy: SimpleNamespace) -> None:
    workflow, _ = sampled(None)
    assert PLAN().preview(workflow.patchers[0], None)["result"][2] == (
        "nothing is planned: no arguments are connected; connect those of WanVideo Enhanced BlockSwap"
    )


# The wrapper is absent, or another than expected


@pytest.mark.parametrize(("widgets", "count"), [({}, 3), ({"auto_hardware_tuning": True}, EVERY_BLOCK)])
def test_without_the_wrapper_it_says_that_nothing_is_swapped_and_what_to_install(
    comfy: SimpleNamespace,
    events: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    widgets: dict[str, Any],
    count: int,
) -> None:
    comfy.classes.clear()
    arguments = ours(**widgets)
    assert SETTINGS_KEY not in arguments
    assert arguments["blocks_to_swap"] == count
    (said,) = warnings(caplog)
    assert "no pack has its loader, and without it WanVideo Enhanced BlockSwap swaps nothing" in said
    assert "install it through ComfyUI Manager" in said
    assert "swapping is used" not in said
    assert [event["text"] for event in events] == [said]


@pytest.mark.parametrize(
    ("widgets", "used"),
    [
        ({"auto_hardware_tuning": True}, "the wrapper's own, slower swapping is used, with every block"),
        ({"blocks_to_swap": 7}, "the wrapper's own, slower swapping is used, with blocks_to_swap = 7"),
        ({"blocks_to_swap": 0}, "nothing is swapped, since blocks_to_swap is 0"),
    ],
)
def test_a_wrapper_that_is_too_old_swaps_by_itself_and_that_is_what_is_said(
    comfy: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    widgets: dict[str, Any],
    used: str,
) -> None:
    from standin.nodes_sampler import init_blockswap

    monkeypatch.setattr(
        "standin.nodes_sampler.init_blockswap", lambda transformer, *rest: init_blockswap(transformer, *rest)
    )
    arguments = ours(**widgets)
    (line,) = warnings(caplog)
    assert line.startswith("standin has changed, or is too old: ")
    assert "init_blockswap(block_swap_args=…), init_blockswap(model=…) are not as expected" in line
    assert line.endswith(f"; update it and WanVideo Enhanced BlockSwap; until then {used}")
    # It is the truth: the wrapper swaps as many by itself, and of ours there is nothing.
    workflow, latents = sampled(arguments)
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    swapped = min(int(arguments["blocks_to_swap"]), 5) - 1
    assert workflow.transformer.blocks_to_swap == max(0, swapped)
    assert node_module.COMFYUI.gate is None
    for text in (
        PLAN().preview(workflow.patchers[0], arguments)["result"][2],
        REPORT().report({}, workflow.patchers[0])["result"][1],
    ):
        assert text.endswith("the wrapper's own swapping is used; the log says why")


# What goes through


@pytest.mark.parametrize("swaps", [True, False])
def test_the_nodes_with_text_pass_on_the_very_objects_that_they_get_and_change_nothing_in_them(
    comfy: SimpleNamespace, swaps: bool
) -> None:
    arguments = ours()
    workflow, latents = sampled(arguments if swaps else None)
    samples = {"samples": latents, "noise_mask": None}
    passed, text = REPORT().report(samples, workflow.patchers[0])["result"]
    assert passed is samples
    assert list(passed) == ["samples", "noise_mask"]
    assert passed["samples"] is latents
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    assert ("1 block on the GPU, 3 streaming" in text) is swaps
    before = dict(arguments)
    model, given, _ = PLAN().preview(workflow.patchers[0], arguments, 128, 128, 9)["result"]
    assert model is workflow.patchers[0]
    assert given is arguments
    assert arguments == before
