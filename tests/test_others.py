"""Others that move, wrap, cast or replace weights while the model runs: noticed once, named, never in its way."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import diffusers.hooks
import pytest
import safetensors.torch
import torch
from torch import nn
from toys import Model, fixed_plan
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.others import (
    FORWARDS_OF_A_STEP,
    MOST_ADOPTIONS,
    Others,
    names_of_others,
)
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

DEVICE = "hpu:0"
BLOCKS = 5
FORWARDS = 6
PLANS = {"swapped": [True] * BLOCKS, "resident": [False] * BLOCKS, "half": [True, False, True, False, True]}
PACK = "ComfyUI-Mover.v2"

Hook = Callable[..., Any]


class Feed(nn.Module):
    """A block: two linear layers beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def feeds() -> Model:
    torch.manual_seed(0)
    return Model([Feed() for _ in range(BLOCKS)]).requires_grad_(False)


def of_a_pack(function: Hook) -> Hook:
    """The function as if a pack in custom_nodes had defined it."""
    function.__module__ = f"/home/user/ComfyUI/custom_nodes/{PACK.replace('.', '_x_')}.nodes"
    return function


def moves_with_data(model: Model) -> None:
    """Points a weight at a copy before its block runs, each time."""

    def move(block: Feed, _: object) -> None:
        block.up.weight.data = block.up.weight.data.clone()

    for block in model.blocks:
        block.register_forward_pre_hook(of_a_pack(move))


def moves_to_the_host(model: Model) -> None:
    """Offloads each block behind its forward and loads it before, as packs that swap by themselves do."""
    for block in model.blocks:
        block.register_forward_pre_hook(of_a_pack(lambda block, _: block.to(DEVICE) and None))
        block.register_forward_hook(of_a_pack(lambda block, *_: block.to("cpu") and None))


def replaces(model: Model) -> None:
    """Puts a new parameter in the place of one of the block behind it, each time: before its turn."""

    def replace(block: Feed, *_: object) -> None:
        behind = model.blocks[(list(model.blocks).index(block) + 1) % BLOCKS]
        behind.down.weight = nn.Parameter(behind.down.weight.detach().clone(), requires_grad=False)

    for block in model.blocks:
        block.register_forward_hook(of_a_pack(replace))


def casts(model: Model) -> None:
    """Casts a weight to another type and back, in the model's forward."""

    def cast(model: Model, _: object) -> None:
        for block in model.blocks:
            block.up.to(torch.float64).to(torch.float32)

    model.register_forward_pre_hook(of_a_pack(cast))


def wraps(model: Model) -> None:
    """Puts a function in the place of the block's forward, which moves weights."""
    for block in model.blocks:
        block.forward = functools.partial(of_a_pack(_moved_forward), block, block.forward)


def _moved_forward(block: Feed, forward: Hook, x: torch.Tensor) -> torch.Tensor:
    block.down.weight.data = block.down.weight.data.clone()
    return forward(x)


def layerwise_casting(model: Model) -> None:
    for block in model.blocks:
        diffusers.hooks.apply_layerwise_casting(
            block, storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_classes=()
        )


def accelerate_aligns(model: Model) -> None:
    for block in model.blocks:
        hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.device(DEVICE), place_submodules=True)
        accelerate.hooks.add_hook_to_module(block, _MovesBack(hook))


