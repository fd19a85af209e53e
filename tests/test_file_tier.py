"""Blocks that are read from their file: right bytes in every forward, and none of a file that has changed."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_disk import mapped, stored
from toys import Block, Model, Simulation, alternating, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap import PinBudget, backend_for
from wanvideo_enhanced_blockswap.blockswap.device import worker
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.blockswap.device.worker import ThreadWorker
from wanvideo_enhanced_blockswap.blockswap.engine import residents
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import WeightFileError
from wanvideo_enhanced_blockswap.blockswap.host import slabs, staging
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.host.store import HostStore
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar

COUNT = 6
FILE, PINNED, STAGED, PAGEABLE = HostTier.FILE, HostTier.PINNED, HostTier.STAGED, HostTier.PAGEABLE
MIXED = [PINNED, FILE, STAGED, FILE, PAGEABLE, FILE]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def outputs(session: SwapSession, model: Model, forwards: int = 3) -> list[torch.Tensor]:
    found = []
    for seed in range(forwards):
        with torch.inference_mode(), session.forward():
            found.append(model(x_of(seed)))
    return found


def x_of(seed: int) -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))


def truth_of(model: Model, forwards: int = 3) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(x_of(seed)) for seed in range(forwards)]


def threaded() -> Backend:
    """A device whose worker is a thread."""
    streams = InlineStreams(torch.device("cpu"))
    return Backend(streams.device, lambda *_: streams, None, PinBudget(0), lambda _: ThreadWorker())


@pytest.mark.parametrize("swapped", [[True] * COUNT, alternating(COUNT)], ids=["all", "half"])
@pytest.mark.parametrize("tiers", [FILE, MIXED], ids=["file", "mixed"])
@pytest.mark.parametrize("lateness", [0.0, 0.5, 1.0])
def test_outputs_equal_the_unswapped_model(path: Path, swapped: list[bool], tiers, lateness: float) -> None:
    model = toy(COUNT)
    truth = truth_of(model)
    stored(model, path)
    simulation = Simulation(lateness=lateness)
    with simulation.session(model, fixed_plan(swapped, tiers=tiers)) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        in_file = [block for block, tier in session.tiers.items() if tier is FILE]
        assert in_file == [i for i in range(COUNT) if swapped[i] and (tiers is FILE or tiers[i] is FILE)]
        assert all(session._holds.slabs[block].pages is None for block in in_file)
        session.release()
        assert all(map(torch.equal, outputs(session, model), truth))
    assert all(map(torch.equal, truth_of(model), truth))


@pytest.mark.parametrize("backend", [threaded(), backend_for(torch.device("cpu"), pin_budget=PinBudget(0))])
def test_a_worker_in_a_thread_and_a_host_thread_alone_read_the_same(path: Path, backend: Backend) -> None:
    model = toy(COUNT)
    truth = truth_of(model)
    stored(model, path)
    with SwapSession(model.named, fixed_plan([True] * COUNT, tiers=FILE, overlap=backend.overlap), backend) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        assert session.slab_bytes == 0


@pytest.mark.parametrize("tier", [FILE, PINNED])
def test_the_masters_of_the_file_tier_are_the_loaders_mapping(path: Path, tier: HostTier) -> None:
    model = toy(COUNT)
    state = stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=tier)) as session:
        outputs(session, model)
        inside = [
            dict(model.named_parameters())[name].data_ptr() == tensor.data_ptr()
            for name, tensor in state.items()
            if not name.endswith("scale")
        ]
        assert all(inside) if tier is FILE else not any(inside)
        session.give_up_slabs() if session.state.value == "idle" else session.release()
    for name, tensor in state.items():
        assert dict(model.named_parameters())[name].data_ptr() == tensor.data_ptr()


def changes(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "rewritten":
        path.write_bytes(content[:-100] + bytes(100))
        os.utime(path, ns=(1, 1))
    elif how == "cut":
        os.truncate(path, len(content) - 200)
    elif how == "longer":
        with path.open("ab") as file:
            file.write(b"more")


@pytest.mark.parametrize("how", ["rewritten", "cut", "longer"])
@pytest.mark.parametrize("when", ["between forwards", "before the adopt's copies"])
def test_a_file_that_changes_is_noticed_before_a_byte_is_used(path: Path, how: str, when: str) -> None:
    model = toy(COUNT)
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=FILE)) as session:
        if when == "between forwards":
            outputs(session, model, 1)
        else:
            session.adopt(wait=False)
        changes(path, how)
        with pytest.raises(WeightFileError, match=r"weights\.safetensors has changed"):
            outputs(session, model, 3)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_goes_after_it_was_opened_is_still_right(path: Path, how: str) -> None:
    model = toy(COUNT)
    truth = truth_of(model)
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=FILE)) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        path.unlink()
        if how == "replaced":
            path.write_bytes(b"another model")
        assert all(map(torch.equal, outputs(session, model), truth))


def test_an_edit_in_place_is_in_no_file_and_the_block_is_adopted_anew(path: Path) -> None:
    model = Model([Block(hidden=2048) for _ in range(COUNT)])
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=FILE)) as session:
        outputs(session, model)
        with torch.no_grad():
            model.blocks[2].up[512:1536].mul_(2)  # on pages that no other block shares
        truth = truth_of(model)
        assert all(map(torch.equal, outputs(session, model), truth))
        assert {block for block, tier in session.tiers.items() if tier is not FILE} == {2}


def test_slabs_of_an_unchanged_file_cost_nothing_when_they_are_given_up(path: Path) -> None:
    model = toy(COUNT)
    truth, state = truth_of(model), None
    state = stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        outputs(session, model)
        session.release()
        session.give_up_slabs()
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == state[name].data_ptr(), name
        assert all(map(torch.equal, outputs(session, model), truth))


def test_slabs_that_were_edited_are_never_exchanged_for_the_file(path: Path) -> None:
    model = toy(COUNT)
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        outputs(session, model)
        session.release()
        with torch.no_grad():
            model.blocks[1].down.add_(1)
        with torch.inference_mode():
            model.blocks[3].up.data.view(-1)[0] += 1
        truth = truth_of(model)
        session.give_up_slabs()
        assert all(map(torch.equal, truth_of(model), truth))
        assert all(map(torch.equal, outputs(session, model), truth))


def test_a_mapping_of_another_file_fills_the_slabs_anew(path: Path) -> None:
    model, other = toy(COUNT), toy(COUNT, seed=1)
    truth = truth_of(other)
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=MIXED)) as session:
        outputs(session, model)
        session.release()
        second = path.with_name("other.safetensors")
        stored(other, second)
        mapped(model, second)
        assert all(map(torch.equal, outputs(session, model), truth))


class CountingRegistrar(SimulatedRegistrar):
    def __init__(self, simulation: Simulation) -> None:
        super().__init__(streams=simulation.streams)
        self.calls: list[str] = []
        simulation.backend = dataclasses.replace(simulation.backend, registrar=self)

    def register(self, pointer: int, nbytes: int) -> int:
        self.calls.append("lock")
        return super().register(pointer, nbytes)

    def unregister(self, pointer: int) -> int:
        self.calls.append("unlock")
        return super().unregister(pointer)


def test_a_second_model_takes_over_locked_memory_and_locks_none_of_its_own(path: Path) -> None:
    simulation = Simulation()
    registrar = CountingRegistrar(simulation)
    first, second = toy(COUNT), toy(COUNT, seed=1)
    truths = [truth_of(model) for model in (first, second)]
    stored(first, path)
    stored(second, path.with_name("second.safetensors"))
    with (
        simulation.session(first, fixed_plan([True] * COUNT)) as one,
        simulation.session(second, fixed_plan([True] * COUNT)) as other,
    ):
        assert all(map(torch.equal, outputs(one, first), truths[0]))
        one.release()
        registrar.calls.clear()
        locked = set(registrar.locked)
        for giver, taker, model, truth in ((one, other, second, truths[1]), (other, one, first, truths[0])):
            taker.take_over(giver)
            assert giver.pinned_bytes == 0 < taker.pinned_bytes
            assert all(map(torch.equal, outputs(taker, model), truth))
            taker.release()
            assert set(registrar.locked) == locked
        assert registrar.calls == []
    assert registrar.locked == {}
    assert all(map(torch.equal, truth_of(first), truths[0]))


@pytest.mark.parametrize("how", ["taken back", "unlocked", "given up"])
def test_memory_of_a_run_that_never_began_can_be_had_again(path: Path, how: str) -> None:
    """As after an interrupt between a run's start and its first forward."""
    simulation = Simulation()
    registrar = CountingRegistrar(simulation)
    first, second = toy(COUNT), toy(COUNT, seed=1)
    truth = truth_of(first)
    stored(first, path)
    with (
        simulation.session(first, fixed_plan([True] * COUNT)) as one,
        simulation.session(second, fixed_plan([True] * COUNT)) as other,
    ):
        outputs(one, first)
        one.release()
        other.take_over(one)
        registrar.calls.clear()
        if how == "taken back":
            one.take_over(other)
        elif how == "unlocked":
            other.unlock()
        else:
            other.give_up_unused()
        assert other.pinned_bytes == other.slab_bytes == 0
        assert all(map(torch.equal, outputs(one, first), truth))
        assert registrar.calls == ([] if how == "taken back" else [*["unlock"] * COUNT, *["lock"] * COUNT])
    assert registrar.locked == {}
    assert simulation.pin_budget.used_bytes == 0


