"""Renamed copies of the wrapper, beside it or instead of it: found by what their modules are, and gated like it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import standin
import standin.workflow
import torch
from gate_bench import DEVICE, GateBench, arguments, truth
from standin.measuring import measured
from wanvideo_enhanced_blockswap.blockswap.errors import WrapperError
from wanvideo_enhanced_blockswap.blockswap.wrapper.find import END, LOAD, PARAMETERS, SET, START, find_wrapper

pytestmark = pytest.mark.usefixtures("pretend_stats")

COPY = "standin_animate_plus"


@pytest.fixture
def copied() -> Iterator[ModuleType]:
    """A second pack with the same modules, under another name."""
    folder = Path(standin.__file__).parent
    spec = importlib.util.spec_from_file_location(
        COPY, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    copy = sys.modules[COPY] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    sys.modules[f"{COPY}.management"].machine.device = torch.device(DEVICE)  # type: ignore[attr-defined]
    yield copy
    for name in [name for name in sys.modules if name.partition(".")[0] == COPY]:
        del sys.modules[name]


def renamed(copy: ModuleType) -> dict[str, type]:
    return {f"WanVideoAnimatePlus {name}": node for name, node in copy.NODE_CLASS_MAPPINGS.items()}


def sampled(monkeypatch: pytest.MonkeyPatch, bench: GateBench, loader: ModuleType, sampler: ModuleType) -> Any:
    """A run with the nodes of these packs."""
    monkeypatch.setattr(standin.workflow, "WanVideoModelLoader", loader.NODE_CLASS_MAPPINGS["WanVideoModelLoader"])
    node = sampler.NODE_CLASS_MAPPINGS["WanVideoSampler"]
    monkeypatch.setitem(standin.workflow.NODE_CLASS_MAPPINGS, "WanVideoSampler", node)
    workflow = bench.workflow("fp32", arguments(4))
    with measured(DEVICE) as cost:
        latents = workflow.sample()
    assert torch.equal(latents, truth("fp32"))
    run = bench.run_of(workflow)
    assert run.session.adoptions == 1
    assert run.session.counters.returned_bytes < 4096
    return cost


@pytest.mark.parametrize("names", ["both", "the copy's alone"])
def test_a_renamed_copy_is_gated_like_the_wrapper(
    monkeypatch: pytest.MonkeyPatch, copied: ModuleType, names: str
) -> None:
    nodes = renamed(copied) | (standin.NODE_CLASS_MAPPINGS if names == "both" else {})
    found = find_wrapper(nodes)
    assert sorted(found.packages) == sorted([COPY, *(["standin"] if names == "both" else [])])
    for name in (*PARAMETERS, SET):
        held = {one.__module__ if isinstance(one, type) else one.__name__ for one in found.holders[name]}
        assert {one.partition(".")[0] for one in held} == set(found.packages)
    monkeypatch.setattr(standin, "NODE_CLASS_MAPPINGS", nodes)
    bench = GateBench()
    try:
        sampled(monkeypatch, bench, copied, copied)
    finally:
        bench.gate.restore()


@pytest.mark.parametrize("from_copy", ["loader", "sampler", "both", "neither"])
def test_the_loader_of_one_copy_works_with_the_sampler_of_another(
    monkeypatch: pytest.MonkeyPatch, copied: ModuleType, from_copy: str
) -> None:
    monkeypatch.setattr(standin, "NODE_CLASS_MAPPINGS", standin.NODE_CLASS_MAPPINGS | renamed(copied))
    bench = GateBench()
    loader = copied if from_copy in ("loader", "both") else standin
    sampler = copied if from_copy in ("sampler", "both") else standin
    try:
        cost = sampled(monkeypatch, bench, loader, sampler)
        assert cost.h2d_bytes > 0
    finally:
        bench.gate.restore()


def test_all_functions_are_restored_in_every_copy(monkeypatch: pytest.MonkeyPatch, copied: ModuleType) -> None:
    def held() -> list[Any]:
        modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("standin", COPY)]
        return [vars(module).get(name) for module in modules for name in (LOAD, START, END)]

    monkeypatch.setattr(standin, "NODE_CLASS_MAPPINGS", standin.NODE_CLASS_MAPPINGS | renamed(copied))
    before = held()
    bench = GateBench()
    assert held() != before
    bench.gate.restore()
    assert held() == before


def test_a_copy_that_lacks_something_is_named_and_the_others_are_gated(
    monkeypatch: pytest.MonkeyPatch, copied: ModuleType
) -> None:
    for name in ("nodes_sampler", "utils", "skyreels", "nodes_model_loading", "multitalk_loop"):
        monkeypatch.delattr(sys.modules[f"{COPY}.{name}"], START, raising=False)
    found = find_wrapper(standin.NODE_CLASS_MAPPINGS | renamed(copied))
    assert found.packages == ["standin"]
    assert found.refused == [f"{COPY} has changed, or is too old: {START} is not as expected"]
    with pytest.raises(WrapperError, match=rf"{COPY} has changed, or is too old: {START} is not as expected; update"):
        find_wrapper(renamed(copied))


def test_a_pack_that_imports_the_wrappers_functions_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = ModuleType("other_pack.nodes")
    vars(pack).update(load_weights=sys.modules["standin.nodes_model_loading"].load_weights)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, pack.__name__, pack)
    node = type("Other", (), {"__module__": pack.__name__})
    assert find_wrapper(standin.NODE_CLASS_MAPPINGS | {"Other": node}).packages == ["standin"]
