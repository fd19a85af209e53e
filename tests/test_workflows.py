"""The example workflows: they load, they say where their models come from, and a server would accept them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import workflow_schema as ws
from wanvideo_enhanced_blockswap import NODE_CLASS_MAPPINGS
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from workflow_schema import Workflow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "example_workflows"
RECORDED = [ROOT / "tests" / "object_info" / name for name in ("core.json", "wrapper.json")]
OURS = "wanvideo-enhanced-blockswap"
SWAP, PLAN, REPORT = "WanVideoEnhancedBlockSwap", "WanVideoEnhancedBlockSwapPlan", "WanVideoEnhancedBlockSwapReport"

DEFINITIONS = {name: node for path in RECORDED for name, node in ws.recorded(path).items()}
DEFINITIONS |= ws.live(OURS, NODE_CLASS_MAPPINGS)

FOLDERS = {
    "CLIPLoader": "text_encoders",
    "CLIPVisionLoader": "clip_vision",
    "MultiTalkModelLoader": "diffusion_models",
    "WanVideoLoraSelect": "loras",
    "WanVideoModelLoader": "diffusion_models",
    "WanVideoTextEncodeCached": "text_encoders",
    "WanVideoVACEModelSelect": "diffusion_models",
    "WanVideoVAELoader": "vae",
    "Wav2VecModelLoader": "wav2vec2",
    "WhisperModelLoader": "audio_encoders",
}
"""Where each loader looks, below ComfyUI's models folder."""

WORKFLOWS = [Workflow.read(path) for path in sorted(EXAMPLES.glob("*.json"))]
CHECKS: dict[str, Callable[[Workflow], list[str]]] = {
    "schema": ws.schema_problems,
    "definitions": lambda workflow: ws.definition_problems(workflow, DEFINITIONS),
    "links": lambda workflow: ws.link_problems(workflow, DEFINITIONS),
    "values": lambda workflow: ws.value_problems(workflow, DEFINITIONS),
    "reach": lambda workflow: ws.reach_problems(workflow, DEFINITIONS),
    "origin": lambda workflow: ws.origin_problems(workflow, DEFINITIONS),
    "models": lambda workflow: ws.model_problems(workflow, FOLDERS),
    "layout": ws.layout_problems,
    "prompt": lambda workflow: ws.prompt_problems(workflow, DEFINITIONS),
}

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)


def named(node: dict[str, Any]) -> dict[str, Any]:
    return {widget.name: value for widget, value in DEFINITIONS[node["type"]].widgets(node["widgets_values"])}


def settings_of(workflow: Workflow) -> list[SwapSettings]:
    return [SwapSettings(**named(node)) for node in workflow.of_type(SWAP)]


def example(number: int) -> Workflow:
    return WORKFLOWS[number - 1]


# All of them


@each_workflow
@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_wrong(workflow: Workflow, check: str) -> None:
    assert CHECKS[check](workflow) == []


@each_workflow
def test_only_comfyui_the_wrapper_and_this_package_are_needed(workflow: Workflow) -> None:
    packages = {node["properties"]["cnr_id"] for node in workflow.data["nodes"]}
    assert packages == {"comfy-core", "ComfyUI-WanVideoWrapper", OURS}


@each_workflow
def test_the_swap_node_s_values_by_position_are_valid_settings_and_reach_a_loader(workflow: Workflow) -> None:
    settings = settings_of(workflow)
    assert settings
    assert not any(each.debug_mode for each in settings)
    takers = workflow.of_type(PLAN) or workflow.of_type("WanVideoModelLoader")
    assert [workflow.source(node, "block_swap_args") in workflow.of_type(SWAP) for node in takers] == [True] * len(
        takers
    )


@each_workflow
def test_every_sampler_is_reported_on(workflow: Workflow) -> None:
    samplers = {node["id"] for node in workflow.of_type("WanVideoSampler")}
    reported = set()
    for report in workflow.of_type(REPORT):
        sampler = workflow.source(report, "samples")
        assert sampler is not None
        assert workflow.source(sampler, "model") == workflow.source(report, "model")
        reported.add(sampler["id"])
    assert reported == samplers


@each_workflow
def test_plan_and_report_have_room_for_their_text(workflow: Workflow) -> None:
    for node in (*workflow.of_type(PLAN), *workflow.of_type(REPORT)):
        width, height = node["size"]
        assert width >= 340
        assert height >= 320


