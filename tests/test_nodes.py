"""What ComfyUI and saved workflows see of the nodes, with a faked ComfyUI and the stand-in wrapper."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import standin
import torch
import wanvideo_enhanced_blockswap as package
from fake_comfyui import HPU, ours, sampled
from standin import Workflow, nodes_sampler
from standin.measuring import unswapped
from wanvideo_enhanced_blockswap import comfyui
from wanvideo_enhanced_blockswap import nodes as node_module
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.blockswap.run.machine import TorchMachine
from wanvideo_enhanced_blockswap.blockswap.settings import EVERY_BLOCK, SETTINGS_KEY, SwapSettings
from wanvideo_enhanced_blockswap.hardware import GIB, HostMemory, HostPlatform

NODES = package.NODE_CLASS_MAPPINGS
SWAP = NODES["WanVideoEnhancedBlockSwap"]

WIDGETS = [
    ("blocks_to_swap", "INT", 0, 0, 48, 1),
    ("enable_cuda_optimization", "BOOLEAN", True, None, None, None),
    ("enable_dram_optimization", "BOOLEAN", True, None, None, None),
    ("auto_hardware_tuning", "BOOLEAN", True, None, None, None),
    ("vram_threshold_percent", "FLOAT", 50.0, 30.0, 90.0, 5.0),
    ("num_cuda_streams", "INT", 8, 1, 16, 1),
    ("bandwidth_target", "FLOAT", 0.8, 0.1, 1.0, 0.05),
    ("offload_txt_emb", "BOOLEAN", False, None, None, None),
    ("offload_img_emb", "BOOLEAN", False, None, None, None),
    ("vace_blocks_to_swap", "INT", 0, 0, 15, 1),
    ("debug_mode", "BOOLEAN", False, None, None, None),
]
"""Saved workflows store values by position: this list may only grow at its end."""

PLAIN = ["blocks_to_swap", "auto_hardware_tuning", "vram_threshold_percent"]
"""Widgets that are always shown; the others are advanced."""

FORMER = {f"WanVideoBlockSwap{name}": f"WanVideoEnhancedBlockSwap{name}" for name in ("Plan", "Report")}


def inputs_of(node: Any) -> dict[str, Any]:
    types = node.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def defaults() -> dict[str, Any]:
    return {name: value for name, _, value, *_ in WIDGETS}


# What is frozen


def test_the_nodes_and_their_names() -> None:
    assert {name: package.NODE_DISPLAY_NAME_MAPPINGS[name] for name in NODES if name not in FORMER} == {
        "WanVideoEnhancedBlockSwap": "WanVideo Enhanced BlockSwap (CUDA Optimized)",
        "WanVideoEnhancedBlockSwapPlan": "WanVideo Enhanced BlockSwap Plan",
        "WanVideoEnhancedBlockSwapReport": "WanVideo Enhanced BlockSwap Report",
    }


def test_former_names_of_saved_workflows_are_the_same_nodes_and_not_offered_any_more() -> None:
    for former, name in FORMER.items():
        assert issubclass(NODES[former], NODES[name])
        assert NODES[former].DEPRECATED
        assert inputs_of(NODES[former]) == inputs_of(NODES[name])
        assert package.NODE_DISPLAY_NAME_MAPPINGS[former] == package.NODE_DISPLAY_NAME_MAPPINGS[name]
    assert [name for name in NODES if getattr(NODES[name], "DEPRECATED", False)] == list(FORMER)


def test_the_swap_node_is_where_saved_workflows_look_for_it() -> None:
    assert (SWAP.CATEGORY, SWAP.RETURN_TYPES[0]) == ("WanVideoWrapper/Enhanced", "BLOCKSWAPARGS")


def test_the_widgets_are_in_the_order_of_saved_workflows_with_their_ranges_and_defaults() -> None:
    found = [
        (name, kind, options["default"], options.get("min"), options.get("max"), options.get("step"))
        for name, (kind, options) in inputs_of(SWAP).items()
    ]
    assert found[: len(WIDGETS)] == WIDGETS


def test_the_widgets_that_nobody_needs_at_first_are_advanced() -> None:
    shown = [name for name, (_, options) in inputs_of(SWAP).items() if not options.get("advanced")]
    assert shown == PLAIN
    advanced = {name: options["advanced"] for name, (_, options) in inputs_of(SWAP).items() if name not in PLAIN}
    assert advanced == {name: True for name, *_ in WIDGETS if name not in PLAIN}
    for name in ("WanVideoEnhancedBlockSwapPlan", "WanVideoEnhancedBlockSwapReport"):
        assert not [widget for widget, (_, options) in inputs_of(NODES[name]).items() if "advanced" in options]


def test_a_workflow_of_the_predecessor_loads_with_the_same_meaning() -> None:
    saved = [8, True, False, False, 35.0, 12, 0.75, True, False, 3, True]
    settings = SwapSettings(**dict(zip(inputs_of(SWAP), saved, strict=False)))  # newer widgets are at their defaults
    assert settings == SwapSettings(
        blocks_to_swap=8,
        enable_dram_optimization=False,
        auto_hardware_tuning=False,
        vram_threshold_percent=35.0,
        num_cuda_streams=12,
        bandwidth_target=0.75,
        offload_txt_emb=True,
        vace_blocks_to_swap=3,
        debug_mode=True,
    )


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_explains_itself(name: str) -> None:
    node = NODES[name]
    assert all(len(options["tooltip"]) > 20 for _, options in inputs_of(node).values())
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    assert len(node.DESCRIPTION) > 40
    assert node.SEARCH_ALIASES
    assert callable(getattr(node, node.FUNCTION))
    assert not hasattr(node, "IS_CHANGED")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("WanVideoEnhancedBlockSwapPlan", "WANVIDEOMODEL"), ("WanVideoEnhancedBlockSwapReport", "LATENT")],
)
def test_the_text_nodes_pass_their_first_input_on(name: str, kind: str) -> None:
    types = NODES[name].INPUT_TYPES()["required"]
    assert next(iter(types.values()))[0] == NODES[name].RETURN_TYPES[0] == kind
    assert NODES[name].RETURN_TYPES[-1] == "STRING"
    assert NODES[name].OUTPUT_NODE  # otherwise ComfyUI sends no text for the node to show


# Values


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"blocks_to_swap": 99}, "blocks_to_swap: expected a whole number from 0 to 48, got 99"),
        ({"blocks_to_swap": -1}, "blocks_to_swap: expected a whole number from 0 to 48, got -1"),
        ({"vram_threshold_percent": 95.0}, "vram_threshold_percent: expected a number from 30.0 to 90.0, got 95.0"),
        ({"bandwidth_target": float("nan")}, "bandwidth_target: expected a number from 0.1 to 1.0, got nan"),
        ({"num_cuda_streams": "8"}, "num_cuda_streams: expected a whole number from 1 to 16, got '8'"),
        ({"vace_blocks_to_swap": 16}, "vace_blocks_to_swap: expected a whole number from 0 to 15, got 16"),
    ],
)
def test_a_value_out_of_range_that_passes_comfyuis_own_check_is_told_before_anything_runs(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(said)):
        SWAP().setargs(**given)


def test_comfyui_checks_ranges_itself_and_marks_the_widget_that_is_wrong() -> None:
    """A text of ours for one input would be shown at every input that we check (validate_inputs in execution.py)."""
    assert not hasattr(SWAP, "VALIDATE_INPUTS")
    for name, (kind, options) in SWAP.INPUT_TYPES()["optional"].items():
        assert kind == "BOOLEAN" or {"min", "max"} <= set(options), name


# Inside ComfyUI


def test_wired_into_the_loader_it_swaps_and_the_report_tells(comfy: SimpleNamespace) -> None:
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3)
    workflow, latents = sampled(arguments)
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    said = NODES["WanVideoEnhancedBlockSwapReport"]().report({"samples": latents}, workflow.patchers[0])
    samples, text = said["result"]
    assert said["ui"] == {"text": [text]}
    assert samples["samples"] is latents
    head, blocks, *_ = text.splitlines()
    assert re.fullmatch(r"run 1, \d\d:\d\d: 3 steps; WanModel on hpu", head)
    assert blocks == "blocks: 1 block on the GPU, 3 streaming"
    assert len(text.splitlines()) <= 12


def test_a_report_of_a_model_that_was_not_swapped_says_so(comfy: SimpleNamespace) -> None:
    workflow, latents = sampled(None)
    _, text = NODES["WanVideoEnhancedBlockSwapReport"]().report({"samples": latents}, workflow.patchers[0])["result"]
    assert "no block was swapped by WanVideo Enhanced BlockSwap" in text


@pytest.mark.parametrize(
    "variant", ["fp32", "fp8_at_load", "fp8_scaled", "gguf", "lora_unmerged", "lora_merged", "vace"]
)
def test_the_plan_node_tells_before_sampling_what_the_run_then_does(comfy: SimpleNamespace, variant: str) -> None:
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=2)
    workflow = Workflow(variant, device=HPU)
    workflow.load(arguments)
    planned = NODES["WanVideoEnhancedBlockSwapPlan"]().preview(workflow.patchers[0], arguments, 128, 128, 9)
    model, passed, text = planned["result"]
    assert planned["ui"] == {"text": [text]}
    assert model is workflow.patchers[0]
    assert passed is arguments
    workflow.sample()
    gate = node_module.COMFYUI.gate
    assert gate is not None
    run = gate.run_of(workflow.transformer)
    assert run is not None
    assert run.plan is not None
    stay = run.plan.block_count - 2
    assert text.startswith(f"hpu: {stay} blocks on the GPU, 2 streaming\n")
    assert run.plan.streaming_count == 2


def test_the_plan_node_says_what_is_wrong_instead_of_failing_the_prompt(comfy: SimpleNamespace) -> None:
    (arguments,) = SWAP().setargs()
    workflow = Workflow("fp32", device=HPU)
    workflow.load(arguments)
    plan = NODES["WanVideoEnhancedBlockSwapPlan"]()
    said = plan.preview(workflow.patchers[0], arguments, 130, 128, 9)["result"][2]
    assert "width: expected a multiple of 16, got 130" in said
    said = plan.preview(workflow.patchers[0], {"blocks_to_swap": 3})["result"][2]
    assert said.startswith("nothing is planned: the block_swap_args are another node's; connect those of WanVideo")


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (torch.device("cpu"), "the CPU computes from host memory"),
        (torch.device("mps"), "share the host's memory"),
        (torch.device("xpu"), "Intel GPUs have not been tried"),
        (torch.device("privateuseone:0"), "DirectML"),
        ("dml", "DirectML"),
    ],
)
def test_on_a_device_without_swapping_it_passes_through_with_one_line(
    comfy: SimpleNamespace, caplog: pytest.LogCaptureFixture, device: Any, why: str
) -> None:
    comfy.set_device(device)
    for _ in range(3):
        assert SWAP().setargs(blocks_to_swap=3) == (None,)
    assert [why in record.message for record in caplog.records] == [True]


def test_an_integrated_gpu_is_left_alone_unless_a_count_is_given_by_hand(
    comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    integrated = SimpleNamespace(is_integrated=True)
    monkeypatch.setattr("wanvideo_enhanced_blockswap.comfyui.probe_device", lambda device: integrated)
    assert SWAP().setargs() == (None,)
    assert "shares the host's memory" in caplog.records[0].message
    assert SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3) != (None,)


@pytest.mark.parametrize("flag", ["gpu_only", "highvram"])
def test_flags_that_keep_models_on_the_gpu_switch_automatic_swapping_off_and_leave_counts_by_hand(
    comfy: SimpleNamespace, flag: str
) -> None:
    setattr(comfy.flags, flag, True)
    assert SWAP().setargs() == (None,)
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3)
    assert arguments is not None


@pytest.mark.parametrize(
    ("flag", "value", "limits"),
    [
        ("disable_pinned_memory", True, {"pin": False}),
        ("disable_async_offload", True, {"overlap": False}),
        ("reserve_vram", 1.5, {"reserve_bytes": 3 * GIB // 2}),
        ("novram", True, {"must_swap_all": True}),
    ],
)
def test_comfyuis_flags_are_limits_of_the_plan(
    comfy: SimpleNamespace, flag: str, value: Any, limits: dict[str, Any]
) -> None:
    setattr(comfy.flags, flag, value)
    (arguments,) = SWAP().setargs()
    workflow, latents = sampled(arguments)
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    gate = node_module.COMFYUI.gate
    assert gate is not None
    run = gate.run_of(workflow.transformer)
    assert run is not None
    assert {name: getattr(run.planner.limits, name) for name in limits} == limits
    if flag == "novram":
        assert run.plan is not None
        assert all(run.plan.swapped)


@pytest.mark.parametrize(
    ("asked", "beyond"),
    [
        (None, 0),
        ([], 0),
        ([1.0], 0),
        ([6.0, 20.0], 6 * GIB - 32 * GIB // 10),
        ([32.0], 0),  # as much as there is: models are dropped in any case
        # ComfyUI before 0.24
        (0, 0),
        (4.0, 4 * GIB - 32 * GIB // 10),
        (-1.0, 8 * GIB - 32 * GIB // 10),
    ],
)
def test_memory_that_comfyuis_cache_keeps_available_is_left_to_it(
    comfy: SimpleNamespace, asked: list[float] | float | None, beyond: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less, ComfyUI drops the loaded model. Our own floor, a tenth of 32 GB, counts."""
    host = HostMemory(32 * GIB, 20 * GIB, None, None, HostPlatform.LINUX)
    monkeypatch.setattr(TorchMachine, "host", lambda _: host)
    comfy.flags.cache_ram = asked
    assert 20 * GIB - comfyui.ComfyMachine(HPU).host().available_bytes == pytest.approx(beyond, abs=2)


