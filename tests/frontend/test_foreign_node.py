"""A node of another pack that ComfyUI uses under our node's name: no bar of ours, and one sentence on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from . import answers
from .bars import SAMPLING, send
from .front_end import LANGUAGES, NODE, RENDERERS, VERSIONS, FrontEnd, Variant, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHOW_BAR = f"{NODE}.ShowBar"
THEIRS = {"vram_threshold_percent": ("FLOAT", {"default": 50.0}), "debug_mode": ("BOOLEAN", {"default": False})}
NOTICE = """id => {
    const widget = app.graph.getNodeById(id).widgets.find(each => each.name === "blockswap_memory");
    const root = widget?.element.shadowRoot;
    return root && {
        text: root.textContent,
        label: widget.element.getAttribute("aria-label"),
        drawings: root.querySelectorAll("svg").length,
        height: root.firstElementChild.offsetHeight,
        shown: widget.element.isConnected && widget.element.checkVisibility(),
    };
}"""
VALUES = "id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(each => [each.name, each.value]))"


def said(language: str) -> str:
    template = answers.translations()[language]["wanVideoEnhancedBlockSwap"]["foreign"]
    of_both = template.replace("[theirs]", "custom_nodes/Intelligent.VRAMNode")
    return str(of_both.replace("[ours]", f"custom_nodes/{answers.FOLDER}"))


@pytest.fixture(
    scope="module",
    params=[Variant(v, r, language) for v, r in zip(VERSIONS, RENDERERS, strict=True) for language in LANGUAGES]
    + [Variant(v, r) for v, r in zip(VERSIONS, reversed(RENDERERS), strict=True)],
    ids=str,
)
def replaced(request: pytest.FixtureRequest, chromium: Browser) -> Iterator[FrontEnd]:
    """A page of a ComfyUI in which the predecessor is loaded after us."""

    def object_info() -> dict[str, Any]:
        nodes = answers_before()
        theirs = nodes[NODE] | {"python_module": "custom_nodes.Intelligent.VRAMNode"}
        theirs |= {"input": {"optional": THEIRS}, "input_order": {"optional": [*THEIRS]}}
        return nodes | {NODE: theirs}

    answers_before = answers.object_info
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "object_info", object_info)
        with opened(chromium, request.param) as page:
            patch.undo()  # the server has taken it
            yield page


@pytest.fixture
def other(replaced: FrontEnd) -> FrontEnd:
    replaced.reset()
    return replaced


def test_the_node_says_whose_it_is_and_has_no_bar(other: FrontEnd) -> None:
    node = other.add(NODE)
    sentence = said(other.variant.language)
    notice = other.evaluate(NOTICE, node)
    assert notice["height"] < 100
    assert notice == {"text": sentence, "label": sentence, "drawings": 0, "height": notice["height"], "shown": True}
    assert other.errors == []
    assert [error for error in other.errors_at_start if answers.FOLDER in error or "exception" in error] == []


def test_no_event_and_no_setting_of_ours_changes_the_node(other: FrontEnd) -> None:
    other.set_setting(f"{NODE}.DefaultCeiling", 80)
    node = other.add(NODE)
    before = other.evaluate(NOTICE, node)
    assert other.evaluate(VALUES, node)["vram_threshold_percent"] == 50
    send(other, node, SAMPLING)
    other.set_setting(SHOW_BAR, value=False)
    assert other.evaluate(NOTICE, node) == before
    again = other.add(NODE)
    assert other.evaluate(NOTICE, again) == before
    assert other.errors == []


def test_nothing_of_it_is_saved(other: FrontEnd) -> None:
    node = other.add(NODE)
    assert other.graph_to_prompt()[node]["inputs"] == {"vram_threshold_percent": 50, "debug_mode": False}
    (saved,) = other.serialize()["nodes"]
    assert saved["widgets_values"] == [50, False]


def test_the_sentence_follows_the_language(other: FrontEnd) -> None:
    node = other.add(NODE)
    other.load(other.serialize())
    wanted = "en" if other.variant.language == "zh" else "zh"
    other.set_setting("Comfy.Locale", wanted)
    other.load(other.serialize())
    other.wait_for(f"([id, text]) => ({NOTICE})(id)?.text === text", [node, said(wanted)])
