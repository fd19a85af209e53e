"""A forward's memory is known before it is needed: the peak of a block on fake tensors corrects the plan."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from pretend_accelerator import PretendHpu
from run_bench import BLOCK, COUNT, SMALL_VIDEO, Bench, X
from torch import nn
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError
from wanvideo_enhanced_blockswap.blockswap.model import fake_run
from wanvideo_enhanced_blockswap.blockswap.model.fake_run import peak_bytes
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run import foresight
from wanvideo_enhanced_blockswap.blockswap.run.history import Workload

WIDTH, TOKENS = 256, 300


class WanLike(nn.Module):
    """Modulation, norms, attention without a kernel, a chunked and a whole feed-forward, views and in-place sums."""

    def __init__(self, *, chunks: int = 1) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.last = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.chunks = chunks

    def forward(self, x: torch.Tensor, *, timestep: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        shift, scale, gate, *_ = (self.modulation + timestep).chunk(6, dim=1)
        normed = self.norm(x) * (1 + scale) + shift
        query = self.query(normed).unflatten(-1, (4, -1)).transpose(1, 2)
        value = self.value(normed).unflatten(-1, (4, -1)).transpose(1, 2)
        found = (query.softmax(-1) * value).transpose(1, 2).flatten(2)
        x = x + found * gate
        x += others[0]
        hidden = [
            self.last(nn.functional.gelu(self.first(part))) for part in (x * self.scale).chunk(self.chunks, dim=1)
        ]
        return x + torch.cat(hidden, dim=1)


def arguments(device: torch.device) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    x = torch.randn(1, TOKENS, WIDTH, device=device)
    return (x,), {"timestep": torch.randn(1, 6, WIDTH, device=device), "others": [torch.randn_like(x)]}


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("weights_are_on_the_device", [True, False])
def test_the_peak_on_fake_tensors_is_that_of_the_forward(
    pretend_stats: PretendHpu, *, chunks: int, weights_are_on_the_device: bool
) -> None:
    device = torch.device("hpu:0")
    block = WanLike(chunks=chunks).requires_grad_(requires_grad=False)
    if weights_are_on_the_device:
        block.to(device)
    given, named = arguments(device)
    pointers = [one.data_ptr() for one in (*block.parameters(), *block.buffers())]
    before = torch.hpu.memory_allocated()
    foreseen = peak_bytes(block, given, named, device)
    assert torch.hpu.memory_allocated() == before
    assert [one.data_ptr() for one in (*block.parameters(), *block.buffers())] == pointers
    block.to(device)
    before = torch.hpu.memory_allocated()
    torch.hpu.reset_peak_memory_stats()
    with torch.inference_mode():
        block(*given, **named)
    assert foreseen == torch.hpu.max_memory_allocated() - before


class Reading(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()


class Odd(nn.Parameter):
    """A class of its own."""


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Odd(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight.sum()


class Kernel(nn.Module):
    """Calls code that torch does not know with the address of what `tensor_of` gives."""

    addresses: ClassVar[list[int]] = []

    def __init__(self, tensor_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.tensor_of = tensor_of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.addresses.append(self.tensor_of(x).data_ptr())
        return x


KERNELS = (lambda x: x, lambda x: x[1:], lambda x: x + x, torch.empty_like, lambda x: (x + x).view(2, 2))


@pytest.mark.parametrize("tensor_of", KERNELS)
def test_no_code_that_torch_does_not_know_gets_the_address_of_a_fake_tensor(
    tensor_of: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    assert peak_bytes(Kernel(tensor_of), (torch.randn(4),), {}, torch.device("cpu")) is None
    assert Kernel.addresses == []


def test_a_torch_that_cannot_refuse_addresses_foresees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_run, "_REFUSE_POINTER", None)
    assert peak_bytes(nn.Linear(4, 4), (torch.randn(1, 4),), {}, torch.device("cpu")) is None


@pytest.mark.parametrize("block", [Reading(), Packed()], ids=lambda block: type(block).__name__)
def test_a_block_that_cannot_run_on_fake_tensors_has_no_peak(block: nn.Module) -> None:
    assert peak_bytes(block, (torch.randn(4),), {}, torch.device("cpu")) is None


def test_a_compiled_block_has_no_peak() -> None:
    block = nn.Linear(4, 4)
    assert peak_bytes(block, (torch.randn(1, 4),), {}, torch.device("cpu")) is not None
    compiled = nn.Linear(4, 4)
    object.__setattr__(compiled, "_orig_mod", block)  # as torch.compile does
    assert peak_bytes(compiled, (torch.randn(1, 4),), {}, torch.device("cpu")) is None


def test_a_block_compiled_in_place_has_no_peak() -> None:
    parts = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parts[1]._compiled_call_impl = parts[1]._call_impl  # as nn.Module.compile does
    assert peak_bytes(parts, (torch.randn(1, 4),), {}, torch.device("cpu")) is None


class Slotted:
    __slots__ = ("known", "late")

    def __init__(self) -> None:
        self.known: torch.Tensor | None = None


class Keeping(nn.Module):
    """Keeps what it computes wherever code of packs keeps such: a forward that meets a fake tensor there fails."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.cache: torch.Tensor | None = None
        self.by_name: dict[str, torch.Tensor] = {"x": torch.ones(4)}
        self.lists: list[list[torch.Tensor]] = [[]]
        self.calls, self.fails = 0, fails
        self.other = SimpleNamespace(found=None)
        self.slotted, self.plain = Slotted(), torch.ones(4)
        self.inner.forward = self.called  # type: ignore[method-assign]

    def called(self, x: torch.Tensor) -> torch.Tensor:
        self.by_name["inner"] = self.by_name.get("inner", x) + 1
        return nn.functional.linear(x, self.inner.weight, self.inner.bias) + self.by_name["inner"]

    def forward(self, x: torch.Tensor, state: Any, shared: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        self.cache = x + 1 if self.cache is None else self.cache + x
        self.by_name["x"] = self.by_name["x"] + x
        self.by_name["new"] = self.by_name.get("new", x) + x
        self.lists[0].append(x * 2)
        self.other.found = x + 3
        state.last = shared["last"] = self.cache
        self.register_buffer("late", x.clone())
        self.slotted.known = self.slotted.late = x + 4
        self.plain.data = x + 7
        x += self.inner(x)
        if self.fails:
            raise ValueError("a fake run may fail half way")
        return x + sum(self.lists[0])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_a_run_on_fake_tensors_leaves_nothing_behind(*, fails: bool, inference: bool) -> None:
    with torch.inference_mode(inference):
        block, untouched = Keeping(fails=fails), Keeping(fails=False)
        untouched.load_state_dict(block.state_dict())
        x, state, shared = torch.randn(4), SimpleNamespace(), {"first": torch.zeros(1)}
        given, drawn = x.clone(), torch.get_rng_state()
        found = peak_bytes(block, (x,), {"state": state, "shared": shared}, torch.device("cpu"))
        assert (found is None) == fails
        assert block.calls == 0
        assert block.cache is block.other.found is None
        assert list(block.by_name) == ["x"]
        assert block.lists == [[]]
        assert block.slotted.known is None
        assert not hasattr(block.slotted, "late")
        assert torch.equal(block.plain, torch.ones(4))
        assert [name for name, _ in block.named_buffers()] == []
        assert not vars(state)
        assert list(shared) == ["first"]
        assert torch.equal(x, given)
        assert torch.equal(torch.get_rng_state(), drawn)
        block.fails = False
        with torch.no_grad():
            wanted = untouched(given, SimpleNamespace(), {})
            assert torch.equal(block(x, state, shared), wanted)
            assert type(state.last) is torch.Tensor


def test_hooks_are_not_called_on_fake_tensors_and_stay() -> None:
    called: list[nn.Module] = []
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handles = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in block.modules()]
    handles += [module.register_forward_hook(lambda module, *_: called.append(module)) for module in block.modules()]
    x = torch.randn(1, 4)
    assert peak_bytes(block, (x,), {}, torch.device("cpu")) is not None
    assert called == []
    block(x)
    assert len(called) == len(handles)
    for handle in handles:
        handle.remove()
    block(x)
    assert len(called) == len(handles)