class _MovesBack(accelerate.hooks.SequentialHook):
    """accelerate's CpuOffload of a block, without its second module."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module.to("cpu")
        return output


MOVERS = {
    moves_with_data: PACK,
    moves_to_the_host: PACK,
    replaces: PACK,
    casts: PACK,
    wraps: PACK,
    layerwise_casting: "diffusers (layerwise_casting)",
    accelerate_aligns: "accelerate (_MovesBack)",
}


def session_of(model: Model, swapped: list[bool]) -> SwapSession:
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    return SwapSession(model.named, fixed_plan(swapped), backend, root=model)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mover", MOVERS, ids=lambda mover: mover.__name__)
@torch.no_grad()
def test_a_run_goes_on_under_a_mover_with_three_adoptions_at_most_and_one_warning(
    pretend_stats: PretendHpu, caplog: pytest.LogCaptureFixture, mover: Callable[[Model], None], plan: str
) -> None:
    x = torch.randn(3, 16).to(DEVICE)
    alone = feeds()
    mover(alone)
    expected = [alone.to(DEVICE)(x).cpu() for _ in range(2)][-1]
    model = feeds()
    mover(model)
    with session_of(model, PLANS[plan]) as session:
        for number in range(FORWARDS):
            with session.forward():
                assert torch.equal(model(x).cpu(), expected), f"forward {number}"
        others = session.others
        assert session.adoptions <= MOST_ADOPTIONS
        assert session.adoptions == 1 + others.placed_again
        (warning,) = warnings(caplog)
        assert MOVERS[mover] in warning
        assert next(iter(others.moved)) in warning
        assert sum(others.moved.values()) >= 2
        assert MOVERS[mover] in others.text
    assert torch.equal(model.to(DEVICE)(x).cpu(), expected), "the weights are right after the session"


@torch.no_grad()
def test_without_us_one_block_is_on_the_device_at_a_time(pretend_stats: PretendHpu) -> None:
    x = torch.randn(3, 16).to(DEVICE)
    model, seen = feeds(), []
    replaces(model)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append([b.down.bias.device.type for b in model.blocks]))
    with session_of(model, PLANS["half"]) as session:
        for _ in range(FORWARDS):
            with session.forward():
                model(x)
        assert session.others.gave_up
        assert session.device_bytes == session.slab_bytes == session.pinned_bytes == 0
        here = [[kind == "hpu" for kind in kinds] for kinds in seen[-BLOCKS:]]
        assert here == [[one == running for one in range(BLOCKS)] for running in range(BLOCKS)]


@torch.no_grad()
def test_an_error_in_a_block_that_was_moved_leaves_it_on_the_host_and_the_next_run_starts_anew(
    pretend_stats: PretendHpu,
) -> None:
    x = torch.randn(3, 16).to(DEVICE)
    expected = feeds().to(DEVICE)(x).cpu()
    model = feeds()
    handles = [block.register_forward_hook(lambda *_: behind(model)) for block in model.blocks]
    with session_of(model, PLANS["swapped"]) as session:
        for _ in range(MOST_ADOPTIONS):
            with session.forward():
                model(x)
        assert session.others.gave_up
        failing = model.blocks[2].register_forward_hook(fails)
        with pytest.raises(ZeroDivisionError), session.forward():
            model(x)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        for handle in (failing, *handles):
            handle.remove()
        session.release()
        session.others = Others()
        for _ in range(2):
            with session.forward():
                assert torch.equal(model(x).cpu(), expected)
        assert not session.others.moved
        assert session.counters.onloads > BLOCKS


@torch.no_grad()
def test_without_us_weights_return_to_the_bytes_that_they_came_from_with_what_others_did_to_them(
    pretend_stats: PretendHpu,
) -> None:
    x = torch.randn(3, 16).to(DEVICE)
    model = feeds()
    for block in model.blocks:
        block.register_forward_hook(lambda *_: behind(model))
    with session_of(model, PLANS["swapped"]) as session:
        for _ in range(MOST_ADOPTIONS):
            with session.forward():
                model(x)
        assert session.others.gave_up
        kept = {name: parameter.data_ptr() for name, parameter in model.blocks[:-1].named_parameters()}
        edited, pointed = model.blocks[0].up, model.blocks[1].up
        wanted = edited.bias + 1, pointed.bias * 2
        edited.register_forward_hook(edits)
        pointed.register_forward_hook(lambda layer, *_: setattr(layer.bias, "data", layer.bias * 2))
        with session.forward():
            model(x)
        assert torch.equal(edited.bias, wanted[0])
        assert torch.equal(pointed.bias, wanted[1])
        moved = {name for name, parameter in model.blocks[:-1].named_parameters() if parameter.data_ptr() != kept[name]}
        assert moved == {"0.up.bias", "1.up.bias"}


def behind(model: Model) -> None:
    """Puts a new parameter in the place of the last block's."""
    last = model.blocks[-1]
    last.down.weight = nn.Parameter(last.down.weight.detach().clone(), requires_grad=False)


def edits(layer: nn.Linear, *_: object) -> None:
    layer.bias.add_(1)


