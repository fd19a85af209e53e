"""A session's life: adopt, run, release, re-plan, close; what it copies, what it refuses, what it leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from toys import Model, Simulation, alternating, fixed_plan, replan, toy
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState, SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.model.profile import blocks_of
from wanvideo_enhanced_blockswap.blockswap.wrapper.parts import parts_of
from wanvideo_enhanced_blockswap.blockswap.wrapper.wanvideo import vace_blocks_entered

COUNT = 6
SLAB = 3072  # of a toy block: two matrices of 16 x 24 float32


def x_of() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(7))


def run(session: SwapSession, model: Model, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad(), session.forward():
        return model(x_of() if x is None else x)


def truth_of(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model(x_of())


def addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def assert_nothing_left(simulation: Simulation) -> None:
    assert simulation.registrar.locked == {}
    assert simulation.pin_budget.used_bytes == 0
    assert simulation.streams.allocated_bytes == 0


@contextlib.contextmanager
def counted_fills(monkeypatch: pytest.MonkeyPatch) -> object:
    """The blocks' tensors that were copied into slabs."""
    from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab

    fills: list[int] = []
    fill = Slab.fill
    monkeypatch.setattr(Slab, "fill", lambda slab, tensors, *of: fills.append(len(tensors)) or fill(slab, tensors, *of))
    yield fills


# ---------------------------------------------------------------------------------------------- memory and traffic


@pytest.mark.parametrize("swapped", [[False] * COUNT, alternating(COUNT), [True] * COUNT])
@pytest.mark.parametrize("slots", [1, 2, 3, COUNT])
def test_device_memory_never_exceeds_the_plan_and_is_free_after_release(swapped: list[bool], slots: int) -> None:
    model, simulation = toy(COUNT), Simulation()
    session = simulation.session(model, fixed_plan(swapped, slots=slots))
    for _ in range(3):
        run(session, model)
    assert simulation.streams.peak_bytes <= session.plan.device_bytes
    session.release()
    assert simulation.streams.allocated_bytes == 0
    session.close()
    assert_nothing_left(simulation)


def test_each_forward_onloads_each_swapped_block_once_and_a_window_at_most_beyond() -> None:
    model, simulation = toy(COUNT), Simulation()
    with simulation.session(model, fixed_plan([True] * COUNT)) as session:
        for _ in range(4):
            run(session, model)
        streamed = 4 * COUNT * SLAB
        assert streamed <= session.counters.onloaded_bytes <= streamed + 2 * SLAB


def test_as_many_slots_as_swapped_blocks_move_nothing_after_the_first_forward() -> None:
    model, simulation = toy(COUNT), Simulation()
    with simulation.session(model, fixed_plan([True] * COUNT, slots=COUNT)) as session:
        for _ in range(4):
            run(session, model)
        assert session.counters.onloads == COUNT


def test_in_steady_state_no_device_memory_is_allocated() -> None:
    model, simulation = toy(COUNT), Simulation()
    with simulation.session(model, fixed_plan(alternating(COUNT))) as session:
        run(session, model)
        simulation.streams.allocate = None  # every call fails
        for _ in range(3):
            run(session, model)


def test_slabs_take_their_exact_pages_and_pins_are_counted() -> None:
    model, simulation = toy(COUNT), Simulation()
    with simulation.session(model, fixed_plan([True] * COUNT)) as session:
        session.adopt()
        assert session.slab_bytes == session.pinned_bytes == COUNT * 4096
        assert sum(simulation.registrar.locked.values()) == COUNT * 4096


def test_adopting_again_copies_nothing_into_slabs_that_hold_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, simulation = toy(COUNT), Simulation()
    truth = truth_of(model)
    with counted_fills(monkeypatch) as fills, simulation.session(model, fixed_plan([True] * COUNT)) as session:
        for _ in range(3):
            assert torch.equal(run(session, model), truth)
            session.release()
        assert len(fills) == COUNT


@pytest.mark.parametrize(("first", "then"), [(2, 5), (5, 2), (0, 6), (6, 0), (3, 3)])
def test_a_re_plan_to_more_or_fewer_swapped_blocks_computes_the_same(first: int, then: int) -> None:
    model, simulation = toy(COUNT), Simulation()
    truth = truth_of(model)
    with simulation.session(model, fixed_plan([i < first for i in range(COUNT)])) as session:
        assert torch.equal(run(session, model), truth)
        plan = replan(session, fixed_plan([i < then for i in range(COUNT)]))
        simulation.streams.peak_bytes = simulation.streams.allocated_bytes
        assert torch.equal(run(session, model), truth)
        assert simulation.streams.peak_bytes <= plan.device_bytes
        assert len(simulation.registrar.locked) == then
    assert_nothing_left(simulation)
    assert torch.equal(truth_of(model), truth)


