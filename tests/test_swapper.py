"""What swapped blocks compute and where their tensors are, forward by forward, against the unswapped model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from odd_tensors import PackedBlock, PackedParameter, Scaled, scaled
from torch import nn
from toys import Block, Model, Simulation, alternating, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

COUNT = 6
SWAPPED = {
    "none": [False] * COUNT,
    "last": [False] * (COUNT - 1) + [True],
    "alternating": alternating(COUNT),
    "all": [True] * COUNT,
}
ORDERS = {
    "in order": range(COUNT),
    "nothing": (),
    "skipping": (0, 3, 5),
    "repeated at once": (1, 1, 3, 3, 3),
    "backwards": (5, 4, 3, 2, 1, 0),
    "twice round": (*range(COUNT), *range(COUNT)),
}


def truth_of(model: Model, orders: Sequence[Sequence[int]], x: torch.Tensor) -> list[torch.Tensor]:
    """What the model computes before anything has touched it."""
    with torch.no_grad():
        return [model(x, order) for order in orders]


def run(session: SwapSession, model: Model, x: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
    with torch.no_grad(), session.forward():
        return model(x, order)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(raw(now[name]), raw(tensor)), name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the elements: unlike values, NaNs compare."""
    return tensor.as_subclass(torch.Tensor).reshape(-1).view(torch.uint8)


def x_of(width: int = 16) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("swapped", SWAPPED.values(), ids=SWAPPED.keys())
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("tier", HostTier)
def test_outputs_equal_the_unswapped_model_in_every_forward(
    swapped: list[bool], order: Sequence[int], tier: HostTier
) -> None:
    model, x = toy(COUNT), x_of()
    orders = [range(COUNT), order, order, range(COUNT)]
    simulation = Simulation(streams=2)
    wanted = truth_of(model, orders, x)
    with simulation.session(model, fixed_plan(swapped, tiers=tier, streams=2)) as session:
        assert all(torch.equal(run(session, model, x, o), want) for o, want in zip(orders, wanted, strict=True))
        assert simulation.streams.peak_bytes <= session.plan.device_bytes


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_no_order_of_the_blocks_makes_the_session_adopt_again(order: Sequence[int]) -> None:
    model = toy(COUNT)
    adopted = []
    planner = fixed_plan(alternating(COUNT))
    simulation = Simulation()
    with simulation.session(model, lambda profile, held: adopted.append(1) or planner(profile)) as session:
        for _ in range(3):
            run(session, model, x_of(), order)
        assert len(adopted) == 1


@pytest.mark.parametrize("swapped", SWAPPED.values(), ids=SWAPPED.keys())
def test_between_forwards_the_state_dict_is_the_original(swapped: list[bool]) -> None:
    model = toy(COUNT)
    wanted = states(model)
    with Simulation(lateness=1.0).session(model, fixed_plan(swapped)) as session:
        for order in ORDERS.values():
            run(session, model, x_of(), order)
            assert_same_state(model, wanted)
        session.release()
        assert_same_state(model, wanted)
    assert_same_state(model, wanted)


class Boom(BaseException):
    """As an interrupt: no Exception."""


@pytest.mark.parametrize("swapped", SWAPPED.values(), ids=SWAPPED.keys())
@pytest.mark.parametrize("error", [ValueError, Boom])
@pytest.mark.parametrize("at", range(COUNT))
def test_an_exception_in_any_block_leaves_true_weights_and_the_next_forward_right(
    swapped: list[bool], error: type[BaseException], at: int
) -> None:
    model, x = toy(COUNT), x_of()
    wanted, truth = states(model), truth_of(model, [range(COUNT)], x)[0]
    with Simulation(lateness=1.0).session(model, fixed_plan(swapped)) as session:
        run(session, model, x)

        def fail(*arguments: object) -> None:
            raise error

        handle = model.blocks[at].register_forward_hook(fail)
        with pytest.raises(error):
            run(session, model, x)
        handle.remove()
        assert_same_state(model, wanted)
        assert torch.equal(run(session, model, x), truth)
    assert_same_state(model, wanted)


def describe(model: nn.Module) -> list[tuple[object, ...]]:
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        facts = tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, tensor.is_inference(), tensor.device
        found.append((name, id(tensor), type(tensor), *facts))
    return found