def test_a_wrapper_that_has_changed_swaps_by_itself_with_one_warning(
    comfy: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("standin.nodes_sampler.init_blockswap", lambda transformer: None)
    for _ in range(2):
        (arguments,) = SWAP().setargs()
        assert arguments is not None
        assert (arguments["blocks_to_swap"], SETTINGS_KEY in arguments) == (EVERY_BLOCK, False)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert "init_blockswap(block_swap_args=…)" in warnings[0]


def test_debug_mode_writes_its_trace_into_comfyuis_temp_folder(comfy: SimpleNamespace) -> None:
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3, debug_mode=True)
    sampled(arguments)
    (trace,) = (comfy.temp / "wanvideo-enhanced-blockswap").iterdir()
    assert trace.suffix == ".json"


# In the browser


def phases(events: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(event["phase"] for event in events))


def test_the_node_is_told_what_its_run_does(comfy: SimpleNamespace, events: list[dict[str, Any]]) -> None:
    (arguments,) = SWAP().setargs(unique_id="7:12", auto_hardware_tuning=False, blocks_to_swap=3)
    assert events == []
    _, latents = sampled(arguments)
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    assert phases(events) == ["adopting", "sampling", "done"]
    assert {(event["node"], event["workflow"]) for event in events} == {("7:12", "a workflow")}
    assert events[0]["text"].startswith(
        "1 block on the GPU, 3 streaming.\nPreparing the weights, on the GPU and in RAM: 0.0 KB of "
    )
    assert events[-1]["text"].splitlines()[1].startswith("Done after 3 steps: ")