def test_memory_that_does_not_fit_is_unlocked_before_a_slab_is_filled(path: Path) -> None:
    simulation = Simulation()
    registrar = CountingRegistrar(simulation)
    first, second = toy(COUNT), toy(COUNT, width=32)
    stored(first, path)
    stored(second, path.with_name("second.safetensors"))
    with (
        simulation.session(first, fixed_plan([True] * COUNT)) as one,
        simulation.session(second, fixed_plan([True] * COUNT)) as other,
    ):
        outputs(one, first)
        one.release()
        registrar.calls.clear()
        other.take_over(one)
        other.adopt(wait=False)
        assert registrar.calls[:COUNT] == ["unlock"] * COUNT


def test_no_slab_is_made_where_the_host_has_no_room_left(path: Path) -> None:
    model, left = toy(COUNT), 2
    truth = truth_of(model)
    stored(model, path)
    simulation = Simulation()
    store_bytes = 4096

    def room() -> int:
        made = len([1 for slab in session._holds.slabs.values() if slab.pages is not None])
        return (left - made) * store_bytes + 1

    backend = dataclasses.replace(simulation.backend, host_room=room)
    with SwapSession(model.named, fixed_plan([True] * COUNT), backend) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        assert sorted(tier.value for tier in session.tiers.values()) == ["file"] * 4 + ["pinned"] * 2
        assert any("not enough RAM" in why for why in session.refusals)


