"""Parameters that are made of other tensors: a subclass of ours, one around another, and ComfyUI's QuantizedTensor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from odd_tensors import Doubled, Scaled, scaled
from on_disk import skip_unless_on_disk
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Model, Simulation, fixed_plan, replan
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState, SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

WIDTH = 64
COUNT = 5
DEVICE = "hpu:0"
SWAPPED = [True, False, True, True, True]
LAYOUTS = ("TensorCoreFP8Layout", "TensorCoreNVFP4Layout", "TensorCoreMXFP8Layout", "TensorWiseINT8Layout")


def quantized(layout: str) -> nn.Parameter:
    """A parameter of ComfyUI's own class, in one of its formats."""
    tensor = pytest.importorskip("comfy_kitchen.tensor", reason="the class is in comfy-kitchen")
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5
    return nn.Parameter(tensor.QuantizedTensor.from_float(weight, layout), requires_grad=False)


def of_ours() -> nn.Parameter:
    return scaled(WIDTH, WIDTH)


def nested() -> nn.Parameter:
    return nn.Parameter(Doubled(scaled(WIDTH, WIDTH).data), requires_grad=False)


KINDS: dict[str, Callable[[], nn.Parameter]] = {
    "ours": of_ours,
    "nested": nested,
    **{layout: lambda layout=layout: quantized(layout) for layout in LAYOUTS},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class ShellBlock(nn.Module):
    """A block with two such matrices and a plain bias."""

    def __init__(self, make: Callable[[], nn.Parameter]) -> None:
        super().__init__()
        self.one, self.other = make(), make()
        self.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.seen: list[tuple[torch.device, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [plain(weight) for weight in (self.one, self.other)]
        self.seen.append((self.one.device, self.other.device, *(weight.device for weight in weights)))
        return x + torch.tanh(x @ weights[0].float() + self.bias) @ weights[1].float()


def plain(weight: nn.Parameter) -> torch.Tensor:
    """The weight as its class computes it from what it is made of."""
    return weight.plain() if isinstance(weight, (Scaled, Doubled)) else weight.dequantize()


def inner(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [tensor for name in weight.__tensor_flatten__()[0] for tensor in inner(getattr(weight, name))]


def shells(kind: str, count: int = COUNT) -> Model:
    torch.manual_seed(0)
    return Model([ShellBlock(KINDS[kind]) for _ in range(count)])


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for parameter in model.parameters() for tensor in inner(parameter)]


def x_of() -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7)) / 8


def run(session: SwapSession, model: Model, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad(), session.forward():
        return model(x_of() if x is None else x)


def assert_same_bytes(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


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
        new = quantized(layout)
        handle = model.blocks[2].register_forward_hook(lambda block, *_: edit_whole(block, new))
        with pytest.raises(UnsupportedModelError, match=r"forward of blocks\.2 edited one of its weights"):
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


class LinearBlock(nn.Module):
    """A linear layer whose class computes it, in kernels of its own where it has some."""

    def __init__(self, make: Callable[[], nn.Parameter]) -> None:
        super().__init__()
        self.weight = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(nn.functional.linear(x, self.weight))


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


@pytest.mark.parametrize("kind", ["nested", "TensorCoreMXFP8Layout", "TensorWiseINT8Layout"])
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


@every_kind
@pytest.mark.parametrize("slots", [1, 2])
def test_on_a_device_only_what_streams_is_copied_and_the_peak_is_as_planned(
    pretend_stats: PretendHpu, kind: str, slots: int
) -> None:
    model, untouched, x = shells(kind), shells(kind), x_of().to(DEVICE)
    want = shells(kind).to(DEVICE)(x).cpu()
    model_bytes = sum(tensor.nbytes for tensor in tensors(model))
    assert profile_model(model.named).profile.block_bytes == model_bytes
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    session = SwapSession(model.named, fixed_plan([True] * COUNT, slots=slots), backend, root=model)
    gc.collect()
    before = pretend_stats.memory_allocated()
    session.adopt()
    assert pretend_stats.memory_allocated() - before <= session.plan.device_bytes
    assert torch.equal(run(session, model, x).cpu(), want)
    pretend_stats.reset_copy_stats()
    onloads, onloaded = session.counters.onloads, session.counters.onloaded_bytes
    y = [run(session, model, x), run(session, model, x)]
    copied = pretend_stats.copy_stats()
    assert copied["d2h_bytes"] == 0
    assert session.counters.onloads - onloads == 2 * COUNT
    assert session.counters.onloaded_bytes - onloaded == pytest.approx(2 * model_bytes, rel=0.01)
    assert copied["h2d_bytes"] <= 1.01 * 2 * model_bytes  # the last prefetch may still be under way
    assert all(torch.equal(one.cpu(), want) for one in y)
    assert {device for block in model.blocks for device in sum(block.seen, ())} == {torch.device(DEVICE)}
    assert {p.device.type for p in [*model.parameters(), *tensors(model)]} == {"cpu"}
    assert_same_bytes(model, untouched)
    pretend_stats.reset_copy_stats()
    session.release()
    assert pretend_stats.copy_stats()["d2h_bytes"] == 0
    assert {p.device.type for p in [*model.parameters(), *tensors(model)]} == {"cpu"}
    assert_same_bytes(model, untouched)
    session.close()


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
