"""The eight rules of order, the release, the prefetch and the wrap-around: each has a run here that fails without it.

`test_mutants.py` takes them out of the code one by one and sees these tests fail.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path

import pytest
import torch
from on_disk import stored
from torch.multiprocessing.reductions import StorageWeakRef
from toys import Block, Model, Simulation, fixed_plan, replan, toy, window_of
from wanvideo_enhanced_blockswap.blockswap import PinBudget
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.device.worker import ThreadWorker
from wanvideo_enhanced_blockswap.blockswap.engine import binding, transfer
from wanvideo_enhanced_blockswap.blockswap.engine.placer import Listeners
from wanvideo_enhanced_blockswap.blockswap.engine.residents import Residents
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.engine.trace import EVERY_FORWARD, Trace
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import TransferError
from wanvideo_enhanced_blockswap.blockswap.model.profile import profile_model
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import predict
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import Ring, VirtualTime, spread, steady_time
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, Timing
from wanvideo_enhanced_blockswap.blockswap.simulation.races import WORKER
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware
from wanvideo_enhanced_blockswap.blockswap.spans import COMPUTE, COPY, FORWARD, STALL, total_ms

LATENESS = [0.0, 1.0]


def run(simulation: Simulation, model: Model, planner, *orders) -> None:
    """Forwards through a session; outputs must be the unswapped model's."""
    x = torch.randn(2, 16)
    with torch.inference_mode():
        wanted = [model(x, order) for order in orders]
        with simulation.session(model, planner) as session:
            for order, want in zip(orders, wanted, strict=True):
                with session.forward():
                    assert torch.equal(model(x, order), want)


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_1_the_first_copy_waits_for_the_windows_allocation(lateness: float) -> None:
    run(Simulation(lateness=lateness), toy(3), fixed_plan([True] * 3), None)


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_1_the_copy_of_a_resident_waits_for_its_allocation(lateness: float) -> None:
    run(Simulation(lateness=lateness), toy(4), fixed_plan([False, True, False, False]), None)


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_3_a_resident_block_waits_for_its_copy(lateness: float) -> None:
    run(Simulation(lateness=lateness), toy(4), fixed_plan([False] * 4), None, None)


def test_release_stops_the_worker_that_places_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in a thread; what it copies after the release would go into memory that is given up."""
    model, begun, go, gather = toy(4), threading.Event(), threading.Event(), Residents._gather

    def held(residents: Residents, nbytes: int) -> object:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go.wait(30)
        return gather(residents, nbytes)

    over: list[bool] = []
    monkeypatch.setattr(Residents, "_gather", held)
    monkeypatch.setattr(Transfer, "free", lambda transfer, memory: over.append(go.is_set()))
    streams = InlineStreams(torch.device("cpu"))
    backend = Backend(streams.device, lambda *_: streams, None, PinBudget(0), lambda _: ThreadWorker())
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with SwapSession(model.named, fixed_plan([False] * 4), backend) as session:
        session.adopt(wait=False)
        assert begun.wait(30)
        threading.Timer(0.2, go.set).start()
        session.release()
        assert over
        assert all(over), "memory was given up before the worker was done with it"
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_placing_goes_on_while_the_first_blocks_run() -> None:
    simulation, model, placed = Simulation(lateness=1.0), toy(4), []
    listeners = Listeners(on_placed=lambda _, count, __: placed.append(count))
    with (
        torch.inference_mode(),
        simulation.session(model, fixed_plan([True] * 4), listeners=listeners) as session,
        session.forward(),
    ):
        assert placed == [0]
        model(torch.randn(2, 16), [0])
        assert placed == [0, 1]


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_2_a_copy_waits_for_the_block_that_last_read_its_slot(lateness: float) -> None:
    run(Simulation(lateness=lateness), toy(5), fixed_plan([True] * 5), None, None, None)


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_2_a_copy_waits_for_the_copies_of_a_block_that_was_passed_by(lateness: float) -> None:
    torch.manual_seed(0)
    # Blocks of different sizes are cut at different bytes: a chunk meets chunks of other streams in its slot.
    model = Model([Block(16, hidden) for hidden in (200, 600, 100, 400, 300, 150)])
    simulation = Simulation(lateness=lateness, streams=3)
    run(simulation, model, fixed_plan([True] * 6, streams=3), None, [0, 3, 5], [4], None)


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_3_a_block_waits_for_every_chunk_of_its_slot(lateness: float) -> None:
    torch.manual_seed(0)
    model = Model([Block(16, 400) for _ in range(4)])
    run(Simulation(lateness=lateness, streams=3), model, fixed_plan([True] * 4, streams=3), None, None)


@pytest.mark.parametrize("swapped", [[True] * 4, [True, False, True, True]])
def test_rule_3_a_new_compute_stream_waits_for_the_old_one(swapped: list[bool]) -> None:
    simulation, model = Simulation(lateness=0.0), toy(4)
    x = torch.randn(2, 16)
    with torch.inference_mode():
        want = model(x)
        with simulation.session(model, fixed_plan(swapped)) as session:
            for _ in range(3):
                with session.forward():
                    y = model(x, [0])
                    simulation.streams.use_another_compute_stream()
                    y = model(y, [1, 2])
                    simulation.streams.use_another_compute_stream()
                    y = model(y, [3])
                assert torch.equal(y, want)


def test_rule_3_a_new_compute_stream_waits_for_the_old_one_before_a_resident_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Residents and small tensors were copied to the device on the stream that was current at adopt."""
    simulation, model, waiting = Simulation(), toy(2), []
    wait = simulation.streams.wait
    monkeypatch.setattr(simulation.streams, "wait", lambda *waits: (waiting.append(waits[0]), wait(*waits))[1])
    with torch.inference_mode(), simulation.session(model, fixed_plan([False] * 2)) as session:
        session.adopt()
        waiting.clear()
        simulation.streams.use_another_compute_stream()
        with session.forward():
            model(torch.randn(2, 16), [0])
            assert waiting == [simulation.streams.compute_stream]


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_4_a_slot_is_free_only_when_the_next_block_begins(lateness: float) -> None:
    run(Simulation(lateness=lateness), toy(6), fixed_plan([True] * 6, slots=3), None, None)


