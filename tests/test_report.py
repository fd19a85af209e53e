"""The report as text and as JSON, and the lines that it omits."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from test_plan import asking
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from wanvideo_enhanced_blockswap.blockswap.plan.budget import MemoryBudget
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import ForwardTime
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.report import BlockTimes, Hint, Measured, RunReport, Step
from wanvideo_enhanced_blockswap.blockswap.run.text import ModelSize, block_table, configuration_lines, summary
from wanvideo_enhanced_blockswap.hardware import DeviceMemory, HostMemory, HostPlatform, Samples
from wanvideo_enhanced_blockswap.hardware.units import GIB, MIB

BRIEF = """\
Auto configuration completed:
   Model: 1,234,567,890 parameters, 4610.4MB, 24 layers
   VRAM: 2048.0/32606.6MB (6.3%)
   DRAM: 26123.4/65379.6MB (usage 39.9%)
   Config: blocks_to_swap=0, streams=16, ratio=90%
Model can be fully loaded into VRAM, no DRAM needed
"""


def plan(blocks: int = 4, swapped: int = 2, **changes: Any) -> SwapPlan:
    """A plan of blocks of 8 MB, apart from what is changed."""
    profile = ModelProfile(
        tuple(BlockProfile(f"blocks.{i}", (TensorProfile("w", 8 * MIB, Placement.STREAMED),)) for i in range(blocks))
    )
    much = 1 << 50
    budget = MemoryBudget(
        weight_bytes=much, limit_bytes=much, host_bytes=much, host_limit_bytes=much, reason="as tested"
    )
    return replace(make_plan(profile, asking(blocks_to_swap=swapped, slots=1), budget), **changes)


SWAPPED = plan(
    40,
    20,
    slots=2,
    slot_bytes=333 * MIB,
    streams=4,
    device_bytes=7 * GIB,
    streamed_bytes=7_000_000_000,
    tuning=(
        "limits of RTX 5090/4090: at most 16 streams, 90% of what is available, since NVIDIA GeForce RTX 4090 is in "
        "the table of GPUs",
        "link: 25.0 GB/s with 4 streams, as fast as with up to 16",
    ),
    tiers=tuple((HostTier.PINNED if i < 36 else HostTier.STAGED) if i % 2 else None for i in range(40)),
)
SAMPLES = Samples(
    count=120,
    gpu_percent_mean=93.4,
    gpu_percent_max=100.0,
    vram_used_peak_bytes=11 * GIB,
    rss_peak_bytes=30 * GIB,
    host_available_least_bytes=20 * GIB,
)
MEASURED = Measured(
    forwards=40,
    step=Step(20, 20),
    steps=20,
    empty_forwards=4,
    timed_forwards=2,
    forward_ms=1250.0,
    stall_ms=12.5,
    onloads=821,
    onloaded_bytes=287_350_000_000,
    placed_bytes=6_900_000_000,
    returned_bytes=0,
    copy_bytes_per_s=24.1e9,
    weight_bytes=7 * GIB,
    activation_bytes=2 * GIB,
    slab_bytes=14 * GIB,
    pinned_bytes=13 * GIB,
    anonymous_bytes=GIB,
    refusals=("not enough locked RAM allowed for a block: 100 bytes needed, 10 left",),
    replans=("the settings have changed",),
    blocks=tuple(BlockTimes(name=f"blocks.{i}", swapped=bool(i % 2), compute_ms=30.0) for i in range(40)),
    samples=SAMPLES,
)
FULL = RunReport(
    title="Wan2_1-T2V-14B_fp8 on NVIDIA GeForce RTX 4090",
    plan=SWAPPED,
    prediction=ForwardTime(elapsed=1200.0, compute=1200.0, stall=6.0, transferred=290.0, onloads=20.0),
    activation_bytes=3 * GIB,
    link_bytes_per_s=25e9,
    measured=MEASURED,
    hint=Hint(free_bytes=2 * GIB, percent=70, blocks=5, saved_ms=1200.0),
    number=3,
    ended=datetime(2026, 1, 2, 14, 5),
    notes=("the trace is in traces/trace.json",),
)
BARE = RunReport(
    title="toy on cpu",
    plan=plan(4, 0),
    measured=Measured(
        forwards=1,
        onloads=0,
        onloaded_bytes=0,
        placed_bytes=32 * MIB,
        returned_bytes=0,
        weight_bytes=None,
        slab_bytes=0,
        pinned_bytes=0,
    ),
)


def changed(**changes: Any) -> RunReport:
    """FULL with other measurements."""
    return replace(FULL, measured=replace(MEASURED, **changes))


def line(report: RunReport, begin: str) -> str:
    """The line of the summary that starts with these words; empty if there is none."""
    found = [text for text in summary(report).splitlines() if text.startswith(begin)]
    assert len(found) <= 1
    return "".join(found)


def test_a_summary_puts_what_was_expected_beside_what_was_measured() -> None:
    assert summary(FULL) == (
        "run 3, 14:05: 20 steps; Wan2_1-T2V-14B_fp8 on NVIDIA GeForce RTX 4090\n"
        "blocks: 20 blocks on the GPU, 20 streaming\n"
        "waiting: the GPU waited 1.0% of the time for copies (expected: 0.5%)\n"
        "hint: 2.0 GB of VRAM stayed free: vram_threshold_percent 70 would keep 5 more blocks on the GPU and save "
        "about 1.2 s a step.\n"
        "passes of the model: 40, 1.2 s each, 1.2 s expected\n"
        "VRAM for the blocks: 7.0 GB planned, 7.0 GB measured\n"
        "VRAM for the computation: 3.0 GB expected, 2.0 GB measured\n"
        "copied to the GPU: 6.4 GB once, 6.7 GB in each pass at 24.1 GB/s (possible: 25.0 GB/s); back: nothing\n"
        "RAM: 14.0 GB for streaming, 13.0 GB of it locked; the system did not let all of it be locked, so copies are "
        "slower\n"
        "in use at most: 11.0 GB of VRAM, 30.0 GB of RAM by ComfyUI; RAM left at least: 20.0 GB; GPU busy 93 %\n"
        "plan changed: the settings have changed\n"
        "note: the trace is in traces/trace.json"
    )


def test_details_are_for_people_who_know_how_it_works_and_come_last() -> None:
    short, long = summary(FULL), summary(FULL, details=True)
    assert long.removeprefix(short) == (
        "\ndetails:\n"
        "- 20 of 40 modules swapped (18 pinned, 2 staged), 2 slots of 333.0 MB, 4 copy streams\n"
        "- limits of RTX 5090/4090: at most 16 streams, 90% of what is available, since NVIDIA GeForce RTX 4090 is in "
        "the table of GPUs\n"
        "- link: 25.0 GB/s with 4 streams, as fast as with up to 16\n"
        "- 4 forwards ran no block\n"
        "- stall per forward: 12.5 ms in 2 timed forwards, 6.0 ms predicted\n"
        "- not page-locked: not enough locked RAM allowed for a block: 100 bytes needed, 10 left\n"
        "- 120 samples"
    )


def test_where_nothing_is_swapped_there_are_no_details_of_swapping() -> None:
    assert summary(BARE, details=True) == summary(BARE)


def test_a_summary_has_at_most_12_lines_whatever_the_texts_hold() -> None:
    many = tuple(f"reason {i}\nover two lines" for i in range(50))
    report = replace(changed(refusals=many, replans=many), title="two\nlines", notes=many)
    report = replace(report, plan=replace(SWAPPED, tuning=many))
    assert len(summary(report).splitlines()) == 12
    assert len(summary(replace(report, failure="two\nlines")).splitlines()) == 12


def test_what_did_not_happen_or_is_not_known_is_left_out() -> None:
    assert summary(BARE) == (
        "run 1: 1 pass of the model; toy on cpu\n"
        "blocks: all 4 blocks on the GPU\n"
        "passes of the model: 1\n"
        "VRAM for the blocks: 32.0 MB planned\n"
        "copied to the GPU: 32.0 MB once; back: nothing"
    )


@pytest.mark.parametrize(
    ("changes", "failure", "head"),
    [
        ({}, "out of VRAM:\n12 GB", "run 3, 14:05: FAILED after 20 steps: out of VRAM: 12 GB"),
        ({"steps": 1}, "stopped", "run 3, 14:05: FAILED after 1 step: stopped"),
        ({"steps": 0}, "stopped", "run 3, 14:05: FAILED after 40 passes of the model: stopped"),
        ({"steps": 0, "forwards": 0}, "stopped", "run 3, 14:05: FAILED before the first step: stopped"),
        (
            {"steps": 0, "forwards": 0},
            "",
            "run 3, 14:05: nothing has run; Wan2_1-T2V-14B_fp8 on NVIDIA GeForce RTX 4090",
        ),
    ],
)
def test_the_first_line_says_which_run_it_was_when_and_how_it_ended(
    changes: dict[str, Any], failure: str, head: str
) -> None:
    assert summary(replace(changed(**changes), failure=failure)).splitlines()[0] == head


def test_a_run_that_lasts_has_no_time_of_its_end() -> None:
    assert summary(replace(FULL, ended=None)).startswith("run 3: 20 steps; ")


def test_a_summary_never_says_unknown_or_none() -> None:
    nothing_known = replace(
        FULL,
        prediction=None,
        activation_bytes=None,
        link_bytes_per_s=None,
        measured=replace(
            MEASURED,
            forward_ms=None,
            stall_ms=None,
            copy_bytes_per_s=None,
            weight_bytes=None,
            activation_bytes=None,
            samples=replace(
                SAMPLES,
                gpu_percent_mean=None,
                gpu_percent_max=None,
                vram_used_peak_bytes=None,
                rss_peak_bytes=None,
                host_available_least_bytes=None,
            ),
        ),
    )
    assert not {"unknown", "none"} & set(summary(nothing_known).lower().replace(",", " ").split())
    for begin in ("waiting", "VRAM for the computation", "in use", "GPU busy"):
        assert line(nothing_known, begin) == "", begin


def test_weights_above_the_plan_are_told() -> None:
    report = changed(weight_bytes=7 * GIB + 1536)
    assert line(report, "VRAM for the blocks").endswith("7.0 GB measured, 1.5 KB more than planned")


def test_a_plan_above_its_budget_says_so() -> None:
    report = replace(FULL, plan=replace(SWAPPED, over_ceiling=True, budget_bytes=6 * GIB))
    assert line(report, "VRAM for the blocks").endswith("7.0 GB measured; 6.0 GB were left for them")


def test_what_is_copied_back_is_always_said() -> None:
    assert line(FULL, "copied").endswith("back: nothing")
    assert line(changed(returned_bytes=2048), "copied").endswith("back: 2.0 KB that the model changed, no weights")


def test_a_run_without_a_single_forward_divides_nothing_by_it() -> None:
    report = changed(forwards=0, forward_ms=None, stall_ms=None, timed_forwards=0)
    assert line(report, "passes") == "passes of the model: 0, 1.2 s expected"
    assert line(report, "copied").startswith("copied to the GPU: 6.4 GB once at 24.1 GB/s")


@pytest.mark.parametrize(
    ("changes", "prediction", "said"),
    [
        ({"forward_ms": None}, FULL.prediction, "waiting, expected: the GPU waits 0.5% of the time for copies"),
        ({"forward_ms": 0.0}, None, ""),
        ({}, None, "waiting: the GPU waited 1.0% of the time for copies"),
        ({"stall_ms": 0.0}, FULL.prediction, "waiting: the GPU never waited (expected: 0.5%)"),
        # 0.05 % is the least that is shown
        ({"stall_ms": 0.0005 * 1250}, None, "waiting: the GPU waited 0.1% of the time for copies"),
        ({"stall_ms": 0.00049 * 1250}, None, "waiting: the GPU never waited"),
        (
            {},
            replace(FULL.prediction, stall=0.0),
            "waiting: the GPU waited 1.0% of the time for copies (expected: never)",
        ),
        (
            {},
            replace(FULL.prediction, elapsed=0.0),
            "waiting: the GPU waited 1.0% of the time for copies (expected: never)",
        ),
    ],
)
def test_a_share_of_the_time_is_told_where_both_are_known(
    changes: dict[str, Any], prediction: ForwardTime | None, said: str
) -> None:
    assert line(replace(changed(**changes), prediction=prediction), "waiting") == said


def test_copies_on_the_compute_stream_are_named_instead_of_their_number() -> None:
    report = replace(FULL, plan=replace(SWAPPED, overlap=False, slots=1, streams=1))
    assert ", 1 slot of 333.0 MB, no overlap\n" in summary(report, details=True)


def test_the_same_text_is_named_once_with_how_often_it_came() -> None:
    assert line(changed(replans=("a", "b", "a")), "plan changed") == "plan changed: a (2 times); b"


def test_of_many_texts_the_first_are_named_and_the_others_counted() -> None:
    assert line(replace(FULL, notes=tuple("abcde")), "note") == "note: a; b; c; and 2 more"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"slab_bytes": 0, "pinned_bytes": GIB, "file_bytes": 9 * GIB},
            "9.0 GB read from the model's file in each pass",
        ),
        ({"pinned_bytes": 14 * GIB}, "14.0 GB for streaming, locked"),
        ({"pinned_bytes": 0}, "14.0 GB for streaming, not locked"),
        (
            {"file_bytes": GIB},
            "14.0 GB for streaming, 13.0 GB of it locked; 1.0 GB read from the model's file in each pass",
        ),
    ],
)
def test_where_the_streaming_blocks_are_is_one_line(changes: dict[str, Any], said: str) -> None:
    assert line(changed(refusals=(), **changes), "RAM: ") == f"RAM: {said}"


def test_a_refusal_to_lock_is_said_without_details_and_its_reason_with_them() -> None:
    report = changed(refusals=("a",), slab_bytes=0, pinned_bytes=0)
    assert line(report, "RAM: ") == "RAM: the system did not let all of it be locked, so copies are slower"
    assert "- not page-locked: a\n" in summary(report, details=True)


def test_streams_that_were_not_chosen_by_the_link_have_no_line_on_tuning() -> None:
    assert "tier" not in summary(replace(FULL, plan=replace(SWAPPED, tuning=())), details=True)


def test_times_of_some_blocks_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="times of all 40 blocks of the plan or of none, got 39"):
        changed(blocks=MEASURED.blocks[1:])


def json_types(value: object) -> set[type]:
    """Every type in a nest of dictionaries and lists."""
    if isinstance(value, dict):
        return {dict, *(type(key) for key in value), *(t for part in value.values() for t in json_types(part))}
    if isinstance(value, list):
        return {list, *(t for part in value for t in json_types(part))}
    return {type(value)}


def test_the_table_has_a_line_for_each_block_and_one_for_all() -> None:
    times = (
        BlockTimes(name="blocks.0", swapped=False, compute_ms=1000.0),
        BlockTimes(name="blocks.1", swapped=True, compute_ms=2.0, copy_ms=3.5, stall_ms=0.25),
        BlockTimes(name="blocks.2", swapped=False, compute_ms=1.0),
        BlockTimes(name="blocks.3", swapped=True, compute_ms=1.0, copy_ms=3.5, stall_ms=0.0),
    )
    report = replace(BARE, plan=plan(4, 2), measured=replace(BARE.measured, blocks=times))
    assert block_table(report).splitlines() == [
        "block     weights    compute ms  copy ms  stall ms",
        "blocks.0  resident     1,000.00",
        "blocks.1  pinned           2.00     3.50      0.25",
        "blocks.2  resident         1.00",
        "blocks.3  pinned           1.00     3.50      0.00",
        "all       2 swapped    1,004.00     7.00      0.25",
    ]


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    times = tuple(BlockTimes(name=f"blocks.{i}", swapped=i > 1, compute_ms=1.0 if i else None) for i in range(4))
    report = replace(BARE, plan=plan(4, 2), measured=replace(BARE.measured, blocks=times))
    assert block_table(report).splitlines()[-1].split() == ["all", "2", "swapped"]


def test_without_times_there_is_no_table() -> None:
    assert block_table(BARE) == ""


def mib(count: float) -> int:
    return round(count * MIB)


def host(physical: int, available: int, *, limit: int | None = None) -> HostMemory:
    return HostMemory(physical, available, limit, None, HostPlatform.LINUX)


ROOMY = host(64 * GIB, 32 * GIB)


def brief(decided: SwapPlan, **changes: Any) -> tuple[str, ...]:
    """The lines for the model and the machine of the brief's example, apart from what is changed."""
    ram = mib(65379.6)
    facts = {
        "memory": DeviceMemory(mib(32606.6), mib(32606.6 - 2048.0), "a test"),
        "host": host(ram, ram - mib(26123.4)),
        "ratio": 0.9,
    }
    model = ModelSize(parameters=1_234_567_890, nbytes=mib(4610.4), layers=24)
    return configuration_lines(decided, model, **(facts | changes))


