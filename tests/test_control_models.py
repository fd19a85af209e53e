"""Control models that the sampler runs: their blocks stream, from the first step, in a session of their own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import standin
import torch
from gate_bench import DEVICE, GateBench, allocated, arguments, sampled, truth
from standin import Workflow
from standin.controlnet.wan_controlnet import BLOCKS, WIDTH, WanControlnet, make
from standin.measuring import unswapped
from torch import nn
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError
from wanvideo_enhanced_blockswap.blockswap.wrapper.control import ControlModels

pytestmark = pytest.mark.usefixtures("pretend_device")

VARIANT = "control_model"
BLOCK_BYTES = 4 * (WIDTH * WIDTH + WIDTH)
FORWARDS = 2 * standin.VARIANTS[VARIANT].request.steps
counts = pytest.mark.parametrize("count", [1, 2, 4, None])


def control_of(workflow: Workflow) -> nn.Module:
    model: nn.Module = workflow.patchers[0].model_options["transformer_options"]["controlnet"]["controlnet"]
    return model


def without_control(workflow: Workflow) -> Workflow:
    del workflow.patchers[0].model_options["transformer_options"]["controlnet"]
    return workflow


@counts
def test_the_latents_are_those_of_the_unswapped_model_in_every_run(bench: GateBench, count: int | None) -> None:
    workflow = bench.workflow(VARIANT, arguments(count))
    for _ in range(3):
        assert torch.equal(workflow.sample(), truth(VARIANT))
    assert not torch.equal(without_control(workflow).sample(), truth(VARIANT))


@counts
def test_its_blocks_stream_from_the_first_step_and_none_is_copied_back(bench: GateBench, count: int | None) -> None:
    cost = sampled(bench.workflow(VARIANT, arguments(count)))
    alone = sampled(without_control(bench.workflow(VARIANT, arguments(count))))
    assert cost.d2h_bytes == alone.d2h_bytes
    sent = cost.h2d_bytes - alone.h2d_bytes
    small = sum(one.numel() * 4 for one in WanControlnet(4).parameters()) - BLOCKS * BLOCK_BYTES
    assert 0 <= sent - FORWARDS * BLOCKS * BLOCK_BYTES <= 2 * small + BLOCK_BYTES


def test_its_blocks_take_no_more_device_memory_than_two_of_them(bench: GateBench) -> None:
    saved = unswapped(VARIANT, DEVICE).peak - sampled(bench.workflow(VARIANT, arguments(4))).peak
    saved_alone = unswapped("fp32", DEVICE).peak - sampled(without_control(bench.workflow(VARIANT, arguments(4)))).peak
    assert saved - saved_alone >= (BLOCKS - 2) * BLOCK_BYTES - 4096


def test_a_control_model_without_blocks_is_left_alone(bench: GateBench) -> None:
    workflow = bench.workflow(VARIANT, arguments(2))
    control_of(workflow).blocks = nn.ModuleList()
    first = workflow.sample()
    del control_of(workflow).blocks
    control_of(workflow).forward = lambda latent: latent  # type: ignore[method-assign]
    assert first.shape == workflow.sample().shape
    assert "to" not in vars(WanControlnet)


def test_afterwards_nothing_of_ours_is_left_on_it_or_on_its_class(bench: GateBench) -> None:
    used: list[nn.Module] = []
    original = WanControlnet.forward

    workflow = bench.workflow(VARIANT, arguments(2))
    try:
        WanControlnet.forward = lambda self, latent: used.append(self) or original(self, latent)  # type: ignore[method-assign, func-returns-value]
        workflow.sample()
    finally:
        WanControlnet.forward = original  # type: ignore[method-assign]
    (model,) = {id(one): one for one in used}.values()
    assert model is not control_of(workflow), "the wrapper runs a copy"
    assert "to" not in vars(WanControlnet)
    assert not {"forward", "_apply"} & {name for module in model.modules() for name in vars(module)}
    wanted = dict(control_of(workflow).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.cpu(), wanted[name])
        assert parameter.device.type == ("cpu" if name.startswith("blocks.") else DEVICE.split(":")[0])


def test_a_failed_step_leaves_all_as_it_was_and_the_next_run_is_right(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = bench.workflow(VARIANT, arguments(2))
    with monkeypatch.context() as patched:
        patched.setattr(WanControlnet, "forward", lambda self, latent: self.blocks[1](latent))
        with pytest.raises(RuntimeError, match="shapes"):
            workflow.sample()
    before = allocated()
    assert "to" not in vars(WanControlnet)
    assert torch.equal(workflow.sample(), truth(VARIANT))
    assert allocated() <= before


def test_a_method_that_another_pack_has_put_on_the_class_stays(bench: GateBench) -> None:
    moved = []

    def to(self: nn.Module, device: torch.device) -> nn.Module:
        moved.append(device)
        return super(WanControlnet, self).to(device)

    WanControlnet.to = to  # type: ignore[method-assign, assignment]
    try:
        assert torch.equal(bench.workflow(VARIANT, arguments(2)).sample(), truth(VARIANT))
        assert vars(WanControlnet)["to"] is to
        assert len(moved) == FORWARDS
    finally:
        del WanControlnet.to


def test_runs_that_do_not_end_in_the_order_they_started_leave_nothing_on_the_class(bench: GateBench) -> None:
    variant = replace(standin.VARIANTS[VARIANT], force_offload=False)
    workflows = [Workflow(variant, device=DEVICE) for _ in range(2)]
    for workflow in workflows:
        workflow.load(arguments(2))
    for workflow in 2 * workflows:
        assert torch.equal(workflow.sample(), truth(VARIANT))
    bench.gate.restore()
    assert "to" not in vars(WanControlnet)


def test_a_copy_of_one_that_its_loader_moved_in_a_run_is_the_wrappers_own(bench: GateBench) -> None:
    """The loader ends with a move to the host; without force_offload, the last run goes on until the next one."""
    workflow = Workflow(replace(standin.VARIANTS[VARIANT], force_offload=False), device=DEVICE)
    workflow.load(arguments(2))
    workflow.sample()
    loaded = make(4)["controlnet"].to("cpu")
    copied = copy.deepcopy(loaded)
    bench.gate.restore()
    latent = torch.randn(4, 1, 2, 2)
    with torch.inference_mode():
        for model in (copied, loaded):
            moved = model.to(DEVICE)
            assert {one.device.type for one in moved.parameters()} == {torch.device(DEVICE).type}
            assert torch.equal(moved(latent.to(DEVICE)).cpu(), make(4)["controlnet"](latent))


def test_one_that_two_transformers_runs_see_is_swapped_once(bench: GateBench) -> None:
    workflow = bench.workflow(VARIANT, arguments(2))
    workflow.sample()
    run = bench.run_of(workflow)
    package = standin.__name__
    model = make(4)["controlnet"]
    latent = torch.randn(4, 1, 2, 2)
    wanted = model(latent)
    outer, inner = (ControlModels([package], run, torch.device("cpu")) for _ in range(2))
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model.to(DEVICE)(latent.to(DEVICE)).cpu(), wanted)
    inner.end()
    outer.end()
    assert "to" not in vars(WanControlnet)
    assert {one.device.type for one in model.blocks.parameters()} == {"cpu"}
    assert torch.equal(model.cpu()(latent), wanted)


def test_running_out_of_device_memory_is_one_clear_error(bench: GateBench, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = bench.workflow(VARIANT, arguments(4))
    workflow.sample()

    def full(self: nn.Module, latent: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(WanControlnet, "forward", full)
    with pytest.raises((torch.OutOfMemoryError, DeviceMemoryError), match="no room"):
        workflow.sample()
