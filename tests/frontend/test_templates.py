"""The example workflows in the template dialog: all are listed with a picture, and one click opens one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256

import pytest

from .answers import EXAMPLES, FOLDER
from .front_end import FrontEnd

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
ALL_THERE = """count => {
    const images = [...document.querySelectorAll("[role=dialog] img")];
    return images.length >= count && images.every(image => image.complete && image.naturalWidth > 0);
}"""
PICTURES = """() => Promise.all([...document.querySelectorAll("[role=dialog] img")].map(async image => {
    const content = await (await fetch(image.src)).arrayBuffer();
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
    return [image.alt, [...digest].map(byte => byte.toString(16).padStart(2, "0")).join("")];
}))"""
"""Name and digest of each; front ends show them from a cache, not from their address."""


@pytest.fixture
def dialog(ui: FrontEnd) -> Iterator[FrontEnd]:
    """The page with the template dialog open at our category, so high that all pictures are in view: others wait."""
    before = ui.page.viewport_size
    assert before is not None
    ui.page.set_viewport_size({"width": before["width"], "height": 1800})
    ui.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    ui.page.get_by_role("dialog").get_by_text(FOLDER).first.click()
    for name in NAMES:
        ui.page.get_by_role("dialog").get_by_text(name, exact=True).first.wait_for()
    yield ui
    ui.page.set_viewport_size(before)


def test_every_example_is_listed_with_its_picture(dialog: FrontEnd) -> None:
    dialog.wait_for(ALL_THERE, len(NAMES))
    files = {name: EXAMPLES / f"{name}.jpg" for name in NAMES}
    expected = {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.exists()}
    assert expected.keys() == files.keys()
    assert dict(dialog.evaluate(PICTURES)) == expected


def test_a_click_on_an_example_opens_it(dialog: FrontEnd) -> None:
    dialog.page.get_by_role("dialog").get_by_text(NAMES[0], exact=True).first.click()
    expected = json.loads((EXAMPLES / f"{NAMES[0]}.json").read_text(encoding="utf-8"))
    dialog.wait_for("count => app.graph.nodes.length === count", len(expected["nodes"]))
    assert dialog.page.get_by_role("dialog").count() == 0
    assert len(dialog.serialize()["links"]) == len(expected["links"])


@pytest.mark.parametrize("words", ["low vram", "8 GB", "12 GB", "16 GB"])
def test_who_searches_for_a_small_card_finds_every_example_whose_title_says_so(dialog: FrontEnd, words: str) -> None:
    dialog.page.get_by_role("dialog").get_by_role("textbox").first.fill(words)
    expected = sorted(name for name in NAMES if words.casefold() in name.casefold())
    assert expected
    dialog.wait_for(
        """([names, expected]) => {
            const shown = [...document.querySelectorAll("[role=dialog] img")].map(image => image.alt);
            return JSON.stringify(shown.filter(name => names.includes(name)).sort()) === JSON.stringify(expected);
        }""",
        [NAMES, expected],
    )