def test_rule_4_a_slot_is_free_after_an_exception() -> None:
    simulation, model = Simulation(lateness=1.0), toy(4)
    x = torch.randn(2, 16)
    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 4)) as session:
        want = model(x)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), session.forward():
                model(x, [0, 1])[0, 0] / (1 // 0)
            with session.forward():
                assert torch.equal(model(x), want)


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_5_the_window_is_given_up_behind_the_prefetch_that_writes_it(lateness: float) -> None:
    simulation, model = Simulation(lateness=lateness), toy(4)
    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 4)) as session:
        with session.forward():
            model(torch.randn(2, 16))
        session.release()
        assert simulation.streams.allocated_bytes == 0


def test_rule_5_memory_goes_back_to_the_stream_it_was_allocated_on() -> None:
    simulation, model = Simulation(lateness=1.0), toy(4)
    with torch.inference_mode(), simulation.session(model, fixed_plan([True, False, True, True])) as session:
        session.adopt()
        simulation.streams.use_another_compute_stream()
        with session.forward():
            model(torch.randn(2, 16))
        session.release()


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_6_a_slab_is_unlocked_behind_the_host_wait_for_its_last_copy(lateness: float) -> None:
    """A release waits for the prefetch on the device only; the slabs are unlocked when their blocks become resident."""
    simulation, model = Simulation(lateness=lateness), toy(4)
    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 4)) as session:
        with session.forward():
            model(torch.randn(2, 16))
        replan(session, fixed_plan([False] * 4))
        assert simulation.registrar.locked == {}


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_6_a_slab_is_refilled_behind_the_host_wait_for_its_last_copy(lateness: float) -> None:
    simulation, model, x = Simulation(lateness=lateness), toy(4), torch.randn(2, 16)
    with simulation.session(model, fixed_plan([True] * 4)) as session, torch.no_grad():
        with session.forward():
            model(x)
        slabs = [block.up.data_ptr() for block in model.blocks]
        session.release()
        for block in model.blocks:
            block.up, block.down = (torch.nn.Parameter(p * 2, requires_grad=False) for p in (block.up, block.down))
        want = toy(4)
        for block in want.blocks:
            block.up.mul_(2), block.down.mul_(2)
        with session.forward():
            assert torch.equal(model(x), want(x))
        assert [block.up.data_ptr() for block in model.blocks] == slabs


