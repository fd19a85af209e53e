"""Texts that users see outside debug mode: no word of how it works, one unit, and no sentence of more than 25 words."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import wan_shapes, write_sparse_safetensors
from facts import make_plan as make_plan_from
from shown import predicted, ran
from test_cli import BAD_VALUES, DEMO
from test_plan import asking, block, budget, equal, stored, timing
from test_planning import FACTS, MODEL, WHOLE, beside
from test_report import FULL, MEASURED
from test_what_fits import WHOLE as WAN
from wanvideo_enhanced_blockswap.blockswap.engine.others import Others
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, PlanError
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.history import Workload
from wanvideo_enhanced_blockswap.blockswap.run.progress import NOTHING_DONE, AdoptFigures, Phase, Progress
from wanvideo_enhanced_blockswap.blockswap.run.replan import kept_over_budget, slow_link, spill, why_replace
from wanvideo_enhanced_blockswap.blockswap.run.report import Hint, Measured, Step
from wanvideo_enhanced_blockswap.blockswap.run.text import (
    hint_text,
    not_again,
    oom_message,
    plan_lines,
    plan_text,
    summary,
)
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.cli import main
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    MIB,
    DeviceMemory,
    DeviceSpec,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
)

ROOT = Path(__file__).parents[1]

JARGON = re.compile(
    r"\b(forwards?|slots?|windows?|residents?|stall(s|ed)?|ceiling|page-?lock\w*|pinned|adopt\w*|slabs?|tiers?)\b", re.I
)
MOST_WORDS = 25
CARD = "NVIDIA GeForce RTX 4090"


def clauses(text: str) -> list[str]:
    """Sentences, and their parts before and after a colon, a semicolon or in parentheses."""
    return [part for part in re.split(r"\n|[;:()] ?|\.(?= |$)", text) if part.strip()]


def wrong(text: str) -> list[str]:
    """What a text has that it must not have."""
    found = [f"{match[0]!r} in {text!r}" for match in JARGON.finditer(text)]
    found += [f"too long: {one!r}" for one in clauses(text) if len(one.split()) > MOST_WORDS]
    found += [f"spaces: {text!r}"] if "  " in text.strip().replace("\n  ", "\n") else []
    return found + ([f"punctuation: {text!r}"] if re.search(r"[;,:] *[;,:.]|None|\(\)", text) else [])


def made() -> Iterator[SwapPlan]:
    """Plans of every kind."""
    audio = replace(block(0, 8 * MIB), name="casual_audio_encoder")
    parts = ModelProfile((*equal(10).blocks, audio))
    activations = (None, Activations(nbytes=4 * MIB, is_measured=True), Activations(nbytes=GIB, is_measured=False))
    hosts: list[dict[str, Any]] = [
        {},
        {"pin": False},
        {"overlap": False},
        {"pin_budget_bytes": 30 * MIB},
        {"pin_budget_bytes": 0, "host_available_bytes": 50 * MIB},
    ]
    rooms = (budget(), budget(50 * MIB), budget(10 * MIB), budget(50 * MIB, limit=100 * MIB, host=30 * MIB))
    counts = (None, 0, 1, 2, 5, 48)
    for profile, room in itertools.product((equal(10), equal(1), stored(10), equal(8, vace=2), parts), rooms):
        for count, host, needs in itertools.product(counts, hosts, activations):
            asked = asking(blocks_to_swap=count, vace_blocks_to_swap=1, activations=needs, **host)
            for times in (asked.timing, timing(profile, 4e9, pageable_bytes_per_s=1e9, host_copy_bytes_per_s=1e10)):
                with contextlib.suppress(PlanError):  # few: `test_the_plans_are_of_every_kind`
                    yield make_plan(profile, replace(asked, timing=times), room)
    yield make_plan(equal(10), asking(is_unified=True), budget(10 * MIB))


def from_settings() -> Iterator[SwapPlan]:
    """Plans with what settings and readings add."""
    estimate = replace(FACTS, memory=DeviceMemory(12 * GIB, 11 * GIB, "mem_get_info less 15 %", is_estimate=True))
    for facts in (FACTS, estimate):
        for settings in (SwapSettings(), SwapSettings(blocks_to_swap=5)):
            yield make_plan_from(MODEL, settings, facts)
        yield make_plan_from(beside(replace(WHOLE, nbytes=4 * MIB)), SwapSettings(), facts)


PLANS = list({repr(plan): plan for plan in (*made(), *from_settings())}.values())
HINTS = [
    Hint(free_bytes=GIB, percent=70, blocks=1, saved_ms=4.0, each="pass"),
    Hint(free_bytes=GIB, percent=90, blocks=5, saved_ms=2e3, each="step"),
]
OTHERS = Others(who=["accelerate (AlignDevicesHook)", "ComfyUI-Mover"], placed_again=2, gave_up=True)
OTHERS.moved.update({f"blocks.{i}.self_attn.q.weight": i + 1 for i in range(6)})


def measured() -> Iterator[Measured]:
    """What runs measure."""
    yield ran(0, 0)
    for forwards, steps in ((1, 0), (7, 0), (1, 1), (30, 15)):
        step = Step(steps, 30) if steps else None
        for stall_ms in (None, 0.0, 40.0):
            run = replace(ran(forwards, GIB, forward_ms=1e3, stall_ms=stall_ms), step=step, steps=steps)
            yield run
            yield replace(run, others=OTHERS.text, refusals=("why",), slab_bytes=GIB, file_bytes=GIB)
            yield replace(MEASURED, blocks=(), forwards=forwards, steps=steps, step=step, returned_bytes=5)


def test_the_plans_are_of_every_kind() -> None:
    remarks = " | ".join({remark for plan in PLANS for remark in plan.remarks})
    for said in ("leave them", "is cut from", "nothing streams", "locked RAM needed", "of RAM needed", "two steps",
                 "model's file", "more slowly", "take turns", "is not locked", "probably run out", "always stay",
                 "has no effect", "an estimate"):  # fmt: skip
        assert said in remarks, said
    assert {plan.swapped_count for plan in PLANS} >= {0, 1, 2, 5, 10}
    assert any(plan.streaming_beside for plan in PLANS)
    assert any(plan.predicted is not None and plan.predicted.stall for plan in PLANS)


def test_a_plan_is_told_in_short_sentences_without_jargon() -> None:
    told = {text for plan in PLANS for text in (plan_text(plan, card=CARD), plan_lines(plan, card=CARD))}
    assert [fault for text in told for fault in wrong(text)] == []


def test_progress_is_told_in_short_sentences_without_jargon() -> None:
    adopt = AdoptFigures(placed=GIB, all=2 * GIB, pinned=GIB)
    told = {NOTHING_DONE}
    for plan, times in itertools.product(PLANS, (None, predicted(0.0, 10.0), predicted(1.0, 10.0))):
        told.add(Progress(phase=Phase.ADOPTING, plan=plan, predicted=times, adopt=adopt).text)
    for plan, run, hint in itertools.product(PLANS[:: len(PLANS) // 20], measured(), (None, *HINTS)):
        for phase in (Phase.SAMPLING, Phase.DONE, Phase.STOPPED):
            told.add(Progress(phase=phase, plan=plan, run=run, hint=hint).text)
    assert [fault for text in told for fault in wrong(text)] == []


def test_a_report_is_told_in_short_sentences_without_jargon() -> None:
    told = set()
    prediction = FULL.prediction
    for plan, run, hint in itertools.product(PLANS[:: len(PLANS) // 20], measured(), (None, *HINTS)):
        for failure, expected in (("", prediction), ("", None), ("out of VRAM", prediction)):
            report = replace(FULL, plan=plan, measured=run, hint=hint, failure=failure, prediction=expected)
            told.add(summary(report))
    assert [fault for text in told for fault in wrong(text)] == []
    assert len(told) > 100


@pytest.mark.parametrize("hint", HINTS)
def test_a_hint_is_told_in_short_sentences_without_jargon(hint: Hint) -> None:
    assert wrong(hint_text(hint)) == []
    assert hint_text(hint).endswith({"step": " a step.", "pass": " a pass of the model."}[hint.each])


def refusals() -> Iterator[BlockSwapError]:
    whole = ModelProfile(tuple(BlockProfile(one.name, (WHOLE,)) for one in MODEL.blocks))
    tries: list[Any] = [
        lambda: make_plan(equal(10), asking(), budget(10 * MIB, limit=12 * MIB)),
        lambda: make_plan(equal(10), asking(blocks_to_swap=3), budget(10 * MIB, limit=12 * MIB)),
        lambda: make_plan(equal(10), asking(is_unified=True), budget(10 * MIB, limit=12 * MIB)),
        lambda: make_plan(stored(8), asking(blocks_to_swap=5), budget(host=0, available=0)),
        lambda: make_plan(ModelProfile(()), asking(), budget()),
        lambda: make_plan_from(whole, SwapSettings(auto_hardware_tuning=False, blocks_to_swap=12), FACTS),
    ]
    for attempt in tries:
        with pytest.raises(PlanError) as refused:
            attempt()
        yield refused.value


def test_a_refusal_is_told_in_short_sentences_without_jargon_and_says_what_to_do() -> None:
    told = [str(refused) for refused in refusals()]
    assert [fault for text in told for fault in wrong(text)] == []
    assert len(set(told)) == 6


@pytest.mark.parametrize("frames", [None, 1, 21])
@pytest.mark.parametrize("expected", [None, GIB])
@pytest.mark.parametrize("plan", [None, *PLANS[:: len(PLANS) // 12]])
def test_that_memory_ran_out_is_told_in_short_sentences_with_what_to_do(
    plan: SwapPlan | None, expected: int | None, frames: int | None
) -> None:
    workload = Workload(tokens=100, expected_activation_bytes=expected, latent_frames=frames)
    for work in (None, workload):
        said = oom_message(work, plan, reported="CUDA error")
        assert wrong(said) == []
        assert "close other programs on the GPU" in said


@pytest.mark.parametrize(
    "why",
    [
        "TeaCache and MagCache keeps state from one step to the next",
        "another pack has changed how the model runs",
        "another pack has hooks on the model's blocks",
    ],
)
def test_that_a_step_cannot_be_repeated_is_told_in_short_sentences(why: str) -> None:
    assert wrong(not_again(why, reported="CUDA error")) == []


def test_notes_of_a_run_are_told_in_short_sentences_without_jargon() -> None:
    present = make_plan(equal(10), asking(), budget())
    less, memory = make_plan(equal(10), asking(), budget(50 * MIB)), DeviceMemory(GIB, 0, "a test")
    faster = replace(less, predicted=predicted(0.0, 500.0))
    link = LinkSpeed(((1, 20e9),), 8e9)
    notes = [
        why_replace(present, less, total_bytes=GIB, predicted=None),
        why_replace(present, faster, total_bytes=1 << 40, predicted=predicted(500.0, 1000.0)),
        why_replace(replace(less, over_ceiling=True), present, total_bytes=1 << 40, predicted=None),
        kept_over_budget(present, less, total_bytes=GIB),
        slow_link(link, streams=1, seen_bytes_per_s=1e9),
        spill(less, memory, took_ms=3e3, usual=1e3),
        OTHERS.text,
    ]
    assert None not in notes
    assert [fault for text in notes if text for fault in wrong(text)] == []


ALLOWED = re.compile(r"--[\w-]+|context windows?|platform +windows|Windows")
"""What a text of the command line may have: options that saved scripts use, what is no word of this package."""

PAGES = ("what-fits.md", "ram.md", "command-line.md", "troubleshooting.md", "limits.md")
"""Pages that README leads users to."""


def of_developers(text: str) -> list[str]:
    """Words and units of developers in what a command prints."""
    return [match[0] for match in (*JARGON.finditer(ALLOWED.sub("", text)), *re.finditer(r"\b[KMGT]iB\b", text))]


@pytest.mark.parametrize(
    ("text", "found"),
    [("--slots N", []), ("two slots", ["slots"]), ("one context window", []), ("8.0 GiB", ["GiB"]), ("8.0 GB", [])],
)
def test_the_check_of_commands_sees_words_and_units(text: str, found: list[str]) -> None:
    assert of_developers(text) == found


@pytest.mark.parametrize("command", [[], ["plan"], ["demo"], ["probe"], ["simulate"]], ids=" ".join)
def test_help_is_in_short_sentences_without_jargon(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # each text on one line
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    usage, *said = capsys.readouterr().out.split("\n")
    assert of_developers("\n".join([usage, *said])) == []
    texts = [clause for line in said for clause in clauses(re.sub(r"^ +\S.*?  +", "", line))]
    assert len(texts) > 4
    assert [text for text in texts if len(text.split()) > MOST_WORDS] == []


PLANS_OF_A_FILE = {
    "fits": "--gpu 'RTX 3060 12GB' --ram 16GB --shape 832x480x81",
    "all on the GPU": "--gpu 'RTX 5090' --ram 64GB --shape 832x480x81",
    "streams from the file": "--vram '8 GB' --ram 8GB",
    "waits": "--gpu 'RTX 4090' --ram 8GB --link 3 --disk 0.2 --shape 480x480x17",
    "does not fit": "--vram 8GB --ram 64GB --shape 1280x720x161",
    "by hand": "--gpu 4060 --ram 64GB --blocks-to-swap all --shape 832x480x81 --context-window 17",
    "shared memory": "--gpu 'DGX Spark' --ram 96GB --shape 832x480x81",
    "too little RAM": "--gpu 'Apple M3 Max' --ram 10GB",
    "a second expert": "--gpu 'RTX 4090' --ram 32GB --beside WAN",
    "a table": "--table --ram 16GB",
}


@pytest.mark.parametrize("options", PLANS_OF_A_FILE.values(), ids=PLANS_OF_A_FILE)
def test_a_plan_of_a_file_is_printed_without_jargon(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str
) -> None:
    path = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WAN, "F8_E4M3"))
    main(["plan", path, *(path if word == "WAN" else word for word in shlex.split(options))])
    said = capsys.readouterr()
    assert len(said.out + said.err) > 60
    assert of_developers(said.out + said.err) == []


def test_what_is_beside_the_blocks_is_printed_without_jargon(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", wan_shapes(5120, 13824, 40, vace=8))
    assert main(["plan", str(path), "--gpu", "4060", "--ram", "64GB"]) == 0
    said = capsys.readouterr().out
    assert "streaming" in said
    assert of_developers(said) == []


@pytest.mark.usefixtures("short_texts")
def test_the_demo_is_printed_without_jargon(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*DEMO, "--device", "cpu", "--picture", str(tmp_path / "t.png")]) == 0
    said = capsys.readouterr().out
    assert "streaming" in said
    assert of_developers(said) == []


@pytest.mark.parametrize("vendor", [Vendor.NVIDIA, Vendor.AMD])
@pytest.mark.parametrize("platform", list(HostPlatform))
@pytest.mark.parametrize(
    "link", [LinkSpeed((), 8e9), LinkSpeed(((1, 20e9), (2, 24e9)), 8e9, 11e9), LinkSpeed((), None)]
)
def test_what_is_read_of_a_machine_is_printed_without_jargon(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    vendor: Vendor,
    platform: HostPlatform,
    link: LinkSpeed,
) -> None:
    spec = DeviceSpec("a GPU", vendor, "cuda:0", compute_units=60, is_integrated=False, total_bytes=16 * GIB)
    readings = {
        "probe_device": spec,
        "read_device_memory": DeviceMemory(16 * GIB, 15 * GIB, "a test"),
        "read_host_memory": HostMemory(32 * GIB, 30 * GIB, None, 8 * MIB, platform),
        "measure_link": link,
    }
    for name, value in readings.items():
        monkeypatch.setattr(f"wanvideo_enhanced_blockswap.commands.probe.{name}", lambda *_, found=value, **__: found)
    assert main(["probe", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "copies to the GPU from ordinary RAM" in said
    assert "16.0 GB" in said
    assert of_developers(said) == []


@pytest.mark.parametrize("options", ["--slots 2", "--vace 4", "--skip 1,2 --uneven 0.5", "--empty"])
def test_a_simulated_schedule_is_printed_without_jargon(capsys: pytest.CaptureFixture[str], options: str) -> None:
    assert main(["simulate", "--blocks", "12", "--swapped", "50%", "--ratio", "1.5", *options.split()]) == 0
    assert of_developers(capsys.readouterr().out) == []


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in BAD_VALUES], ids=" ".join)
def test_a_bad_value_is_refused_without_jargon(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    path = str(write_sparse_safetensors(tmp_path / "wan.safetensors", WAN, "F8_E4M3"))
    typed = [path if word == "WAN" else word for word in arguments]
    assert main(typed) == 1
    said = capsys.readouterr().err
    for word in typed:
        said = said.replace(word, "")
    assert of_developers(said) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_that_readme_leads_users_to_is_without_jargon(name: str) -> None:
    page = (ROOT / "docs" / name).read_text("utf-8").replace("and GiB\nmeans the same", "")
    assert of_developers(page) == []


def test_sizes_are_written_in_one_unit_everywhere() -> None:
    folders = ("blockswap", "commands", "hardware", "benchmarks", "docs", "web/docs", "locales")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    texts = [file for file in files if file.suffix in (".py", ".md", ".json", ".sh")]
    assert len(texts) > 150
    found = {file.name for file in texts if re.search(r"\b[KMGT]iB\b", file.read_text("utf-8"))}
    assert found == {"units.py", "options.py", "command-line.md", "CHANGELOG.md"}  # which say that GiB is accepted


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_what_the_page_of_the_command_line_quotes_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    (typed,) = re.findall(rf"^ +python -m \w+ ({command} (?:.*\\\n)?.*-.*)$", page, re.MULTILINE)
    path = write_sparse_safetensors(tmp_path / "wan.safetensors", WAN, "F8_E4M3")
    words = [word.replace("MODEL.safetensors", str(path)) for word in shlex.split(typed.replace("\\\n", " "))]
    assert main(words) == 0
    assert f"\n\n{textwrap.indent(capsys.readouterr().out, '    ')}\n" in page
