"""The stand-in computes and keeps its weights as the wrapper does, so tests of the gate against it are valid."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import standin
import torch
from standin import Fault, InterruptProcessingException, Workflow, measuring, swap_args
from standin.measuring import at_forwards, places

DEVICE = "hpu:0"
ALL = swap_args(4, vace_blocks_to_swap=2)

measured = partial(measuring.measured, DEVICE)
unswapped = partial(measuring.unswapped, device=DEVICE)

pytestmark = pytest.mark.usefixtures("pretend_stats")


def loaded(variant: str | standin.Variant, args: dict[str, Any] | None = None) -> Workflow:
    workflow = Workflow(variant, device=DEVICE)
    workflow.load(args)
    return workflow


def calls_of(workflow: Workflow) -> list[int]:
    """A list that gets the number of each block that runs."""
    seen: list[int] = []
    for index, block in enumerate(workflow.transformer.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: seen.append(index))
    return seen


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("variant", standin.VARIANTS)
def test_native_swapping_gives_the_same_latents_and_copies_weights_back(variant: str) -> None:
    truth = unswapped(variant)
    workflow = loaded(variant, ALL)
    with measured() as cost:
        assert torch.equal(workflow.sample(), truth.latents)
    assert torch.equal(workflow.sample(), truth.second)
    assert truth.latents.isfinite().all()
    assert cost.d2h_bytes > truth.d2h_bytes


@pytest.mark.parametrize("block", range(4))
def test_latents_show_every_block(block: int) -> None:
    workflow = loaded("fp32")
    with torch.inference_mode():
        workflow.patchers[0].model["sd"][f"blocks.{block}.ffn.0.weight"] *= 1.01
    assert not torch.equal(workflow.sample(), unswapped("fp32").latents)


def test_the_pretend_device_and_the_cpu_agree() -> None:
    assert torch.equal(standin.run("fp32", device="cpu")[0], unswapped("fp32").latents)


def test_native_swapping_of_three_blocks_saves_two() -> None:
    workflow = loaded("fp32", ALL)
    with measured() as cost:
        workflow.sample()
    block = sum(parameter.nbytes for parameter in workflow.transformer.blocks[0].parameters())
    assert cost.peak <= unswapped("fp32").peak - 2 * block


def test_a_state_dict_may_be_on_the_device() -> None:
    workflow = loaded("main_device", ALL)
    workflow.sample()
    assert {value.device.type for value in workflow.patchers[0].model["sd"].values()} == {"hpu"}


@pytest.mark.parametrize(("variant", "forwards"), [("fp32", 6), ("context_windows", 18), ("one_forward_a_step", 3)])
def test_forwards_of_a_run(variant: str, forwards: int) -> None:
    workflow = loaded(variant)
    seen = at_forwards(workflow.transformer, id)
    workflow.sample()
    assert len(seen) == forwards


@pytest.mark.parametrize(
    ("variant", "calls"),
    [
        ("fp32", [6] * 4),
        ("skip_layers", [6, 3, 6, 3]),
        ("teacache", [4] * 4),
        ("magcache", [4] * 4),
        ("easycache", [5] * 4),
    ],
)
def test_blocks_may_be_skipped_by_themselves_or_all_together(variant: str, calls: list[int]) -> None:
    workflow = loaded(variant)
    seen = calls_of(workflow)
    workflow.sample()
    assert [seen.count(index) for index in range(4)] == calls


# ------------------------------------------------------------------------------------------------ where the weights are


def test_weights_are_on_meta_until_the_first_run_then_on_the_device_and_on_the_host_afterwards() -> None:
    workflow = loaded("fp32")
    assert places(workflow.transformer) == {"meta"}
    seen = at_forwards(workflow.transformer, places)
    workflow.sample()
    assert seen[0] == {"hpu"}
    assert places(workflow.transformer) == {"cpu"}


@pytest.mark.parametrize(("variant", "place"), [("fp8_scaled", "meta"), ("lora_unmerged", "meta"), ("gguf", "cpu")])
def test_patched_models_lose_their_weights_at_the_end(variant: str, place: str) -> None:
    workflow = loaded(variant)
    workflow.sample()
    weight = workflow.transformer.blocks[0].self_attn.q.weight
    assert (weight.device.type, type(weight)) == (place, torch.nn.Parameter)
    assert place == "meta" or weight.numel() == 0


def test_merged_loras_live_in_the_transformer_alone() -> None:
    workflow = loaded("lora_merged", ALL)
    assert workflow.patchers[0].model["sd"] is None
    before = workflow.transformer.blocks[1].ffn[0].weight.clone()
    workflow.sample()
    assert torch.equal(workflow.transformer.blocks[1].ffn[0].weight, before)


def test_swapped_parameters_share_the_loaders_bytes_until_they_are_copied_back() -> None:
    def is_shared(transformer: Any) -> bool:
        return transformer.blocks[3].ffn[0].weight.data_ptr() == sd["blocks.3.ffn.0.weight"].data_ptr()

    workflow = loaded("fp32", ALL)
    sd = workflow.patchers[0].model["sd"]
    seen = at_forwards(workflow.transformer, is_shared)
    workflow.sample()
    assert seen == [True] + [False] * 5


def test_packed_parameters_are_kept_by_the_next_load_unless_they_were_offloaded() -> None:
    for variant, is_kept in (("gguf_stays", True), ("gguf", False)):
        workflow = loaded(variant)
        seen = at_forwards(workflow.transformer, lambda transformer: transformer.blocks[0].self_attn.q.weight)
        workflow.sample()
        workflow.sample()
        assert seen[0].quant_type == seen[-1].quant_type == "Q8_0"
        assert (seen[0] is seen[-1]) is is_kept


def test_scales_of_swapped_blocks_are_on_the_device_and_in_no_list_of_tensors() -> None:
    workflow = loaded("fp8_scaled", ALL)
    workflow.sample()
    layer = workflow.transformer.blocks[3].ffn[0]
    assert layer.scale_weight.device.type == "hpu"
    assert "scale_weight" not in {*layer._parameters, *layer._buffers}


def test_lora_deltas_strengths_and_the_step_are_buffers_and_the_step_changes_inside_a_forward() -> None:
    workflow = loaded("lora_scheduled")
    steps = []
    workflow.sample(cfg=1.0)
    layer = workflow.transformer.blocks[1].ffn[0]
    assert {"_step", "_lora_strength_0"} <= {*layer._buffers}
    assert "lora_diff_0_0" not in layer._buffers  # the deltas went with the weights
    layer.register_forward_pre_hook(lambda module, _: steps.append((module._step.item(), *module._buffers)))
    seen = at_forwards(workflow.transformer, lambda _: layer._step.item())
    workflow.sample(cfg=1.0)
    assert seen == [0, 0, 1]
    assert [step for step, *_ in steps] == [0, 1, 2]
    assert {"lora_diff_0_0", "lora_diff_0_1"} <= {*steps[0]}


def test_a_lora_set_in_one_run_is_gone_in_the_next() -> None:
    first, second, third = standin.run("lora_set_at_times", device=DEVICE, runs=3)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_embeddings_go_back_to_the_host_if_asked() -> None:
    workflow = loaded("image", ALL | {"offload_txt_emb": True, "offload_img_emb": True})
    seen = at_forwards(workflow.transformer, lambda model: places(model.text_embedding) | places(model.img_emb))
    workflow.sample()
    assert seen[:2] == [{"hpu"}, {"cpu"}]


def test_the_first_expert_leaves_the_device_before_the_second_if_runs_offload() -> None:
    for variant, place in (("two_experts", "cpu"), ("two_experts_stays", "hpu")):
        workflow = loaded(variant)
        first, second = workflow.transformers
        seen = at_forwards(second, lambda _, first=first: places(first))
        workflow.sample()
        assert seen[0] == {place}


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("error", [InterruptProcessingException, torch.OutOfMemoryError])
@pytest.mark.parametrize("variant", ["fp32", "fp8_scaled", "gguf", "vace", "compiled"])
def test_a_run_that_fails_offloads_and_the_next_is_right(variant: str, error: type[BaseException]) -> None:
    workflow = loaded(variant, ALL)
    with pytest.raises(error):
        workflow.sample(fault=Fault(block=2, forward=1, error=error))
    assert "hpu" not in places(workflow.transformer)
    assert torch.equal(workflow.sample(), unswapped(variant).latents)


def test_an_interrupt_is_no_exception_and_comes_before_its_block() -> None:
    assert not issubclass(InterruptProcessingException, Exception)
    workflow = loaded("fp32")
    seen = calls_of(workflow)
    with pytest.raises(InterruptProcessingException):
        workflow.sample(fault=Fault(block=2, forward=1, error=InterruptProcessingException))
    assert seen == [0, 1, 2, 3, 0, 1]


def test_skyreels_leaves_everything_on_the_device_if_it_fails() -> None:
    workflow = loaded("forcing")
    with pytest.raises(RuntimeError, match="block 2 fails"):
        workflow.sample(fault=Fault(block=2))
    assert places(workflow.transformer) == {"hpu"}
