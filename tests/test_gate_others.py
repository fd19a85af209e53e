"""The gate among other packs, odd arguments and little memory."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import standin
import torch
from gate_bench import (
    BLOCKS,
    DEVICE,
    VACE_BLOCKS,
    GateBench,
    allocated,
    arguments,
    block_bytes,
    is_as_new,
    sampled,
    truth,
)
from standin import Workflow, nodes_model_loading, swap_args
from standin.measuring import measured
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError, UnsupportedModelError, WrapperError
from wanvideo_enhanced_blockswap.blockswap.settings import SETTINGS_KEY
from wanvideo_enhanced_blockswap.blockswap.wrapper.patch import Forward

pytestmark = pytest.mark.usefixtures("pretend_stats")

ALL = BLOCKS


def stays(variant: str) -> standin.Variant:
    """Without force_offload."""
    return replace(standin.VARIANTS[variant], force_offload=False)


# Without force_offload


@pytest.mark.parametrize("order", [(2, "none"), (2, "native"), ("none", 2, "none"), (ALL, "native", 2, "none", None)])
@pytest.mark.parametrize("variant", ["fp32", "fp8_scaled", "gguf", "lora_gguf", "vace_gguf", "lora_merged", "vace"])
def test_a_model_that_stays_on_the_device_takes_any_order_of_arguments(
    bench: GateBench, variant: str, order: tuple[Any, ...]
) -> None:
    workflow = Workflow(stays(variant), device=DEVICE)
    workflow.load(None)
    args = {"none": None, "native": swap_args(3, vace_blocks_to_swap=1)}
    for one in order:
        given = args[one] if isinstance(one, str) else arguments(one)
        assert torch.equal(workflow.sample(given), truth(variant)), one


@pytest.mark.parametrize("variant", ["fp32", "fp8_scaled", "gguf"])
def test_old_residents_and_new_weights_never_stand_side_by_side(bench: GateBench, variant: str) -> None:
    gc.collect()
    workflow = Workflow(stays(variant), device=DEVICE)
    workflow.load(arguments(None))
    before = allocated()
    first = sampled(workflow)
    in_use = allocated()
    assert in_use + sampled(workflow).peak <= before + first.peak + 4096


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("variant", ["fp32", "fp8_scaled", "gguf", "lora_merged", "vace", "beside", "compiled_whole"])
def test_a_model_that_stays_leaves_the_device_when_the_text_encoder_asks_for_it(
    bench: GateBench, variant: str, count: int | None
) -> None:
    workflow = Workflow(stays(variant), device=DEVICE)
    workflow.load(arguments(count))
    workflow.sample()
    beside = sum(one.nbytes for one in workflow.transformer.parameters()) - block_bytes(workflow.transformer)
    with torch.inference_mode(), measured(DEVICE) as cost:
        workflow.transformer.to("cpu")
    assert bench.run_of(workflow).session.device_bytes == 0
    assert cost.d2h_bytes <= beside + 4096
    assert torch.equal(workflow.sample(), truth(variant))


# Other packs


def test_a_pack_that_changes_weights_for_one_run_changes_them_for_no_other(bench: GateBench) -> None:
    workflow = bench.workflow("bf16", arguments(ALL))
    workflow.sample()
    done = []

    def double(model: Any, _: Any) -> None:
        if not done:
            done.append(True)
            for parameter in model.blocks.parameters():
                parameter.data = parameter.data * 2

    handle = workflow.transformer.register_forward_pre_hook(double)
    assert not torch.equal(workflow.sample(), truth("bf16"))
    handle.remove()
    assert torch.equal(workflow.sample(), truth("bf16"))


@pytest.mark.parametrize("variant", ["multitalk_lora_unmerged", "multitalk_gguf", "forcing_fp8_scaled", "fp32"])
@pytest.mark.parametrize("name", ["init_blockswap", "offload_transformer", "load_weights"])
def test_a_pack_that_has_wrapped_a_function_in_one_module_before_us_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, variant: str, name: str
) -> None:
    import standin.nodes_sampler as module

    called = []
    original = getattr(module, name)

    @functools.wraps(original)
    def theirs(*given: Any, **named: Any) -> Any:
        called.append(name)
        return original(*given, **named)

    monkeypatch.setattr(module, name, theirs)
    bench = GateBench()
    try:
        workflow = bench.workflow(variant, arguments(2))
        assert torch.equal(workflow.sample(), truth(variant))
        assert bench.run_of(workflow).session.adoptions >= 1
        assert called or variant.startswith("forcing")
    finally:
        bench.gate.restore()
    assert getattr(module, name) is theirs


def test_what_another_pack_puts_on_the_transformer_in_a_run_stays_and_ours_passes_on(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    seen = []

    def put(model: Any, _: Any) -> None:
        ours = model.forward
        assert isinstance(ours, Forward)

        def theirs(*given: Any, **named: Any) -> Any:
            seen.append(True)
            return ours(*given, **named)

        model.forward = theirs
        handle.remove()

    handle = workflow.transformer.register_forward_pre_hook(put)
    workflow.sample()
    theirs = vars(workflow.transformer)["forward"]
    assert not isinstance(theirs, Forward)
    for args in (None, swap_args(2), arguments(2)):
        assert torch.equal(workflow.sample(args), truth("fp32"))
    assert seen


def test_a_deep_copy_taken_in_a_run_computes_with_its_own_weights(bench: GateBench) -> None:
    workflow = Workflow(stays("fp32"), device=DEVICE)
    workflow.load(arguments(None))
    workflow.sample()
    copied = copy.deepcopy(workflow.transformer)
    assert isinstance(vars(workflow.transformer)["forward"], Forward)
    assert not isinstance(vars(copied)["forward"], Forward)
    assert vars(copied)["forward"].args[0] is copied


@pytest.mark.parametrize("variant", ["fp32", "compiled", "compiled_whole"])
def test_a_model_that_goes_while_it_is_on_the_device_takes_everything_along(bench: GateBench, variant: str) -> None:
    gc.collect()
    before = allocated()
    workflow = Workflow(stays(variant), device=DEVICE)
    workflow.load(arguments(2))
    workflow.sample()
    workflow.transformer.forward_of_another_pack = workflow.transformer.forward
    alive = weakref.ref(workflow.transformer)
    del workflow
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    assert allocated() <= before


def test_hooks_on_a_model_compiled_as_a_whole_are_called(bench: GateBench) -> None:
    workflow = bench.workflow("compiled_whole", arguments(2))
    seen = []
    workflow.transformer.register_forward_pre_hook(lambda *_: seen.append(True))
    workflow.sample()
    assert len(seen) == 6


def test_what_is_beside_the_blocks_of_a_model_compiled_as_a_whole_is_not_loaded_as_a_run_starts(
    bench: GateBench,
) -> None:
    runs = []
    for compiles in (None, "model"):
        workflow = Workflow(replace(standin.VARIANTS["beside"], compiles=compiles), device=DEVICE)
        workflow.load(arguments(ALL))
        runs.append(sampled(workflow))
    plain, whole = runs
    assert torch.equal(whole.latents, plain.latents)
    assert whole.h2d_bytes == plain.h2d_bytes
    assert whole.d2h_bytes == plain.d2h_bytes
    assert whole.peak == plain.peak


def test_weights_moved_to_the_device_between_forwards_leave_nothing_there(bench: GateBench) -> None:
    workflow = bench.workflow("lora_merged", arguments(ALL))
    workflow.sample()
    before = allocated()
    left = [2]

    def move(model: Any, _: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            model.to(DEVICE)

    handle = workflow.transformer.register_forward_pre_hook(move)
    assert torch.equal(workflow.sample(), truth("lora_merged"))
    handle.remove()
    assert torch.equal(workflow.sample(), truth("lora_merged"))
    gc.collect()
    assert allocated() <= before


def test_a_wrapper_that_was_loaded_again_is_noticed(bench: GateBench) -> None:
    import standin.utils as module

    assert bench.gate.is_whole
    importlib.reload(module)
    try:
        assert not bench.gate.is_whole
    finally:
        for name in ("offload_transformer", "init_blockswap"):
            setattr(module, name, vars(importlib.import_module("standin.nodes_sampler"))[name])


def test_a_failed_notice_does_not_cost_the_wrappers_own_offload(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    run = None

    def fail(_failure: BaseException | None = None) -> None:
        raise ZeroDivisionError

    def spoil(model: Any, _: Any) -> None:
        nonlocal run
        run = bench.run_of(workflow)
        monkeypatch.setattr(run, "release", fail)

    handle = workflow.transformer.register_forward_pre_hook(spoil)
    with pytest.raises(ZeroDivisionError):
        workflow.sample()
    handle.remove()
    monkeypatch.undo()
    outside = [p for name, p in workflow.transformer.named_parameters() if not name.startswith("blocks.")]
    assert {parameter.device.type for parameter in outside} == {"cpu"}
    assert torch.equal(workflow.sample(), truth("fp32"))


# Odd arguments


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"blocks_to_swap": 99}, "blocks_to_swap: expected a whole number from 0 to 48, got 99"),
        ({"debug_mode": 1}, "debug_mode: expected True or False, got 1; set the widget to such a value"),
        ([1, 2], "expected a mapping of settings, got list"),
    ],
)
@pytest.mark.parametrize("variant", ["fp32", "gguf", "lora_merged"])
def test_malformed_settings_are_refused_in_one_line_before_anything_is_moved(
    bench: GateBench, variant: str, ours: Any, said: str
) -> None:
    workflow = bench.workflow(variant, None)
    before = allocated()
    with pytest.raises(SettingsError, match=said):
        workflow.sample({**arguments(2), SETTINGS_KEY: ours})
    assert torch.equal(workflow.sample(), truth(variant))
    assert is_as_new(workflow.transformer)
    assert allocated() <= before


@pytest.mark.parametrize("ours", [None, {}, {"an_older": "key"}])
def test_settings_that_are_missing_or_of_another_version_have_their_defaults(bench: GateBench, ours: Any) -> None:
    workflow = bench.workflow("fp32", None)
    assert torch.equal(workflow.sample({**arguments(2), SETTINGS_KEY: ours}), truth("fp32"))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_run_with_cuda_graphs_is_refused_and_the_model_is_as_it_was(bench: GateBench, mode: str) -> None:
    workflow = bench.workflow("compiled", arguments(2))
    workflow.patchers[0].model["compile_args"]["mode"] = mode
    with pytest.raises(WrapperError, match="choose mode max-autotune-no-cudagraphs"):
        workflow.sample()
    assert is_as_new(workflow.transformer) or workflow.transformer.blocks_to_swap > 0
    workflow.patchers[0].model["compile_args"]["mode"] = None
    assert torch.equal(workflow.sample(), truth("compiled"))


def test_a_transformer_that_has_changed_is_told_by_what_it_lacks(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    del workflow.transformer.offload_device
    with pytest.raises((WrapperError, AttributeError), match="offload_device"):
        workflow.sample()


def test_merged_weights_get_no_count_of_ours_left_by_a_run_that_never_began(bench: GateBench) -> None:
    workflow = bench.workflow("lora_merged", None)
    workflow.transformer.blocks_to_swap = 10_000
    workflow.sample()
    assert is_as_new(workflow.transformer)


# Little memory


def test_slabs_of_a_model_whose_run_is_over_go_when_the_next_needs_the_hosts_memory(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = (bench.workflow("fp8_scaled", arguments(ALL)) for _ in range(2))
    first.sample()
    assert bench.run_of(first).session.slab_bytes > 0
    machine = type(bench.run_of(first).planner.machine)
    host = bench.run_of(first).planner.machine.host()
    scarce = replace(host, physical_bytes=1000, available_bytes=100)
    monkeypatch.setattr(machine, "host", lambda self: scarce if bench.run_of(first).session.slab_bytes else host)
    second.sample()
    assert bench.run_of(first).session.slab_bytes == 0
    assert any("a model whose run has ended is freed" in record.message for record in caplog.records)
    monkeypatch.undo()
    assert torch.equal(first.sample(), truth("fp8_scaled"))


def test_slabs_that_are_not_in_use_go_before_a_gguf_file_is_copied_into_memory_that_is_short(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (bench.workflow("gguf", arguments(ALL)) for _ in range(2))
    first.sample()
    run = bench.run_of(first)
    assert run.session.slab_bytes > 0
    host, held = run.planner.machine.host(), []
    scarce = replace(host, physical_bytes=1000, available_bytes=100)
    monkeypatch.setattr(type(run.planner.machine), "host", lambda self: scarce)
    read = nodes_model_loading._read_gguf
    monkeypatch.setattr(nodes_model_loading, "_read_gguf", lambda *of: held.append(run.session.slab_bytes) or read(*of))
    assert torch.equal(second.sample(), truth("gguf"))
    assert held
    assert not any(held)
    monkeypatch.undo()
    assert torch.equal(first.sample(), truth("gguf"))


def test_by_hand_hints_go_to_the_host_where_vace_blocks_are_swapped_and_stay_where_none_is(bench: GateBench) -> None:
    swapped, kept = (
        sampled(bench.workflow("vace", arguments(2))),
        sampled(bench.workflow("vace", arguments(2, vace_blocks_to_swap=0))),
    )
    hint = 48 * 32 * 4  # tokens x width x bytes, one for each VACE block, at each of six forwards
    assert swapped.d2h_bytes - kept.d2h_bytes >= VACE_BLOCKS * hint * 6


@pytest.mark.parametrize("room", [True, False])
def test_automatic_hints_go_to_the_host_where_the_plan_has_no_room_for_them(
    bench: GateBench,
    pretend_stats: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: bool,
) -> None:
    caplog.set_level(logging.INFO)
    expected = {True: 1_000 if room else 10_000_000, False: 1_000}
    monkeypatch.setattr(
        "wanvideo_enhanced_blockswap.blockswap.wrapper.workload.activation_bytes",
        lambda architecture, tokens, options: expected[options.vace_hints],
    )
    pretend_stats.set_memory_limit(2_000_000)
    workflow = bench.workflow("vace", arguments(None))
    cost = sampled(workflow)
    assert torch.equal(cost.latents, truth("vace"))
    assert bench.gate._gated[workflow.transformer].hints_to_host is not room
    assert any("hints of 2 VACE blocks go to RAM" in record.message for record in caplog.records) is not room
    plan = bench.run_of(workflow).plan
    assert plan is not None
    assert not plan.over_ceiling


def test_a_block_that_is_removed_between_runs_is_gone_and_in_a_run_is_one_error_with_what_to_do(
    bench: GateBench,
) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample()
    del workflow.transformer.blocks[1]
    plain = Workflow(standin.VARIANTS["fp32"], device=DEVICE)
    plain.load(None)
    del plain.transformer.blocks[1]
    assert torch.equal(workflow.sample(), plain.sample())
    forwards = []

    def remove(model: Any, _: Any) -> None:
        forwards.append(model)
        if len(forwards) == 2:
            del model.blocks[1]

    handle = workflow.transformer.register_forward_pre_hook(remove)
    said = rf"began with {BLOCKS - 1} blocks, and now the model has {BLOCKS - 2}: .* queue the prompt again"
    with pytest.raises(UnsupportedModelError, match=said):
        workflow.sample()
    handle.remove()
    del plain.transformer.blocks[1]
    assert torch.equal(workflow.sample(), plain.sample())


def _sees(model: Any, *_: Any) -> None:
    """A hook that holds the model."""


@pytest.mark.parametrize("closes", [False, True], ids=["alone", "held by a hook of its own block"])
def test_a_model_that_is_dropped_is_gone_whatever_its_blocks_hold(bench: GateBench, closes: bool) -> None:
    workflow = bench.workflow("fp32", arguments(ALL))
    if closes:
        workflow.transformer.blocks[0].register_forward_hook(functools.partial(_sees, workflow.transformer))
    workflow.sample()
    alive = weakref.ref(workflow.transformer)
    del workflow
    gc.collect()
    assert alive() is None
    assert len(bench.gate._gated) == 0
