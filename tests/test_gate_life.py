"""The gate over the life of a model: runs in a row, changed arguments, failures, and its own coming and going."""

from __future__ import annotations

import gc
import logging
import types
import weakref
from typing import Any

import pytest
import standin
import torch
from gate_bench import BLOCKS, DEVICE, VACE_BLOCKS, GateBench, allocated, arguments, is_as_new, sampled, truth
from standin import Fault, InterruptProcessingException, Workflow, swap_args
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError, WrapperError, WrapperMissingError
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.wrapper.find import find_wrapper
from wanvideo_enhanced_blockswap.blockswap.wrapper.wanvideo import refuse_cuda_graphs, shown_name

pytestmark = pytest.mark.usefixtures("pretend_stats")

KINDS = ("fp32", "fp8_scaled", "gguf", "lora_merged", "lora_unmerged", "vace", "compiled", "forcing", "multitalk")
STAND_IN = ("stand_in", "stand_in_unmerged")
ALL = BLOCKS


# Runs in a row


@pytest.mark.parametrize("variant", ["fp32", "bf16", "lora_merged", "vace"])
def test_a_second_run_finds_its_weights_in_their_slabs_and_copies_none_on_the_host(
    bench: GateBench, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = bench.workflow(variant, arguments(ALL))
    workflow.sample()
    store = bench.run_of(workflow).session._holds.store
    assert store is not None
    slabs = {block: slab.pages.tensor.data_ptr() for block, slab in store.slabs.items()}
    monkeypatch.setattr(Slab, "fill", None)  # would raise
    assert torch.equal(workflow.sample(), truth(variant))
    assert {block: slab.pages.tensor.data_ptr() for block, slab in store.slabs.items()} == slabs


def test_the_loader_holds_the_weights_of_swapped_blocks_in_our_slabs_and_not_a_second_time(bench: GateBench) -> None:
    workflow = bench.workflow("bf16", arguments(ALL))
    workflow.sample()
    stored = workflow.patchers[0].model["sd"]
    store = bench.run_of(workflow).session._holds.store
    assert store is not None
    for block, slab in store.slabs.items():
        low, high = slab.pages.tensor.data_ptr(), slab.pages.tensor.data_ptr() + slab.pages.tensor.nbytes
        weights = [t for name, t in stored.items() if name.startswith(f"blocks.{block}.") and t.nbytes >= 1024]
        assert weights
        assert all(low <= t.data_ptr() < high for t in weights)


@pytest.mark.parametrize("variant", ["main_device", "lora_merged_main_device"])
def test_a_state_dict_on_the_device_gives_way_to_the_host(bench: GateBench, variant: str) -> None:
    workflow = bench.workflow(variant, arguments(ALL))
    workflow.sample()
    stored = workflow.patchers[0].model["sd"] or {}
    assert {t.device.type for name, t in stored.items() if name.startswith("blocks.")} <= {"cpu"}
    assert torch.equal(workflow.sample(), truth(variant))


@pytest.mark.parametrize("variant", KINDS)
def test_five_runs_in_a_row_are_alike(bench: GateBench, variant: str) -> None:
    workflow = bench.workflow(variant, arguments(2))
    costs = [sampled(workflow) for _ in range(5)]
    assert all(torch.equal(cost.latents, truth(variant)) for cost in costs)
    assert len({(cost.h2d_bytes, cost.d2h_bytes) for cost in costs[1:]}) == 1
    assert len({cost.peak for cost in costs[1:]}) == 1


# Changed arguments


@pytest.mark.parametrize("variant", KINDS)
def test_a_model_whose_node_was_removed_is_as_if_it_had_never_had_one(bench: GateBench, variant: str) -> None:
    plain = bench.workflow(variant, None)
    # A first run moves buffers of a few bytes that then stay on the device.
    first, later = sampled(plain), sampled(plain)
    workflow = bench.workflow(variant, None)
    workflow.sample(arguments(2))
    workflow.sample(arguments(None))
    found = sampled(workflow)
    assert torch.equal(found.latents, later.latents)
    for name in ("h2d_bytes", "d2h_bytes", "peak"):
        least, most = sorted((getattr(first, name), getattr(later, name)))
        assert least <= getattr(found, name) <= most, name
    assert is_as_new(workflow.transformer)
    assert bench.gate.run_of(workflow.transformer) is None


@pytest.mark.parametrize("variant", STAND_IN)
def test_weights_that_the_wrapper_places_once_are_where_it_has_put_them_when_the_node_is_gone(
    bench: GateBench, variant: str
) -> None:
    plain, workflow = bench.workflow(variant, None), bench.workflow(variant, None)
    plain.sample()
    expected = sampled(plain)
    workflow.sample(arguments(2))
    assert torch.equal(workflow.sample(), expected.latents)
    again = sampled(workflow)
    assert torch.equal(again.latents, expected.latents)
    assert (again.h2d_bytes, again.d2h_bytes) == (expected.h2d_bytes, expected.d2h_bytes)
    wanted = [one.device for one in plain.transformer.parameters()]
    assert [one.device for one in workflow.transformer.parameters()] == wanted


@pytest.mark.parametrize("variant", KINDS)
def test_other_settings_with_a_cached_loader_are_obeyed(bench: GateBench, variant: str) -> None:
    workflow = bench.workflow(variant, None)
    for count in (1, ALL, 2, None, ALL):
        assert torch.equal(workflow.sample(arguments(count)), truth(variant))
        plan = bench.run_of(workflow).plan
        assert plan is not None
        vace = min(count or 0, VACE_BLOCKS) if variant == "vace" else 0
        assert plan.swapped_count == (count or 0) + vace


@pytest.mark.parametrize("variant", [*KINDS, *STAND_IN])
def test_our_swapping_and_the_wrappers_take_turns_on_one_model(bench: GateBench, variant: str) -> None:
    workflow = bench.workflow(variant, None)
    for args in (arguments(2), swap_args(3, vace_blocks_to_swap=1), arguments(None), None, arguments(ALL)):
        assert torch.equal(workflow.sample(args), truth(variant))


def test_a_count_above_the_models_is_cut_and_said(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(48))
    assert torch.equal(workflow.sample(), truth("fp32"))
    plan = bench.run_of(workflow).plan
    assert plan is not None
    assert plan.swapped_count == BLOCKS
    assert "blocks_to_swap is cut from 48 to 4, the number of blocks the model has" in plan.reasons


def test_a_run_with_our_arguments_that_never_began_leaves_no_count_behind(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", None)
    workflow.transformer.blocks_to_swap = 10_000  # as the sampler sets it before anything of ours is asked
    cost = sampled(workflow)
    assert torch.equal(cost.latents, truth("fp32"))
    assert is_as_new(workflow.transformer)


def test_a_device_on_which_nothing_can_be_swapped_runs_with_the_wrappers_own_swapping(bench: GateBench) -> None:
    bench.refuses = True
    workflow = bench.workflow("vace", arguments(2))
    assert torch.equal(workflow.sample(), truth("vace"))
    assert bench.gate.run_of(workflow.transformer) is None


# Failures


@pytest.mark.parametrize(
    "error", [InterruptProcessingException, RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt]
)
@pytest.mark.parametrize("variant", KINDS)
def test_after_a_run_that_failed_in_any_block_the_memory_is_free_and_the_next_run_is_right(
    bench: GateBench, variant: str, error: type[BaseException]
) -> None:
    workflow = bench.workflow(variant, arguments(2))
    workflow.sample()
    raised = DeviceMemoryError if error is torch.OutOfMemoryError else error
    for forward, block in ((0, 0), (0, 3), (1, 1), (3, 2)):
        with pytest.raises(raised):
            workflow.sample(fault=Fault(block=block, forward=forward, error=error))
        run = bench.run_of(workflow)
        assert run.session.state is SessionState.IDLE
        assert run.session.device_bytes == 0
        assert all(getattr(workflow.transformer, name) <= 0 for name in ("blocks_to_swap", "prefetch_blocks"))
    before = allocated()
    assert torch.equal(workflow.sample(), truth(variant))
    assert allocated() <= before


def test_a_device_that_runs_out_of_memory_in_a_run_recovers_at_the_next(bench: GateBench, pretend_stats: Any) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample()
    pretend_stats.set_memory_limit(allocated() + 60_000)
    with pytest.raises((RuntimeError, torch.OutOfMemoryError)):
        workflow.sample()
    pretend_stats.set_memory_limit(None)
    assert torch.equal(workflow.sample(), truth("fp32"))


# Two models and little memory


def test_a_model_whose_run_is_over_gives_its_locks_up_to_the_next(bench: GateBench) -> None:
    bench.gate.restore()
    bench = GateBench(pin_bytes=5 * 53_248)
    try:
        first, second = (bench.workflow("fp32", arguments(ALL)) for _ in range(2))
        first.sample()
        assert bench.run_of(first).session.pinned_bytes > 0
        second.sample()
        assert bench.run_of(first).session.pinned_bytes == 0
        assert bench.run_of(second).session.pinned_bytes > 0
        assert torch.equal(first.sample(), truth("fp32"))
        assert sum(bench.registrar.locked.values()) == bench.pins.used_bytes <= bench.pins.limit_bytes
    finally:
        bench.gate.restore()


def test_slabs_go_when_host_memory_is_nearly_full_and_the_weights_stay(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("wanvideo_enhanced_blockswap.blockswap.wrapper.gate.SCARCE_HOST_SHARE", 2.0)
    workflow = bench.workflow("lora_merged", arguments(ALL))
    for _ in range(2):
        assert torch.equal(workflow.sample(), truth("lora_merged"))
        assert bench.run_of(workflow).session.slab_bytes == 0
    assert any("weights are not kept ready" in record.message for record in caplog.records)


def test_when_a_model_goes_its_run_goes_and_nothing_stays_locked(bench: GateBench) -> None:
    bench.gate.restore()
    bench = GateBench(pin_bytes=1 << 30)
    try:
        workflow = bench.workflow("fp32", arguments(ALL))
        workflow.sample()
        alive = weakref.ref(bench.run_of(workflow)), weakref.ref(workflow.transformer)
        assert bench.registrar.locked
        del workflow
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
        assert (bench.registrar.locked, bench.pins.used_bytes) == ({}, 0)
    finally:
        bench.gate.restore()


# Coming and going


def modules() -> list[types.ModuleType]:
    import sys

    return [module for name, module in sys.modules.items() if name.startswith("standin.")]


def holders(name: str) -> list[Any]:
    return [vars(module)[name] for module in modules() if name in vars(module)]


@pytest.mark.parametrize("name", ["load_weights", "init_blockswap", "offload_transformer"])
def test_each_function_is_wrapped_wherever_it_is_held_and_restored(name: str) -> None:
    before = holders(name)
    assert len(before) == 4
    bench = GateBench()
    bench.gate.install()
    during = holders(name)
    assert len(set(map(id, during))) == 1
    assert during[0] is not before[0]
    assert during[0].__wrapped__ is not None
    bench.gate.restore()
    assert holders(name) == before


def test_a_gate_that_is_restored_closes_its_runs_and_leaves_a_model_that_works(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample()
    bench.gate.restore()
    assert is_as_new(workflow.transformer)
    assert torch.equal(workflow.sample(swap_args(2)), truth("fp32"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_weights": None}, "load_weights"),
        ({"load_weights": lambda transformer: None}, r"load_weights\(block_swap_args=…\)"),
        ({"WanModel": None}, "WanModel"),
        ({"WanModel": torch.nn.Linear}, r"enumerate.*WanModel.forward.*WanModel.forward_vace"),
    ],
)
def test_a_wrapper_that_has_changed_is_told_by_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    import standin.nodes_model_loading as loading

    for name, value in changes.items():
        monkeypatch.setattr(loading, name, value)
    with pytest.raises(WrapperError, match=rf"too old: .*{said}.*update it and WanVideo Enhanced"):
        find_wrapper(standin.NODE_CLASS_MAPPINGS)


def test_a_wrapper_that_is_not_there_is_told_with_what_to_do() -> None:
    with pytest.raises(WrapperMissingError, match=r"no pack has its loader.*install it"):
        find_wrapper({})


@pytest.mark.parametrize(
    ("compile_args", "said"),
    [
        ({"mode": "reduce-overhead", "backend": "inductor"}, "mode reduce-overhead"),
        ({"mode": "max-autotune", "backend": "inductor"}, "mode max-autotune"),
        ({"mode": "default", "backend": "cudagraphs"}, "backend cudagraphs"),
    ],
)
def test_compile_modes_with_cuda_graphs_are_refused_with_a_way_out(compile_args: dict[str, str], said: str) -> None:
    with pytest.raises(WrapperError, match=rf"torch.compile has {said}; choose mode max-autotune-no-cudagraphs"):
        refuse_cuda_graphs(compile_args)
    refuse_cuda_graphs({"mode": "max-autotune-no-cudagraphs", "backend": "inductor"})
    refuse_cuda_graphs(None)


def test_a_model_compiled_as_a_whole_says_that_it_runs_uncompiled(
    bench: GateBench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workflow = bench.workflow("compiled_whole", arguments(2))
    assert torch.equal(workflow.sample(), truth("compiled_whole"))
    assert any("compile only the blocks" in record.message for record in caplog.records)


def test_compiled_blocks_are_not_compiled_again_when_the_number_of_swapped_blocks_changes(bench: GateBench) -> None:
    workflow = Workflow("compiled", device=DEVICE)
    workflow.load(None)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(workflow.sample(), truth("compiled"))
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    graphs = []
    for count in (1, 3, 2, ALL, None, 1):
        assert torch.equal(workflow.sample(arguments(count)), truth("compiled"))
        graphs.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert graphs == [(0, 0)] * 6, "graphs and graph breaks beyond those of the unswapped run"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Wan2_2-HIGH_fp8.safetensors", "Wan2_2-HIGH_fp8"),
        (r"wan\2.2\Wan2.2-LOW.Q4_K_M.gguf", "Wan2.2-LOW.Q4_K_M"),
        ("wan/high_noise_model/diffusion_pytorch_model.safetensors", "high_noise_model/diffusion_pytorch_model"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("Wan2.2_high.v1", "Wan2.2_high.v1"),
        (".", ""),
        (None, ""),
        (torch.zeros(2), ""),
    ],
)
def test_a_model_is_called_by_its_file(file: object, name: str) -> None:
    assert shown_name(file) == name
