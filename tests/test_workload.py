"""What the arguments of a forward of the wrapper's model say of the memory that it takes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap.model.activations import Attention, ForwardOptions, Rope, activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.wan import WanArchitecture
from wanvideo_enhanced_blockswap.blockswap.run.history import Workload
from wanvideo_enhanced_blockswap.blockswap.run.report import Step
from wanvideo_enhanced_blockswap.blockswap.wrapper.workload import step_of, workload_of

LATENTS = torch.empty(16, 3, 8, 8, device="meta")
TOKENS = 3 * 4 * 4


def transformer(**changes: Any) -> Any:
    block = nn.Module()
    block.modulation = nn.Parameter(torch.empty(1, 6, 384, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    block.rope_func = changes.pop("rope_func", "comfy")
    for name, value in changes.pop("layer", {}).items():
        block.add_module("ffn", getattr(block, "ffn", None) or nn.Module())
        setattr(block.ffn, name, value)
    made = {"dim": 384, "ffn_dim": 1024, "num_heads": 3, "in_dim": 16, "patch_size": (1, 2, 2), "main_device": "cpu"}
    return SimpleNamespace(blocks=[block], **{**made, **changes})


def expected(sequences: int = 1, vace_blocks: int = 0, **options: Any) -> Workload:
    architecture = WanArchitecture(384, 1024, 3, 1, vace_blocks, (1, 2, 2), 16)
    tokens = TOKENS * sequences
    nbytes = activation_bytes(architecture, tokens, ForwardOptions(sequences=sequences, frames=3, **options))
    return Workload(tokens=tokens, expected_activation_bytes=nbytes, latent_frames=3)


FP8 = torch.empty(4, 4, dtype=torch.float8_e4m3fn)
PLAIN_LAYER = {"lora_diffs": [], "is_gguf": False, "scale_weight": None}


@pytest.mark.parametrize(
    ("model", "keywords", "options"),
    [
        ({}, {}, {}),
        ({"attention_mode": "sageattn"}, {}, {"attention": Attention.SAGE}),
        ({"attention_mode": "flash_attn_3"}, {}, {"attention": Attention.FLASH}),
        ({"rope_func": "comfy_chunked"}, {}, {"rope": Rope.CHUNKED}),
        ({"rope_func": "default"}, {}, {"rope": Rope.DEFAULT}),
        ({"rope_func": "mocha"}, {}, {"rope": Rope.DEFAULT}),
        ({}, {"x": [LATENTS, LATENTS]}, {"sequences": 2}),
        ({}, {"t": torch.zeros(1, 3)}, {"per_token": True}),
        ({}, {"multitalk_audio": LATENTS, "ref_target_masks": LATENTS}, {"speakers": 2}),
        ({"model_type": "s2v"}, {}, {"speech": True}),
        ({"layer": PLAIN_LAYER | {"is_gguf": True}}, {}, {"weight_copies": 2}),
        ({"layer": PLAIN_LAYER | {"lora_diffs": ["lora_diff_0"]}}, {}, {"weight_copies": 3}),
        ({"layer": PLAIN_LAYER | {"lora_diffs": ["lora_diff_0"], "scale_weight": 1}}, {}, {"weight_copies": 4}),
        ({"layer": PLAIN_LAYER | {"weight": FP8}}, {}, {"weight_copies": 1}),
        ({"layer": PLAIN_LAYER | {"weight": FP8, "lora_diffs": ["lora_diff_0"]}}, {}, {"weight_copies": 4}),
        ({"layer": PLAIN_LAYER | {"weight": FP8, "scale_weight": 1}}, {}, {"weight_copies": 2}),
        ({"vace_blocks": [nn.Module()]}, {"vace_data": [{}, {}]}, {"vace_blocks": 1, "vace_inputs": 2}),
        ({"vace_blocks": [nn.Module()]}, {"vace_data": None}, {"vace_blocks": 1, "vace_inputs": 1}),
    ],
)
def test_a_forward_is_expected_to_take_what_its_arguments_say(
    model: dict[str, Any], keywords: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "comfy_kitchen", raising=False)
    given = {"x": [LATENTS], "t": torch.zeros(1), **keywords}
    assert workload_of(transformer(**model), (), given, hints_to_host=False) == expected(**options)


def test_norms_in_float32_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "comfy_kitchen", raising=False)
    model = transformer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert workload_of(model, ([LATENTS],), {}, hints_to_host=False) == expected(wide=True, weight_copies=1)
    model.blocks[0].modulation = nn.Parameter(torch.empty(1, 6, 384), requires_grad=False)
    assert workload_of(model, ([LATENTS],), {}, hints_to_host=False) == expected(wide=True)


def test_the_kernel_of_comfy_kitchen_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = SimpleNamespace(is_available=lambda name: name == "cuda")
    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(registry=registry))
    assert workload_of(transformer(), ([LATENTS],), {}, hints_to_host=False) == expected(rope=Rope.FUSED)


def test_hints_on_the_host_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "comfy_kitchen", raising=False)
    model = transformer(vace_blocks=[nn.Module(), nn.Module()])
    on_host = expected(vace_blocks=2, vace_hints=False)
    assert workload_of(model, ([LATENTS],), {"vace_data": [{}]}, hints_to_host=True) == on_host


def test_what_is_not_as_the_wrapper_passes_it_has_no_workload() -> None:
    assert workload_of(transformer(), (), {}, hints_to_host=False) is None
    assert workload_of(transformer(), ([torch.empty(4)],), {}, hints_to_host=False) is None
    assert workload_of(transformer(), (5,), {}, hints_to_host=False) is None
    assert workload_of(transformer(patch_size=2), ([LATENTS],), {}, hints_to_host=False) is None


def test_latents_in_one_tensor_count_as_a_list_of_them() -> None:
    both = torch.stack([LATENTS, LATENTS])
    found = workload_of(transformer(), (both, torch.zeros(1)), {}, hints_to_host=False)
    assert found == workload_of(transformer(), ([LATENTS, LATENTS], torch.zeros(1)), {}, hints_to_host=False)


@pytest.mark.parametrize("lacks", ["dim", "ffn_dim", "num_heads", "in_dim", "main_device"])
def test_a_transformer_without_a_size_has_a_workload_of_which_nothing_is_expected(lacks: str) -> None:
    model, given = transformer(), Workload(tokens=TOKENS, latent_frames=3)
    delattr(model, lacks)
    assert workload_of(model, ([LATENTS],), {}, hints_to_host=False) == given
    assert workload_of(transformer(**{lacks: None}), ([LATENTS],), {}, hints_to_host=False) == given


@pytest.mark.parametrize("data", [5, torch.zeros(2, 3), [torch.zeros(2)], {}, "x"])
def test_odd_controls_count_as_one(data: object) -> None:
    model = transformer(vace_blocks=[nn.Module()])
    found = workload_of(model, ([LATENTS],), {"vace_data": data}, hints_to_host=False)
    assert found == workload_of(model, ([LATENTS],), {"vace_data": [{}]}, hints_to_host=False)


def test_latents_without_frames_and_several_speakers_have_a_workload() -> None:
    talk = {"multitalk_audio": LATENTS, "ref_target_masks": LATENTS}
    found = workload_of(transformer(), ([torch.empty(16, 0, 8, 8)],), talk, hints_to_host=False)
    assert found is not None
    assert found.tokens == 0


def called(index: int, steps: int, *, tells_last: bool = True) -> dict[str, Any]:
    """What the wrapper's samplers call a forward with; only one of them tells the last step."""
    keywords = {"current_step": index, "current_step_percentage": index / steps}
    return keywords | ({"last_step": index == steps - 1} if tells_last else {})


@pytest.mark.parametrize("tells_last", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 49, 100])
def test_a_step_counts_from_1_and_the_number_of_all_is_known_from_the_second_on(steps: int, tells_last: bool) -> None:
    first, *later = [step_of(called(i, steps, tells_last=tells_last)) for i in range(steps)]
    assert first == Step(1, 1 if steps == 1 and tells_last else None)
    assert later == [Step(i + 1, steps) for i in range(1, steps)]


@pytest.mark.parametrize("keywords", [{}, {"current_step": None}, {"current_step": torch.tensor(3)}])
def test_without_a_number_there_is_no_step(keywords: dict[str, Any]) -> None:
    assert step_of(keywords | {"last_step": True}) is None


@pytest.mark.parametrize("keywords", [{}, {"current_step_percentage": 0.0}, {"current_step_percentage": None}])
def test_without_a_share_the_number_of_all_steps_is_unknown(keywords: dict[str, Any]) -> None:
    assert step_of({"current_step": 3} | keywords) == Step(4, None)
