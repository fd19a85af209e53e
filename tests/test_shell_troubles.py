"""Parameters made of other tensors that share them, change amid a run, get LoRAs, or cannot be taken apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from facts import make_plan
from odd_tensors import Scaled, ShownAsFloat, scaled
from quantised import KINDS, LAYOUTS, WIDTH, LinearBlock, ShellBlock, assert_same_bytes, inner, plain, tensors
from test_planning import BY_HAND, FACTS
from test_shells import CHANGES, DEVICE, run, shells, x_of
from torch import nn
from toys import Model, fixed_plan
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError, UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

pytestmark = pytest.mark.usefixtures("pretend_stats")

PLANS = ([True] * 3, [True, False, True], [False, True, False])
every_plan = pytest.mark.parametrize("swapped", PLANS, ids=["all", "ends", "middle"])


def on_device(model: Model, swapped: list[bool]) -> SwapSession:
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    return SwapSession(model.named, fixed_plan(swapped), backend, root=model)


def same(session: SwapSession, model: Model, unswapped: Model) -> bool:
    """Whether the next forward is the unswapped model's, to the rounding of two devices."""
    return torch.allclose(run(session, model, x_of().to(DEVICE)).cpu(), unswapped(x_of()), atol=1e-5)


# ------------------------------------------------------------------------------------- changes in the first forward


def edit_scale(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    """Of the small tensors, in place."""
    for tensor in inner(block.one):
        if tensor.numel() <= WIDTH and tensor.is_floating_point() and tensor.itemsize > 1:
            tensor.mul_(2)


def grow_scale(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    """Another shape: one scale for each row in place of one."""
    of_rows = torch.linspace(0.01, 0.02, WIDTH)[:, None]
    if isinstance(block.one, Scaled):
        block.one.scale = of_rows
    else:
        block.one._params = replace(block.one._params, scale=of_rows)


def other_layout(block: ShellBlock, make: Callable[[], nn.Parameter]) -> None:
    """Other tensors, and other numbers of them."""
    block.one = KINDS["mxfp8"]()


CASES = [
    *[(kind, change) for kind in ("ours", "nvfp4", "int8", "w4a8") for change in (*CHANGES, edit_scale, other_layout)],
    *[(kind, grow_scale) for kind in ("ours", "int8")],
]
every_change = pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind, change in CASES if kind in LAYOUTS or change.__name__ != "load_state"],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)


@every_change
@every_plan
@pytest.mark.parametrize("turn", ["before its first turn", "before its second", "between forwards"])
@torch.no_grad()
def test_a_change_is_seen_and_kept_whenever_it_comes(
    kind: str, change: Callable, swapped: list[bool], turn: str
) -> None:
    model, unswapped = shells(kind, 3), shells(kind, 3)
    both = (model, unswapped)

    def changed(one: Model) -> None:
        torch.manual_seed(5)
        change(one.blocks[2], KINDS[kind])

    with on_device(model, swapped) as session:
        if turn != "before its first turn":
            assert same(session, model, unswapped)
        if turn == "between forwards":
            for one in both:
                changed(one)
        else:
            handles = [one.blocks[0].register_forward_pre_hook(lambda *_, one=one: changed(one)) for one in both]
            assert same(session, model, unswapped)
            for handle in handles:
                handle.remove()
        assert same(session, model, unswapped)
        session.release()
        assert_same_bytes(model, unswapped)
        assert same(session, model, unswapped)
    assert_same_bytes(model, unswapped)


# ------------------------------------------------------------------------------------------------- shared tensors


def share_a_scale(model: Model) -> None:
    """One tensor object in every shell."""
    scale = model.blocks[0].one._params.block_scale
    for block in model.blocks:
        for weight in (block.one, block.other):
            weight._params = replace(weight._params, block_scale=scale)


def share_memory(model: Model) -> None:
    """Views of the same bytes, in two shells of a block."""
    for block in model.blocks:
        scale = block.one._params.block_scale
        block.other._params = replace(block.other._params, block_scale=scale.view_as(scale))


def share_a_weight(model: Model) -> None:
    model.blocks[2].one = model.blocks[0].one