def test_a_block_of_which_a_pack_has_replaced_the_forward_has_no_peak() -> None:
    """The function may keep tensors where a copy of the block does not reach."""
    block, kept = nn.Sequential(nn.Linear(4, 4)), []
    block[0].forward = lambda x: kept.append(x) or x  # type: ignore[method-assign, func-returns-value]
    assert peak_bytes(block, (torch.randn(1, 4),), {}, torch.device("cpu")) is None
    assert kept == []


class Indexing(nn.Module):
    """Takes its hint by the value of a buffer, as the blocks of the wrapper's VACE models do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("block_id", torch.tensor(1))

    def forward(self, x: torch.Tensor, hints: list[torch.Tensor]) -> torch.Tensor:
        return x.add_(hints[self.block_id], alpha=0.5) + 1


@pytest.mark.parametrize("inference", [False, True])
def test_a_block_that_takes_its_hint_by_a_buffers_value_has_a_peak(*, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.randn(1000)
        assert peak_bytes(Indexing(), (x,), {"hints": [x[:10], x.clone()]}, torch.device("cpu")) == 4096


def test_attention_is_counted_as_cudas_flash_kernel_allocates_it() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.empty(1, 40, 1000, 128, dtype=torch.bfloat16)
    output, logsumexp = x.numel() * 2, 40 * 1000 * 4
    foreseen = peak_bytes(Attention(), (x,), {}, torch.device("cpu"))
    assert foreseen is not None
    assert output + logsumexp <= foreseen < output + logsumexp + 1024


# ------------------------------------------------------------------------------------------------- in a run

ROOM = 6
"""Blocks that the bench's card holds under the ceiling, which is half of the card."""


