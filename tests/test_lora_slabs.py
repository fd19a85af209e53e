"""LoRAs that come, change and go between runs: what the slabs keep, and what host memory holds after it."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from gate_bench import DEVICE, GateBench, arguments
from on_disk import mapped, stored
from standin import Workflow
from test_file_tier import FILE, outputs, truth_of
from test_host import PAGE, PINNED, Recorder, point, put, store_with, weights
from toys import Block, Model, Simulation, fixed_plan
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab

COUNT = 4
MARK = 77
ALL = arguments(4)


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[Slab]:
    """The slabs that are filled from now on."""
    found: list[Slab] = []
    fill = Slab.fill
    monkeypatch.setattr(Slab, "fill", lambda slab, *rest: found.append(slab) or fill(slab, *rest))
    return found


# ------------------------------------------------------------------------------------------------------------ one slab


def test_of_tensors_that_are_new_in_part_only_these_are_copied() -> None:
    base, registrar = weights(5000)[0], Recorder()
    store = store_with(registrar)
    slab = store.put(0, [base, *weights(500)], tier=PINNED)
    slab.pages.tensor[0] = MARK  # a second copy would wipe it out
    again = store.put(0, [base, *weights(500, seed=1)], tier=PINNED)
    assert again.pages.tensor[0] == MARK
    assert torch.equal(again.views[1], weights(500, seed=1)[0])
    assert registrar.names == ["register"]


def test_a_lora_that_goes_and_another_that_comes_find_the_rest_in_the_same_locked_memory() -> None:
    base, registrar = weights(50000, 5000), Recorder()
    store = store_with(registrar)
    store.put(0, [*base, *weights(500, 500)], tier=PINNED).pages.tensor[0] = MARK
    for seed, sizes in ((1, ()), (2, (900,)), (3, (300, 300))):
        deltas = weights(*sizes, seed=seed)
        held = [view.clone() for view in store.put(0, [*base, *deltas], tier=PINNED).views]
        assert len(held) == 2 + len(sizes)
        assert all(map(torch.equal, held[1:], [base[1], *deltas]))
    assert store.slabs[0].pages.tensor[0] == MARK
    assert registrar.names == ["register"]


def test_memory_that_would_be_empty_for_the_most_part_is_given_up() -> None:
    base, registrar = weights(1000), Recorder()
    store = store_with(registrar)
    put(store, 0, [*base, *weights(5000)], tier=PINNED)
    put(store, 0, base, tier=PINNED)
    gc.collect()
    assert list(registrar.locked.values()) == [PAGE]


def test_a_delta_that_is_kept_aside_keeps_its_bytes_when_another_takes_its_place() -> None:
    base, kept, store = weights(50000), weights(500)[0], store_with(None)
    truth = kept.clone()
    point([base[0], kept], store.put(0, [base[0], kept], tier=PINNED))
    store.put(0, [base[0], *weights(900, seed=1)], tier=PINNED)
    assert torch.equal(kept, truth)


@pytest.mark.parametrize(("before", "after"), [(64, 400), (400, 64), (64, 128), (128, 64)])
def test_a_tensor_that_stays_behind_one_of_another_size_keeps_its_bytes(before: int, after: int) -> None:
    """As Stand-In's layers, which the wrapper loads once, behind another LoRA's deltas, which are new in each run."""
    (base,), (delta,), (stays,), (other,) = (weights(n, seed=n) for n in (50000, before, 128, after))
    truth, store = stays.clone(), store_with(None)
    point([base, delta, stays], store.put(0, [base, delta, stays], tier=PINNED))
    del delta
    views = store.put(0, [base, other, stays], tier=PINNED).views
    assert all(map(torch.equal, views, [base, other, truth]))


def test_an_edited_master_is_not_taken_for_its_source_in_another_layout() -> None:
    base, store = weights(50000)[0], store_with(None)
    parameter = torch.nn.Parameter(base.data, requires_grad=False)
    delta = weights(500)[0]
    point([parameter, delta], store.put(0, [parameter, delta], tier=PINNED))
    del delta
    parameter.add_(1)
    again = store.put(0, [torch.nn.Parameter(base.data, requires_grad=False)], tier=PINNED)
    assert torch.equal(again.views[0], base)


# ------------------------------------------------------------------------------------------------------- mapped weights


def wide() -> Model:
    torch.manual_seed(0)
    return Model([Block(hidden=2048) for _ in range(COUNT)])


def test_the_same_file_mapped_again_fills_no_slab(tmp_path: Path, fills: list[Slab]) -> None:
    model = wide()
    truth, path = truth_of(model), tmp_path / "weights.safetensors"
    stored(model, path)
    with Simulation().session(model, fixed_plan([True] * COUNT)) as session:
        outputs(session, model)
        session.release()
        assert len(fills) == COUNT
        mapped(model, path)
        assert all(map(torch.equal, outputs(session, model), truth))
    assert len(fills) == COUNT


@pytest.mark.parametrize("swapped", [[True] * COUNT, [False, True] * (COUNT // 2)], ids=["all", "half"])
def test_a_mapping_that_was_written_goes_with_the_first_run(tmp_path: Path, swapped: list[bool]) -> None:
    """As where the wrapper merges LoRAs into the loader's tensors: the written pages would stay beside the slabs."""
    model, path = wide(), tmp_path / "weights.safetensors"
    stored(model, path)
    model.blocks[1].up.mul_(2)  # the first block stays as it is in the file, and shares no page with what is written
    for block in model.blocks[2:]:
        block.up.mul_(2)
        block.down.mul_(2)
    truth = truth_of(model)
    with Simulation().session(model, fixed_plan(swapped)) as session:
        outputs(session, model)
        session.release()
        gc.collect()
        assert str(path) not in Path("/proc/self/maps").read_text()
        assert all(map(torch.equal, truth_of(model), truth))
        assert all(map(torch.equal, outputs(session, model), truth))


