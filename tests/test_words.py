"""Texts that users see outside debug mode: no word of how it works, and no sentence of more than 25 words."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from facts import make_plan as make_plan_from
from shown import predicted, ran
from test_plan import asking, block, budget, equal, stored, timing
from test_planning import FACTS, MODEL, WHOLE, beside
from test_report import FULL, MEASURED
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
from wanvideo_enhanced_blockswap.hardware import GIB, MIB, DeviceMemory, LinkSpeed

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
    for said in ("left for them", "is cut from", "nothing streams", "locked RAM needed", "of RAM needed", "two steps",
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
    assert hint_text(hint).endswith(f"a {hint.each}.")


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