def expecting(blocks: float) -> Workload:
    return Workload(tokens=100, expected_activation_bytes=int(blocks * BLOCK))


def foreseen(monkeypatch: pytest.MonkeyPatch, blocks: float | None) -> list[nn.Module]:
    """Lets each peak on fake tensors be that of so many blocks' weights; returns the blocks that were asked about."""
    asked: list[nn.Module] = []

    def found(block: nn.Module, *_: object) -> int | None:
        asked.append(block)
        return None if blocks is None else int(blocks * BLOCK)

    monkeypatch.setattr(foresight, "peak_bytes", found)
    return asked


def test_a_plan_that_is_too_large_is_corrected_before_the_first_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, bench = foreseen(monkeypatch, 8), Bench(ROOM)
    bench.run.prepare(expecting(5))
    before = bench.swapped
    bench.machine.activation_bytes = 8 * BLOCK
    bench.forward(expecting(5))
    assert asked == [bench.model.named[0][1]]
    assert bench.swapped > before
    assert bench.run.session.adoptions == 2
    assert bench.run.plan is not None
    assert bench.run.plan.device_bytes + 8 * BLOCK <= bench.machine.total_bytes
    assert bench.run.planner.history.of(expecting(5)).activation_bytes == 8 * BLOCK
    bench.forward(expecting(5), times=3)
    assert len(asked) == 1, "the peak is known now"
    assert bench.run.session.adoptions == 2


def test_a_block_under_the_hooks_of_a_run_has_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int | None] = []
    monkeypatch.setattr(foresight, "peak_bytes", lambda *of: found.append(peak_bytes(*of)) or found[-1])
    bench = Bench(ROOM)
    bench.forward(expecting(5), times=2)
    assert len(found) == 1
    assert found[0] is not None
    assert 0 < found[0] < BLOCK
    assert bench.run.session.adoptions == 1