def test_a_re_plan_fills_only_the_slabs_of_newly_swapped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, simulation = toy(COUNT), Simulation()
    with counted_fills(monkeypatch) as fills:
        with simulation.session(model, fixed_plan([i < 2 for i in range(COUNT)])) as session:
            run(session, model)
            replan(session, fixed_plan([i < 5 for i in range(COUNT)]))
        assert len(fills) == 5


def test_two_sessions_share_one_pin_budget() -> None:
    one, other = Simulation(), Simulation()
    backend = Backend(
        other.backend.device, other.backend.open_streams, other.registrar, one.pin_budget, other.backend.make_worker
    )
    one.pin_budget.limit_bytes = 8 * 4096
    models = toy(COUNT), toy(COUNT, seed=1)
    truths = [truth_of(model) for model in models]
    first = one.session(models[0], fixed_plan([True] * COUNT))
    second = SwapSession(models[1].named, fixed_plan([True] * COUNT), backend)
    for _ in range(2):
        assert torch.equal(run(first, models[0]), truths[0])
        assert torch.equal(run(second, models[1]), truths[1])
    assert one.pin_budget.used_bytes <= 8 * 4096
    assert second.refusals
    first.close()
    second.close()
    assert_nothing_left(one)
    assert other.registrar.locked == {}


# --------------------------------------------------------------------------------------------------- what it refuses


def do(session: SwapSession, act: str) -> None:
    """One call of the session's interface."""
    if act == "forward":
        with session.forward():
            pass
    elif act == "enter":
        session.enter(0)
    else:
        getattr(session, act)()


@pytest.mark.parametrize(
    ("bring", "act", "sentence"),
    [
        ([], "enter", "enter needs a session that is running, but this one is idle"),
        (["adopt"], "adopt", "adopt needs a session that is idle, but this one is adopted"),
        (["adopt"], "enter", "enter needs a session that is running, but this one is adopted"),
        (["close"], "adopt", "adopt needs a session that is idle, but this one is closed"),
        (["close"], "release", "release needs a session that is idle or adopted, but this one is closed"),
        (["close"], "forward", "forward needs a session that is idle or adopted, but this one is closed"),
    ],
)
def test_an_illegal_transition_names_both_states(bring: list[str], act: str, sentence: str) -> None:
    session = Simulation().session(toy(2), fixed_plan([True] * 2))
    for step in bring:
        getattr(session, step)()
    with pytest.raises(BlockSwapError, match=sentence), torch.no_grad():
        do(session, act)
    session.close()


@pytest.mark.parametrize("act", ["adopt", "release", "forward"])
def test_an_illegal_transition_inside_a_forward_is_refused_and_the_next_forward_runs(act: str) -> None:
    model = toy(4)
    truth = truth_of(model)
    with Simulation().session(model, fixed_plan([True] * 4)) as session:

        def misuse(*arguments: object) -> None:
            do(session, act)

        handle = model.blocks[3].register_forward_hook(misuse)
        with pytest.raises(BlockSwapError, match="this one is running"):
            run(session, model)
        handle.remove()
        assert torch.equal(run(session, model), truth)


def test_closing_inside_a_forward_closes_for_good() -> None:
    model, simulation = toy(4), Simulation()
    truth = truth_of(model)
    session = simulation.session(model, fixed_plan([True] * 4))
    with torch.no_grad(), session.forward():
        model(x_of())
        session.close()
    assert session.state is SessionState.CLOSED
    assert_nothing_left(simulation)
    assert torch.equal(truth_of(model), truth)


def test_close_is_idempotent() -> None:
    simulation = Simulation()
    session = simulation.session(toy(2), fixed_plan([True] * 2))
    session.adopt()
    session.close()
    session.close()
    assert session.state is SessionState.CLOSED
    assert_nothing_left(simulation)


def test_grad_on_weights_that_require_it_is_refused_before_anything_changes() -> None:
    model, simulation = toy(4), Simulation()
    model.blocks[2].down.requires_grad_()
    before = addresses(model)
    session = simulation.session(model, fixed_plan([True] * 4))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.down requires grad"), session.forward():
        model(x_of())
    assert addresses(model) == before
    assert_nothing_left(simulation)
    session.close()