@each_workflow
def test_every_model_has_its_speed_lora_and_a_sampler_of_few_steps_without_cfg(workflow: Workflow) -> None:
    loras = [workflow.source(loader, "lora") for loader in workflow.of_type("WanVideoModelLoader")]
    assert [lora["type"] for lora in loras if lora is not None] == ["WanVideoLoraSelect"] * len(loras)
    assert len({named(lora)["lora"] for lora in loras if lora is not None}) == len(loras)
    assert all(re.search("distill|Lightning", named(lora)["lora"]) for lora in loras if lora is not None)
    for sampler in workflow.of_type("WanVideoSampler"):
        assert named(sampler)["cfg"] == 1
        assert named(sampler)["steps"] <= (12 if named(sampler)["scheduler"].startswith("longcat") else 6)


@each_workflow
def test_who_looks_for_a_small_card_finds_it(workflow: Workflow) -> None:
    (note,) = workflow.notes
    _, first, *_ = [line for line in note.splitlines() if line]
    assert "low VRAM" in workflow.name
    assert "Low VRAM" in first
    assert {"8 GB", "12 GB", "16 GB"} <= set(re.findall(r"\d+ GB", first))


@each_workflow
def test_a_note_tells_models_memory_and_what_to_change_and_invents_no_time(workflow: Workflow) -> None:
    (note,) = workflow.notes
    assert re.findall(r"^### (.+)$", note, re.MULTILINE) == ["Models", "Memory", "Without the speed LoRA", "Change"]
    assert {"VRAM", "RAM"} <= set(re.findall(r"\*\*(\w+)\*\*:", note))
    assert re.search(r"report node|BlockSwap Report", note)
    assert {"predicted", "measured"} <= set(re.findall(r"\w+", note.lower()))
    assert not re.search(r"\d\s*(?:s|sec|seconds|min|minutes|h|hours|it/s|s/it|fps)\b|\d\S* (?:faster|slower)", note)


@each_workflow
def test_a_note_calls_widgets_by_their_names(workflow: Workflow) -> None:
    (note,) = workflow.notes
    widgets = {each.name for node in workflow.nodes for each in DEFINITIONS[node["type"]].inputs if each.is_widget}
    spoken_of = {name for name in re.findall(r"`([^`]+)`", note) if "/" not in name}
    assert spoken_of <= widgets


def test_file_names_are_readable_titles_in_one_flat_folder() -> None:
    names = [workflow.name for workflow in WORKFLOWS]
    assert [name[:3] for name in names] == [f"{number:02} " for number in range(1, len(names) + 1)]
    assert [name for name in names if not re.fullmatch(r"\d\d [A-Z][A-Za-z0-9 .,-]{10,50}", name)] == []
    assert len({name[3:].casefold() for name in names}) == len(names)
    assert [path for path in EXAMPLES.rglob("*.json") if path.parent != EXAMPLES] == []
    assert len({workflow.data["id"] for workflow in WORKFLOWS}) == len(names) == 10


def test_the_recorded_definitions_are_those_that_the_examples_use() -> None:
    used = {node["type"] for workflow in WORKFLOWS for node in workflow.nodes}
    assert set(DEFINITIONS) == used | set(NODE_CLASS_MAPPINGS)
    for path in RECORDED:
        answer = json.loads(path.read_text(encoding="utf-8"))
        assert re.fullmatch(r"\d+\.\d+\.\d+", answer["version"])
        told = {
            node["properties"]["ver"]
            for workflow in WORKFLOWS
            for node in workflow.nodes
            if node["properties"]["cnr_id"] == answer["package"]
        }
        assert told == {answer["version"]}


# What each is for


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8, 9, 10])
def test_all_but_manual_tuning_leave_everything_to_the_node(number: int) -> None:
    assert set(settings_of(example(number))) == {SwapSettings()}


def test_wan_2_2_has_one_swap_node_for_both_experts_and_hands_the_samples_over() -> None:
    workflow = example(3)
    (swap,) = workflow.of_type(SWAP)
    assert [workflow.source(each, "block_swap_args") for each in workflow.of_type("WanVideoModelLoader")] == [swap] * 2
    high, low = sorted(workflow.of_type("WanVideoSampler"), key=lambda node: named(node)["start_step"])
    assert named(high)["end_step"] == named(low)["start_step"]
    for shared in ("steps", "shift", "scheduler", "seed"):
        assert named(high)[shared] == named(low)[shared]
    assert named(high)["force_offload"] is True
    loras = [
        node and workflow.source(node, "lora") for node in (workflow.source(each, "model") for each in (high, low))
    ]
    assert [("HIGH" in named(lora)["lora"], "LOW" in named(lora)["lora"]) for lora in loras if lora] == [
        (True, False),
        (False, True),
    ]
    report = workflow.source(low, "samples")
    assert report is not None
    assert workflow.source(report, "samples") == high