@pytest.mark.parametrize("tier", [HostTier.PINNED, HostTier.STAGED])
@pytest.mark.parametrize("struck", range(1, 30))
def test_rule_6_a_slab_is_unlocked_behind_copies_that_were_struck_amid(
    tier: HostTier, struck: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception between two chunks leaves copies under way that no slab has recorded."""
    monkeypatch.setattr(transfer, "CHUNK_ALIGNMENT", 64)
    simulation, model = Simulation(lateness=1.0, streams=3), toy(4)
    left, copy = [struck], simulation.streams.copy

    def striking(*arguments: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise TransferError("struck")
        copy(*arguments)

    monkeypatch.setattr(simulation.streams, "copy", striking)
    planner = fixed_plan([True] * 4, tiers=tier, streams=3)
    with torch.inference_mode():
        with pytest.raises(TransferError, match="struck"):
            run(simulation, model, planner, None, None, None, None)
        assert simulation.registrar.locked == {}
        assert simulation.streams.allocated_bytes == 0
        run(simulation, model, planner, None)


@pytest.mark.parametrize("strike", [1, 2])
def test_rule_6_a_staging_slab_is_unlocked_behind_a_copy_that_was_struck_amid(strike: int) -> None:
    """An exception in the worker between a copy and its event leaves a copy that the staging slab has not recorded."""
    simulation, model = Simulation(lateness=1.0), toy(5)
    left, record = [strike], simulation.streams.record

    def striking(event: object, stream: object) -> None:
        if stream in simulation.streams.copy_streams and simulation.streams._actor == WORKER:
            left[0] -= 1
            if left[0] == 0:
                raise TransferError("struck")
        record(event, stream)

    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 5, tiers=HostTier.STAGED)) as session:
        with session.forward():
            model(torch.randn(2, 16))
        simulation.streams.record = striking
        session.release()
        assert left[0] <= 0
    assert simulation.registrar.locked == {}


@pytest.mark.parametrize("lateness", LATENESS)
def test_rule_7_the_worker_waits_for_the_last_copy_from_its_staging_slab(lateness: float) -> None:
    run(Simulation(lateness=lateness), toy(5), fixed_plan([True] * 5, slots=3, tiers=HostTier.STAGED), None, None)


@pytest.mark.parametrize("seed", range(8))
def test_rule_7_the_worker_waits_for_the_last_copy_before_it_reads_a_file(seed: int, tmp_path: Path) -> None:
    """Jobs that run early, and copies that land late: with four slots, both staging slabs are under way."""
    model = toy(6)
    stored(model, tmp_path / "weights.safetensors")
    run(Simulation(seed=seed), model, fixed_plan([True] * 6, slots=4, tiers=HostTier.FILE), None, None, None)


def test_rule_7_a_block_waits_until_the_worker_has_recorded() -> None:
    run(Simulation(lateness=1.0), toy(5), fixed_plan([True] * 5, tiers=HostTier.STAGED), None, None)


def test_rule_8_calls_run_with_the_windows_device_current() -> None:
    run(Simulation(streams=2), toy(4), fixed_plan([True] * 4, streams=2), None, [0, 2], None)


def test_rule_7_the_window_goes_only_when_the_worker_is_done() -> None:
    simulation, model = Simulation(lateness=1.0), toy(5)
    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 5, tiers=HostTier.STAGED)) as session:
        with session.forward():
            model(torch.randn(2, 16))
        session.release()


def test_rule_7_two_staging_slabs_are_used_in_turn() -> None:
    simulation, model = Simulation(lateness=0.0), toy(5)
    sources = []
    copy = simulation.streams.host_copy
    simulation.streams.host_copy = lambda target, source: (sources.append(target.data_ptr()), copy(target, source))
    run(simulation, model, fixed_plan([True] * 5, tiers=HostTier.STAGED), None)
    assert len(set(sources)) == 2
    assert all(one != other for one, other in itertools.pairwise(sources))


def test_release_orders_a_changed_buffer_behind_the_kernels_that_changed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small buffer is copied back on the compute stream: a new one must have waited for the old one by then."""
    simulation, model, seen = Simulation(), toy(3), []
    write_back, wait = binding.TensorBinding.write_back, simulation.streams.wait
    copied_back = lambda bound: (seen.append("copied back"), write_back(bound))[1]  # noqa: E731
    monkeypatch.setattr(binding.TensorBinding, "write_back", copied_back)
    monkeypatch.setattr(simulation.streams, "wait", lambda *waits: (seen.append("waited"), wait(*waits))[1])
    with torch.inference_mode(), simulation.session(model, fixed_plan([False] * 3)) as session:
        with session.forward():
            model(torch.randn(2, 16))
        simulation.streams.use_another_compute_stream()
        seen.clear()
        session.release()
    assert seen[:2] == ["waited", "copied back"]


@torch.inference_mode()
def test_device_memory_is_free_at_release_in_every_tier() -> None:
    """With the real worker: work that is done must not keep the slot it filled."""
    for tier in HostTier:
        simulation, model = Simulation(lateness=0.0), toy(4)
        backend = dataclasses.replace(simulation.backend, make_worker=lambda _: ThreadWorker())
        # The simulation has one acting thread: the worker's own clock is not its subject here.
        streams = InlineStreams(torch.device("cpu"))
        backend = dataclasses.replace(backend, open_streams=lambda count, overlap, streams=streams: streams)
        with SwapSession(model.named, fixed_plan([True] * 4, tiers=tier), backend) as session:
            with session.forward():
                model(torch.randn(2, 16))
            window = [StorageWeakRef(memory.untyped_storage()) for memory in window_of(session)]
            assert len(window) == 2
            session.release()
            assert all(memory.expired() for memory in window), tier


@pytest.mark.parametrize("tier", [HostTier.PINNED, HostTier.STAGED])
def test_release_shows_every_parameter_its_master_between_forwards(tier: HostTier) -> None:
    simulation, model = Simulation(), toy(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 4, tiers=tier)) as session:
        window = [range(0)]
        for _ in range(2):
            with session.forward():
                model(torch.randn(2, 16))
            window = [range(m.data_ptr(), m.data_ptr() + m.nbytes) for m in window_of(session)]
            assert len(window) == 2
            assert not any(p.data_ptr() in slot for p in model.parameters() for slot in window)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def timed(model: Model, planner, *, compute_ms: float, copy_ms: float, forwards: int = 4) -> Trace:
    """A run in virtual time in which each block computes and copies for so long; the trace of the last forward."""
    slab = 2 * 16 * 24 * 4
    hardware = SimulatedHardware(link_bytes_per_ms=slab / copy_ms, default_compute_ms=compute_ms)
    simulation = Simulation(hardware=hardware)
    with torch.inference_mode(), simulation.session(model, planner, traced=EVERY_FORWARD) as session:
        session.adopt()
        for _ in range(forwards):
            session.trace.start()
            with session.forward():
                model(torch.randn(2, 16))
        return session.trace


