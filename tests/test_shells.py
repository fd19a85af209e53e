"""Parameters that are made of other tensors: a subclass of ours, one around another, and ComfyUI's QuantizedTensor."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from on_disk import skip_unless_on_disk
from quantised import KINDS, LAYOUTS, WIDTH, LinearBlock, ShellBlock, assert_same_bytes, inner, tensors
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Model, Simulation, fixed_plan, replan, window_of
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState, SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile, Placement
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

COUNT = 5
DEVICE = "hpu:0"
SWAPPED = [True, False, True, True, True]

every_kind = pytest.mark.parametrize("kind", KINDS)


def shells(kind: str, count: int = COUNT) -> Model:
    torch.manual_seed(0)
    return Model([ShellBlock(KINDS[kind]) for _ in range(count)])


def x_of() -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7)) / 8


def run(session: SwapSession, model: Model, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad(), session.forward():
        return model(x_of() if x is None else x)


# --------------------------------------------------------------------------------------------- on a simulated device


@every_kind
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("lateness", [0.0, 1.0])
def test_outputs_objects_and_bytes_are_as_unswapped(kind: str, slots: int, lateness: float) -> None:
    model, untouched, simulation = shells(kind), shells(kind), Simulation(lateness=lateness)
    want = untouched(x_of())
    objects = [id(tensor) for tensor in [*model.parameters(), *tensors(model)]]
    session = simulation.session(model, fixed_plan(SWAPPED, slots=slots))
    session.checks = True
    for _ in range(3):
        assert torch.equal(run(session, model), want)
        assert [id(tensor) for tensor in [*model.parameters(), *tensors(model)]] == objects
    session.release()
    assert_same_bytes(model, untouched)
    assert torch.equal(run(session, model), want)
    session.close()
    assert_same_bytes(model, untouched)
    assert torch.equal(model(x_of()), want)
    assert [id(tensor) for tensor in [*model.parameters(), *tensors(model)]] == objects
    assert simulation.streams.allocated_bytes == 0


def replace_shell(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    block.one = make()


def replace_data(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    new = make()
    for name in new.__tensor_flatten__()[0]:
        setattr(block.one, name, getattr(new, name))
    if hasattr(new, "_params"):
        block.one._params = new._params


def edit_data(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    with torch.no_grad():
        for tensor, other in zip(inner(block.one), inner(make()), strict=True):
            tensor.copy_(other)


def load_state(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    """As the wrapper's loader and ComfyUI's patches do; our own classes do not know the operation."""
    with torch.no_grad():
        block.one.copy_(make())


def to_host(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    block.to("cpu")


CHANGES = [replace_shell, replace_data, edit_data, load_state, to_host]
every_change = pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind in KINDS for change in CHANGES if kind in LAYOUTS or change is not load_state],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)


@every_change
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_change_between_forwards_is_seen_and_kept(kind: str, change: Callable, at: int) -> None:
    model, unswapped = shells(kind), shells(kind)
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        for seed in range(3):
            assert torch.equal(run(session, model), unswapped(x_of()))
            for changed in (model, unswapped):
                torch.manual_seed(seed)
                change(changed.blocks[at], KINDS[kind])
            if seed == 1:
                session.release()
                assert_same_bytes(model, unswapped)
        assert torch.equal(run(session, model), unswapped(x_of()))
    assert_same_bytes(model, unswapped)


def edit_whole(block: ShellBlock, new: nn.Parameter) -> None:
    block.one.copy_(new)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shell_that_its_own_block_edits_is_a_clear_error(layout: str) -> None:
    model = shells(layout)
    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        run(session, model)
        new = LAYOUTS[layout]()
        handle = model.blocks[2].register_forward_hook(lambda block, *_: edit_whole(block, new))
        with pytest.raises(UnsupportedModelError, match=r"blocks\.2 edited one of its weights"):
            run(session, model)
        handle.remove()
        assert torch.equal(run(session, model), shells(layout)(x_of()))


@every_kind
def test_weights_made_in_inference_mode_run(kind: str) -> None:
    with torch.inference_mode():
        model, want = shells(kind), shells(kind)(x_of())
        with Simulation().session(model, fixed_plan(SWAPPED)) as session:
            for _ in range(3):
                assert torch.equal(run(session, model), want)
        assert torch.equal(model(x_of()), want)


def test_a_parameter_may_be_in_two_blocks() -> None:
    model = shells("ours", 3)
    model.blocks[2].one = model.blocks[0].one
    want = model(x_of())
    with Simulation().session(model, fixed_plan([True] * 3)) as session:
        for _ in range(2):
            assert torch.equal(run(session, model), want)
    assert torch.equal(model(x_of()), want)


def test_a_plan_may_change_which_blocks_are_swapped() -> None:
    model = shells("nested")
    want = model(x_of())
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        for swapped in (SWAPPED, [not one for one in SWAPPED], [False] * COUNT, [True] * COUNT):
            replan(session, fixed_plan(swapped)) if session.plan else None
            assert torch.equal(run(session, model), want)
    assert_same_bytes(model, shells("nested"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_the_class_itself_computes_gives_the_same(layout: str) -> None:
    torch.manual_seed(0)
    model = Model([LinearBlock(KINDS[layout]) for _ in range(COUNT)])
    x = x_of().to(torch.bfloat16)
    want = model(x)
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        assert all(torch.equal(run(session, model, x), want) for _ in range(3))


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
@pytest.mark.filterwarnings("ignore")
def test_layers_that_torchao_has_quantized_give_the_same(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="the classes are torchao's")
    torch.manual_seed(0)
    model = Model([nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16)) for _ in range(COUNT)])
    quantization.quantize_(model.requires_grad_(False), getattr(quantization, name)())
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    want = model(x)
    streamed = sum(block.streamed_bytes for block in profile_model(model.named).profile.blocks)
    assert streamed == COUNT * 256 * 256
    with Simulation().session(model, fixed_plan(SWAPPED)) as session:
        assert all(torch.equal(run(session, model, x), want) for _ in range(3))


@pytest.mark.parametrize("kind", ["nested", "mxfp8", "int8"])
@pytest.mark.parametrize("tier", [HostTier.FILE, HostTier.PINNED])
def test_tensors_that_are_in_a_file_are_read_from_it(tmp_path: Path, kind: str, tier: HostTier) -> None:
    """And an edit of the whole parameter, which its tensors do not count, is kept."""
    path, model, unswapped = tmp_path / "weights.safetensors", shells(kind), shells(kind)
    save_file({f"{i}": tensor.detach().clone() for i, tensor in enumerate(tensors(model))}, path)
    skip_unless_on_disk(path)
    state = load_file(path)
    for i, tensor in enumerate(tensors(model)):
        tensor.data = state[f"{i}"]
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=tier)) as session:
        assert torch.equal(run(session, model), unswapped(x_of()))
        assert set(session.tiers.values()) == {tier}
        assert all(slab.originals or slab.pages is None for slab in session._holds.slabs.values())
        for changed in (model, unswapped):
            torch.manual_seed(9)
            (load_state if hasattr(changed.blocks[1].one, "_qdata") else edit_data)(changed.blocks[1], KINDS[kind])
        session.release()
        for swapped in ([True] * COUNT, [False] * COUNT, [True] * COUNT):
            replan(session, fixed_plan(swapped, tiers=tier)) if session.state is SessionState.ADOPTED else None
            assert torch.equal(run(session, model), unswapped(x_of()))
    assert_same_bytes(model, unswapped)


# ------------------------------------------------------------------------- on a device whose memory is not the host's


def within(addresses: Iterable[int], memories: Iterable[torch.Tensor]) -> list[bool]:
    """Which addresses are in one of these pieces of device memory."""
    ranges = [range(memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in memories]
    return [any(address in one for one in ranges) for address in addresses]


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_on_a_device_only_what_streams_is_copied_and_the_peak_is_as_planned(
    pretend_stats: PretendHpu, kind: str, seed: int
) -> None:
    rng = random.Random(f"{kind} {seed}")
    count, slots, tier = rng.randint(3, 6), rng.randint(1, 3), rng.choice([HostTier.PINNED, HostTier.PAGEABLE])
    swapped = [True, *(rng.random() < 0.7 for _ in range(count - 2)), True]
    model, untouched, x = shells(kind, count), shells(kind, count), x_of().to(DEVICE)
    profile = profile_model(model.named).profile
    assert profile.block_bytes == sum(tensor.nbytes for tensor in tensors(model))
    assert profile.fixed == {}
    away = [block for block, s in zip(profile.blocks, swapped, strict=True) if s]
    slabs, stored = sum(block.slab_bytes for block in away), sum(block.nbytes for block in away)
    assert 0.95 * stored <= sum(block.streamed_bytes for block in away) <= stored

    def peak(work: Callable[[], object]) -> tuple[object, int]:
        gc.collect()
        before = pretend_stats.memory_allocated()
        pretend_stats.reset_peak_memory_stats()
        return work(), pretend_stats.max_memory_allocated() - before

    whole = shells(kind, count).to(DEVICE)
    whole(x)  # kernels of some layouts bring tables, which some keep
    pretend_stats.reset_copy_stats()
    want, of_activations = peak(lambda: whole(x).cpu())
    own = pretend_stats.copy_stats()["h2d_bytes"]
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    session = SwapSession(model.named, fixed_plan(swapped, slots=slots, tiers=tier), backend, root=model)
    _, of_weights = peak(session.adopt)
    assert of_weights <= session.plan.device_bytes
    session.release()

    def forwards() -> list[torch.Tensor]:
        outputs = [run(session, model, x).cpu()]
        session._holds.transfer.unlocked.drain()  # what the first forward prefetches for the second
        pretend_stats.reset_copy_stats()
        outputs += [run(session, model, x).cpu(), run(session, model, x).cpu()]
        session._holds.transfer.unlocked.drain()
        return outputs

    y, of_all = peak(forwards)
    copied = pretend_stats.copy_stats()
    assert of_all <= 1.02 * session.plan.device_bytes + of_activations
    assert copied["d2h_bytes"] == 2 * want.nbytes
    assert copied["h2d_bytes"] - 2 * own == (2 * slabs if len(away) > slots else 0)
    assert all(torch.equal(one, want) for one in y)
    assert {device for block in model.blocks for device in sum(block.seen, ())} == {torch.device(DEVICE)}
    assert_placed(session, model, profile, swapped)
    assert_same_bytes(model.blocks[0], untouched.blocks[0])
    pretend_stats.reset_copy_stats()
    session.release()
    assert pretend_stats.copy_stats()["d2h_bytes"] == 0
    assert {p.device.type for p in [*model.parameters(), *tensors(model)]} == {"cpu"}
    assert_same_bytes(model, untouched)
    session.close()


def assert_placed(session: SwapSession, model: Model, profile: ModelProfile, swapped: Sequence[bool]) -> None:
    """Blocks ran from the window if they are swapped, and are at their masters now; the others have their own place."""
    for index, (block, of_block) in enumerate(zip(model.blocks, profile.blocks, strict=True)):
        streams = [tensor.placement is Placement.STREAMED for tensor in of_block.tensors]
        ran_at = [[at for at, s in zip(addresses, streams, strict=True) if s] for addresses in block.addresses[-2:]]
        now = [tensor.data_ptr() for tensor, s in zip(tensors(block), streams, strict=True) if s]
        if swapped[index]:
            assert all(map(all, (within(addresses, window_of(session)) for addresses in ran_at)))
            assert now == [view.data_ptr() for view in session._holds.slabs[index].views]
            assert {tensor.device.type for tensor in [block.one, block.other, *inner(block.one)]} == {"cpu"}
        else:
            assert [now, now] == ran_at
            assert not any(within(now, window_of(session)))


@every_change
@pytest.mark.parametrize("at", [0, 1])
def test_on_a_device_a_change_between_forwards_is_seen_and_kept(
    pretend_stats: PretendHpu, kind: str, change: Callable, at: int
) -> None:
    model, unswapped, x = shells(kind, 3), shells(kind, 3), x_of()
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    with SwapSession(model.named, fixed_plan([True, False, True]), backend, root=model) as session:
        for seed in range(2):
            assert torch.allclose(run(session, model, x.to(DEVICE)).cpu(), unswapped(x), atol=1e-5)
            for changed in (model, unswapped):
                torch.manual_seed(seed)
                change(changed.blocks[at], KINDS[kind])
        assert torch.allclose(run(session, model, x.to(DEVICE)).cpu(), unswapped(x), atol=1e-5)
    assert_same_bytes(model, unswapped)
