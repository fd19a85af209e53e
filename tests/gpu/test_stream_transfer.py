"""StreamTransfer on a real CUDA or ROCm device: order, overlap, memory, page-locking."""

from __future__ import annotations

import mmap
import time
import warnings
from pathlib import Path

import pytest
import torch
from copies_seen import assert_placed_in_few_copies_of_our_memory
from on_disk import stored
from toys import Block, Model, alternating, fixed_plan
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.engine.trace import EVERY_FORWARD
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import predict
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import spread
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, Timing
from wanvideo_enhanced_blockswap.blockswap.spans import COMPUTE, COPY, total_ms
from wanvideo_enhanced_blockswap.hardware.pinning import CudaRegistrar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

WIDTH, HIDDEN, BLOCKS = 1024, 8192, 8
SPIN_CYCLES = 20_000_000


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def large_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model([Block(WIDTH, HIDDEN) for _ in range(BLOCKS)])


def session_of(model: Model, planner, device: torch.device, **options: bool) -> SwapSession:
    return SwapSession(model.named, planner, backend_for(device, pin_budget=PinBudget(1 << 40)), **options)


def unswapped(model: Model, x: torch.Tensor) -> torch.Tensor:
    model.to(x.device)
    y = model(x)
    model.to("cpu")
    return y


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("tier", list(HostTier))
@pytest.mark.parametrize("slots", [1, 2, 3])
@torch.inference_mode()
def test_outputs_equal_the_unswapped_model(device: torch.device, streams: int, tier: HostTier, slots: int) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    want = unswapped(model, x)
    planner = fixed_plan([True] * BLOCKS, slots=slots, tiers=tier, streams=streams)
    with session_of(model, planner, device) as session:
        for _ in range(5):
            with session.forward():
                assert torch.equal(model(x), want)


