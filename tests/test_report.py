"""The report as text and as JSON, and the lines that it omits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_plan import asking
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from wanvideo_enhanced_blockswap.blockswap.plan.budget import MemoryBudget
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import ForwardTime
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.report import BlockTimes, Measured, RunReport
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
        "tier RTX 5090/4090: at most 16 streams, 90% of what is available, since NVIDIA GeForce RTX 4090 is in the "
        "table of tiers",
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
    refusals=("not enough pin budget for a slab: 100 bytes needed, 10 left",),
    replans=("the settings have changed",),
    blocks=tuple(BlockTimes(name=f"blocks.{i}", swapped=bool(i % 2), compute_ms=30.0) for i in range(40)),
    samples=SAMPLES,
)
FULL = RunReport(
    title="WanModel on NVIDIA GeForce RTX 4090",
    plan=SWAPPED,
    prediction=ForwardTime(elapsed=1200.0, compute=1200.0, stall=6.0, transferred=290.0, onloads=20.0),
    activation_bytes=3 * GIB,
    link_bytes_per_s=25e9,
    measured=MEASURED,
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


def test_a_summary_puts_what_was_predicted_beside_what_was_measured() -> None:
    assert summary(FULL) == (
        "WanModel on NVIDIA GeForce RTX 4090: 20 of 40 blocks swapped (18 pinned, 2 staged), "
        "2 slots of 333.0 MB, 4 copy streams\n"
        "weights on the device: 7.0 GB planned; 7.0 GB measured\n"
        "activations: 3.0 GB expected; 2.0 GB measured\n"
        "forwards: 40, and 4 that ran no block; 1,200 ms predicted; 1,250 ms measured (median)\n"
        "stall per forward: 6.0 ms (0.5%) predicted; 12.5 ms (1.0%) measured in 2 timed forwards\n"
        "copied to the device: 6.90 GB once; per forward 7.00 GB planned, 7.18 GB measured at 24.1 GB/s "
        "(link 25.0 GB/s); back: nothing\n"
        "tuning: tier RTX 5090/4090: at most 16 streams, 90% of what is available, since NVIDIA GeForce RTX 4090 is in "
        "the table of tiers; link: 25.0 GB/s with 4 streams, as fast as with up to 16\n"
        "host memory: 14.0 GB of slabs; 13.0 GB page-locked; 1.0 GB of ordinary memory; not page-locked: not enough "
        "pin budget for a slab: 100 bytes needed, 10 left\n"
        "120 samples: GPU busy 93 % (at most 100 %); VRAM in use at most 11.0 GB; RAM of this process at most "
        "30.0 GB; RAM available at least 20.0 GB\n"
        "planned again: the settings have changed\n"
        "note: the trace is in traces/trace.json"
    )


def test_a_summary_has_at_most_11_lines_whatever_the_texts_hold() -> None:
    many = tuple(f"reason {i}\nover two lines" for i in range(50))
    report = replace(changed(refusals=many, replans=many), title="two\nlines", notes=many)
    report = replace(report, plan=replace(SWAPPED, tuning=many))
    assert len(summary(report).splitlines()) == 11


def test_what_did_not_happen_or_is_not_known_is_left_out() -> None:
    assert summary(BARE) == (
        "toy on cpu: all 4 blocks resident\n"
        "weights on the device: 32.0 MB planned\n"
        "forwards: 1\n"
        "copied to the device: 33.6 MB once; back: nothing"
    )


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
    assert line(nothing_known, "stall") == line(nothing_known, "activations") == line(nothing_known, "120") == ""


def test_weights_above_the_plan_are_told_to_the_byte() -> None:
    report = changed(weight_bytes=7 * GIB + 1536)
    assert line(report, "weights").endswith("1,536 bytes more than planned")


def test_a_plan_above_its_budget_says_so() -> None:
    report = replace(FULL, plan=replace(SWAPPED, over_ceiling=True, budget_bytes=6 * GIB))
    assert "7.0 GB planned, over the budget of 6.0 GB" in line(report, "weights")


def test_what_is_copied_back_is_always_said() -> None:
    assert line(FULL, "copied").endswith("back: nothing")
    assert line(changed(returned_bytes=2048), "copied").endswith("back: 2.0 KB of changed buffers, no weights")


def test_a_run_without_a_single_forward_divides_nothing_by_it() -> None:
    report = changed(forwards=0, forward_ms=None, stall_ms=None, timed_forwards=0)
    assert line(report, "forwards").startswith("forwards: 0")
    assert "7.00 GB planned at" in line(report, "copied")


def test_a_share_of_no_time_is_left_out() -> None:
    assert "12.5 ms measured in 1 timed forward" in line(changed(forward_ms=None, timed_forwards=1), "stall")
    assert "12.5 ms measured" in line(changed(forward_ms=0.0), "stall")


def test_copies_on_the_compute_stream_are_named_instead_of_their_number() -> None:
    report = replace(FULL, plan=replace(SWAPPED, overlap=False, slots=1, streams=1))
    assert summary(report).splitlines()[0].endswith("1 slot of 333.0 MB, no overlap")


def test_the_same_text_is_named_once_with_how_often_it_came() -> None:
    assert line(changed(replans=("a", "b", "a")), "planned again") == "planned again: a (2 times); b"


def test_of_many_texts_the_first_are_named_and_the_others_counted() -> None:
    assert line(changed(refusals=tuple("abcde")), "host").endswith("; not page-locked: a; b; c; and 2 more")


def test_blocks_that_are_read_from_their_file_are_in_the_line_on_host_memory() -> None:
    report = changed(refusals=(), slab_bytes=0, pinned_bytes=GIB, anonymous_bytes=0, file_bytes=9 * GIB)
    read = "9.0 GB read from the file in each forward"
    assert line(report, "host memory") == f"host memory: 0 B of slabs; 1.0 GB page-locked; {read}"


def test_what_was_refused_is_said_of_a_run_without_slabs_too() -> None:
    report = changed(refusals=("a",), slab_bytes=0, pinned_bytes=0, anonymous_bytes=0)
    assert line(report, "not page-locked") == "not page-locked: a"


def test_streams_that_were_not_chosen_by_the_link_have_no_line_on_tuning() -> None:
    assert line(replace(FULL, plan=replace(SWAPPED, tuning=())), "tuning") == ""


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