class Taking(nn.Module):
    """A frozen block that takes its input in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16), requires_grad=False)

    def forward(self, *given: object, **named: object) -> torch.Tensor:
        (x,) = (leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, torch.Tensor))
        return x @ self.w


WAYS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "positional": lambda block, x: block(x),
    "keyword": lambda block, x: block(x=x),
    "nested": lambda block, x: block(3, [None, ({"x": x},)]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [0, 2])
def test_an_input_that_requires_grad_is_refused_with_the_name_of_its_block(way: str, at: int) -> None:
    model, simulation = Model([Taking() for _ in range(3)]), Simulation()
    x = x_of().requires_grad_()
    with simulation.session(model, fixed_plan([True] * 3)) as session:
        with session.forward():
            for block in model.blocks[:at]:
                block(x_of())
            with pytest.raises(
                UnsupportedModelError, match=rf"an input of blocks\.{at} requires grad.*no_grad.*detach"
            ):
                WAYS[way](model.blocks[at], x)
        with torch.no_grad(), session.forward():
            WAYS[way](model.blocks[at], x)
        with session.forward():
            assert not WAYS[way](model.blocks[at], x.detach()).requires_grad
    assert_nothing_left(simulation)


def test_grad_that_is_enabled_inside_of_a_forward_is_seen() -> None:
    model = toy(3)
    model.blocks[1].up.requires_grad_()
    with Simulation().session(model, fixed_plan([True] * 3)) as session, torch.no_grad():
        for x, refused in ((x_of().requires_grad_(), "an input of blocks.0"), (x_of(), "blocks.1.up")):
            with pytest.raises(UnsupportedModelError, match=refused), session.forward(), torch.enable_grad():
                model(x)
        assert torch.equal(run(session, model), truth_of(model))


def test_what_a_block_is_called_with_may_be_passed_to_enter() -> None:
    model = toy(2)
    with Simulation().session(model, fixed_plan([True] * 2)) as session, session.forward():
        session.enter(0, (x_of(), {"x": None}))
        with pytest.raises(UnsupportedModelError, match=r"an input of blocks\.1 requires grad"):
            session.enter(1, (x_of(), [x_of().requires_grad_()]))


class Vace(nn.Module):
    """A block whose forward the wrapper calls directly."""

    def __init__(self, index: int) -> None:
        super().__init__()
        if not index:
            self.before_proj = nn.Linear(16, 16).requires_grad_(False)
        self.after_proj = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.after_proj(self.before_proj(c) + x if hasattr(self, "before_proj") else c)


@pytest.mark.parametrize(("name", "at"), [("c", 0), ("x", 1)])
def test_an_input_of_a_vace_block_that_requires_grad_is_refused(name: str, at: int) -> None:
    model = nn.Module()
    model.vace_blocks = nn.ModuleList(Vace(index) for index in range(3))
    given = {"c": x_of(), "x": x_of()}
    given[name].requires_grad_()

    def forward() -> None:
        c = given["c"]
        for block in model.vace_blocks:
            c = block.forward(c, given["x"])

    with SwapSession(list(blocks_of(model)), fixed_plan([True] * 3), Simulation().backend, root=model) as session:
        refused = pytest.raises(UnsupportedModelError, match=rf"an input of vace_blocks\.{at} requires grad")
        parts = parts_of(model)
        with session.forward(), vace_blocks_entered(parts, session.enter), refused:
            forward()
        with torch.no_grad(), session.forward(), vace_blocks_entered(parts, session.enter):
            forward()


def test_a_forward_over_another_number_of_blocks_is_refused() -> None:
    model = toy(4)
    with Simulation().session(model, fixed_plan([True] * 4)) as session:
        with pytest.raises(
            UnsupportedModelError, match=r"began with 4 blocks, and now the model has 3: .* queue the prompt again"
        ):
            session.forward(blocks=list(model.blocks)[:3]).__enter__()
        assert session.state is SessionState.IDLE


def test_a_forward_over_something_that_takes_no_hooks_leaves_no_hook_and_the_next_one_runs() -> None:
    model = toy(3)
    truth = truth_of(model)
    with Simulation().session(model, fixed_plan([True] * 3)) as session:
        with pytest.raises(AttributeError), torch.no_grad():
            session.forward(blocks=[model.blocks[0], model.blocks[1], lambda x: x]).__enter__()
        assert not any(block._forward_pre_hooks for block in model.blocks)
        assert torch.equal(run(session, model), truth)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_session_whose_close_fails_is_closed_all_the_same(error: type[BaseException]) -> None:
    model, simulation = toy(COUNT), Simulation()
    truth = truth_of(model)
    session = simulation.session(model, fixed_plan([True] * COUNT))
    run(session, model)
    wait, failures = simulation.streams.host_wait, [error("lost")]

    def fail_once(event: object) -> None:
        if failures:
            raise failures.pop()
        wait(event)

    simulation.streams.host_wait = fail_once
    with pytest.raises((KeyboardInterrupt, BlockSwapError)):
        session.close()
    assert session.state is SessionState.CLOSED
    session.close()
    assert_nothing_left(simulation)
    assert torch.equal(truth_of(model), truth)
