"""The memory bar follows a run: widths, words and sentences are those of the event."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from shown import planned, predicted, ran
from wanvideo_enhanced_blockswap.blockswap.run.progress import AdoptFigures, Phase, Progress
from wanvideo_enhanced_blockswap.blockswap.run.report import Step
from wanvideo_enhanced_blockswap.node_progress import EVENT

from .answers import LOCALES, translations
from .bars import (
    ADOPTING,
    DONE,
    FAILED,
    GIB,
    HINT,
    MEMORY,
    NOT_BEGUN,
    PLAN,
    PREDICTED,
    SAMPLING,
    STOPPED,
    bar,
    connected,
    send,
)
from .front_end import NODE, FrontEnd, Variant

one_page = pytest.mark.parametrize("front_end", [Variant()], indirect=True, ids=str)

TEXTS = json.loads((Path(__file__).parent / "sentences.json").read_text(encoding="utf-8"))
"""What each of these, and the legend, reads like in a language."""

TOLD = {
    "adopting": ADOPTING,
    "sampling": SAMPLING,
    "done": DONE,
    "moved": replace(
        SAMPLING, run=replace(SAMPLING.run, others="accelerate moved blocks.3.up", movers=("accelerate",))
    ),
    "rescued": replace(SAMPLING, run=replace(SAMPLING.run, ran_out_with=12)),
    "passes": replace(SAMPLING, run=replace(SAMPLING.run, step=None, steps=0, forwards_per_step=None)),
    "whole": Progress(
        phase=Phase.SAMPLING,
        memory=MEMORY,
        plan=planned(0, free=5 * GIB, over_ceiling=True),
        predicted=PREDICTED,
        run=ran(0, 0),
    ),
    "stopped": STOPPED,
    "not_begun": NOT_BEGUN,
    "failed": FAILED,
    "off": Progress(phase=Phase.OFF, why="the CPU computes from host memory"),
}


AT_ITS_MIDDLE = """selector => {
    const { shadowRoot } = document.querySelector("[data-phase]");
    const box = shadowRoot.querySelector(selector).getBoundingClientRect();
    const hit = shadowRoot.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2)
        .closest("[data-zone], [data-entry]");
    return hit?.dataset.zone ?? hit?.dataset.entry;
}"""


def plain(lines: list[str]) -> list[str]:
    """With ordinary spaces between numbers and units."""
    return [line.replace("\u00a0", " ") for line in lines]


# Before a run


def test_a_new_node_has_an_empty_bar_and_says_when_the_plan_comes(ui: FrontEnd) -> None:
    shown = bar(ui, connected(ui))
    assert (shown.phase, shown.is_shown, shown.overflows) == ("idle", True, False)
    assert shown.parts == {}
    assert shown.lines == TEXTS[ui.variant.language]["idle"]
    assert [word for word, _ in shown.legend.values()] == TEXTS[ui.variant.language]["legend"]
    assert ui.errors == []


# The bar


def test_parts_are_as_wide_as_their_share_of_the_card(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    shown = bar(ui, node)
    sizes = {"other": 2, "residents": 8, "window": 1, "activations": 7, "free": 6}  # of 24 halves of a GB
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    assert {name: part for name, part in shown.parts.items() if name != "ceiling"} == {
        name: pytest.approx([starts[name] / 24, size / 24], abs=2 / shown.width) for name, size in sizes.items()
    }
    left, width = shown.parts["ceiling"]
    assert left + width / 2 == pytest.approx(0.5, abs=2 / shown.width)


MEMORIES = {
    "ordinary": MEMORY,
    "odd": replace(MEMORY, other=int(1.04 * GIB), residents=int(4.04 * GIB), window=int(0.54 * GIB)),
    "full": replace(MEMORY, activations=GIB * 13 // 2),
    "too much": replace(MEMORY, activations=20 * GIB),
    "too much without the computation": replace(MEMORY, other=9 * GIB, activations=None),
    "unknown": replace(MEMORY, activations=None, ceiling=0),
    "small": replace(MEMORY, **{each.name: getattr(MEMORY, each.name) >> 7 for each in fields(MEMORY)}),
}


@one_page
@pytest.mark.parametrize("progress", [ADOPTING, SAMPLING, DONE], ids=lambda progress: progress.phase.value)
@pytest.mark.parametrize("name", MEMORIES)
def test_the_figures_of_the_legend_add_up_to_the_one_above_the_bar(ui: FrontEnd, progress: Progress, name: str) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(progress, memory=MEMORIES[name]))
    shown = bar(ui, node)
    parts = [size.split("\u00a0") for _, size in shown.legend.values() if size[-1] == "B"]
    number, unit = shown.head[0].split()[1:3]
    assert {unit for _, unit in parts} == {unit}
    rounding = 0.05 * (len(parts) + 1)
    assert sum(float(number) for number, _ in parts) == pytest.approx(float(number), abs=rounding)
    widths = [width for part, (_, width) in shown.parts.items() if part != "ceiling"]
    assert sum(widths) == pytest.approx(1, abs=0.01)


@one_page
def test_what_is_unknown_or_does_not_apply_is_neither_drawn_nor_named(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(SAMPLING, memory=MEMORIES["unknown"]))
    shown = bar(ui, node)
    assert list(shown.parts) == list(shown.legend) == ["other", "residents", "window", "free"]


@one_page
def test_estimates_of_more_than_the_card_has_are_shown_as_such(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(SAMPLING, memory=MEMORIES["too much"]))
    shown = bar(ui, node)
    assert plain(shown.head) == ["VRAM 25.5 GB of 12.0 GB", ""]
    assert shown.legend["free"][1] == "0.0\u00a0GB"
    left, width = shown.parts["ceiling"]
    assert left + width / 2 == pytest.approx(6 / 25.5, abs=0.01)


def test_the_longest_line_above_the_bar_fits_into_the_panel(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(DONE, memory=MEMORIES["too much"]))
    assert not bar(ui, node).overflows


def test_the_legend_names_every_part_and_its_size_and_the_limit_as_a_share(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    shown, words = bar(ui, node), TEXTS[ui.variant.language]
    sizes = {"other": "1.0 GB", "residents": "4.0 GB", "window": "0.5 GB", "activations": "3.5 GB", "free": "3.0 GB"}
    assert {name: plain(texts) for name, texts in shown.legend.items()} == {
        "ceiling": [words["limit"], "50%"],
        **{name: [word, size] for (name, size), word in zip(sizes.items(), words["legend"], strict=True)},
    }
    assert plain(shown.head)[0].endswith("12.0 GB")


def test_every_part_and_every_entry_says_on_hover_what_it_is(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    tips = bar(ui, node).tips
    said = translations()[ui.variant.language]["wanVideoEnhancedBlockSwap"]
    names = ("other", "residents", "window", "activations", "free", "ceiling")
    assert tips == {place: said[f"tip_{name}"] for name in names for place in (name, f"bar {name}")}
    # The browser shows it where the pointer is, and not what lies above.
    for selector in ("[data-part=residents]", "[data-entry=residents]"):
        hit = ui.evaluate(AT_ITS_MIDDLE, selector)
        assert hit == "residents"


# Sentences


@pytest.mark.parametrize("name", TOLD)
def test_each_phase_is_told_in_the_users_language(ui: FrontEnd, name: str) -> None:
    node = connected(ui)
    send(ui, node, TOLD[name])
    shown = bar(ui, node)
    assert (shown.phase, shown.overflows) == (TOLD[name].phase.value, False)
    assert plain(shown.lines) == TEXTS[ui.variant.language][name]
    assert ui.errors == []


def test_placing_the_weights_has_a_progress_that_is_gone_with_the_first_forward(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, ADOPTING)
    assert bar(ui, node).progress == "75%"
    send(ui, node, replace(ADOPTING, adopt=AdoptFigures(placed=8 * GIB, all=8 * GIB, pinned=0)))
    assert bar(ui, node).progress == "100%"
    send(ui, node, SAMPLING)
    assert bar(ui, node).progress is None


def test_a_screen_reader_is_told_the_same(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, DONE)
    shown = bar(ui, node)
    assert shown.role == "img"
    said = [*shown.lines, *(" ".join(entry) for entry in shown.legend.values())]
    assert [part for part in said if part not in shown.label] == []


def test_the_hint_after_a_run_stands_out(ui: FrontEnd) -> None:
    node = connected(ui)
    send(ui, node, DONE)
    shown = bar(ui, node)
    assert shown.hint == shown.lines[-1]
    send(ui, node, replace(DONE, hint=None))
    assert bar(ui, node).hint is None
    assert len(bar(ui, node).lines) == 2


def test_an_error_and_a_node_that_is_not_in_use_are_marked(ui: FrontEnd) -> None:
    node = connected(ui)
    notes = TEXTS[ui.variant.language]["notes"]
    for name in ("failed", "off", "not_begun", "sampling"):
        send(ui, node, TOLD[name])
        shown = bar(ui, node)
        alarm = shown.lines[0] if name == "failed" else None
        assert (shown.head[1], shown.alarm) == (notes.get(name, ""), alarm), name


def test_the_second_model_of_a_node_has_the_result_of_the_first_above_it(ui: FrontEnd) -> None:
    node = connected(ui)

    def run(model: str, *phases: Progress) -> list[str]:
        for progress in phases:
            ui.send(EVENT, {"node": node, "model": model, **progress.as_json()})
        return plain(bar(ui, node).lines)

    one, pair = (TEXTS[ui.variant.language][name] for name in ("sampling", "pair"))
    run("Wan2_2-HIGH", ADOPTING, DONE)
    assert run("Wan2_2-HIGH", SAMPLING) == one  # the same model once more
    run("Wan2_2-HIGH", DONE)
    assert run("Wan2_2-LOW", ADOPTING, SAMPLING) == pair
    shown = bar(ui, node)
    assert (shown.overflows, plain([shown.label])[0].count("Wan2_2-")) == (False, 2)
    assert run("Wan2_2-LOW", DONE)[0] == pair[0]
    failed_line = run("Wan2_2-LOW", FAILED)[1]
    assert plain([bar(ui, node).alarm or ""]) == [failed_line]
    ui.send("execution_start", {"prompt_id": "another", "timestamp": 1})
    assert run("Wan2_2-HIGH", SAMPLING) == one
    assert ui.errors == []


WAYS = [
    {"plan": PLAN, "predicted": PREDICTED},
    {"plan": PLAN, "predicted": predicted(0.1, 1000.0)},
    {"plan": planned(22, free=5 * GIB, over_ceiling=True), "predicted": PREDICTED},
    {"plan": planned(22, free=5 * GIB)},
    {"plan": planned(0, free=GIB // 3), "predicted": PREDICTED},
    {"plan": planned(39, free=GIB)},
]
RUNS = [
    SAMPLING.run,
    ran(2, 175 << 20),
    ran(0, 0),
    ran(3, 9 * GIB, forward_ms=500.0, stall_ms=0.0),
    replace(ran(6, 9 * GIB), step=Step(3, None), steps=3),
    replace(ran(1, 9 * GIB), step=Step(1, 4), steps=1),
    ran(1, 9 * GIB),
    replace(ran(7, 9 * GIB, forward_ms=700.0), step=Step(4, 9), steps=4, forwards_per_step=1.5, ran_out_with=3),
    replace(ran(7, 9 * GIB), step=Step(4, 9), steps=4, ran_out_with=1),
]
HINTS = [None, *(replace(HINT, saved_ms=saved) for saved in (0.0, 45.6, 999.0, 1000.0, 61_000.0))]
HINTS += [replace(HINT, blocks=1), replace(HINT, each="pass")]


@one_page
def test_the_english_templates_make_pythons_own_sentences(ui: FrontEnd) -> None:
    adopts = [ADOPTING.adopt, AdoptFigures(placed=0, all=5 * GIB, pinned=0)]
    told = [Progress(phase=Phase.ADOPTING, **way, adopt=adopt) for way in WAYS for adopt in adopts]
    told += [
        Progress(phase=phase, **way, run=run)
        for phase in (Phase.SAMPLING, Phase.DONE, Phase.STOPPED)
        for way in WAYS
        for run in RUNS
    ]
    told += [Progress(phase=Phase.DONE, **WAYS[0], run=SAMPLING.run, hint=hint) for hint in HINTS]
    made = ui.evaluate(
        """async ([script, events]) => {
            const { Texts } = await import(script);
            const texts = new Texts();
            return events.map(event => texts.lines({ ...event, text: "" }).join("\\n"));
        }""",
        [module(ui, "texts.js"), [each.as_json() for each in told]],
    )
    # Nothing is shown as 0 MB by us, and as 0 B by Python.
    assert [text.replace("\u00a0", " ").replace("0.0 MB", "0 B") for text in made] == [each.text for each in told]


@one_page
@pytest.mark.parametrize("language", sorted(folder.name for folder in LOCALES.iterdir()))
def test_every_language_fits_into_a_panel_of_the_least_height(ui: FrontEnd, language: str) -> None:
    texts = json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))
    found = ui.evaluate(
        """async ([textsScript, panelScript, language, translations, events]) => {
            const { textsFrom } = await import(textsScript);
            const { Panel } = await import(panelScript);
            const panel = new Panel(() => {});
            panel.element.style.width = "380px";
            document.body.append(panel.element);
            const least = panel.height;
            const heights = events.map(event => {
                panel.show(event, textsFrom({ [language]: translations }, language));
                const { scrollWidth, clientWidth } = panel.element.shadowRoot.firstElementChild;
                return [panel.height, scrollWidth - clientWidth];
            });
            panel.element.remove();
            return [least, heights];
        }""",
        [
            module(ui, "texts.js"),
            module(ui, "panel.js"),
            language,
            texts,
            [None, *(each.as_json() for each in (ADOPTING, SAMPLING, replace(DONE, hint=None)))],
        ],
    )
    least, heights = found
    # The longest sentences take three lines more than the least; the hint after a run is not among them.
    assert [(height, overflow) for height, overflow in heights if height > least + 60 or overflow] == []


# Several nodes, and events that are none


def test_each_node_follows_its_own_events(ui: FrontEnd) -> None:
    first, second = ui.add(NODE), ui.add(NODE)
    send(ui, first, SAMPLING)
    assert (bar(ui, first).phase, bar(ui, second).phase) == ("sampling", "idle")
    send(ui, second, ADOPTING)
    assert (bar(ui, first).phase, bar(ui, second).phase) == ("sampling", "adopting")


MALFORMED: list[Any] = [
    None,
    7,
    {},
    {"phase": "sampling"},
    {"node": "1", "phase": "dreaming"},
    {"node": {}, "phase": "done"},
    {"node": "no such node", "phase": "done", "text": "lost"},
]


@pytest.mark.parametrize("detail", MALFORMED, ids=str)
def test_an_event_that_is_none_of_ours_changes_nothing(ui: FrontEnd, detail: Any) -> None:
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    before = bar(ui, node)
    ui.send(EVENT, detail)
    assert bar(ui, node) == before
    assert ui.errors == []


HALF: list[dict[str, Any]] = [
    {"memory": {"total": 0, "other": 0, "residents": 0, "window": 0, "ceiling": 0, "activations": 0}},
    {"memory": {"total": "12"}},
    {"memory": [], "plan": "40", "adopt": {"placed": -1}, "run": {"passes": None}, "hint": {"percent": "60"}},
    {"memory": {**SAMPLING.as_json()["memory"], "window": -5}},  # type: ignore[dict-item]
    {"text": None},
    {"text": {"a": 1}},
]


@pytest.mark.parametrize("harm", HALF, ids=str)
def test_an_event_with_a_part_that_is_none_shows_the_rest(ui: FrontEnd, harm: dict[str, Any]) -> None:
    node = ui.add(NODE)
    ui.send(EVENT, {"node": node, **SAMPLING.as_json(), **harm})
    shown = bar(ui, node)
    assert (shown.phase, shown.overflows) == ("sampling", False)
    assert bool(shown.parts) == ("memory" not in harm)
    assert ui.errors == []


def module(ui: FrontEnd, name: str) -> str:
    """The address of one of our modules."""
    return str(
        ui.evaluate(
            """async name => {
        const { api } = await import("/scripts/api.js");
        const ours = (await api.getExtensions()).find(address => address.endsWith(`/js/${name}`));
        return new URL(api.fileURL(ours), location.href).href;
    }""",
            name,
        )
    )