def test_a_forward_begins_before_the_last_block_is_placed(path: Path) -> None:
    """With a worker in a thread, which is held up at the last block until the first one has run."""
    model, ran, order = toy(COUNT), threading.Event(), []
    truth = truth_of(model, 1)
    stored(model, path)
    backend = threaded()
    fill = Slab.fill

    def held(slab: Slab, tensors, *arguments) -> None:
        if tensors[0].data_ptr() == model.blocks[COUNT - 1].up.data_ptr():
            assert ran.wait(30), "the first block waits for the last slab"
        order.append("slab")
        fill(slab, tensors, *arguments)

    model.blocks[0].register_forward_hook(lambda *_: order.append("block") or ran.set())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slab, "fill", held)
        with SwapSession(model.named, fixed_plan([True] * COUNT, tiers=PAGEABLE), backend) as session:
            assert all(map(torch.equal, outputs(session, model, 1), truth))
    assert order.index("block") < len(order) - 1 == COUNT


def test_a_release_during_placing_stops_it_and_leaves_every_tensor_in_its_place(path: Path) -> None:
    model = toy(COUNT)
    truth, state = truth_of(model), None
    state = stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        session.adopt(wait=False)
        session.release()
        assert session.pinned_bytes == session.slab_bytes
        assert all(map(torch.equal, truth_of(model), truth))
        session.give_up_slabs()
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in model.named_parameters())


def test_slabs_that_nothing_points_at_are_handed_over_and_given_up() -> None:
    """As after a GGUF model's run: the wrapper has put the weights on the meta device, and will copy them anew."""
    model, other = toy(COUNT), toy(COUNT, seed=1)
    truth = truth_of(other)
    simulation = Simulation()
    registrar = CountingRegistrar(simulation)
    with (
        simulation.session(model, fixed_plan([True] * COUNT)) as one,
        simulation.session(other, fixed_plan([True] * COUNT)) as two,
    ):
        outputs(one, model)
        one.release()
        two.take_over(one)
        assert one.slab_bytes > 0 == two.slab_bytes, "these are the only copy"
        one.give_up_unused()
        assert one.slab_bytes > 0
        model.to("meta")
        registrar.calls.clear()
        two.take_over(one)
        assert one.slab_bytes == 0 < two.slab_bytes
        assert all(map(torch.equal, outputs(two, other), truth))
        assert registrar.calls == []
        two.release()
        other.to("meta")
        two.give_up_unused()
        assert two.slab_bytes == 0
    assert registrar.locked == {}


