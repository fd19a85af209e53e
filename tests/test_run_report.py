"""The output of a run: its report, its log, its trace, and its watcher."""

from __future__ import annotations

import gc
import json
import logging
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from run_bench import BLOCK, COUNT, Bench, CountingSampler, interrupt
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.run.progress import Progress
from wanvideo_enhanced_blockswap.blockswap.run.report import Step
from wanvideo_enhanced_blockswap.blockswap.run.text import pass_time, summary
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings


def test_the_report_sets_what_came_beside_what_was_predicted() -> None:
    bench = Bench(room=5, link_ms=0.8)
    bench.forward(times=5)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    plan, measured = report.plan, report.measured
    assert (measured.forwards, measured.empty_forwards, measured.timed_forwards) == (5, 0, 2)
    assert measured.weight_bytes == plan.device_bytes
    assert measured.returned_bytes == 0
    # Five forwards, and the window that was prefetched for a sixth.
    assert measured.onloaded_bytes == BLOCK * (5 * plan.swapped_count + plan.slots)
    assert measured.slab_bytes == plan.slab_bytes
    assert measured.pinned_bytes == plan.pinned_bytes
    assert report.prediction is not None
    assert measured.forward_ms == pytest.approx(report.prediction.elapsed)
    assert measured.copy_bytes_per_s == pytest.approx(bench.machine.link_speed)
    assert [times.compute_ms for times in measured.blocks] == [pytest.approx(1.0)] * COUNT
    assert all((times.copy_ms is not None) == times.swapped for times in measured.blocks)


def test_each_run_counts_for_itself_and_the_forwards_of_all_its_plans_count() -> None:
    bench = Bench(room=5)
    bench.forward(times=3)
    bench.run.release()
    bench.forward(times=2)
    bench.machine.others_bytes = 2 * BLOCK
    bench.forward(times=2)
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert (report.measured.forwards, len(report.measured.replans)) == (4, 1)
    assert report.measured.onloaded_bytes < BLOCK * COUNT * 6


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def test_a_summary_of_at_most_12_lines_is_logged_when_a_run_is_over_and_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    bench.forward(times=4)
    bench.run.release()
    bench.run.release()
    (said,) = [text for text in logged(caplog) if text.startswith("\nWanVideo Enhanced BlockSwap, run ")]
    assert 3 < len(said.splitlines()[1:]) <= 12
    assert re.match(
        r"\nWanVideo Enhanced BlockSwap, run 1, \d\d:\d\d: 4 passes of the model; Model on RTX 4090\n", said
    )
    assert "\nblocks: 3 blocks on the GPU, 5 streaming\n" in said


def test_a_plan_is_logged_once_in_a_run_in_at_most_three_lines_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    for _ in range(2):
        caplog.clear()
        bench.forward(times=4)
        (said,) = logged(caplog)
        first, head, *others = said.split("\n")  # a progress bar may have begun the first line
        assert first == ""
        assert head.startswith("WanVideo Enhanced BlockSwap on RTX 4090: 3 blocks on the GPU, 5 streaming")
        assert len(others) == 1
        bench.run.release()


@pytest.mark.parametrize("count", [2, 5, 99])
def test_with_a_remark_it_is_three_lines(caplog: pytest.LogCaptureFixture, count: int) -> None:
    caplog.set_level(logging.INFO)
    settings = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=min(count, 48), enable_dram_optimization=False)
    Bench(room=5, settings=settings).forward()
    (said,) = logged(caplog)
    assert len(said.splitlines()) == 4
    assert said.startswith("\nWanVideo Enhanced BlockSwap on ")


def test_a_change_of_plan_is_one_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    bench.forward(times=3)
    caplog.clear()
    bench.machine.others_bytes = 2 * BLOCK
    bench.forward()
    (memory,) = logged(caplog)
    caplog.clear()
    bench.run.use(SwapSettings(auto_hardware_tuning=False, blocks_to_swap=8))
    bench.forward()
    (settings,) = logged(caplog)
    assert re.fullmatch(
        r"\nanother plan: \d blocks? on the GPU, \d streaming; the weights take .* left for them now", memory
    )
    assert settings == "\nanother plan: 0 blocks on the GPU, 8 streaming; the settings have changed"
    bench.run.release()
    report = bench.run.last_report
    assert report is not None
    assert [text.rpartition("; ")[2] for text in (memory, settings)] == list(report.measured.replans)


DETAILS = re.compile(r"\b(tiers?|link|streams?|slots?|stall|page-locked|pinned|Auto configuration)\b")