@pytest.mark.parametrize("is_file", [False, True], ids=["residents", "file tier"])
def test_a_mapping_stays_that_other_blocks_need_more(tmp_path: Path, is_file: bool) -> None:
    model, path = wide(), tmp_path / "weights.safetensors"
    stored(model, path)
    model.blocks[0].up.mul_(2)
    swapped, tiers = [True, is_file, is_file, True], [PINNED, FILE, FILE, PINNED]
    with Simulation().session(model, fixed_plan(swapped, tiers=tiers)) as session:
        outputs(session, model)
        session.release()
        gc.collect()
        assert any(slab.originals for slab in session._holds.slabs.values())
        assert str(path) in Path("/proc/self/maps").read_text()


# ------------------------------------------------------------------------------------------------------ in the stand-in


def changed(workflow: Workflow, **changes: Any) -> torch.Tensor:
    """The latents of the next run, with other LoRAs from WanVideoSetLoRAs; none with lora=None."""
    workflow.variant = replace(workflow.variant, **changes)
    return workflow.sample()


@pytest.mark.usefixtures("pretend_stats")
@pytest.mark.parametrize("storage", ["fp32", "fp8_scaled", "gguf", "vace"])
def test_loras_that_change_between_runs_are_those_of_each_run(bench: GateBench, storage: str) -> None:
    variant = replace(standin.VARIANTS[storage], lora="set", lora_rank=16)
    runs: list[dict[str, Any]] = [
        {"lora_seeds": (5,)},
        {"lora_seeds": (6, 7)},
        {"lora": None},
        {"lora": "set", "lora_seeds": (5,), "lora_strength": 0.3},
        {"lora_seeds": (5, 6, 7, 8)},
    ]
    swapped, plain = (Workflow(variant, device=DEVICE) for _ in range(2))
    swapped.load(ALL)
    plain.load()
    seen = [(changed(swapped, **changes), changed(plain, **changes)) for changes in runs]
    assert all(torch.equal(ours, truth) for ours, truth in seen)
    assert len({tuple(truth.flatten().tolist()) for _, truth in seen}) == len(runs)
    assert bench.run_of(swapped).session.adoptions == len(runs)