@pytest.mark.parametrize("tiers", [FILE, PINNED, MIXED], ids=["file", "pinned", "mixed"])
def test_a_model_of_which_half_is_converted_streams_each_part_from_its_place(path: Path, tiers) -> None:
    model = toy(COUNT)
    truth = truth_of(model)
    stored(model, path)
    for block in model.blocks[::2]:
        block.up.data = block.up.data.clone()
    for block in model.blocks[3:]:
        block.down.data = block.down.data.clone()
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=tiers)) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        whole = {block for block, slab in session._holds.slabs.items() if slab.regions and all(slab.regions)}
        assert whole == {1}


@pytest.mark.parametrize("at", [1, 5, 12, 30])
def test_a_disk_that_fails_gives_one_sentence_and_the_next_run_is_right(
    path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "preadv"):
        pytest.skip("this system reads in another way")
    model, calls, preadv = toy(COUNT), [0], os.preadv
    truth = truth_of(model)
    stored(model, path)

    def failing(*arguments: object) -> int:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=MIXED)) as session:
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(
            WeightFileError, match=r"weights\.safetensors failed \(Input/output error\); check the disk"
        ):
            outputs(session, model, 8)
        assert all(map(torch.equal, outputs(session, model), truth))
        assert not session.others.moved
        session.release()
        assert all(map(torch.equal, outputs(session, model), truth))


def test_a_disk_that_stalls_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "preadv"):
        pytest.skip("this system reads in another way")
    model, preadv = toy(COUNT), os.preadv
    truth = truth_of(model)
    stored(model, path)
    stalls = iter([0, 0, 0.5, 0, 0.5])
    monkeypatch.setattr(os, "preadv", lambda *of: time.sleep(next(stalls, 0)) or preadv(*of))
    with SwapSession(model.named, fixed_plan([True] * COUNT, tiers=FILE), threaded()) as session:
        assert all(map(torch.equal, outputs(session, model), truth))


def test_a_mapping_that_was_written_between_two_runs_fills_its_slab_anew(path: Path) -> None:
    """An inference tensor counts no edits; the page that was written is a copy, and in no file."""
    model = toy(COUNT)
    with torch.inference_mode():
        state = stored(model, path)
        for block in model.blocks:
            block.up = torch.nn.Parameter(block.up.data.clone(), requires_grad=False)
            block.down = torch.nn.Parameter(block.down.data.clone(), requires_grad=False)
        mapped(model, path)
    state = dict(model.state_dict())
    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        outputs(session, model)
        session.release()
        with torch.inference_mode():
            for name, parameter in model.named_parameters():
                parameter.data = state[name]
            state["blocks.2.up"].view(-1)[3] += 1
        truth = truth_of(model)
        assert all(map(torch.equal, outputs(session, model), truth))


@pytest.mark.parametrize("first", [FILE, PINNED])
@pytest.mark.parametrize("then", [FILE, PINNED, STAGED, None])
@pytest.mark.parametrize("how", ["inference tensor", "new parameter of the same bytes"])
def test_an_edit_that_is_not_counted_is_kept_whatever_the_next_plan_is(
    path: Path, first: HostTier, then: HostTier | None, how: str
) -> None:
    is_inference = how == "inference tensor"
    with torch.inference_mode(mode=is_inference):
        model = toy(COUNT)
        stored(model, path)
    assert model.blocks[2].up.is_inference() == is_inference
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=first)) as session:
        outputs(session, model)
        session.release()
        if not is_inference:
            model.blocks[2].up = torch.nn.Parameter(model.blocks[2].up.data, requires_grad=False)
        with torch.inference_mode(mode=is_inference), torch.no_grad():
            model.blocks[2].up.mul_(2)
        truth = truth_of(model)
        session._planner = fixed_plan([then is not None] * COUNT, tiers=then or FILE)
        assert all(map(torch.equal, outputs(session, model), truth))
        session.release()
        assert all(map(torch.equal, truth_of(model), truth))


