"""Our section of the settings dialog: it is there in the user's language, and each setting does what it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from wanvideo_enhanced_blockswap.comfyui import KEEP_HOST_SLABS, PIN_BUDGET_GIB, Preferences

from .answers import LOCALES
from .bars import COPY, shown
from .front_end import NODE, RENDERERS, VERSIONS, FrontEnd, Variant

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Locator

SHOW_BAR, DEFAULT_CEILING = f"{NODE}.ShowBar", f"{NODE}.DefaultCeiling"
ALL = {SHOW_BAR: True, DEFAULT_CEILING: 50, KEEP_HOST_SLABS: True, PIN_BUDGET_GIB: 0}
CEILING = "vram_threshold_percent"

CLONE = """id => {
    const clone = app.graph.getNodeById(id).clone();
    app.graph.add(clone);
    return String(clone.id);
}"""

one_language = pytest.mark.parametrize(
    "front_end", [Variant(v, r) for v in VERSIONS for r in RENDERERS], indirect=True, ids=str
)
one_renderer = pytest.mark.parametrize("front_end", [Variant(v) for v in VERSIONS], indirect=True, ids=str)


def texts(language: str, file: str) -> dict[str, Any]:
    return dict(json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8")))


def section(ui: FrontEnd) -> Locator:
    """The dialog, open at our section."""
    name = texts(ui.variant.language, "main")["settingsCategories"]["WanVideo Enhanced BlockSwap"]
    ui.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = ui.page.get_by_role("dialog")
    dialog.get_by_text(name, exact=True).first.click()
    dialog.locator(f"[data-setting-id='{SHOW_BAR}']").wait_for()
    return dialog


def type_number(ui: FrontEnd, dialog: Locator, setting: str, number: str) -> None:
    field = dialog.locator(f"[data-setting-id='{setting}'] input").last
    field.click()
    field.press("Control+A")
    field.press("Backspace")
    field.press_sequentially(number)
    field.blur()
    ui.settle()


def read(ui: FrontEnd, folder: Path) -> Preferences:
    """What Python reads of what the page has stored."""
    file = folder / "comfy.settings.json"
    file.write_text(json.dumps(ui.server.settings), encoding="utf-8")
    return Preferences.read(file)


def ceiling_of(ui: FrontEnd, node: str) -> float:
    script = "([id, name]) => app.graph.getNodeById(id).widgets.find(widget => widget.name === name).value"
    return float(ui.evaluate(script, [node, CEILING]))


# The dialog


@pytest.mark.parametrize(
    "front_end", [Variant(v, language=language) for v in VERSIONS for language in ("en", "zh")], indirect=True, ids=str
)
def test_the_dialog_has_our_section_in_the_users_language(ui: FrontEnd) -> None:
    dialog = section(ui)
    said = dialog.inner_text()
    expected = texts(ui.variant.language, "settings")
    headings = list(texts(ui.variant.language, "main")["settingsCategories"].values())[1:]
    assert [text for text in [*headings, *(each["name"] for each in expected.values())] if text not in said] == []
    for setting in ALL:
        dialog.locator(f"[data-setting-id='{setting}'] i").first.hover()
        tooltip = ui.page.get_by_text(expected[setting.replace(".", "_")]["tooltip"]).first
        tooltip.wait_for()
        ui.page.mouse.move(0, 0)
        tooltip.wait_for(state="hidden")
    assert ui.errors == []


@one_renderer
def test_what_nobody_has_changed_is_at_its_default_and_not_stored(ui: FrontEnd) -> None:
    assert {setting: ui.setting(setting) for setting in ALL} == ALL
    assert ui.server.settings.keys().isdisjoint(ALL)
    budget = ui.setting(PIN_BUDGET_GIB) << 30
    assert Preferences() == Preferences(keep_host_slabs=ui.setting(KEEP_HOST_SLABS), pin_budget_bytes=budget or None)


@one_renderer
def test_what_the_dialog_stores_is_what_python_reads(ui: FrontEnd, tmp_path: Path) -> None:
    dialog = section(ui)
    dialog.locator(f"[id='{KEEP_HOST_SLABS}']").click()
    type_number(ui, dialog, PIN_BUDGET_GIB, "48")
    ui.wait_for("id => app.extensionManager.setting.get(id) === 48", PIN_BUDGET_GIB)
    assert read(ui, tmp_path) == Preferences(keep_host_slabs=False, pin_budget_bytes=48 << 30)


@one_renderer
def test_more_than_a_host_can_have_is_cut_by_the_dialog(ui: FrontEnd) -> None:
    type_number(ui, section(ui), PIN_BUDGET_GIB, "5000")
    ui.wait_for("id => app.extensionManager.setting.get(id) === 1024", PIN_BUDGET_GIB)


@one_renderer
def test_an_emptied_budget_is_still_one_that_python_reads(ui: FrontEnd, tmp_path: Path) -> None:
    ui.set_setting(PIN_BUDGET_GIB, 16)
    type_number(ui, section(ui), PIN_BUDGET_GIB, "")
    ui.set_setting(DEFAULT_CEILING, 60)  # stored after it
    assert read(ui, tmp_path).pin_budget_bytes in (None, 16 << 30)
    ui.set_setting(PIN_BUDGET_GIB, None)
    assert read(ui, tmp_path).pin_budget_bytes is None


@one_renderer
def test_the_switch_of_the_bar_works_at_once(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    switch = section(ui).locator(f"[id='{SHOW_BAR}']")
    for is_shown in (False, True):
        switch.click()
        ui.settle()
        assert (shown(ui, node) is not None) == is_shown == ui.server.settings[SHOW_BAR]


# The ceiling of new nodes


@one_language
def test_a_new_node_has_the_users_ceiling(ui: FrontEnd) -> None:
    before = ui.add(NODE)
    type_number(ui, section(ui), DEFAULT_CEILING, "75")
    ui.wait_for("id => app.extensionManager.setting.get(id) === 75", DEFAULT_CEILING)
    node = ui.add(NODE)
    assert (ceiling_of(ui, before), ceiling_of(ui, node)) == (50, 75)
    assert ui.graph_to_prompt()[node]["inputs"][CEILING] == 75
    assert ui.errors == []


@one_language
def test_a_node_from_a_workflow_keeps_its_own_ceiling(ui: FrontEnd) -> None:
    node = ui.add(NODE, **{CEILING: 40})
    saved = ui.serialize()
    ui.set_setting(DEFAULT_CEILING, 75)
    ui.load(saved)
    assert ceiling_of(ui, node) == 40


@one_language
@pytest.mark.parametrize("way", [COPY, CLONE], ids=["pasted", "cloned"])
def test_a_copy_keeps_the_ceiling_of_its_original(ui: FrontEnd, way: str) -> None:
    node = ui.add(NODE, **{CEILING: 40})
    ui.set_setting(DEFAULT_CEILING, 75)
    assert ceiling_of(ui, ui.evaluate(way, node)) == 40


@one_language
@pytest.mark.parametrize("saved", [["widgets_values", [0, True]], ["widgets_values", None]], ids=["some", "none"])
def test_a_node_that_was_saved_without_a_ceiling_has_the_nodes_own_default(ui: FrontEnd, saved: list[Any]) -> None:
    node = ui.add(NODE)
    workflow = ui.serialize()
    workflow["nodes"][0].pop("widgets_values_named", None)
    workflow["nodes"][0] |= dict([saved])
    ui.set_setting(DEFAULT_CEILING, 75)
    ui.load(workflow)
    assert ceiling_of(ui, node) == 50


@one_renderer
@pytest.mark.parametrize(("stored", "taken"), [(5, 30), (1000, 90), ("high", 50), (None, 50)])
def test_a_ceiling_that_the_dialog_would_not_give_is_made_to_fit(ui: FrontEnd, stored: Any, taken: float) -> None:
    ui.set_setting(DEFAULT_CEILING, stored)
    assert ceiling_of(ui, ui.add(NODE)) == taken
    assert ui.errors == []
