"""Device memory that runs out during a run: the run continues with a smaller plan, or an error says what would fit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import standin
import torch
from call_arguments import arguments_compared
from gate_bench import BLOCKS, GateBench, allocated, arguments, truth
from standin import Fault, InterruptProcessingException, Workflow
from wanvideo_enhanced_blockswap.blockswap.engine import session as session_module
from wanvideo_enhanced_blockswap.blockswap.engine.placer import Placer
from wanvideo_enhanced_blockswap.blockswap.engine.session import SessionState
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError
from wanvideo_enhanced_blockswap.blockswap.run.progress import Phase, Progress, failed

pytestmark = pytest.mark.usefixtures("pretend_device")

KINDS = ("fp32", "fp8_scaled", "gguf", "lora_merged", "lora_unmerged", "vace", "compiled", "forcing", "multitalk")
LARGER = "trying a smaller plan"


@pytest.fixture(autouse=True)
def _nothing_is_left_of_failures() -> Iterator[None]:
    """Failures that a test has caught hold what their frames held on the device until the collector comes."""
    yield
    gc.collect()


def once(block: int, forward: int = 0, *, times: int = 1) -> Fault:
    return Fault(block=block, forward=forward, error=torch.OutOfMemoryError, times=times)


def swapped(bench: GateBench, workflow: Workflow) -> int:
    plan = bench.run_of(workflow).plan
    assert plan is not None
    return plan.swapped_count


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("count", [1, None])
def test_a_forward_that_runs_out_of_memory_is_repeated_with_everything_swapped(
    bench: GateBench, variant: str, count: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    workflow = bench.workflow(variant, arguments(count))
    for forward, block in ((0, 0), (0, BLOCKS - 1), (1, 1), (3, 2)):
        assert torch.equal(workflow.sample(fault=once(block, forward)), truth(variant))
        assert bench.run_of(workflow).session.state is SessionState.IDLE
        assert bench.run_of(workflow).session.device_bytes == 0
        bench.run_of(workflow).planner.history.forgive()
    assert sum(LARGER in record.message for record in caplog.records) == 4


def test_the_smaller_plan_is_remembered_for_the_next_run_of_that_size(
    bench: GateBench, caplog: pytest.LogCaptureFixture
) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample(fault=once(1))
    caplog.clear()
    assert torch.equal(workflow.sample(), truth("fp32"))
    assert swapped(bench, workflow) == BLOCKS
    report = bench.run_of(workflow).report()
    assert report is not None
    assert "4 of 4 blocks are swapped, since the device ran out of memory with a larger plan" in report.plan.reasons[0]
    assert not any(LARGER in record.message for record in caplog.records)
    workflow.sample(frames=2)
    assert swapped(bench, workflow) == 2


def test_other_settings_are_tried_as_they_are(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample(fault=once(1))
    assert torch.equal(workflow.sample(arguments(1)), truth("fp32"))
    assert swapped(bench, workflow) == 1


def test_automatic_tuning_plans_anew_from_the_peak_that_the_repeated_forward_has_shown(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(None))
    assert torch.equal(workflow.sample(fault=once(1)), truth("fp32"))
    run = bench.run_of(workflow)
    assert run.report().measured.replans[0] == "VRAM ran out"
    assert run.report().measured.activation_bytes is not None
    assert torch.equal(workflow.sample(), truth("fp32"))
    assert swapped(bench, workflow) == 0
    # After a second refusal the peak is known and still too large: the plan stays small.
    assert torch.equal(workflow.sample(fault=once(1)), truth("fp32"))
    assert torch.equal(workflow.sample(), truth("fp32"))
    assert swapped(bench, workflow) == BLOCKS


def test_where_even_the_smallest_plan_fails_it_says_what_would_fit_and_the_next_run_works(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    with pytest.raises(DeviceMemoryError) as failure:
        workflow.sample(fault=once(1, times=2))
    said = str(failure.value)
    assert said.startswith("out of VRAM: computing this video takes ")
    assert ", with 0 blocks on the GPU; take about " in said
    assert isinstance(failure.value, torch.OutOfMemoryError)  # which ComfyUI knows
    assert "frames, or" in said
    assert "(the GPU reported: block 1 fails)" in said
    assert failure.value.__context__ is None  # nothing of the failed forward is held
    before = allocated()
    assert torch.equal(workflow.sample(), truth("fp32"))
    assert allocated() <= before


def ends_badly(bench: GateBench, how: str) -> Workflow:
    """A model whose run has ended with an error about memory."""
    variant = "teacache" if how == "not again" else "fp32"
    workflow = bench.workflow(variant, arguments(2))
    with pytest.raises(DeviceMemoryError):
        workflow.sample(fault=once(1, forward=2 if how == "not again" else 0, times=2))
    return workflow


@pytest.mark.parametrize("how", ["too large", "not again"])
def test_a_refused_video_does_not_burden_the_next_one(bench: GateBench, how: str) -> None:
    workflow = ends_badly(bench, how)
    workflow.sample(frames=2)
    assert swapped(bench, workflow) == 2
    report = bench.run_of(workflow).report()
    assert report is not None
    assert report.measured.replans == ()


@pytest.mark.parametrize("how", ["too large", "not again"])
def test_the_node_is_told_the_error_that_the_run_has_ended_with(bench: GateBench, how: str) -> None:
    workflow = bench.workflow("teacache" if how == "not again" else "fp32", arguments(2))
    workflow.sample()
    told: list[Progress] = []
    bench.run_of(workflow).watcher = told.append
    with pytest.raises(DeviceMemoryError) as failure:
        workflow.sample(fault=once(1, forward=2 if how == "not again" else 0, times=2))
    assert told[-1] == failed(failure.value)


def test_the_node_is_told_that_vram_ran_out_and_with_how_many_blocks_until_the_run_is_over(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(1))
    workflow.sample()
    told: list[Progress] = []
    bench.run_of(workflow).watcher = told.append
    workflow.sample(fault=once(1, forward=2))
    runs = [progress.run for progress in told if progress.run is not None]
    assert {run.ran_out_with for run in runs if run.forwards > 2} == {BLOCKS - 1}
    assert None in {run.ran_out_with for run in runs}
    assert told[-1].phase is Phase.DONE
    assert f"VRAM ran out with {BLOCKS - 1} blocks on the GPU" in told[-1].text
    workflow.sample()
    assert "VRAM ran out" not in told[-1].text


def refuse_device_memory(monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    """The next adopts get no device memory."""
    start, left = Placer.start, [True] * times

    def refuse(placer: Placer) -> None:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("no room")
        start(placer)

    monkeypatch.setattr(Placer, "start", refuse)


def test_memory_that_runs_out_while_blocks_are_placed_is_in_the_report_and_the_run_never_stopped(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample()
    told: list[Progress] = []
    bench.run_of(workflow).watcher = told.append
    refuse_device_memory(monkeypatch, times=1)
    assert torch.equal(workflow.sample(), truth("fp32"))
    report = bench.run_of(workflow).report()
    assert report is not None
    assert report.measured.replans == ("VRAM ran out",)
    assert Phase.FAILED not in {progress.phase for progress in told}


def test_a_run_that_cannot_place_its_blocks_is_stopped_once(bench: GateBench, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample()
    told: list[Progress] = []
    bench.run_of(workflow).watcher = told.append
    with monkeypatch.context() as patch:
        refuse_device_memory(patch, times=9)
        with pytest.raises(DeviceMemoryError) as failure:
            workflow.sample()
    assert [one for one in told if one.phase is Phase.FAILED] == [failed(failure.value)]
    assert torch.equal(workflow.sample(frames=2), workflow.sample(frames=2))
    report = bench.run_of(workflow).report()
    assert report is not None
    assert report.measured.replans == ()


def test_memory_that_runs_out_before_anything_is_planned_has_its_own_sentence(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = bench.workflow("fp32", arguments(2))

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(session_module, "profile_model", refuse)
        with pytest.raises(DeviceMemoryError, match="out of VRAM before the first step; close other programs"):
            workflow.sample()
    assert torch.equal(workflow.sample(), truth("fp32"))


@pytest.mark.parametrize("error", [InterruptProcessingException, RuntimeError])
def test_slabs_that_are_not_to_be_kept_go_after_a_run_that_failed_as_well(
    bench: GateBench, error: type[BaseException]
) -> None:
    bench.gate._keeps_slabs = lambda: False
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample()
    assert bench.run_of(workflow).session.slab_bytes == 0
    with pytest.raises(error):
        workflow.sample(fault=Fault(block=2, forward=1, error=error))
    assert bench.run_of(workflow).session.slab_bytes == 0


def test_a_plan_may_grow_again_once_others_have_given_memory_back(
    bench: GateBench, pretend_stats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [1 << 20]
    monkeypatch.setattr(type(pretend_stats), "mem_get_info", lambda self, device=None: (free[0], 1 << 34))
    workflow = bench.workflow("fp32", arguments(2))
    workflow.sample(fault=once(1))
    workflow.sample()
    assert swapped(bench, workflow) == BLOCKS
    free[0] = 1 << 21
    assert torch.equal(workflow.sample(), truth("fp32"))
    assert swapped(bench, workflow) == 2


def test_a_forward_that_another_pack_has_changed_is_not_repeated(
    bench: GateBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    kind = type(workflow.transformer)
    plain = kind.forward

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        return plain(self, *given, **named)

    monkeypatch.setattr(kind, "forward", counting)
    with pytest.raises(DeviceMemoryError, match="another pack has changed how the model runs"):
        workflow.sample(fault=once(1))
    monkeypatch.undo()
    handle = workflow.transformer.blocks[0].register_forward_hook(lambda *_: None)
    bench.run_of(workflow).planner.history.forgive()
    with pytest.raises(DeviceMemoryError, match="another pack has hooks on the model's blocks"):
        workflow.sample(fault=once(1))
    handle.remove()
    assert torch.equal(workflow.sample(), truth("fp32"))


def test_a_step_cache_that_does_not_act_in_this_step_keeps_nothing_from_being_repeated(bench: GateBench) -> None:
    workflow = bench.workflow("teacache", arguments(2))
    workflow.transformer.teacache_start_step, workflow.transformer.teacache_end_step = 1, -1
    assert torch.equal(workflow.sample(fault=once(1)), truth("teacache"))


@pytest.mark.parametrize(
    ("variant", "cache"), [("teacache", "TeaCache"), ("magcache", "MagCache"), ("easycache", "EasyCache")]
)
def test_a_forward_with_a_step_cache_is_not_repeated_and_the_next_run_has_the_smaller_plan(
    bench: GateBench, variant: str, cache: str
) -> None:
    workflow = bench.workflow(variant, arguments(2))
    with pytest.raises(
        DeviceMemoryError, match=f"cannot be repeated, since {cache} keeps state from one step to the next"
    ):
        workflow.sample(fault=once(1, forward=2))
    assert torch.equal(workflow.sample(), truth(variant))
    assert swapped(bench, workflow) == BLOCKS


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("variant", standin.VARIANTS)
def test_a_forward_leaves_its_arguments_alone_so_that_it_can_be_repeated(
    bench: GateBench, variant: str, count: int | None
) -> None:
    workflow = bench.workflow(variant, arguments(count))
    with arguments_compared(workflow.transformer) as kept:
        workflow.sample()
    assert kept
    assert all(kept)


def test_an_argument_that_is_edited_in_a_forward_would_be_seen(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", None)
    given: list[Any] = []
    with arguments_compared(workflow.transformer) as kept:
        workflow.transformer.register_forward_pre_hook(
            lambda model, arguments, keywords: given.append(keywords["x"][0]), with_kwargs=True
        )
        workflow.transformer.blocks[0].register_forward_pre_hook(lambda *_: given[-1].add_(1) is None or None)
        workflow.sample()
    assert kept
    assert not any(kept)


def test_an_error_that_is_none_of_memory_is_not_swallowed(bench: GateBench) -> None:
    workflow = bench.workflow("fp32", arguments(2))
    with pytest.raises(RuntimeError, match="block 1 fails"):
        workflow.sample(fault=Fault(block=1, times=1))


# The device's own memory


def peak_of(bench: GateBench, count: int | None, pretend_stats: Any) -> int:
    workflow = bench.workflow("fp32", arguments(count))
    pretend_stats.reset_peak_memory_stats()
    workflow.sample()
    return int(pretend_stats.max_memory_allocated())


def test_a_card_that_is_smaller_than_it_says_is_got_along_with(
    bench: GateBench, pretend_stats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pretend_stats), "mem_get_info", lambda self, device=None: (1 << 34, 1 << 34))
    most, least = peak_of(bench, 1, pretend_stats), peak_of(bench, BLOCKS, pretend_stats)
    assert least < most
    for limit in range(most - 1, least, -(most - least) // 5):
        workflow = bench.workflow("fp32", arguments(1))
        pretend_stats.set_memory_limit(limit)
        assert torch.equal(workflow.sample(), truth("fp32")), limit
        pretend_stats.set_memory_limit(None)