@pytest.mark.parametrize("is_inference", [True, False])
@pytest.mark.parametrize("then", [FILE, PINNED, STAGED, None])
@pytest.mark.parametrize("first", [FILE, PINNED, STAGED])
def test_a_block_that_another_plan_has_elsewhere_is_placed_once(
    path: Path, first: HostTier, then: HostTier | None, is_inference: bool
) -> None:
    with torch.inference_mode(mode=is_inference):
        model = toy(COUNT)
        truth = truth_of(model)
        stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=first)) as session:
        outputs(session, model)
        for at in range(3):
            session.release()
            session._planner = fixed_plan(
                [then is not None] * COUNT if at % 2 else alternating(COUNT), tiers=then or FILE
            )
            assert all(map(torch.equal, outputs(session, model), truth))
            assert session.adoptions == 2 + at


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_slab_whose_filling_failed_holds_nothing(path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "preadv"):
        pytest.skip("this system reads in another way")
    model, other, preadv = toy(COUNT), toy(COUNT, seed=1), os.preadv
    truth, second, left = truth_of(model), path.with_name("second.safetensors"), [at]
    first = stored(model, path)
    stored(other, second)

    def failing(*arguments: object) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        session.release()
        mapped(model, second)
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(WeightFileError):
            outputs(session, model)
        for name, parameter in model.named_parameters():
            parameter.data = first[name]
        assert all(map(torch.equal, outputs(session, model), truth))


@pytest.mark.parametrize("lateness", [0.0, 1.0])
@pytest.mark.parametrize("swapped", [True, False])
def test_a_tensor_that_is_replaced_while_blocks_are_placed_is_the_one_that_is_used(
    swapped: bool, lateness: float
) -> None:
    """Before or after its block was placed, but before a forward has come to it."""
    model, other = toy(COUNT), toy(COUNT, seed=1)
    with Simulation(lateness=lateness).session(model, fixed_plan([swapped] * COUNT)) as session:
        session.adopt(wait=False)
        for block, source in zip(model.blocks[2:4], other.blocks, strict=False):
            block.up.data = source.up.data
            block.down = torch.nn.Parameter(source.down.data.clone(), requires_grad=False)
        expected = toy(COUNT)
        for block, source in zip(expected.blocks[2:4], other.blocks, strict=False):
            block.up.data, block.down.data = source.up.data, source.down.data
        assert all(map(torch.equal, outputs(session, model), truth_of(expected)))