def mixed() -> Model:
    """Blocks of different sizes, dtypes and strides, with buffers, an empty tensor and one that requires grad."""
    torch.manual_seed(1)
    blocks = [
        Block(16, 24, torch.bfloat16),
        Block(16, 200, torch.float8_e4m3fn),
        Block(16, 8, torch.float16),
        Block(16, 64),
        PackedBlock(16),
    ]
    blocks[2].up = nn.Parameter(torch.randn(16, 8).T, requires_grad=False)
    blocks[3].up.requires_grad_()
    blocks[1].register_buffer("empty", torch.empty(0, 3))
    blocks[0].none = nn.Parameter(torch.empty(0), requires_grad=False)
    blocks[0].register_buffer("block_id", torch.tensor(0))
    return Model(blocks)


@pytest.mark.parametrize("swapped", [[True] * 5, [True, False, True, False, True], [False] * 5])
def test_blocks_of_different_sizes_and_kinds_compute_the_same(swapped: list[bool]) -> None:
    model, x = mixed(), x_of()
    wanted = truth_of(model, [range(5)] * 3, x)
    simulation = Simulation(streams=3)
    with simulation.session(model, fixed_plan(swapped, streams=3)) as session:
        assert all(torch.equal(run(session, model, x), want) for want in wanted)
        assert simulation.streams.peak_bytes <= session.plan.device_bytes


@pytest.mark.parametrize("swapped", [[True] * 5, [True, False, True, False, True], [False] * 5])
def test_close_gives_every_object_back_as_it_was(swapped: list[bool]) -> None:
    model = mixed()
    objects, state = describe(model), states(model)
    dicts = [(m, dict(vars(m)), {k: dict(v) for k, v in vars(m).items() if "hooks" in k}) for m in model.modules()]
    with Simulation().session(model, fixed_plan(swapped)) as session:
        run(session, model, x_of())
    assert describe(model) == objects
    assert_same_state(model, state)
    for module, attributes, hooks in dicts:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert {k: dict(v) for k, v in vars(module).items() if "hooks" in k} == hooks


def storages(model: nn.Module) -> list[tuple[int, int]]:
    found = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    return [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in found]


@pytest.mark.parametrize("ends", ["release", "close"])
def test_nothing_points_into_device_memory_afterwards(ends: str) -> None:
    model = mixed()
    simulation = Simulation()
    given = []
    allocate = simulation.streams.allocate

    def remember(nbytes: int) -> torch.Tensor:
        given.append(allocate(nbytes))
        return given[-1]

    simulation.streams.allocate = remember
    session = simulation.session(model, fixed_plan([True, False, True, False, True]))
    run(session, model, x_of())
    getattr(session, ends)()
    assert given
    for memory in given:
        assert not any(begin <= memory.data_ptr() < end for begin, end in storages(model))
    session.close()


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize(
    "block", [lambda: nn.Identity(), lambda: nn.LayerNorm(16).requires_grad_(False), lambda: shared_halves()]
)
def test_a_swapped_block_with_nothing_to_stream_runs(block: Callable[[], nn.Module], streams: int) -> None:
    model, x = Model([Block(), block(), Block(), block(), block()]), x_of()
    want = truth_of(model, [range(5)], x)[0]
    with Simulation(streams=streams).session(model, fixed_plan([True] * 5, streams=streams)) as session:
        assert torch.equal(run(session, model, x), want)
        assert torch.equal(run(session, model, x), want)


def shared_halves() -> nn.Module:
    """A block whose two matrices are one."""
    block = Block(16, 16)
    block.down = block.up
    return block


def test_a_model_of_which_no_block_streams_anything_runs() -> None:
    model, x = Model([shared_halves() for _ in range(3)]), x_of()
    want = truth_of(model, [range(3)], x)[0]
    with Simulation().session(model, fixed_plan([True] * 3)) as session:
        assert torch.equal(run(session, model, x), want)


def test_one_module_in_two_places_of_the_list_runs() -> None:
    shared = Block()
    model, x = Model([Block(), shared, Block(), shared]), x_of()
    want = truth_of(model, [range(4)], x)[0]
    with Simulation().session(model, fixed_plan([True] * 4)) as session:
        assert torch.equal(run(session, model, x), want)
        assert torch.equal(run(session, model, x), want)


def test_weights_tied_across_blocks_compute_the_same_and_stay_tied() -> None:
    model, x = toy(4), x_of()
    model.blocks[3].up = model.blocks[0].up
    model.blocks[2].down = nn.Parameter(model.blocks[1].down[:, :], requires_grad=False)
    want = truth_of(model, [range(4)], x)[0]
    with Simulation().session(model, fixed_plan([True] * 4)) as session:
        assert torch.equal(run(session, model, x), want)
        model.blocks[0].up.data.zero_()
        assert model.blocks[3].up.count_nonzero() == 0
    assert model.blocks[3].up is model.blocks[0].up
    assert model.blocks[2].down.data_ptr() == model.blocks[1].down.data_ptr()