@pytest.mark.parametrize("tier", list(HostTier))
@pytest.mark.parametrize("swapped", [0, BLOCKS // 2, BLOCKS])
def test_every_copy_of_a_weight_reads_memory_of_ours_and_each_block_is_copied_once(
    device: torch.device, tier: HostTier, swapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = fixed_plan(spread(BLOCKS, swapped), tiers=tier, streams=2)
    with session_of(large_model(), planner, device) as session:
        assert_placed_in_few_copies_of_our_memory(session, monkeypatch)


@torch.inference_mode()
def test_outputs_are_right_when_compute_lags_far_behind_the_host(device: torch.device) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    want = unswapped(model, x)
    with session_of(model, fixed_plan([True] * BLOCKS, streams=2), device) as session:
        outputs = []
        for _ in range(3):
            with session.forward():
                y = x
                for block in model.blocks:
                    torch.cuda._sleep(SPIN_CYCLES)
                    y = block(y)
                outputs.append(y)
        assert all(torch.equal(y, want) for y in outputs)


@torch.inference_mode()
def test_outputs_are_right_when_copies_lag_far_behind_compute(device: torch.device) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    want = unswapped(model, x)
    with session_of(model, fixed_plan([True] * BLOCKS, streams=2), device) as session:
        session.adopt()
        for _ in range(3):
            with session.forward():
                for copies in session._holds.transfer.streams.copy_streams:
                    with torch.cuda.stream(copies):
                        torch.cuda._sleep(SPIN_CYCLES)
                y = model(x)
            assert torch.equal(y, want)


@torch.inference_mode()
def test_a_compute_stream_changed_amid_a_forward_keeps_order(device: torch.device) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    want = unswapped(model, x)
    other = torch.cuda.Stream(device)
    with session_of(model, fixed_plan([True] * BLOCKS), device) as session:
        for _ in range(3):
            with session.forward():
                y = model(x, range(4))
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    y = model(y, range(4, BLOCKS))
                torch.cuda.current_stream().wait_stream(other)
            assert torch.equal(y, want)


def typical_ms(run, repeats: int = 5) -> float:
    """Median wall time of `run` until the device is done, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times[1:])[repeats // 2]


def forward_ms(model: Model, x: torch.Tensor, planner, *, spin: int) -> float:
    """Median time of a forward in which the device spins for so many cycles behind each block."""

    def forward() -> None:
        with session.forward():
            y = x
            for block in model.blocks:
                y = block(y)
                torch.cuda._sleep(spin)

    with session_of(model, planner, x.device) as session:
        return typical_ms(forward)


@torch.inference_mode()
def test_copies_overlap_compute(device: torch.device) -> None:
    """With compute as long as the copies, a forward takes clearly less than both one behind the other."""
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    cycles_per_ms = SPIN_CYCLES / typical_ms(lambda: torch.cuda._sleep(SPIN_CYCLES))
    overlapping, taking_turns = (fixed_plan([True] * BLOCKS, overlap=overlap) for overlap in (True, False))
    copies_ms = forward_ms(model, x, taking_turns, spin=1)
    spin = int(copies_ms / BLOCKS * cycles_per_ms)
    assert forward_ms(model, x, overlapping, spin=spin) < 0.8 * forward_ms(model, x, taking_turns, spin=spin)


@pytest.mark.parametrize("tier", list(HostTier))
@torch.inference_mode()
def test_copies_shorter_than_compute_overlap_it_from_every_tier_as_predicted(
    device: torch.device, tier: HostTier, tmp_path: Path
) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    if tier is HostTier.FILE:
        stored(model, tmp_path / "weights.safetensors")
    cycles_per_ms = SPIN_CYCLES / typical_ms(lambda: torch.cuda._sleep(SPIN_CYCLES))
    every = [True] * BLOCKS
    copies_ms = forward_ms(model, x, fixed_plan(every, tiers=tier, overlap=False), spin=1)
    spin = int(5 / 3 * copies_ms / BLOCKS * cycles_per_ms)  # as 50 ms of compute beside 30 ms of copies
    compute_ms = forward_ms(model, x, fixed_plan([False] * BLOCKS), spin=spin)
    # The best of a few: other programs only add time, and without overlap each takes 1.6 times as long.
    overlapped_ms = min(forward_ms(model, x, fixed_plan(every, tiers=tier), spin=spin) for _ in range(5))
    assert overlapped_ms <= 1.1 * max(compute_ms, copies_ms)
    profile = profile_model(model.named).profile
    speed = profile.blocks[0].slab_bytes / (copies_ms / BLOCKS) * 1e3
    timing = Timing(
        compute_ms=(compute_ms / BLOCKS,) * BLOCKS,
        pinned_bytes_per_s=speed,
        pageable_bytes_per_s=speed,
        host_copy_bytes_per_s=speed,
        file_bytes_per_s=speed,
    )
    predicted = predict(profile, every, 2, [tier] * BLOCKS, timing, overlap=True)
    assert predicted is not None
    assert predicted.elapsed == pytest.approx(max(compute_ms, copies_ms), rel=0.01)


@torch.inference_mode()
def test_the_trace_shows_copies_beside_compute(device: torch.device) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    with session_of(model, fixed_plan([True] * BLOCKS), device, traced=EVERY_FORWARD) as session:
        for _ in range(2):
            with session.forward():
                model(x)
        spans = session.trace.spans()
    assert total_ms(spans, COMPUTE) > 0
    assert sum(span.duration_ms for span in spans if span.lane.startswith(COPY)) > 0


@pytest.mark.parametrize("streams", [1, 4])
@torch.inference_mode()
def test_in_steady_state_nothing_is_allocated_and_the_host_waits_for_nothing(
    device: torch.device, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large_model()
    with session_of(model, fixed_plan([True] * BLOCKS, streams=streams), device) as session:

        def enter_all() -> None:
            with session.forward():
                for block in range(BLOCKS):
                    session.enter(block)

        for _ in range(2):
            enter_all()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        try:
            monkeypatch.setattr(torch.cuda.Event, "synchronize", None)  # every call fails
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns once that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(5):
                enter_all()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            monkeypatch.undo()
        assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


@torch.inference_mode()
def test_memory_never_exceeds_the_plan_however_far_the_host_runs_ahead(device: torch.device) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    unswapped(model, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    with session_of(model, fixed_plan(alternating(BLOCKS), slots=2, streams=2), device) as session:
        plan = session.adopt()
        assert torch.cuda.memory_allocated(device) - before <= plan.device_bytes
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(10):
            torch.cuda._sleep(SPIN_CYCLES)
            with session.forward():
                model(x)
        activations = 16 * x.shape[0] * HIDDEN * 4
        assert torch.cuda.max_memory_allocated(device) - held <= activations
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(device) - before <= activations


@torch.inference_mode()
def test_slabs_are_page_locked_while_the_session_lives_and_not_after(device: torch.device) -> None:
    model, x = large_model(), torch.randn(4, WIDTH, device=device)
    session = session_of(model, fixed_plan([True] * BLOCKS), device)
    with session:
        with session.forward():
            model(x)
        assert all(block.up.is_pinned() for block in model.blocks)
        assert session.pinned_bytes == session.slab_bytes
    assert not any(block.up.is_pinned() for block in model.blocks)
    assert session.pinned_bytes == 0


def test_a_refused_pin_leaves_no_pending_error_behind(device: torch.device) -> None:
    registrar = CudaRegistrar(device)
    assert registrar.register(mmap.PAGESIZE, mmap.PAGESIZE) != 0
    registrar.consume_error()
    assert torch.ones(2, device=device).sum().item() == 2
    torch.cuda.synchronize(device)