INTERRUPT, ERROR = standin.InterruptProcessingException, RuntimeError


@pytest.mark.parametrize(
    ("error", "forward", "phase", "said", "reported"),
    [
        (INTERRUPT, 0, "stopped", "The run ended before its first step finished.", "stopped before the first step"),
        (INTERRUPT, 4, "stopped", "Stopped after 2 steps: ", "stopped after 2 steps; fp8 on hpu"),
        (ERROR, 0, "failed", "The run failed before the first step: block 1", "FAILED before the first step: block 1"),
        (ERROR, 4, "failed", "The run failed after 2 steps: block 1 fails", "FAILED after 2 steps: block 1 fails"),
    ],
)
def test_the_node_is_told_whether_the_user_or_an_error_ended_the_run(
    comfy: SimpleNamespace,
    events: list[dict[str, Any]],
    error: type[BaseException],
    forward: int,
    phase: str,
    said: str,
    reported: str,
) -> None:
    workflow, _ = sampled(ours())
    workflow.patchers[0].model["model_name"] = r"wan\2.2/fp8.safetensors"
    events.clear()
    with pytest.raises(error):
        workflow.sample(fault=standin.Fault(block=1, forward=forward, error=error))
    assert [event["phase"] for event in events if event["phase"] not in ("adopting", "sampling")] == [phase]
    assert (events[-1]["node"], events[-1]["model"]) == ("3", "fp8")
    assert events[-1]["text"].splitlines()[-1].startswith(said)
    _, said = NODES["WanVideoEnhancedBlockSwapReport"]().report(None, workflow.patchers[0])["result"]
    assert reported in said