def test_the_lora_on_gguf_is_not_merged() -> None:
    workflow = example(4)
    (loader,), (lora,) = workflow.of_type("WanVideoModelLoader"), workflow.of_type("WanVideoLoraSelect")
    assert named(loader)["model"].endswith(".gguf")
    assert named(loader)["quantization"] == "disabled"
    assert workflow.source(loader, "lora") == lora
    assert named(lora)["merge_loras"] is False


def test_vace_is_loaded_beside_the_model_and_frames_agree() -> None:
    workflow = example(5)
    (loader,), (encode,) = workflow.of_type("WanVideoModelLoader"), workflow.of_type("WanVideoVACEEncode")
    extra, frames = workflow.source(loader, "extra_model"), workflow.source(encode, "input_frames")
    assert extra is not None
    assert extra["type"] == "WanVideoVACEModelSelect"
    assert frames is not None
    assert named(frames)["num_frames"] == named(encode)["num_frames"]


def test_manual_tuning_is_planned_for_the_video_that_is_made() -> None:
    workflow = example(6)
    (settings,) = settings_of(workflow)
    assert not settings.auto_hardware_tuning
    assert settings.blocks_to_swap > 0
    (plan,), (size,) = workflow.of_type(PLAN), workflow.of_type("WanVideoEmptyEmbeds")
    for name in ("width", "height", "num_frames"):
        assert workflow.source(plan, name) == workflow.source(size, name) is not None
    (sampler,) = workflow.of_type("WanVideoSampler")
    with_swap = workflow.source(sampler, "model")
    assert with_swap is not None
    assert with_swap["type"] == "WanVideoSetBlockSwap"
    assert workflow.source(with_swap, "block_swap_args") == workflow.source(with_swap, "model") == plan


def test_infinite_talk_is_loaded_beside_the_model_and_its_sound_is_that_of_the_video() -> None:
    workflow = example(7)
    (loader,), (sampler,), (create,) = map(workflow.of_type, ("WanVideoModelLoader", "WanVideoSampler", "CreateVideo"))
    talk, voice = workflow.source(loader, "multitalk_model"), workflow.source(sampler, "multitalk_embeds")
    assert talk is not None
    assert talk["type"] == "MultiTalkModelLoader"
    assert voice is not None
    assert workflow.source(create, "audio") == voice
    assert named(create)["fps"] == named(voice)["fps"]


def test_humo_hears_the_sound_of_the_video() -> None:
    workflow = example(8)
    (embeds,), (create,) = workflow.of_type("HuMoEmbeds"), workflow.of_type("CreateVideo")
    assert workflow.source(embeds, "audio") == workflow.source(create, "audio") is not None
    assert named(create)["fps"] == 25


def test_animate_is_as_long_as_its_pose_video() -> None:
    workflow = example(9)
    (embeds,), (create,) = workflow.of_type("WanVideoAnimateEmbeds"), workflow.of_type("CreateVideo")
    count, poses = workflow.source(embeds, "num_frames"), workflow.source(embeds, "pose_images")
    assert count is not None
    assert poses is not None
    assert workflow.source(count, "image") == poses
    assert workflow.source(create, "fps") == workflow.source(poses, "image")
    assert workflow.source(embeds, "face_images") not in (None, workflow.source(poses, "image"))


def test_longcat_begins_with_the_image() -> None:
    workflow = example(10)
    (sampler,), (empty,) = workflow.of_type("WanVideoSampler"), workflow.of_type("WanVideoEmptyEmbeds")
    image = workflow.source(empty, "extra_latents")
    assert image is not None
    assert image["type"] == "WanVideoEncode"
    assert named(sampler)["scheduler"] == "longcat_distill_euler"


@each_workflow
def test_images_are_scaled_to_the_size_of_the_video(workflow: Workflow) -> None:
    sizes = {
        (named(node)["width"], named(node)["height"])
        for node in workflow.nodes
        if {"width", "height"} <= set(named(node) if node.get("widgets_values") else ())
    }
    assert len(sizes) == 1


# The checks find what they are for


def node_of(data: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["type"] == kind)


def moved(data: dict[str, Any], kind: str, to: str) -> None:
    node_of(data, kind)["pos"] = list(node_of(data, to)["pos"])