def test_the_log_of_debug_mode_is_the_briefs() -> None:
    # 26123.4 of 65379.6 are 39.96 %: the brief's "39.9" is not what its own figures give.
    assert list(brief(plan(24, 0, streams=16))) == BRIEF.replace("usage 39.9%", "usage 40.0%").splitlines()


def test_a_plan_that_swaps_says_how_much_stays_in_dram() -> None:
    *_, config, verdict = brief(plan(24, 6, streams=16, slab_bytes=mib(1152.6)))
    assert config == "   Config: blocks_to_swap=6, streams=16, ratio=90%"
    assert verdict == "Model is partly kept in DRAM: 6 of 24 blocks (1152.6MB) are streamed into VRAM"


def test_a_model_that_only_the_user_wants_in_vram_is_not_said_to_fit() -> None:
    *_, verdict = brief(plan(24, 0, over_ceiling=True))
    assert verdict == "Model is fully loaded into VRAM as asked, above what the settings leave for weights"


def test_figures_that_are_not_known_are_left_out_of_the_log() -> None:
    model = ModelSize(parameters=None, nbytes=GIB, layers=24)
    lines = configuration_lines(plan(24, 0), model, memory=None, host=ROOMY, ratio=0.75)
    assert lines[1] == "   Model: 1024.0MB, 24 layers"
    assert not any("VRAM:" in text for text in lines)
    assert "ratio=75%" in lines[3]


def test_dram_is_what_the_control_group_allows() -> None:
    lines = brief(plan(24, 0), host=host(64 * GIB, 4 * GIB, limit=16 * GIB))
    assert lines[3] == "   DRAM: 12288.0/16384.0MB (usage 75.0%)"
