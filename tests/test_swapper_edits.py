"""Weights that somebody replaces, moves or edits between forwards are seen, resident and swapped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from odd_tensors import scaled
from test_swapper import ScaledBlock, assert_same_state, run, states, x_of
from torch import nn
from toys import Block, Model, Simulation, fixed_plan, toy

SWAPPED = [True, False, True, False, True]


def replace_parameter(block: Block) -> None:
    block.up = nn.Parameter(torch.randn(24, 16), requires_grad=False)


def replace_by_larger(block: Block) -> None:
    block.up = nn.Parameter(torch.randn(100, 16), requires_grad=False)
    block.down = nn.Parameter(torch.randn(16, 100), requires_grad=False)


def replace_by_smaller(block: Block) -> None:
    block.up = nn.Parameter(torch.randn(4, 16), requires_grad=False)
    block.down = nn.Parameter(torch.randn(16, 4), requires_grad=False)


def replace_by_transposed(block: Block) -> None:
    block.up = nn.Parameter(torch.randn(16, 24).T, requires_grad=False)


def replace_by_another_type(block: Block) -> None:
    block.up = nn.Parameter(torch.randn(24, 16).to(torch.bfloat16), requires_grad=False)


def move(block: Block) -> None:
    block.up.data = torch.randn(24, 16)


def edit(block: Block) -> None:
    with torch.no_grad():
        block.up.mul_(-2)


def edit_part(block: Block) -> None:
    with torch.no_grad():
        block.down[3:5] = 1


def edit_in_inference_mode(block: Block) -> None:
    with torch.inference_mode():
        block.up.mul_(-2)


def edit_small(block: Block) -> None:
    with torch.no_grad():
        block.scale.fill_(0.25)


def replace_small(block: Block) -> None:
    block.scale = nn.Parameter(torch.full((1,), 0.25), requires_grad=False)


def load_state(block: Block) -> None:
    block.load_state_dict({name: torch.randn_like(tensor) for name, tensor in block.state_dict().items()})


def assign_state(block: Block) -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in block.state_dict().items()}
    block.load_state_dict(state, assign=True)
    block.requires_grad_(False)


def exchange(block: Block) -> None:
    block.up, block.down = (
        nn.Parameter(block.down.data.T, requires_grad=False),
        nn.Parameter(block.up.data.T, requires_grad=False),
    )


CHANGES = [
    replace_parameter, replace_by_larger, replace_by_smaller, replace_by_transposed, replace_by_another_type, move,
    edit, edit_part, edit_in_inference_mode, edit_small, replace_small, load_state, assign_state, exchange,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("lateness", [0.0, 1.0])
def test_a_change_between_forwards_is_seen_and_kept(change: Callable, at: int, lateness: float) -> None:
    model, plain, x = toy(5), toy(5), x_of()
    simulation = Simulation(lateness=lateness)
    with simulation.session(model, fixed_plan(SWAPPED)) as session:
        for seed in range(3):
            assert torch.equal(run(session, model, x), plain(x).detach())
            for changed in (model, plain):
                torch.manual_seed(seed)
                change(changed.blocks[at])
            assert_same_state(model, states(plain))
            if seed == 1:
                session.release()
                assert_same_state(model, states(plain))
        assert torch.equal(run(session, model, x), plain(x).detach())
        simulation.streams.peak_bytes = simulation.streams.allocated_bytes
        assert torch.equal(run(session, model, x), plain(x).detach())
        assert simulation.streams.peak_bytes <= session.plan.device_bytes
    assert_same_state(model, states(plain))
    assert simulation.registrar.locked == {}
    assert simulation.streams.allocated_bytes == 0


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_edit_after_release_is_seen(at: int) -> None:
    model, plain, x = toy(5), toy(5), x_of()
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        run(session, model, x)
        session.release()
        edit(model.blocks[at])
        edit(plain.blocks[at])
        assert torch.equal(run(session, model, x), plain(x).detach())


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_edit_of_weights_made_in_inference_mode_is_seen_at_the_next_adopt(at: int) -> None:
    """Tensors made in inference mode count no edits: between the forwards of one adopt theirs go unseen."""
    with torch.inference_mode():
        model, plain, x = toy(5), toy(5), x_of()
        with Simulation().session(model, fixed_plan(SWAPPED)) as session:
            run(session, model, x)
            session.release()
            edit(model.blocks[at])
            edit(plain.blocks[at])
            assert torch.equal(run(session, model, x), plain(x))
        assert_same_state(model, states(plain))


def test_two_weights_that_change_places_between_blocks_keep_their_bytes() -> None:
    model, plain, x = toy(5), toy(5), x_of()
    with Simulation().session(model, fixed_plan([True] * 5)) as session:
        run(session, model, x)
        for m in (model, plain):
            m.blocks[1].up, m.blocks[3].up = m.blocks[3].up, m.blocks[1].up
        assert torch.equal(run(session, model, x), plain(x).detach())
    assert_same_state(model, states(plain))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("between", ["nothing", "release"])
def test_a_weight_kept_aside_comes_back_with_its_own_bytes(at: int, between: str) -> None:
    model, plain, x = toy(5), toy(5), x_of()
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        run(session, model, x)
        kept = model.blocks[at].up
        model.blocks[at].up = nn.Parameter(torch.zeros(24, 16), requires_grad=False)
        run(session, model, x)
        if between == "release":
            session.release()
        model.blocks[at].up = kept
        assert torch.equal(run(session, model, x), plain(x).detach())
    assert_same_state(model, states(plain))


def test_a_state_dict_taken_between_forwards_can_be_loaded_back_later() -> None:
    model, plain, x = toy(5), toy(5), x_of()
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        run(session, model, x)
        saved = model.state_dict()
        for block in model.blocks:
            replace_parameter(block)
        run(session, model, x)
        session.release()
        model.load_state_dict(saved, assign=True)
        model.requires_grad_(False)
        assert torch.equal(run(session, model, x), plain(x).detach())


def test_a_replaced_wrapper_subclass_is_used() -> None:
    torch.manual_seed(0)
    model, x = Model([ScaledBlock() for _ in range(3)]), x_of()
    with Simulation().session(model, fixed_plan([True] * 3)) as session:
        run(session, model, x)
        model.blocks[1].weight = new = scaled(16, 16)
        with torch.no_grad():
            want = model(x)
        assert torch.equal(run(session, model, x), want)
    assert model.blocks[1].weight is new


def test_only_a_change_makes_the_session_copy_a_block_again() -> None:
    model, x = toy(4), x_of()
    with Simulation().session(model, fixed_plan([True] * 4, slots=4)) as session:
        run(session, model, x)
        edit(model.blocks[2])
        run(session, model, x)
        run(session, model, x)
        assert session.counters.onloads == 5
