"""The engine on a device whose memory is not the host's: a diffusers Wan transformer, swapped and unswapped."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from copies_seen import assert_placed_in_few_copies_of_our_memory
from odd_tensors import Opaque, PackedBlock, PackedParameter, scaled
from test_swapper import Counting, ScaledBlock
from torch import nn
from toys import Block, Model, fixed_plan, small_bytes
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError
from wanvideo_enhanced_blockswap.blockswap.model.layout import device_bytes
from wanvideo_enhanced_blockswap.blockswap.model.profile import blocks_of, profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import spread
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

LAYERS = 4
FORWARDS = 3
DEVICE = "hpu:0"


def wan(dtype: torch.dtype) -> nn.Module:
    """A tiny Wan transformer with random weights, on the host."""
    diffusers = pytest.importorskip("diffusers", reason="the model is diffusers' Wan transformer")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=128, num_layers=LAYERS,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 2, 8, 8, generator=generator, dtype=dtype)
    text = torch.randn(1, 7, 32, generator=generator, dtype=dtype)
    moved = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([500])}
    return {name: tensor.to(DEVICE) for name, tensor in moved.items()}


def all_but_blocks_to_device(model: nn.Module) -> None:
    """What the caller of a session does with the rest of its model."""
    blocks = model.blocks
    model.blocks = nn.ModuleList()
    model.to(DEVICE)
    model.blocks = blocks


def session_of(model: nn.Module, swapped: Sequence[bool], **options: object) -> SwapSession:
    backend = backend_for(torch.device(DEVICE), pin_budget=PinBudget(1 << 40))
    return SwapSession(list(blocks_of(model)), fixed_plan(swapped, **options), backend, root=model)


@pytest.mark.parametrize("count", [0, 1, LAYERS // 2, LAYERS])
def test_every_copy_of_a_weight_reads_memory_of_ours_and_each_block_is_copied_once(
    pretend_stats: PretendHpu, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wan(torch.bfloat16)
    with session_of(model, spread(LAYERS, count)) as session:
        assert_placed_in_few_copies_of_our_memory(session, monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leaves what the imports made out of every collection in this file."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def in_use(stats: PretendHpu) -> int:
    """Device memory in use, without what earlier tests left to the garbage collector."""
    gc.collect()
    return stats.memory_allocated()


@contextlib.contextmanager
def measured(stats: PretendHpu) -> Iterator[SimpleNamespace]:
    """Bytes copied and the peak of memory above what was in use before."""
    before, found = in_use(stats), SimpleNamespace()
    stats.reset_copy_stats()
    stats.reset_peak_memory_stats()
    yield found
    found.__dict__.update(stats.copy_stats(), peak=stats.max_memory_allocated() - before)


def forwards(model: nn.Module, given: dict[str, torch.Tensor], session: SwapSession | None = None) -> list:
    outputs = []
    with torch.inference_mode():
        for _ in range(FORWARDS):
            with contextlib.nullcontext() if session is None else session.forward():
                outputs.append(model(**given, return_dict=False)[0])
    return outputs


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def reference(request: pytest.FixtureRequest, pretend_device: torch.device) -> SimpleNamespace:
    """What the unswapped model computes and costs on the device."""
    dtype = request.param
    model, given = wan(dtype).to(DEVICE), inputs(dtype)
    with measured(torch.hpu) as cost:
        outputs = forwards(model, given)
    return SimpleNamespace(dtype=dtype, given=given, outputs=[y.cpu() for y in outputs], cost=cost)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("count", [0, 1, LAYERS // 2, LAYERS])
def test_outputs_traffic_and_memory_are_as_promised(
    reference: SimpleNamespace, pretend_stats: PretendHpu, count: int, slots: int
) -> None:
    model = wan(reference.dtype)
    all_but_blocks_to_device(model)
    profile = profile_model(list(blocks_of(model))).profile
    swapped = spread(LAYERS, count)
    session = session_of(model, swapped, slots=slots)
    with measured(pretend_stats) as cost:
        outputs = forwards(model, reference.given, session)
    plan = session.plan
    assert all(torch.equal(y.cpu(), want) for y, want in zip(outputs, reference.outputs, strict=True))
    assert cost.d2h_bytes == reference.cost.d2h_bytes
    assert cost.peak <= plan.device_bytes + reference.cost.peak

    resident = sum(b.streamed_bytes for b, s in zip(profile.blocks, swapped, strict=True) if not s)
    fixed = resident + sum(small_bytes(b) for b in profile.blocks)
    often = FORWARDS if count > slots else 1
    streamed = often * sum(b.slab_bytes for b, s in zip(profile.blocks, swapped, strict=True) if s)
    moved = cost.h2d_bytes - reference.cost.h2d_bytes
    # A buffer of residents is copied with what aligns its tensors.
    assert fixed + streamed <= moved <= streamed + plan.device_bytes
    with measured(pretend_stats) as ending:
        session.close()
    assert ending.d2h_bytes == 0
    assert {p.device.type for p in model.blocks.parameters()} == {"cpu"}


@pytest.mark.parametrize("count", [0, LAYERS // 2, LAYERS])
def test_release_frees_all_device_memory_of_the_blocks(pretend_stats: PretendHpu, count: int) -> None:
    model, given = wan(torch.float32), inputs(torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    all_but_blocks_to_device(model)
    before = in_use(pretend_stats)
    session = session_of(model, spread(LAYERS, count))
    del forwards(model, given, session)[:]
    session.release()
    assert in_use(pretend_stats) == before
    session.close()
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in model.state_dict().items())


def test_memory_that_runs_out_at_adopt_is_a_clear_error_and_the_weights_are_back(
    reference: SimpleNamespace, pretend_stats: PretendHpu
) -> None:
    model = wan(reference.dtype)
    state = {name: tensor.clone() for name, tensor in model.blocks.state_dict().items()}
    all_but_blocks_to_device(model)
    session = session_of(model, spread(LAYERS, 3))
    need, before = fixed_plan(spread(LAYERS, 3))(profile_model(session._named).profile).device_bytes, None
    for step in range(8):
        before = in_use(pretend_stats)
        pretend_stats.set_memory_limit(before + need * step // 8)
        with pytest.raises(DeviceMemoryError, match=r"not enough VRAM on hpu:0 for [\d,]+ bytes of block weights"):
            session.adopt()
        assert in_use(pretend_stats) == before
        assert {p.device.type for p in model.blocks.parameters()} == {"cpu"}
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.blocks.state_dict().items())
    pretend_stats.set_memory_limit(before + need)
    session.adopt()
    pretend_stats.set_memory_limit(None)
    outputs = forwards(model, reference.given, session)
    assert torch.equal(outputs[-1].cpu(), reference.outputs[-1])
    session.close()


def test_memory_that_runs_out_amid_a_forward_leaves_the_weights_true_and_the_next_forward_right(
    reference: SimpleNamespace, pretend_stats: PretendHpu
) -> None:
    model = wan(reference.dtype)
    all_but_blocks_to_device(model)
    with session_of(model, spread(LAYERS, 3)) as session:
        session.adopt()
        pretend_stats.set_memory_limit(pretend_stats.memory_allocated() + reference.cost.peak // 2)
        with pytest.raises(torch.OutOfMemoryError):
            forwards(model, reference.given, session)
        pretend_stats.set_memory_limit(None)
        assert torch.equal(forwards(model, reference.given, session)[-1].cpu(), reference.outputs[-1])


# ---------------------------------------------------------------------------------- what a shared memory would not show


def on_device(model: Model, session: SwapSession, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), session.forward():
        return model(x.to(DEVICE)).cpu()


def x_of() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(7))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": Block,
    "fp8": lambda: Block(dtype=torch.float8_e4m3fn),
    "packed": PackedBlock,
    "wrapper": ScaledBlock,
    "counting": Counting,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize("tier", [HostTier.PINNED, HostTier.PAGEABLE])
def test_every_kind_of_block_runs_and_comes_back_to_the_host(
    pretend_stats: PretendHpu, kind: str, count: int, tier: HostTier
) -> None:
    torch.manual_seed(0)
    model, x = Model([KINDS[kind]() for _ in range(4)]), x_of()
    torch.manual_seed(0)
    plain = Model([KINDS[kind]() for _ in range(4)])
    before = in_use(pretend_stats)
    with session_of(model, spread(4, count), tiers=tier) as session:
        for round_ in range(4):
            with torch.no_grad():
                assert torch.equal(on_device(model, session, x), plain(x))
            if round_ == 1:
                session.release()
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert in_use(pretend_stats) == before
    for name, tensor in model.state_dict().items():
        if kind != "wrapper" or "weight" not in name:
            assert torch.equal(tensor.float(), plain.state_dict()[name].float())


def test_empty_tensors_come_back_to_the_host_and_hold_no_device_memory(pretend_stats: PretendHpu) -> None:
    model = Model([Block() for _ in range(3)])
    model.blocks[1].register_buffer("empty", torch.empty(0, 4))
    model.blocks[2].none = nn.Parameter(torch.empty(0), requires_grad=False)
    before = in_use(pretend_stats)
    session = session_of(model, [True] * 3)
    on_device(model, session, x_of())
    session.close()
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert in_use(pretend_stats) == before


def test_block_id_is_read_on_the_host(pretend_stats: PretendHpu) -> None:
    model = Model([Block() for _ in range(3)])
    named = []
    for i, block in enumerate(model.blocks):
        block.register_buffer("block_id", torch.tensor(i))
        block.register_forward_pre_hook(lambda block, _: named.append("abc"[block.block_id]))
    with session_of(model, [True, False, True]) as session:
        on_device(model, session, x_of())
        pretend_stats.reset_copy_stats()
        with torch.no_grad(), session.forward():
            x = x_of().to(DEVICE)
            model(x)
        assert pretend_stats.copy_stats()["d2h_bytes"] == 0
    assert "".join(named) == "abcabc"


def test_inference_weights_run_on_the_device(pretend_stats: PretendHpu) -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        model, x = Model([Counting() for _ in range(4)]), x_of()
        torch.manual_seed(0)
        plain = Model([Counting() for _ in range(4)])
        with session_of(model, [True, False, True, False]) as session:
            for _ in range(3):
                assert torch.equal(on_device(model, session, x), plain(x))


def replaced_parameter(block: nn.Module) -> None:
    block.up = nn.Parameter(torch.randn(16, 16), requires_grad=False)


def replaced_fixed(block: nn.Module) -> None:
    block.weight = scaled(16, 16)


def moved_away(block: nn.Module) -> None:
    block.to("cpu")


def moved_here(block: nn.Module) -> None:
    block.up.data = block.up.data.to(DEVICE)


def cast(block: nn.Module) -> None:
    block.up.data = (block.up.data.cpu() * 2).to(torch.float64).to(torch.float32)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("change", [replaced_parameter, replaced_fixed, moved_away, moved_here, cast])
def test_a_tensor_replaced_or_moved_between_forwards_is_brought_to_the_device(
    pretend_stats: PretendHpu, change: Callable, at: int
) -> None:
    torch.manual_seed(0)
    model, x = Model([ScaledBlock() for _ in range(3)]), x_of()
    torch.manual_seed(0)
    plain = Model([ScaledBlock() for _ in range(3)])
    with session_of(model, [True, False, True]) as session, torch.no_grad():
        assert torch.equal(on_device(model, session, x), plain(x))
        for m in (model, plain):
            torch.manual_seed(5)
            change(m.blocks[at]) if m is model or change is not moved_here else None
        assert torch.equal(on_device(model, session, x), plain(x))


def replaced_small(block: nn.Module) -> None:
    block.scale = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)


def small_data(block: nn.Module) -> None:
    block.scale.data = torch.full((1,), 2.0)


def edited_small(block: nn.Module) -> None:
    block.scale.mul_(2)


@pytest.mark.parametrize("swapped", [[True] * 3, [False] * 3], ids=["swapped", "resident"])
@pytest.mark.parametrize("change", [replaced_parameter, replaced_small, small_data, edited_small, moved_away])
@torch.no_grad()
def test_a_change_in_the_first_forward_before_a_blocks_turn_is_seen_and_kept(
    pretend_stats: PretendHpu, change: Callable, swapped: list[bool]
) -> None:
    def changed(model: Model) -> None:
        torch.manual_seed(5)
        change(model.blocks[2])

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model([Block(16, 16) for _ in range(3)]))
    model, plain = models
    x = x_of()
    with session_of(model, swapped) as session:
        handles = [one.blocks[0].register_forward_pre_hook(lambda *_, one=one: changed(one)) for one in models]
        assert torch.equal(on_device(model, session, x), plain(x))
        for handle in handles:
            handle.remove()
        assert torch.equal(on_device(model, session, x), plain(x))
        session.release()
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
        assert torch.equal(on_device(model, session, x), plain(x))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("change", ["replaced", "new"])
def test_a_buffer_set_between_forwards_is_brought_to_the_device(
    pretend_stats: PretendHpu, change: str, at: int
) -> None:
    class Shifted(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(1) if change == "replaced" else None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if self.shift is None else super().forward(x) + self.shift

    torch.manual_seed(0)
    model, x = Model([Shifted() for _ in range(3)]), x_of()
    torch.manual_seed(0)
    plain = Model([Shifted() for _ in range(3)])
    with session_of(model, [True, False, True]) as session, torch.no_grad():
        assert torch.equal(on_device(model, session, x), plain(x))
        for m in (model, plain):
            m.blocks[at].shift = torch.ones(1)
        assert torch.equal(on_device(model, session, x), plain(x))


def test_memory_that_runs_out_for_a_tensor_that_cannot_be_re_pointed_is_a_clear_error(
    pretend_stats: PretendHpu,
) -> None:
    torch.manual_seed(0)
    model = Model([ScaledBlock() for _ in range(3)])
    model.blocks[2].weight = scaled(512, 16, kind=Opaque)
    session = session_of(model, [True] * 3)
    pretend_stats.set_memory_limit(pretend_stats.memory_allocated() + 4096)
    with pytest.raises(DeviceMemoryError, match="not enough VRAM on hpu:0 for"):
        session.adopt()
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_memory_used_by_wrapper_subclasses_stays_within_the_plan(pretend_stats: PretendHpu) -> None:
    torch.manual_seed(0)
    model = Model([ScaledBlock() for _ in range(3)])
    session = session_of(model, [True] * 3)
    with measured(pretend_stats) as cost:
        session.adopt()
    assert cost.peak <= session.plan.device_bytes
    session.close()


@pytest.mark.parametrize("name", ["hpu", "hpu:0"])
def test_weights_on_the_device_already_stay_there_without_a_copy(pretend_stats: PretendHpu, name: str) -> None:
    torch.manual_seed(0)
    model = Model([Block() for _ in range(3)]).to(DEVICE)
    backend = backend_for(torch.device(name), pin_budget=PinBudget(1 << 40))
    session = SwapSession(model.named, fixed_plan([False] * 3), backend)
    with measured(pretend_stats) as cost:
        session.adopt()
    assert cost.peak == 0
    assert cost.d2d_bytes == 0
    session.close()


def kind(weight: PackedParameter) -> tuple[type, str, torch.device]:
    return type(weight), weight.quant_type, weight.device


def test_packed_parameters_keep_class_and_attributes_on_the_device(pretend_stats: PretendHpu) -> None:
    model = Model([PackedBlock() for _ in range(3)])
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda b, _: seen.append((type(b.weight), b.weight.quant_type, b.weight.device))
        )
    with session_of(model, [True, False, True]) as session:
        on_device(model, session, x_of())
    assert seen == [(PackedParameter, "Q8", torch.device(DEVICE))] * 3


def test_the_plan_names_what_the_window_and_the_small_tensors_take(pretend_stats: PretendHpu) -> None:
    model = Model([Block() for _ in range(4)])
    session = session_of(model, [True] * 4, slots=2)
    before = in_use(pretend_stats)
    plan = session.adopt()
    assert pretend_stats.memory_allocated() - before == plan.device_bytes == 2 * plan.slot_bytes + device_bytes(4 * 256)
    session.close()