@pytest.mark.parametrize("how", ["edited", "replaced", "pointed elsewhere"])
@pytest.mark.parametrize("swapped", [True, False])
def test_a_tensor_that_changes_while_its_own_block_is_placed_is_the_one_that_is_used(
    how: str, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the copy of its bytes and the moment when it is pointed at the copy."""
    model, expected, other = toy(COUNT), toy(COUNT), toy(COUNT, seed=1)
    block, copy_bytes, done = model.blocks[3], slabs.copy_bytes, []
    last = block.down.data_ptr()

    def copying(target: torch.Tensor, source: torch.Tensor) -> None:
        copy_bytes(target, source)
        if source.data_ptr() == last and not done:
            done.append(how)
            if how == "edited":
                block.up.mul_(2)
            elif how == "replaced":
                block.up = torch.nn.Parameter(other.blocks[3].up.data.clone(), requires_grad=False)
            else:
                block.up.data = other.blocks[3].up.data.clone()

    if how == "edited":
        expected.blocks[3].up.data.mul_(2)
    else:
        expected.blocks[3].up.data.copy_(other.blocks[3].up)
    truth = truth_of(expected)
    monkeypatch.setattr(slabs, "copy_bytes", copying)
    monkeypatch.setattr(residents, "copy_bytes", copying)
    with Simulation(lateness=0.0).session(model, fixed_plan([swapped] * COUNT)) as session:
        assert all(map(torch.equal, outputs(session, model), truth))
        assert done
        session.release()
        assert all(map(torch.equal, truth_of(model), truth))


def test_memory_that_a_file_was_read_into_before_there_were_staging_slabs_goes_with_its_copy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = toy(COUNT), []

    class Watched(staging.PageMemory):
        def __init__(self, nbytes: int, streams: object) -> None:
            super().__init__(nbytes, streams)
            made.append(weakref.ref(self._pages))

    monkeypatch.setattr(staging, "PageMemory", Watched)
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=FILE)) as session:
        outputs(session, model)
        assert made
        assert [reference for reference in made if reference() is not None] == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_placing_that_was_cut_short_holds_no_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    if not hasattr(os, "preadv"):
        pytest.skip("this system reads in another way")
    model, begun, memories, preadv = toy(COUNT), threading.Event(), [], os.preadv
    stored(model, path)
    allocate = Transfer.allocate

    def watched(transfer: Transfer, nbytes: int) -> torch.Tensor:
        memory = allocate(transfer, nbytes)
        memories.append(weakref.ref(memory))
        return memory

    def read(*arguments: object) -> int:
        begun.set()
        if fails:
            raise OSError(5, "Input/output error")
        time.sleep(0.05)
        return preadv(*arguments)

    monkeypatch.setattr(Transfer, "allocate", watched)
    monkeypatch.setattr(os, "preadv", read)
    gc.disable()  # it would free a cycle
    try:
        with SwapSession(model.named, fixed_plan([False] * COUNT), threaded()) as session:
            session.adopt(wait=False)
            assert begun.wait(30)
            session.release()
            assert len(memories) == COUNT + 1
            assert [memory for memory in memories if memory() is not None] == []
    finally:
        gc.enable()


def test_blocks_that_a_new_run_drops_while_they_are_read_ahead_raise_nothing(path: Path) -> None:
    model = toy(COUNT)
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT, tiers=FILE)) as session:
        outputs(session, model)
        session.release()
        store = session._holds.store

        class Vanishing(dict):
            def __contains__(self, block: object) -> bool:
                found = super().__contains__(block)
                self.pop(block, None)
                return found

        store.slabs = Vanishing(store.slabs)
        store.read_ahead(1 << 40)


def test_the_worker_and_the_host_thread_do_not_both_make_staging_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block is the first one that needs them, and it is placed before it is copied."""
    model, streams, page, staging_of = toy(4), InlineStreams(torch.device("cpu")), 4096, HostStore.staging_of
    budget, registrar = PinBudget(5 * page), SimulatedRegistrar()
    backend = Backend(streams.device, lambda *_: streams, registrar, budget, lambda _: ThreadWorker())
    base = fixed_plan([True] * 4, tiers=[PINNED, PINNED, PINNED, STAGED])

    def slow(store: HostStore, nbytes: int) -> list[PageMemory]:
        made = staging_of(store, nbytes)
        time.sleep(0.2)
        return made

    def planner(*of: object) -> SwapPlan:
        return dataclasses.replace(base(*of), staging_bytes=2 * page, pinned_bytes=5 * page)

    monkeypatch.setattr(HostStore, "staging_of", slow)
    with SwapSession(model.named, planner, backend) as session:
        session.adopt(wait=False)
        session._holds.swapper._pending[3].job.wait()
        outputs(session, model)
        assert session.refusals == ()
        assert session.tiers[3] is STAGED
        assert budget.used_bytes == sum(registrar.locked.values()) == 5 * page
    assert budget.used_bytes == 0


def test_a_session_that_is_dropped_in_a_thread_that_reads_for_it_waits_for_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector runs in any thread."""
    if not hasattr(os, "preadv"):
        pytest.skip("this system reads in another way")
    model, preadv, last = toy(COUNT), os.preadv, []
    adopted, ended = threading.Event(), threading.Event()
    stored(model, path)

    def read(*arguments: object) -> int:
        if last and threading.current_thread().name.startswith("blockswap-read"):
            adopted.wait(60)
            last.clear()
            ended.set()
        else:
            time.sleep(0.05)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", read)
    last.append(SwapSession(model.named, fixed_plan([True] * COUNT, tiers=FILE), threaded()))
    last[0].adopt(wait=False)
    adopted.set()
    assert ended.wait(60)
    wait_until(lambda: not worker.running & sys._current_frames().keys())


def test_a_session_that_is_dropped_in_the_thread_that_locks_for_it_waits_for_nothing() -> None:
    model, last = toy(COUNT), []
    adopted, ended = threading.Event(), threading.Event()

    class Dropping(SimulatedRegistrar):
        def register(self, pointer: int, nbytes: int) -> int:
            if last:
                adopted.wait(60)
                last.clear()
                ended.set()
            return super().register(pointer, nbytes)

    streams, registrar = InlineStreams(torch.device("cpu")), Dropping()
    backend = Backend(streams.device, lambda *_: streams, registrar, PinBudget(1 << 40), lambda _: ThreadWorker())
    last.append(SwapSession(model.named, fixed_plan([True] * COUNT, tiers=PINNED), backend))
    last[0].adopt(wait=False)
    adopted.set()
    assert ended.wait(60)
    wait_until(lambda: not worker.running & sys._current_frames().keys())
    wait_until(lambda: registrar.locked == {})


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