BREAKAGES: list[tuple[str, str, Callable[[dict[str, Any]], object]]] = [
    ("schema", "a link of five", lambda data: data["links"][0].pop()),
    ("schema", "no size", lambda data: data["nodes"][0].pop("size")),
    (
        "schema",
        "a model without address",
        lambda data: node_of(data, "WanVideoVAELoader")["properties"]["models"][0].pop("url"),
    ),
    ("schema", "a version that is none", lambda data: node_of(data, SWAP)["properties"].update(ver="newest")),
    ("schema", "an id twice", lambda data: data["nodes"][1].update(id=data["nodes"][2]["id"])),
    ("schema", "a link beyond the counter", lambda data: data.update(last_link_id=3)),
    ("definitions", "an unknown type", lambda data: node_of(data, SWAP).update(type="WanVideoBlockSwapper")),
    ("definitions", "a muted node", lambda data: node_of(data, SWAP).update(mode=2)),
    ("definitions", "a slot too few", lambda data: node_of(data, "WanVideoSampler")["inputs"].pop()),
    ("definitions", "an output renamed", lambda data: node_of(data, SWAP)["outputs"][0].update(name="args")),
    ("definitions", "no model", lambda data: node_of(data, "WanVideoSampler")["inputs"][0].update(link=None)),
    ("links", "an end forgotten", lambda data: node_of(data, SWAP)["outputs"][0].update(links=None)),
    ("links", "a link gone", lambda data: data["links"].pop()),
    ("links", "another slot", lambda data: data["links"][0].__setitem__(4, 0)),
    ("links", "another type", lambda data: data["links"][0].__setitem__(5, "MODEL")),
    ("links", "no such node", lambda data: data["links"][0].__setitem__(1, 999)),
    ("values", "one too few", lambda data: node_of(data, SWAP)["widgets_values"].pop()),
    ("values", "one too many", lambda data: node_of(data, SWAP)["widgets_values"].append(False)),
    ("values", "out of range", lambda data: node_of(data, SWAP)["widgets_values"].__setitem__(0, 99)),
    ("values", "a number for a switch", lambda data: node_of(data, SWAP)["widgets_values"].__setitem__(1, 1)),
    (
        "values",
        "no such choice",
        lambda data: node_of(data, "WanVideoModelLoader")["widgets_values"].__setitem__(1, "int8"),
    ),
    ("values", "no control after the seed", lambda data: node_of(data, "WanVideoSampler")["widgets_values"].pop(4)),
    ("values", "off the step", lambda data: node_of(data, "WanVideoEmptyEmbeds")["widgets_values"].__setitem__(2, 82)),
    (
        "values",
        "a codec of another container",
        lambda data: node_of(data, "SaveVideo")["widgets_values"].__setitem__(2, "vp9"),
    ),
    ("values", "a path", lambda data: node_of(data, "SaveVideo")["widgets_values"].__setitem__(0, "C:/videos/wan")),
    ("reach", "nothing saved", lambda data: data.update(links=[link for link in data["links"] if link[5] != "VIDEO"])),
    ("reach", "an order that cannot be", lambda data: node_of(data, SWAP).update(order=len(data["nodes"]) - 1)),
    ("origin", "no package", lambda data: node_of(data, ws.NOTE)["properties"].clear()),
    ("origin", "another package", lambda data: node_of(data, SWAP)["properties"].update(cnr_id="comfy-core")),
    (
        "models",
        "another file",
        lambda data: node_of(data, "WanVideoVAELoader")["widgets_values"].__setitem__(0, "a.safetensors"),
    ),
    (
        "models",
        "another folder",
        lambda data: node_of(data, "WanVideoVAELoader")["properties"]["models"][0].update(directory="vaes"),
    ),
    ("models", "not told in the note", lambda data: node_of(data, ws.NOTE).update(widgets_values=["…"])),
    ("layout", "one over another", lambda data: moved(data, SWAP, "WanVideoModelLoader")),
    ("layout", "too wide", lambda data: data["groups"][-1]["bounding"].__setitem__(2, 3000)),
    ("layout", "too tall", lambda data: data["groups"][-1]["bounding"].__setitem__(3, 1500)),
    ("layout", "outside its group", lambda data: data["groups"].pop()),
    ("layout", "to the left", lambda data: node_of(data, SWAP).update(pos=[9000, 9000])),
    ("layout", "folded", lambda data: node_of(data, SWAP)["flags"].update(collapsed=True)),
    ("prompt", "an input missing", lambda data: node_of(data, "WanVideoDecode")["inputs"][0].update(link=None)),
    ("prompt", "another type", lambda data: node_of(data, "WanVideoDecode")["inputs"][1].update(link=1)),
    (
        "prompt",
        "nothing to save",
        lambda data: data.update(nodes=[n for n in data["nodes"] if n["type"] in (SWAP, ws.NOTE)]),
    ),
]


@pytest.mark.parametrize(
    ("check", "name", "harm"), BREAKAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_broken_workflow_is_found(check: str, name: str, harm: Callable[[dict[str, Any]], object]) -> None:
    data = deepcopy(example(1).data)
    harm(data)
    assert CHECKS[check](Workflow(name, data)) != []
