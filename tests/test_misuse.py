"""What people do that is not meant: one error with the right call, or it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from facts import Facts, make_plan
from toys import Simulation, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap import (
    PinBudget,
    SwapRun,
    SwapSettings,
    TorchMachine,
    Workload,
    backend_for,
    blocks_of,
)
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from wanvideo_enhanced_blockswap.hardware.records import DeviceMemory, DeviceSpec, HostMemory, HostPlatform, Vendor
from wanvideo_enhanced_blockswap.hardware.units import GIB

PAIRS = "pairs of a block's name and its module, as blocks_of(model) gives them"


def session(blocks: Any) -> SwapSession:
    return SwapSession(blocks, fixed_plan([True] * 4), Simulation().backend)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: session(model), f"{PAIRS}, got Model"),
        (lambda model: session(model.blocks), f"{PAIRS}, got ModuleList"),
        (lambda model: session(list(model.blocks)), f"{PAIRS}, got Block"),
        (lambda _: PinBudget("8GiB"), "a number of bytes, as in PinBudget(8 << 30), got '8GiB'"),
        (lambda _: PinBudget(8e9), "a number of bytes, as in PinBudget(8 << 30), got 8000000000.0"),
        (
            lambda _: Workload(tokens="832x480x81"),
            "a number of tokens, as in Workload(tokens=32_760), got '832x480x81'",
        ),
        (lambda _: Workload(tokens=(1, 2)), "a number of tokens, as in Workload(tokens=32_760), got (1, 2)"),
    ],
)
def test_a_wrong_call_is_one_error_with_the_right_one(call: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(TypeError) as raised:
        call(toy(4))
    assert str(raised.value) == f"expected {said}"


def test_a_device_may_be_given_by_its_name(pretend_device: torch.device) -> None:
    name = str(pretend_device)
    assert TorchMachine(name).spec == TorchMachine(pretend_device).spec
    model = toy(4)
    backend = backend_for(name, pin_budget=PinBudget(0))
    assert backend.device == pretend_device
    run = SwapRun(blocks_of(model), SwapSettings(), TorchMachine(name), backend, root=model)
    run.close()


def test_weights_that_accelerate_holds_are_refused_with_what_to_do() -> None:
    model = accelerate.cpu_offload(toy(4), execution_device="cpu")
    cure = r"accelerate holds the weights .*accelerate\.hooks\.remove_hook_from_module\(model, recurse=True\)"
    x = torch.randn(3, 16)
    with torch.no_grad(), Simulation().session(model, fixed_plan([True] * 4)) as session:
        with pytest.raises(UnsupportedModelError, match=rf"^blocks\.0\.\w+ is on the meta device, since {cure}"):
            session.forward().__enter__()
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        truth = model(x)
        with session.forward():
            assert torch.equal(model(x), truth)


def test_a_count_beside_automatic_tuning_is_said_to_have_no_effect() -> None:
    said = "blocks_to_swap = 18 has no effect while auto_hardware_tuning is on; switch it off to set the number"
    profile = ModelProfile(
        tuple(BlockProfile(f"blocks.{i}", (TensorProfile("w", 1 << 20, Placement.STREAMED),)) for i in range(40))
    )
    facts = Facts(
        spec=DeviceSpec("GPU", Vendor.NVIDIA, "cuda:0", None, None, 20, False, None, None, None),
        memory=DeviceMemory(12 * GIB, 11 * GIB, "a test"),
        host=HostMemory(64 * GIB, 48 * GIB, None, None, HostPlatform.LINUX),
    )
    settings = SwapSettings(blocks_to_swap=18)
    for is_auto in (True, False):
        plan = make_plan(profile, replace(settings, auto_hardware_tuning=is_auto), facts)
        assert (said in plan.reasons) == is_auto
    assert not [reason for reason in make_plan(profile, SwapSettings(), facts).reasons if "no effect" in reason]