@pytest.mark.parametrize(
    ("error", "phase", "said"),
    [
        (INTERRUPT, "stopped", "Stopped after 1 step. "),
        (ERROR, "failed", "The run failed after 1 step: the preview is too large"),
    ],
)
def test_what_ends_a_run_between_two_steps_is_told_as_well(
    comfy: SimpleNamespace,
    events: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    phase: str,
    said: str,
) -> None:
    workflow, _ = sampled(ours())
    step = nodes_sampler._windowed

    def second(predict: Any, latent: Any, number: int, request: Any) -> Any:
        if number:
            raise error("the preview is too large\nin its second line")
        return step(predict, latent, number, request)

    monkeypatch.setattr(nodes_sampler, "_windowed", second)
    with pytest.raises(error):
        workflow.sample()
    assert events[-1]["phase"] == phase
    assert events[-1]["text"].splitlines()[-1].startswith(said)


def test_a_run_inside_the_handler_of_another_error_has_not_failed(
    comfy: SimpleNamespace, events: list[dict[str, Any]]
) -> None:
    workflow, _ = sampled(ours())
    try:
        raise ValueError("an upscaler is not there")
    except ValueError:
        workflow.sample()
    assert events[-1]["phase"] == "done"


@pytest.mark.parametrize(
    "item",
    [
        None,
        (0, "a prompt", {}),
        (0, "a prompt", {}, {}, []),
        (0, "a prompt", {}, {"extra_pnginfo": {"workflow": None}}, []),
    ],
)
def test_a_prompt_without_a_workflow_is_told_of_all_the_same(
    comfy: SimpleNamespace, events: list[dict[str, Any]], item: Any
) -> None:
    queue = SimpleNamespace(currently_running={} if item is None else {0: item})
    sys.modules["server"].PromptServer.instance.prompt_queue = queue
    comfy.set_device(torch.device("cpu"))
    SWAP().setargs(unique_id="3")
    assert [(event["node"], event["workflow"]) for event in events] == [("3", None)]