def test_details_are_in_the_log_in_debug_mode_alone(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    found = {}
    for is_debug in (False, True):
        caplog.clear()
        bench = Bench(room=5, settings=SwapSettings(debug_mode=is_debug), link_ms=3.0, pin_bytes=0, trace_dir=tmp_path)
        bench.forward(times=4)
        bench.run.release()
        found[is_debug] = "\n".join(logged(caplog))
    assert DETAILS.findall(found[False]) == []
    assert {"link", "streams", "slots", "stall", "Auto configuration"} <= set(DETAILS.findall(found[True]))


@pytest.mark.parametrize("forwards", [0, 3])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("the sampler failed\nin two lines")])
def test_a_run_that_fails_says_so_with_its_number_and_time_in_the_first_line(
    caplog: pytest.LogCaptureFixture, forwards: int, failure: BaseException
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    bench.forward()
    bench.run.release()
    caplog.clear()
    bench.forward(times=forwards)
    handle = bench.model.blocks[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.forward()
    handle.remove()
    bench.run.release(failure)
    said = logged(caplog)[-1].splitlines()[1].removeprefix("WanVideo Enhanced BlockSwap, ")
    when = "before the first step" if forwards == 0 else "after 3 passes of the model"
    how = f"FAILED {when}: {' '.join(str(failure).split())}"
    if isinstance(failure, KeyboardInterrupt):
        how = f"stopped {when}; Model on RTX 4090"
    assert re.fullmatch(rf"run 2, \d\d:\d\d: {re.escape(how)}", said)
    report = bench.run.last_report
    assert report is not None
    assert report.hint is None
    assert summary(report).splitlines()[0] == said
    bench.forward()
    bench.run.release()
    assert bench.run.last_report is not None
    assert re.match(r"run 3, \d\d:\d\d: 1 pass of the model; ", summary(bench.run.last_report))


def timed(bench: Bench, *steps: int) -> list[tuple[float, str] | None]:
    """What is told of the time of a step, after each forward of these steps, and at the end of the run."""
    told: list[Progress] = []
    bench.run.watcher = told.append
    for number in steps:
        bench.forward(step=Step(number, max(steps)))
    bench.run.release()
    runs = [progress.run for progress in told if progress.run is not None and progress.run.forwards]
    return [pass_time(replace(run, forward_ms=10.0)) for run in runs]


def test_a_step_is_as_long_as_those_that_are_finished_however_many_passes_each_has() -> None:
    bench = Bench(room=5)
    windows = [1] * 24 + [2] * 24
    assert timed(bench, *windows) == [(10.0, "pass")] * 24 + [(240.0, "step")] * 25
    guided_at_first = [1, 1, 2, 2, 3, 4, 5]
    assert timed(bench, *guided_at_first)[-1] == (pytest.approx(14.0), "step")
    assert timed(bench, 1, 2, 3) == [(10.0, "pass"), *[(10.0, "step")] * 3]


def test_steps_of_all_rounds_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5)
    for _ in range(2):  # as for two windows of a long video
        for step in (Step(1, None), Step(2, 3), Step(3, 3)):
            bench.forward(times=2, step=step)
    report = bench.run.report()
    assert report is not None
    assert (report.measured.forwards, report.measured.steps, report.measured.step) == (12, 6, Step(3, 3))
    bench.run.release()
    assert re.match(r"\nWanVideo Enhanced BlockSwap, run 1, \d\d:\d\d: 6 steps; ", logged(caplog)[-1])


def test_the_details_tell_the_tiers_limit_and_the_links_choice_unless_the_streams_were_given() -> None:
    settings = {
        "automatic": SwapSettings(),
        "by hand": SwapSettings(auto_hardware_tuning=False, blocks_to_swap=5, num_cuda_streams=4),
    }
    said = {}
    for name, chosen in settings.items():
        bench = Bench(room=5, settings=chosen)
        bench.forward(times=4)
        bench.run.release()
        assert bench.run.last_report is not None
        lines = summary(bench.run.last_report, details=True).splitlines()
        said[name] = [text for text in lines if text.startswith(("- limits", "- link"))]
    tier, link = said["automatic"]
    assert tier.startswith("- limits of RTX 5090/4090: at most 16 streams, 90% of what is available, since RTX 4090")
    assert re.fullmatch(r"- link: \d+\.\d MB/s with 1 stream", link)
    assert said["by hand"] == []


def test_debug_mode_logs_the_briefs_lines_a_table_of_blocks_and_writes_a_trace(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True), trace_dir=tmp_path)
    bench.forward(times=4)
    bench.run.release()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "Auto configuration completed:\n   Model: 6,152 parameters, 0.0MB, 8 layers\n   VRAM: 0.0/0.0MB" in text
    assert "Config: blocks_to_swap=5, streams=1, ratio=90%" in text
    assert re.search(r"blocks\.7 +pinned +1\.0", text)
    (file,) = tmp_path.iterdir()
    events = json.loads(file.read_text())["traceEvents"]
    assert sum(event.get("cat") == "forward" for event in events) == 4
    assert bench.run.last_report is not None
    assert bench.run.last_report.notes == (f"trace: {file}",)


def test_a_trace_that_cannot_be_written_is_a_note_and_no_failure(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    bench = Bench(room=5, settings=SwapSettings(debug_mode=True), trace_dir=in_the_way)
    bench.forward(times=4)
    bench.run.release()
    assert bench.run.last_report is not None
    assert str(in_the_way) in bench.run.last_report.notes[0]


def test_the_device_is_watched_from_the_first_forward_to_the_release_and_no_thread_is_left() -> None:
    bench = Bench(room=5, sampler=CountingSampler())
    before = threading.active_count()
    for _ in range(2):
        bench.forward(times=2)
        assert threading.active_count() == before + 1
        bench.run.release()
        assert threading.active_count() == before
        assert bench.run.last_report is not None
        samples = bench.run.last_report.measured.samples
        assert samples is not None
        assert (samples.gpu_percent_max, samples.vram_used_peak_bytes) == (80.0, 3 * BLOCK)


@pytest.mark.parametrize("end", ["close", "drop", "fail"])
def test_no_thread_is_left_however_a_run_ends(end: str) -> None:
    before = threading.active_count()
    bench = Bench(room=5, sampler=CountingSampler())
    bench.forward()
    if end == "close":
        bench.run.close()
    elif end == "drop":
        del bench.run
        gc.collect()
    else:
        bench.model.blocks[4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench.forward()
        bench.run.release()
    assert threading.active_count() == before


def test_a_plan_that_is_refused_starts_no_thread() -> None:
    bench = Bench(room=5, sampler=CountingSampler())
    before = threading.active_count()
    bench.machine.others_bytes = bench.machine.total_bytes
    with pytest.raises(PlanError):
        bench.forward()
    assert threading.active_count() == before
    bench.machine.others_bytes = 0
    bench.forward()
    bench.run.close()