@pytest.mark.parametrize("share", [share_a_scale, share_memory, share_a_weight])
@every_plan
@torch.no_grad()
def test_shells_may_share_tensors(share: Callable, swapped: list[bool]) -> None:
    model, unswapped = shells("nvfp4", 3), shells("nvfp4", 3)
    for one in (model, unswapped):
        share(one)
    addresses = addresses_in(model)
    with on_device(model, swapped) as session:
        for _ in range(3):
            assert same(session, model, unswapped)
            for one in (model, unswapped):  # three octaves less
                one.blocks[0].one._params.block_scale.view(torch.uint8).sub_(8)
        session.release()
        assert_same_bytes(model, unswapped)
    assert_same_bytes(model, unswapped)
    assert same_pairs(addresses_in(model)) == same_pairs(addresses) != set()


def addresses_in(model: Model) -> list[int]:
    return [tensor.data_ptr() for block in model.blocks for tensor in tensors(block)]


def same_pairs(addresses: list[int]) -> set[tuple[int, int]]:
    """Which tensors start at the same byte as which other ones."""
    return {(i, j) for i, one in enumerate(addresses) for j, other in enumerate(addresses[:i]) if one == other}


# ----------------------------------------------------------------------------------- classes that cannot be taken apart


class Mute(ShownAsFloat):
    """It does not say what it is made of."""

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.hidden, self.factor = data, scale

    def plain(self) -> torch.Tensor:
        return self.hidden.to(torch.float32) * self.factor

    dequantize = plain

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].hidden, args[0].factor)
        if func is torch.ops.aten._to_copy.default:
            device = kwargs["device"]
            return cls(args[0].hidden.to(device), args[0].factor.to(device))
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class Raising(Mute):
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        raise RuntimeError("not today")


class Lying(Mute):
    """It names what it does not have."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["hidden", "gone"], None


class Lacking(Mute):
    """One of its tensors is missing."""

    zero = None

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["hidden", "factor", "zero"], None


class Immovable(Mute):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            raise NotImplementedError("Immovable has no _to_copy")
        return super().__torch_dispatch__(func, types, args, kwargs)


class OddBlock(nn.Module):
    """A weight of some class, beside a plain one that streams."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.one = scaled(WIDTH, WIDTH, kind=kind)
        self.up = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.one.plain()) @ self.up


def of(kind: type) -> Model:
    torch.manual_seed(0)
    return Model([OddBlock(kind) for _ in range(3)])


STAYING = (Mute, Raising, Lying, Lacking)
every_class = pytest.mark.parametrize("kind", STAYING, ids=lambda kind: kind.__name__)


@every_class
@every_plan
@torch.no_grad()
def test_a_class_that_cannot_be_taken_apart_stays_and_what_is_beside_it_streams(
    kind: type, swapped: list[bool], pretend_stats: PretendHpu
) -> None:
    model, unswapped = of(kind), of(kind)
    originals = [block.one for block in model.blocks]
    with on_device(model, swapped) as session:
        for _ in range(3):
            assert same(session, model, unswapped)
        pretend_stats.reset_copy_stats()
        session.release()
        assert pretend_stats.copy_stats()["d2h_bytes"] == 0
    assert all(block.one is original for block, original in zip(model.blocks, originals, strict=True))
    of_block = profile_model(model.named).profile.blocks[0]
    assert {tensor.name: tensor.placement.value for tensor in of_block.tensors}["one"] == "fixed"
    assert of_block.streamed_bytes >= WIDTH * WIDTH


@every_class
def test_the_plan_names_the_weight_its_type_and_the_bytes_that_stay(kind: type) -> None:
    reasons = make_plan(profile_model(of(kind).named).profile, replace(BY_HAND, blocks_to_swap=1), FACTS).reasons
    stay = f"48.0 KB of weights always stay on the GPU (blocks.0.one and 2 more: {kind.__name__} cannot be taken"
    assert [reason for reason in reasons if "always stay" in reason] == [f"{stay} apart)"]


@every_class
def test_a_number_of_blocks_that_frees_nothing_is_refused_with_that_reason(kind: type) -> None:
    model = Model([LinearBlock(lambda: scaled(WIDTH, WIDTH, kind=kind))])
    stay = rf"16\.0 KB of weights always stay on the GPU \(blocks\.0\.weight: {kind.__name__} cannot be taken apart"
    with pytest.raises(PlanError, match=rf"swapping 1 block would free nothing: {stay}\); set blocks_to_swap to 0"):
        make_plan(profile_model(model.named).profile, replace(BY_HAND, blocks_to_swap=1), FACTS)