def test_prefetch_copies_a_block_while_the_one_before_computes() -> None:
    spans = timed(toy(6), fixed_plan([True] * 6), compute_ms=2.0, copy_ms=1.5).spans()
    compute = {span.block: span for span in spans if span.lane == COMPUTE}
    copies = {span.block: span for span in spans if span.lane.startswith(COPY)}
    for block in range(2, 6):
        assert copies[block].begin_ms < compute[block - 1].end_ms
        assert copies[block].end_ms <= compute[block].begin_ms
    assert total_ms(spans, STALL) == 0


def test_wrap_around_copies_the_next_forwards_first_blocks_before_it_begins() -> None:
    spans = timed(toy(6), fixed_plan([True] * 6), compute_ms=2.0, copy_ms=1.5).spans()
    end = max(span.end_ms for span in spans if span.lane == COMPUTE)
    behind = [span.block for span in spans if span.lane.startswith(COPY) and span.end_ms > end - 2.0]
    assert behind == [0, 1]


def test_compute_and_copies_in_virtual_time_take_what_the_schedule_says() -> None:
    for swapped, ratio in ((8, 0.5), (6, 1.25), (4, 3.0)):
        flags = spread(8, swapped)
        spans = timed(toy(8), fixed_plan(flags), compute_ms=1.0, copy_ms=ratio, forwards=12).spans()
        time = VirtualTime(Ring(flags, slots=2), compute=[1.0] * 8, transfer=[ratio] * 8)
        predicted = steady_time(time, [range(8)])
        assert total_ms(spans, STALL) == pytest.approx(predicted.stall)
        assert total_ms(spans, COMPUTE) == pytest.approx(predicted.compute)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize(("compute_ms", "copy_ms"), [(50.0, 30.0), (50.0, 50.0), (30.0, 50.0)])
def test_pageable_copies_overlap_compute_as_predicted(compute_ms: float, copy_ms: float, slots: int) -> None:
    planner = fixed_plan([True] * 8, slots=slots, tiers=HostTier.PAGEABLE)
    spans = timed(toy(8), planner, compute_ms=compute_ms, copy_ms=copy_ms, forwards=12).spans()
    (forward,) = (span.duration_ms for span in spans if span.lane == FORWARD)
    assert forward <= 1.1 * 8 * max(compute_ms, copy_ms)
    profile = profile_model(toy(8).named).profile
    timing = Timing(pageable_bytes_per_s=profile.blocks[0].slab_bytes / copy_ms * 1e3, compute_ms=(compute_ms,) * 8)
    predicted = predict(profile, [True] * 8, slots, [HostTier.PAGEABLE] * 8, timing, overlap=True)
    assert predicted is not None
    assert forward == pytest.approx(predicted.elapsed)


def test_a_violation_names_both_accesses() -> None:
    simulation, model = Simulation(lateness=0.0), toy(3)
    with torch.inference_mode(), simulation.session(model, fixed_plan([True] * 3)) as session:
        session.adopt()
        slot = window_of(session)[0]
        with (
            simulation.streams.guard(),
            pytest.raises(TransferError, match=r"read of .* on compute .* write of .* on copy 0"),
        ):
            simulation.streams.reads(slot, slot.nbytes, simulation.streams.current())
