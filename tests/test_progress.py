"""The progress of a run: the sentence, the figures, and when they are sent."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from run_bench import BLOCK, COUNT, LARGE_VIDEO, SMALL_VIDEO, Bench
from shown import planned, predicted, ran
from wanvideo_enhanced_blockswap.blockswap.engine.session import Holdings
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError, PlanError
from wanvideo_enhanced_blockswap.blockswap.host.pages import Locking
from wanvideo_enhanced_blockswap.blockswap.run.history import Workload
from wanvideo_enhanced_blockswap.blockswap.run.progress import (
    AdoptFigures,
    MemoryUse,
    Phase,
    Progress,
    failed,
)
from wanvideo_enhanced_blockswap.blockswap.run.report import Hint, Step
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import GIB, MIB

MEMORY = MemoryUse(total=12 * GIB, other=GIB, residents=4 * GIB, window=GIB // 2, ceiling=6 * GIB, activations=2 * GIB)
FREE = int(11.2 * GIB)
PLAN = planned(18, free=FREE)
RUN = replace(ran(17, 61 * GIB, forward_ms=1000.0, stall_ms=4.0), step=Step(9, 30), steps=9, forwards_per_step=2.0)
STAY = "22 blocks on the GPU, 18 streaming"


def sampling(**changes: Any) -> Progress:
    return Progress(phase=Phase.SAMPLING, memory=MEMORY, **{"plan": PLAN, "run": RUN, **changes})


# The sentence


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ({"plan": PLAN}, f"{STAY}."),
        ({"plan": PLAN, "predicted": predicted(0.0, 1000.0)}, f"{STAY}; expected: the GPU never waits."),
        ({"plan": PLAN, "predicted": predicted(0.4, 1000.0)}, f"{STAY}; expected: the GPU never waits."),
        (
            {"plan": PLAN, "predicted": predicted(31.0, 1000.0)},
            f"{STAY}; expected: the GPU waits 3.1% of the time for copies.",
        ),
        (
            {"plan": planned(18, free=FREE, over_ceiling=True)},
            f"{STAY}; this is more VRAM than is left for them.",
        ),
        ({"plan": planned(39, free=FREE)}, "1 block on the GPU, 39 streaming."),
        ({"plan": planned(0, free=FREE, slots=0), "predicted": predicted(0.0, 1000.0)}, "All 40 blocks on the GPU."),
        ({"plan": planned(40, free=FREE)}, "0 blocks on the GPU, 40 streaming."),
        (
            {"plan": replace(PLAN, beside=tuple(i in (0, 38, 39) for i in range(40)))},
            "21 blocks on the GPU, 16 streaming, with 2 other parts of the model.",
        ),
    ],
)
def test_a_plan_is_one_sentence(shown: dict[str, Any], said: str) -> None:
    assert Progress(phase=Phase.ADOPTING, **shown).text == said


@pytest.mark.parametrize(("placed", "told"), [(0, "0.0 GB"), (307 * MIB, "0.3 GB"), (int(12.3 * GIB), "12.3 GB")])
def test_adopting_tells_how_far_it_is_in_one_unit(placed: int, told: str) -> None:
    figures = AdoptFigures(placed=placed, all=26 * GIB, pinned=placed)
    said = Progress(phase=Phase.ADOPTING, plan=PLAN, adopt=figures).text
    assert said == f"{STAY}.\nPreparing the weights, on the GPU and in RAM: {told} of 26.0 GB."


PASSES = "1.0 s a pass of the model, the GPU waited 0.4% of the time for copies"
WAITED = "2.0 s a step, the GPU waited 0.4% of the time for copies"


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        (sampling(), f"Step 9 of 30: {WAITED}."),
        (sampling(run=replace(RUN, stall_ms=0.0)), "Step 9 of 30: 2.0 s a step, the GPU never waited."),
        (sampling(run=replace(RUN, step=Step(1, None))), f"Step 1: {WAITED}."),
        (sampling(run=replace(RUN, step=None, steps=0, forwards_per_step=None)), f"Pass 17 of the model: {PASSES}."),
        (sampling(run=ran(2, 17 * MIB)), "Pass 2 of the model."),
        (sampling(run=ran(0, 0)), "The first step is running."),
        (replace(sampling(), phase=Phase.DONE), f"Done after 9 steps: {WAITED}. VRAM is released."),
        (replace(sampling(), phase=Phase.STOPPED), f"Stopped after 9 steps: {WAITED}. VRAM is released."),
        (
            replace(sampling(run=ran(1, GIB)), phase=Phase.DONE),
            "Done after 1 pass of the model. VRAM is released.",
        ),
        (
            replace(sampling(run=ran(7, GIB)), phase=Phase.DONE),
            "Done after 7 passes of the model. VRAM is released.",
        ),
        (
            replace(sampling(), phase=Phase.DONE, hint=Hint(free_bytes=3 * GIB, percent=70, blocks=1, saved_ms=40.0)),
            f"Done after 9 steps: {WAITED}. VRAM is released.\n3.0 GB of VRAM stayed free: vram_threshold_percent 70 "
            "would keep 1 more block on the GPU and save about 40.0 ms a step.",
        ),
    ],
)
def test_a_run_tells_its_step_what_it_copied_and_how_long_it_waited(progress: Progress, said: str) -> None:
    assert progress.text == f"{STAY}.\n{said}"


def test_steps_that_stream_nothing_have_no_waiting_to_tell() -> None:
    assert sampling(plan=planned(0, free=FREE)).text.splitlines()[1] == "Step 9 of 30: 2.0 s a step."


def test_once_it_is_measured_how_long_the_gpu_waits_what_was_expected_is_not_told() -> None:
    for phase in (Phase.SAMPLING, Phase.DONE, Phase.STOPPED):
        told = replace(sampling(predicted=predicted(31.0, 1000.0)), phase=phase)
        assert ("expected" in told.text) == (phase is Phase.SAMPLING)
        assert "expected" in replace(told, run=replace(RUN, stall_ms=None)).text


def test_vram_that_ran_out_is_told_above_the_step() -> None:
    assert sampling(run=replace(RUN, ran_out_with=20)).text.splitlines()[1:] == [
        "VRAM ran out with 20 blocks on the GPU, so the step was repeated with less VRAM.",
        f"Step 9 of 30: {WAITED}.",
    ]


def test_why_nothing_is_swapped_is_all_the_text() -> None:
    assert (
        Progress(phase=Phase.OFF, why="the CPU computes from host memory").text == "the CPU computes from host memory"
    )


OTHERS = ("ran_out_with", "others", "movers")


def test_it_is_plain_data_with_every_part_named() -> None:
    hint = Hint(free_bytes=GIB, percent=70, blocks=1, saved_ms=40.0)
    told = json.loads(json.dumps(sampling(hint=hint).as_json()))
    assert set(told) == {"phase", "text", "memory", "plan", "adopt", "run", "hint", "error"}
    assert set(told["memory"]) == {"total", "other", "residents", "window", "ceiling", "activations"}
    assert set(told["plan"]) == {"blocks", "swapped", "parts", "stall_ms", "forward_ms", "over_ceiling"}
    assert set(told["run"]) == {"passes", "step", "steps", "forward_ms", "stall_ms", "each_ms", "each", *OTHERS}
    assert (told["phase"], told["adopt"]) == ("sampling", None)
    assert (told["run"]["step"], told["run"]["steps"], told["run"]["passes"]) == (9, 30, 17)
    assert told["hint"] == {"free_bytes": GIB, "percent": 70, "blocks": 1, "saved_ms": 40.0, "each": "step"}
    assert sampling(run=ran(2, 0)).as_json()["hint"] is None


def test_modules_beside_the_blocks_are_not_counted_as_blocks() -> None:
    plan = sampling(plan=replace(PLAN, beside=tuple(i in (0, 38, 39) for i in range(40)))).as_json()["plan"]
    assert isinstance(plan, dict)
    assert (plan["blocks"], plan["swapped"], plan["parts"]) == (37, 16, 2)


# A run


class Watcher:
    """Keeps what it receives."""

    def __init__(self, bench: Bench) -> None:
        self.told: list[Progress] = []
        bench.run.watcher = self.told.append

    def phases(self) -> list[Phase]:
        """Each once, as long as it lasted."""
        found: list[Phase] = []
        for progress in self.told:
            if not found or found[-1] is not progress.phase:
                found.append(progress.phase)
        return found

    def of(self, phase: Phase) -> list[Progress]:
        return [progress for progress in self.told if progress.phase is phase]


def test_a_run_is_told_from_its_plan_to_its_result() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.forward(times=4)
    bench.run.release()
    assert watcher.phases() == [Phase.ADOPTING, Phase.SAMPLING, Phase.DONE]
    assert [progress.run.forwards for progress in watcher.of(Phase.SAMPLING) if progress.run] == [0, 1, 2, 3, 4]


def test_adopting_counts_every_block_and_what_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Locking, "start", lambda _: None)  # as where the thread gets no core before it is waited for
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.forward()
    placed = [progress.adopt for progress in watcher.of(Phase.ADOPTING)]
    assert [adopt.placed for adopt in placed if adopt] == [i * placed[-1].all // COUNT for i in range(COUNT + 1)]
    pinned = [adopt.pinned for adopt in placed if adopt]
    assert pinned == sorted(pinned)
    assert pinned[-1] == bench.run.session.pinned_bytes > 0


def test_memory_is_the_plan_s_and_its_parts_fit_the_card() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.forward(times=3)
    assert bench.run.plan is not None
    for progress in watcher.told:
        memory = progress.memory
        assert memory is not None
        assert memory.residents + memory.window == bench.run.plan.device_bytes
        assert memory.other + memory.residents + memory.window <= memory.total
        assert memory.ceiling == memory.total // 2


def test_where_memory_ran_out_what_the_computation_needs_is_unknown_until_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    monkeypatch.setattr(type(bench.run._peak), "taken_bytes", lambda _: None)
    video = Workload(tokens=1, expected_activation_bytes=BLOCK // 4)
    bench.forward(video)
    expected = [progress.memory.activations for progress in watcher.told if progress.memory]
    bench.run.shrink("out of memory")
    bench.forward(video)
    bench.run.release()
    told = [progress.memory.activations for progress in watcher.told if progress.memory][len(expected) :]
    assert set(expected) == {BLOCK // 4}
    assert set(told) == {None}


def test_with_manual_tuning_no_limit_is_drawn() -> None:
    bench = Bench(4.5)
    bench.run.use(SwapSettings(auto_hardware_tuning=False, blocks_to_swap=6))
    watcher = Watcher(bench)
    bench.forward()
    assert {progress.memory.ceiling for progress in watcher.told if progress.memory} == {0}


def test_the_stall_is_told_once_it_was_measured_and_is_the_report_s() -> None:
    bench = Bench(4.5, compute_ms=0.1, link_ms=1.0)
    watcher = Watcher(bench)
    bench.forward(times=5)
    runs = [progress.run for progress in watcher.of(Phase.SAMPLING) if progress.run]
    assert [run.stall_ms for run in runs[:3]] == [None, None, None]
    bench.run.release()
    (done,) = watcher.of(Phase.DONE)
    report = bench.run.last_report
    assert done.run is not None
    assert report is not None
    assert (done.run.stall_ms, done.run.copy_bytes_per_s) == (
        report.measured.stall_ms,
        report.measured.copy_bytes_per_s,
    )
    assert done.run.stall_ms is not None
    assert done.run.stall_ms > 0
    assert done.run.onloaded_bytes == report.measured.onloaded_bytes


def test_a_plan_that_gives_way_is_told_again_and_forwards_count_on() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.forward(SMALL_VIDEO, times=2)
    bench.run.use(SwapSettings(auto_hardware_tuning=False, blocks_to_swap=6))
    bench.forward(LARGE_VIDEO)
    assert watcher.phases() == [Phase.ADOPTING, Phase.SAMPLING, Phase.ADOPTING, Phase.SAMPLING]
    last = watcher.told[-1]
    assert last.run is not None
    assert last.plan is not None
    assert (last.run.forwards, last.plan.swapped_count) == (3, 6)


def test_each_run_counts_from_its_own_begin() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    for _ in range(2):
        bench.forward(times=3)
        bench.run.release()
    assert [progress.run.forwards for progress in watcher.of(Phase.DONE) if progress.run] == [3, 3]


def test_a_plan_that_cannot_be_is_told_once_in_the_error_s_words() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.machine.others_bytes = bench.machine.total_bytes - BLOCK
    with pytest.raises(PlanError) as failure:
        bench.forward()
    assert watcher.told == []
    bench.run.release(failure.value)
    assert watcher.told == [failed(failure.value)]


def test_a_release_that_fails_is_told_in_the_error_s_words(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.forward(times=3)

    def fail(_: object) -> None:
        raise DeviceMemoryError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Holdings, "drop_device", fail)
        with pytest.raises(DeviceMemoryError):
            bench.run.release()
    assert watcher.phases() == [Phase.ADOPTING, Phase.SAMPLING, Phase.FAILED]
    assert watcher.told[-1] == failed(DeviceMemoryError("the device is gone"))


def test_a_run_without_a_forward_is_told_as_stopped() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.run.prepare(SMALL_VIDEO)
    bench.run.release()
    assert watcher.phases() == [Phase.ADOPTING, Phase.STOPPED]


def test_a_release_without_a_run_tells_nothing() -> None:
    bench = Bench(4.5)
    watcher = Watcher(bench)
    bench.run.release()
    assert watcher.told == []


def test_nobody_need_watch() -> None:
    bench = Bench(4.5)
    bench.forward(times=3)
    bench.run.release()
    assert bench.run.last_report is not None