def test_two_experts_tell_each_their_own_node(comfy: SimpleNamespace, events: list[dict[str, Any]]) -> None:
    for node, count in (("3", 2), ("4", 3)):
        (arguments,) = SWAP().setargs(unique_id=node, auto_hardware_tuning=False, blocks_to_swap=count)
        sampled(arguments)
    told = {event["node"]: event["plan"]["swapped"] for event in events}
    assert told == {"3": 2, "4": 3}


def test_a_loader_that_is_cached_tells_the_node_that_gives_the_arguments_now(
    comfy: SimpleNamespace, events: list[dict[str, Any]]
) -> None:
    (first,) = SWAP().setargs(unique_id="3", auto_hardware_tuning=False, blocks_to_swap=3)
    workflow, _ = sampled(first)
    events.clear()
    (second,) = SWAP().setargs(unique_id="5", auto_hardware_tuning=False, blocks_to_swap=3)
    workflow.sample(second)
    assert {event["node"] for event in events} == {"5"}


def test_the_node_says_why_nothing_is_swapped(comfy: SimpleNamespace, events: list[dict[str, Any]]) -> None:
    comfy.set_device(torch.device("cpu"))
    assert SWAP().setargs(unique_id="3") == (None,)
    (event,) = events
    assert (event["phase"], event["node"]) == ("off", "3")
    assert "the CPU computes from host memory" in event["text"]