def test_a_plan_that_leaves_much_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, bench = foreseen(monkeypatch, 8), Bench(ROOM)
    bench.forward(expecting(0.5))
    assert asked == []
    assert bench.run.session.adoptions == 1


@pytest.mark.parametrize("blocks", [None, 1, 5])
def test_a_plan_is_kept_where_the_peak_is_unknown_or_not_higher(
    monkeypatch: pytest.MonkeyPatch, blocks: float | None
) -> None:
    asked, bench = foreseen(monkeypatch, blocks), Bench(ROOM)
    bench.forward(expecting(5))
    assert len(asked) == 1
    assert bench.run.session.adoptions == 1
    activations = bench.run.planner.history.activations(expecting(5))
    assert activations is not None
    assert (activations.nbytes, activations.is_measured) == (0, True)
    assert bench.run.planner.history.of(expecting(5)).foreseen_bytes is None


def test_a_first_block_that_needs_less_than_a_later_one_does_not_lower_the_expectation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreseen(monkeypatch, 1)
    bench = Bench(ROOM)
    bench.forward(expecting(5))
    history = bench.run.planner.history
    history.of(expecting(5)).activation_bytes = None  # as after memory has run out
    activations = history.activations(expecting(5))
    assert activations is not None
    assert activations.nbytes == 5 * BLOCK


@pytest.mark.parametrize("blocks", [None, 1])
def test_a_workload_is_run_on_fake_tensors_once_where_its_peak_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, blocks: float | None
) -> None:
    asked, bench = foreseen(monkeypatch, blocks), Bench(ROOM)
    bench.machine.can_reset = False
    bench.machine._peak = 1 << 40
    bench.forward(expecting(5), times=3)
    assert bench.run.planner.history.of(expecting(5)).activation_bytes is None
    assert len(asked) == 1
    bench.forward(expecting(5.5))
    assert len(asked) == 2


def test_memory_that_runs_out_while_a_plan_is_corrected_makes_the_next_plan_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreseen(monkeypatch, 8)
    bench = Bench(ROOM)
    bench.run.prepare(expecting(5))
    before, adopt = bench.swapped, bench.run.session.adopt

    def refuse(*, wait: bool = True) -> SwapPlan:
        monkeypatch.setattr(bench.run.session, "adopt", adopt)
        raise DeviceMemoryError("out of memory")

    monkeypatch.setattr(bench.run.session, "adopt", refuse)
    with pytest.raises(DeviceMemoryError), torch.inference_mode(), bench.run.forward(expecting(5)):
        bench.model(X)
    assert bench.run.planner.next_plan is None
    assert all(not block._forward_pre_hooks for _, block in bench.model.named)
    bench.run.shrink("out of memory")
    bench.forward(expecting(5), times=2)
    assert bench.swapped > before


def test_an_interrupt_while_a_block_runs_on_fake_tensors_ends_the_forward_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(foresight, "peak_bytes", interrupted)
    bench = Bench(ROOM)
    with pytest.raises(KeyboardInterrupt), torch.inference_mode(), bench.run.forward(expecting(5)):
        bench.model(X)
    assert all(not block._forward_pre_hooks for _, block in bench.model.named)
    bench.run.release()
    bench.forward(expecting(5), times=2)


def test_a_forward_that_fits_in_no_plan_is_tried_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    foreseen(monkeypatch, 40)
    bench = Bench(ROOM)
    bench.forward(expecting(5))
    assert bench.run.session.adoptions <= 2


def test_without_an_expectation_or_with_manual_tuning_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, bench = foreseen(monkeypatch, 8), Bench(ROOM)
    bench.forward(SMALL_VIDEO)
    assert asked == []
    assert len(bench.model.named) == COUNT


def test_hooks_for_the_first_block_are_gone_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    foreseen(monkeypatch, 1)
    bench = Bench(ROOM)
    bench.forward(expecting(5))
    assert all(not block._forward_pre_hooks for _, block in bench.model.named)