def fails(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("quiet", [0, 1, FORWARDS_OF_A_STEP])
def test_what_returns_within_a_step_is_in_a_row(quiet: int) -> None:
    others = Others()
    for number in range(MOST_ADOPTIONS):
        assert not others.gave_up, number
        others.undid("blocks.3.up.weight", ())
        for _ in range(quiet):
            others.ended_forward()
    assert others.gave_up
    assert others.placed_again == MOST_ADOPTIONS - 1


def test_what_happens_once_in_a_while_is_followed_for_ever() -> None:
    others = Others()
    for _ in range(4 * MOST_ADOPTIONS):
        others.undid("blocks.3.up.weight", ())
        assert not others.gave_up
        for _ in range(FORWARDS_OF_A_STEP + 1):
            others.ended_forward()
    assert others.placed_again == 4 * MOST_ADOPTIONS


def test_the_sentence_names_three_weights_and_counts_the_rest() -> None:
    others = Others()
    assert others.text == ""
    for number in range(5):
        others.found(f"blocks.{number}.up.weight", ())
    assert others.text == (
        "another node moved, replaced or edited blocks.0.up.weight (1 time), blocks.1.up.weight (1 time), "
        "blocks.2.up.weight (1 time), 2 more while the model ran; remove or bypass what moves or patches the model"
    )


class Unreadable:
    """A hook that raises at whatever is asked of it."""

    def __call__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


def test_a_hook_that_cannot_be_looked_at_is_of_nobody_known() -> None:
    others, block = Others(), Feed()
    block.register_forward_hook(Unreadable())
    others.found("blocks.3.up.weight", [[block]])
    assert others.names == "another node"
    assert others.moved == {"blocks.3.up.weight": 1}


def test_hooks_of_torch_of_the_model_s_own_pack_and_ours_are_nobody_else_s(pretend_device: torch.device) -> None:
    model = feeds()
    assert names_of_others(list(model.modules())) == []
    model.blocks[0].register_forward_hook(lambda *_: None)  # defined where the blocks are
    torch.nn.utils.parametrizations.weight_norm(model.blocks[1].up)
    with torch.no_grad(), session_of(model, PLANS["swapped"]) as session, session.forward():
        assert names_of_others(list(model.modules())) == []
    model.blocks[2].register_forward_pre_hook(functools.partial(of_a_pack(lambda *_: None), 1))

    assert names_of_others(list(model.modules())) == [PACK]


@torch.no_grad()
def test_once_others_have_stopped_the_run_streams_again_and_once_only(pretend_stats: PretendHpu) -> None:
    x = torch.randn(3, 16).to(DEVICE)
    expected = feeds().to(DEVICE)(x).cpu()
    model = feeds()
    with session_of(model, PLANS["half"]) as session:
        for is_first in (True, False):  # others come back after they had stopped
            handles = [block.register_forward_hook(lambda *_: behind(model)) for block in model.blocks]
            for _ in range(MOST_ADOPTIONS):
                with session.forward():
                    assert torch.equal(model(x).cpu(), expected)
            assert session.others.gave_up
            for handle in handles:
                handle.remove()
            onloads = session.counters.onloads
            for _ in range(2 * FORWARDS_OF_A_STEP):
                with session.forward():
                    assert torch.equal(model(x).cpu(), expected)
            assert session.others.gave_up is not is_first
            assert (session.counters.onloads > onloads) is is_first
        assert session.adoptions == 2 * MOST_ADOPTIONS


def test_a_hook_that_passes_for_the_function_it_wraps_is_named_by_where_it_is_defined() -> None:
    block = Feed()
    code = (lambda *of: None).__code__.replace(co_filename=f"/home/user/ComfyUI/custom_nodes/{PACK}/nodes.py")
    block.forward = functools.wraps(block.forward)(types.FunctionType(code, {}))
    assert names_of_others([block]) == [PACK]


@torch.no_grad()
def test_an_edit_in_place_is_not_told_of_a_weight_that_was_not_edited(
    pretend_stats: PretendHpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = feeds()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    model.load_state_dict(safetensors.torch.load_file(file), assign=True)
    model.requires_grad_(False)
    x = torch.randn(3, 16).to(DEVICE)
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    plan = fixed_plan([True] * BLOCKS, tiers=(HostTier.FILE,) * BLOCKS)
    with SwapSession(model.named, plan, backend, root=model) as session:
        with session.forward():
            model(x)
        model.blocks[1].down.weight.mul_(2)
        with session.forward():
            model(x)
    (warning,) = warnings(caplog)
    assert warning.startswith("a weight of blocks.1 was moved, replaced or edited by another node")
