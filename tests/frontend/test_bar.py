"""The memory bar follows a run: widths, words and sentences are those of the event."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shown import planned, predicted, ran
from wanvideo_enhanced_blockswap.blockswap.run.progress import AdoptFigures, Phase, Progress, stopped
from wanvideo_enhanced_blockswap.node_progress import EVENT

from .answers import LOCALES
from .bars import ADOPTING, DONE, GIB, MEMORY, PLAN, PREDICTED, SAMPLING, bar, send
from .front_end import NODE, FrontEnd, Variant

one_page = pytest.mark.parametrize("front_end", [Variant()], indirect=True, ids=str)

TEXTS = json.loads((Path(__file__).parent / "sentences.json").read_text(encoding="utf-8"))
"""What each of these, and the legend, reads like in a language."""

TOLD = {
    "adopting": ADOPTING,
    "sampling": SAMPLING,
    "done": DONE,
    "moved": replace(SAMPLING, run=replace(SAMPLING.run, others="accelerate moved blocks.3.up")),
    "whole": Progress(
        phase=Phase.SAMPLING,
        memory=MEMORY,
        plan=planned(0, free=5 * GIB, over_ceiling=True),
        predicted=PREDICTED,
        run=ran(0, 0),
    ),
    "stopped": stopped(),
    "failed": stopped("out of memory"),
    "off": Progress(phase=Phase.OFF, why="the CPU computes from host memory"),
}


def plain(lines: list[str]) -> list[str]:
    """With ordinary spaces between numbers and units."""
    return [line.replace("\u00a0", " ") for line in lines]


# Before a run


def test_a_new_node_has_an_empty_bar_and_says_when_the_plan_comes(ui: FrontEnd) -> None:
    shown = bar(ui, ui.add(NODE))
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
    starts = {"other": 0, "residents": GIB, "window": 5 * GIB, "activations": GIB * 11 // 2}
    assert {name: part for name, part in shown.parts.items() if name != "ceiling"} == {
        name: pytest.approx([start / MEMORY.total, getattr(MEMORY, name) / MEMORY.total], abs=2 / shown.width)
        for name, start in starts.items()
    }
    left, width = shown.parts["ceiling"]
    assert left + width / 2 == pytest.approx(0.5, abs=2 / shown.width)


@one_page
def test_activations_that_do_not_fit_fill_the_headroom_and_no_more(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(SAMPLING, memory=replace(MEMORY, activations=20 * GIB)))
    start, width = bar(ui, node).parts["activations"]
    assert start + width == pytest.approx(1, abs=0.01)
    assert bar(ui, node).legend["activations"][1] == "20.0\u00a0GiB"


@one_page
def test_what_is_unknown_or_does_not_apply_is_neither_drawn_nor_named(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(SAMPLING, memory=replace(MEMORY, activations=None, ceiling=0)))
    shown = bar(ui, node)
    assert list(shown.parts) == ["other", "residents", "window"]
    assert list(shown.legend) == ["other", "residents", "window", "headroom"]


@one_page
def test_estimates_of_more_than_the_card_has_stay_inside_the_bar(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, replace(SAMPLING, memory=replace(MEMORY, other=9 * GIB)))
    shown = bar(ui, node)
    assert sum(shown.parts["window"]) == pytest.approx(1, abs=0.01)
    assert shown.legend["headroom"][1] == "0.0\u00a0MiB"


def test_the_legend_names_every_part_and_its_size(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    send(ui, node, SAMPLING)
    assert {name: plain(texts) for name, texts in bar(ui, node).legend.items()} == {
        name: [word, size]
        for (name, size), word in zip(
            {
                "other": "1.0 GB",
                "residents": "4.0 GB",
                "window": "512.0 MB",
                "activations": "3.5 GB",
                "headroom": "6.5 GB",
                "ceiling": "6.0 GB",
            }.items(),
            TEXTS[ui.variant.language]["legend"],
            strict=True,
        )
    }


# Sentences


@pytest.mark.parametrize("name", TOLD)
def test_each_phase_is_told_in_the_users_language(ui: FrontEnd, name: str) -> None:
    node = ui.add(NODE)
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


WAYS = [
    {"plan": PLAN, "predicted": PREDICTED},
    {"plan": PLAN, "predicted": predicted(0.1, 1000.0)},
    {"plan": planned(22, free=5 * GIB, over_ceiling=True)},
    {"plan": planned(0, free=GIB // 3), "predicted": PREDICTED},
]
RUNS = [
    SAMPLING.run,
    ran(2, 175_000_000),
    ran(0, 0),
    ran(3, 9_000_000_000, forward_ms=500.0, stall_ms=0.0),
]


@one_page
def test_the_english_templates_make_pythons_own_sentences(ui: FrontEnd) -> None:
    adopts = [ADOPTING.adopt, AdoptFigures(placed=0, all=5 * GIB, pinned=0)]
    told = [Progress(phase=Phase.ADOPTING, **way, adopt=adopt) for way in WAYS for adopt in adopts]
    told += [
        Progress(phase=phase, **way, run=run) for phase in (Phase.SAMPLING, Phase.DONE) for way in WAYS for run in RUNS
    ]
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
            [None, *(each.as_json() for each in (ADOPTING, SAMPLING, DONE))],
        ],
    )
    least, heights = found
    # One line more than the least is room for the longest languages.
    assert [(height, overflow) for height, overflow in heights if height > least + 24 or overflow] == []


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
    {"memory": [], "plan": "40", "adopt": {"placed": -1}, "run": {"forwards": None}},
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
