"""Sessions over compiled blocks, and inside and outside inference mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from test_session import assert_nothing_left, run, truth_of, x_of
from torch import nn
from toys import Block, Model, Simulation, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier


def test_blocks_that_are_compiled_anew_at_every_forward_compute_the_same() -> None:
    model, simulation = toy(4), Simulation()
    originals, x = list(model.blocks), x_of()
    truth = truth_of(model)
    with simulation.session(model, fixed_plan([True, False, True, True])) as session:
        for _ in range(3):
            model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in originals)
            with torch.no_grad(), session.forward(blocks=model.blocks):
                assert torch.equal(model(x), truth)
            assert not any(block._forward_pre_hooks for block in [*model.blocks, *originals])
    assert session.counters.onloads >= 9


def test_a_session_made_from_compiled_blocks_computes_the_same() -> None:
    model = toy(4)
    truth = truth_of(model)
    model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    with Simulation().session(model, fixed_plan([True] * 4)) as session:
        for _ in range(3):
            assert torch.equal(run(session, model), truth)


# --------------------------------------------------------------------------------------------------- inference mode


class Stepping(Block):
    """Counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_step", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._step += 1
        return super().forward(x) + self._step


def made(inside: Callable[[], contextlib.AbstractContextManager[object]], block: type[Block]) -> Model:
    torch.manual_seed(0)
    with inside():
        return Model([block() for _ in range(4)])


INSIDE = {"normal": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("tier", HostTier)
@pytest.mark.parametrize("swapped", [[True] * 4, [True, False] * 2, [False] * 4])
@pytest.mark.parametrize("runs", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("created", INSIDE.values(), ids=INSIDE)
def test_inference_and_normal_weights_run_inside_and_outside_inference_mode(
    created: Callable, runs: Callable, swapped: list[bool], tier: HostTier
) -> None:
    model, x = made(created, Block), x_of()
    kinds = [(id(p), p.is_inference(), p.requires_grad) for p in model.parameters()]
    truth = truth_of(model)
    simulation = Simulation()
    with simulation.session(model, fixed_plan(swapped, tiers=tier)) as session:
        for round_ in range(3):
            with runs(), session.forward():
                assert torch.equal(model(x), truth)
            if round_ == 1:
                session.release()
    assert [(id(p), p.is_inference(), p.requires_grad) for p in model.parameters()] == kinds
    assert torch.equal(truth_of(model), truth)
    assert_nothing_left(simulation)


@pytest.mark.parametrize("closes", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("created", INSIDE.values(), ids=INSIDE)
def test_buffers_changed_inside_inference_mode_keep_their_changes(created: Callable, closes: Callable) -> None:
    model, plain, x = made(created, Stepping), made(created, Stepping), x_of()
    session = Simulation().session(model, fixed_plan([True] * 4))
    for round_ in range(4):
        with torch.inference_mode():
            want = plain(x)
            with session.forward():
                assert torch.equal(model(x), want)
        if round_ == 1:
            with closes():
                session.release()
    with closes():
        session.close()
    assert [block._step.item() for block in model.blocks] == [4.0] * 4


def test_compiled_blocks_see_the_same_kind_of_tensor_resident_and_swapped() -> None:
    model = made(torch.inference_mode, Block)
    with Simulation().session(model, fixed_plan([True, False, True, False])) as session, torch.inference_mode():
        kinds = []
        for block in model.blocks:
            block.register_forward_hook(
                lambda block, *_: kinds.append((block.up.is_inference(), block.up.stride(), block.up.requires_grad))
            )
        with session.forward():
            model(x_of())
        assert len(set(kinds)) == 1