class Counting(Block):
    """Counts its forwards in two buffers: one edited in place, one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_step", torch.zeros(1))
        self.register_buffer("_total", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._step += 1
        self._total = self._total + 1
        return super().forward(x) + self._step + self._total


@pytest.mark.parametrize("swapped", [[True] * 4, [True, False] * 2, [False] * 4])
def test_buffers_changed_in_a_forward_keep_their_changes_across_release(swapped: list[bool]) -> None:
    torch.manual_seed(0)
    model, x = Model([Counting() for _ in range(4)]), x_of()
    plain = copy.deepcopy(model)
    with Simulation().session(model, fixed_plan(swapped)) as session, torch.no_grad():
        for round_ in range(6):
            assert torch.equal(run(session, model, x), plain(x))
            if round_ % 2:
                session.release()
                assert_same_state(model, plain.state_dict())
    assert_same_state(model, plain.state_dict())


def test_a_buffer_edited_in_place_is_the_same_object_afterwards() -> None:
    model = Model([Counting() for _ in range(4)])
    step = model.blocks[2]._step
    with Simulation().session(model, fixed_plan([True] * 4)) as session:
        run(session, model, x_of())
    assert model.blocks[2]._step is step
    assert step == 1


class ScaledBlock(nn.Module):
    """A block whose matrix is a wrapper subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = scaled(16, 16)
        self.up = nn.Parameter(torch.randn(16, 16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.weight, Scaled)
        return x + torch.tanh(x @ self.up @ self.weight.plain())


def test_wrapper_subclasses_run_and_come_back_as_the_same_objects() -> None:
    torch.manual_seed(0)
    model, x = Model([ScaledBlock() for _ in range(4)]), x_of()
    with torch.no_grad():
        want = model(x)
    objects = [id(p) for p in model.parameters()]
    with Simulation().session(model, fixed_plan([True] * 4)) as session:
        assert torch.equal(run(session, model, x), want)
        assert torch.equal(run(session, model, x), want)
    assert [id(p) for p in model.parameters()] == objects


def test_packed_parameters_keep_class_and_attributes_everywhere() -> None:
    torch.manual_seed(0)
    model, x = Model([PackedBlock() for _ in range(5)]), x_of()
    with torch.no_grad():
        want = model(x)
    weights = [block.weight for block in model.blocks]
    with Simulation().session(model, fixed_plan([True, False, True, True, False])) as session:
        for _ in range(3):
            assert torch.equal(run(session, model, x), want)
            assert all(block.weight is weight for block, weight in zip(model.blocks, weights, strict=True))
            assert all(type(w) is PackedParameter and w.quant_type == "Q8" for w in weights)
    assert all(type(w) is PackedParameter and w.quant_type == "Q8" for w in weights)


class Editing(Block):
    """A block that edits its own weight when armed."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed:
            self.armed = False
            self.up.mul_(1)
        return super().forward(x)


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_a_weight_edited_in_its_own_forward_is_a_clear_error_and_the_next_forward_works(
    at: int, inside: Callable[[], object]
) -> None:
    torch.manual_seed(0)
    model, x = Model([Editing() for _ in range(4)]), x_of()
    wanted, want = states(model), truth_of(model, [range(4)], x)[0]
    with inside(), Simulation().session(model, fixed_plan([True] * 4)) as session:
        run(session, model, x)
        model.blocks[at].armed = True
        with pytest.raises(UnsupportedModelError, match=rf"blocks\.{at} edited one of its weights"):
            run(session, model, x)
        assert_same_state(model, wanted)
        assert torch.equal(run(session, model, x), want)
        assert torch.equal(run(session, model, x), want)


def test_a_resident_weight_edited_in_its_own_forward_keeps_the_edit() -> None:
    torch.manual_seed(0)
    model, x = Model([Editing() for _ in range(4)]), x_of()
    with Simulation().session(model, fixed_plan([True, False] * 2)) as session, torch.no_grad():
        model.blocks[1].armed = True
        handle = model.blocks[1].register_forward_hook(lambda block, *_: block.up.fill_(0.5))
        run(session, model, x)
        handle.remove()
        assert (model.blocks[1].up == 0.5).all()
    assert (model.blocks[1].up == 0.5).all()