def test_without_a_browser_nothing_is_sent_and_all_goes_on(comfy: SimpleNamespace) -> None:
    (arguments,) = SWAP().setargs(unique_id="3", auto_hardware_tuning=False, blocks_to_swap=3)
    _, latents = sampled(arguments)
    assert torch.equal(latents, unswapped("fp32", HPU).latents)


# The user's settings


def written(comfy: SimpleNamespace, **values: object) -> None:
    comfy.settings.parent.mkdir(parents=True, exist_ok=True)
    stored = {f"WanVideoEnhancedBlockSwap.{name}": value for name, value in values.items()}
    comfy.settings.write_text(json.dumps(stored), encoding="utf-8")


@pytest.mark.parametrize("keep", [True, False])
def test_slabs_are_kept_for_the_next_run_unless_the_user_says_no(comfy: SimpleNamespace, keep: bool) -> None:
    written(comfy, KeepHostSlabs=keep)
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3)
    workflow, latents = sampled(arguments)
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    run = node_module.COMFYUI.gate.run_of(workflow.transformer)
    assert (run.session.slab_bytes > 0) is keep
    assert torch.equal(workflow.sample(), latents)


def test_the_pin_budget_is_what_the_user_says_at_the_next_run(comfy: SimpleNamespace) -> None:
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3)
    workflow, _ = sampled(arguments)
    pins = node_module.COMFYUI.gate.run_of(workflow.transformer).planner.pins
    without = pins.limit_bytes
    written(comfy, PinBudgetGiB=0.25)
    workflow.sample()
    assert pins.limit_bytes == GIB // 4 < without
    written(comfy, PinBudgetGiB=0)
    workflow.sample()
    assert pins.limit_bytes > GIB // 4


def test_what_comfyui_has_locked_itself_is_not_locked_again_and_idle_models_give_theirs_up(
    comfy: SimpleNamespace,
) -> None:
    management = sys.modules["comfy.model_management"]
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3)
    workflow, _ = sampled(arguments)
    pins = node_module.COMFYUI.gate.run_of(workflow.transformer).planner.pins
    limit = pins.limit_bytes
    vars(management).update(TOTAL_PINNED_MEMORY=limit // 4)
    workflow.sample()
    assert pins.limit_bytes == limit - limit // 4
    asked = []

    def free_registrations(shortfall: int, *, evict_active: bool) -> None:
        asked.append((shortfall, evict_active))
        vars(management).update(TOTAL_PINNED_MEMORY=limit // 8)

    vars(management).update(TOTAL_PINNED_MEMORY=limit, free_registrations=free_registrations)
    workflow.sample()
    assert asked == [(limit - limit // 2, False)]
    assert pins.limit_bytes == limit - limit // 8


def test_a_settings_file_that_cannot_be_read_is_said_once_and_costs_nothing_else(
    comfy: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    written(comfy, PinBudgetGiB="all")
    (arguments,) = SWAP().setargs(auto_hardware_tuning=False, blocks_to_swap=3)
    workflow, latents = sampled(arguments)
    workflow.sample()
    assert torch.equal(latents, unswapped("fp32", HPU).latents)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len([message for message in said if "PinBudgetGiB: expected 0 to 1024 GB" in message]) == 1
