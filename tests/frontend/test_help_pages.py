"""Help pages in the real front ends: the panel shows the page of the user's language."""

from __future__ import annotations

import re

import pytest
from test_help import NODES

from .answers import FOLDER, WEB
from .front_end import FrontEnd

TOO_WIDE = """panel => [...panel.querySelectorAll("*")].filter(
    each => !each.closest("pre") && each.getBoundingClientRect().right > panel.getBoundingClientRect().right + 1
).map(each => each.outerHTML.slice(0, 200))"""
"""What one would have to scroll to see; what the nodes print scrolls by itself."""

TRIED_FIRST = re.compile(rf"/extensions/{re.escape(FOLDER)}/docs/\w+/en\.md")
"""Front ends look for a page of the language; the English one is the page that they take in its absence."""


def headings(markdown: str) -> list[str]:
    return [line.lstrip("# ").replace("`", "") for line in markdown.splitlines() if re.match(r"#+ ", line)]


@pytest.mark.parametrize("kind", NODES)
def test_the_help_button_of_a_node_shows_its_page_in_the_user_s_language(ui: FrontEnd, kind: str) -> None:
    language = ui.variant.language
    page = WEB / "docs" / (f"{kind}.md" if language == "en" else f"{kind}/{language}.md")
    expected = headings(page.read_text(encoding="utf-8"))
    node = ui.add(kind)
    ui.evaluate("id => { app.canvas.selectNode(app.graph.getNodeById(id)); app.canvas.setDirty(true, true); }", node)
    ui.page.get_by_test_id("info-button").click()
    panel = ui.page.locator(".node-help-content")
    panel.get_by_role("heading", name=expected[-1], exact=True).wait_for()
    assert panel.get_by_role("heading").all_inner_texts() == expected
    assert panel.evaluate(TOO_WIDE) == []
    assert [path for path in ui.server.failed if not TRIED_FIRST.fullmatch(path)] == []