@torch.no_grad()
def test_a_class_that_cannot_even_be_moved_is_refused_in_a_sentence_and_nothing_has_changed() -> None:
    model, unswapped = of(Immovable), of(Immovable)
    sentence = (
        r"blocks\.0\.one \(Immovable, 16,384 bytes\) can be neither taken apart nor moved to hpu:0, since its class "
        r"fails with NotImplementedError: Immovable has no _to_copy; load the model with another quantization"
    )
    with on_device(model, PLANS[0]) as session, pytest.raises(UnsupportedModelError, match=sentence):
        session.adopt()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(model(x_of()), unswapped(x_of()))


@torch.no_grad()
def test_a_shell_that_can_be_taken_apart_no_more_stays_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, unswapped = of(Scaled), of(Scaled)
    with on_device(model, PLANS[0]) as session:
        assert same(session, model, unswapped)
        monkeypatch.setattr(Scaled, "__tensor_flatten__", Raising.__tensor_flatten__)
        assert same(session, model, unswapped)
        monkeypatch.undo()
    assert_same_bytes(model, unswapped)


# -------------------------------------------------------------------------------------------------------------- LoRAs


def delta(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((WIDTH, 8), (8, WIDTH))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.bfloat16) / WIDTH**0.5 for shape in shapes)


def merge(model: Model, seed: int) -> None:
    """A weight that is quantised anew from its values and the LoRA's, as ComfyUI's patches do."""
    for block in model.blocks:
        up, down = delta(seed)
        weight = block.one.requantize_from_float(block.one.dequantize() + up @ down, scale="recalculate")
        block.one = nn.Parameter(weight, requires_grad=False)


class LoraBlock(ShellBlock):
    """It adds a LoRA's product to the weight that it has unpacked, as the wrapper's linear layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [plain(weight) for weight in (self.one, self.other)]
        if hasattr(self, "lora_diff_0_0"):
            weights[0] = weights[0] + self.lora_diff_0_0 @ self.lora_diff_0_1 * self._lora_strength_0
        return x + torch.tanh(x @ weights[0].float() + self.bias) @ weights[1].float()


def set_beside(model: Model, seed: int) -> None:
    """Buffers beside the weight, which the wrapper sets anew for each run."""
    for block in model.blocks:
        for name, tensor in zip(("lora_diff_0_0", "lora_diff_0_1"), delta(seed), strict=True):
            block.register_buffer(name, tensor.clone())
        block.register_buffer("_lora_strength_0", torch.tensor([0.5], dtype=torch.bfloat16))


def take_away(model: Model) -> None:
    for block in model.blocks:
        for name in list(block._buffers):
            delattr(block, name)


REQUANTISED = [kind for kind in LAYOUTS if kind not in ("awq", "svdquant")]
"""Those that are not made elsewhere."""


def loras(kind: str) -> Model:
    torch.manual_seed(0)
    return Model([LoraBlock(KINDS[kind]) for _ in range(3)])


@pytest.mark.parametrize("kind", REQUANTISED)
@every_plan
@pytest.mark.parametrize("ends", ["release", "close"])
@torch.no_grad()
def test_a_lora_that_is_merged_into_quantised_weights_between_runs_gives_the_unswapped_outputs(
    kind: str, swapped: list[bool], ends: str
) -> None:
    model, unswapped = loras(kind), loras(kind)
    session = on_device(model, swapped)
    outputs = []
    for seed in range(3):
        for _ in range(2):
            assert same(session, model, unswapped)
        outputs.append(unswapped(x_of()))
        session.release()
        if ends == "close":
            session.close()
            session = on_device(model, swapped)
        for one in (model, unswapped):
            merge(one, seed)
    assert not torch.equal(outputs[0], outputs[1])
    session.close()
    assert_same_bytes(model, unswapped)


@pytest.mark.parametrize("kind", [*LAYOUTS, "Int8WeightOnlyConfig"])
@every_plan
@torch.no_grad()
def test_a_lora_beside_quantised_weights_gives_the_unswapped_outputs(kind: str, swapped: list[bool]) -> None:
    model, unswapped = loras(kind), loras(kind)
    outputs = []
    with on_device(model, swapped) as session:
        for change in (lambda _: None, lambda one: set_beside(one, 1), lambda one: set_beside(one, 2), take_away):
            for one in (model, unswapped):
                change(one)
            for _ in range(2):
                assert same(session, model, unswapped)
            outputs.append(unswapped(x_of()))
            session.release()
            assert_same_bytes(model, unswapped)
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])
