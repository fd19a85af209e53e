"""The Chinese texts: sentences of a length that is read at once, one word for one thing, names as on the node."""

from __future__ import annotations

import re

import pytest
from test_help import NODES, SPAN, inputs_of, leaves, locale, page
from test_locales import BAR, texts

HANZI = re.compile(r"[\u4e00-\u9fff]")
MOST_HANZI = 45
WIDGETS = ("BOOLEAN", "FLOAT", "INT")

OTHER_WORDS = {
    "流式传输": "按需传输",
    "直通": "不起作用",
    "从不等待": "没有等待",
    "开发者的说法": "开发者术语",
    "链路": "PCIe",
    "显存溢出": "显存不足, but of the driver's own swapping",
}
"""Words for which the texts have another one."""


def sentences(text: str) -> list[str]:
    """What is between full stops; cells, lines and quoted output end one as well."""
    told = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return [each for each in re.split(r"[。！？\n|]", told) if each.strip()]


def too_long(text: str) -> list[str]:
    return [each for each in sentences(text) if len(HANZI.findall(each)) > MOST_HANZI]


def all_texts() -> dict[str, str]:
    """Pages and locales, by their names."""
    found = {f"{node}: page": page(node, "zh") for node in NODES}
    for name, texts_of in (
        ("nodes", locale("zh")),
        ("bar", texts("zh", "main")[BAR]),
        ("settings", texts("zh", "settings")),
    ):
        found |= {f"{name}: {'.'.join(path)}": text for path, text in leaves(texts_of)}
    return found


@pytest.mark.parametrize(
    ("text", "number"), [("多" * 45 + "。" + "少" * 46 + "。", 1), ("多" * 30 + "\n" + "少" * 30, 0)]
)
def test_the_check_of_sentences_sees_long_ones(text: str, number: int) -> None:
    assert len(too_long(text)) == number


def test_no_sentence_is_too_long_to_be_read_at_once() -> None:
    assert {where: long for where, text in all_texts().items() if (long := too_long(text))} == {}


@pytest.mark.parametrize("node", NODES)
def test_the_identifier_of_a_widget_stands_beside_the_name_that_the_node_shows(node: str) -> None:
    shown = {
        name: locale("zh")[each]["inputs"][name]["name"]
        for each in NODES
        for name, (kind, _) in inputs_of(each).items()
        if kind in WIDGETS
    }
    text = page(node, "zh")
    for name in set(SPAN.findall(text)) & set(shown):
        beside = text.count(f"“{shown[name]}”（`{name}`）") + text.count(f"**{shown[name]}**（`{name}`）")
        assert text.count(f"`{name}`") == beside, name


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_one_thing_has_one_word(word: str) -> None:
    found = [where for where, text in all_texts().items() if word in re.sub(r"^### 爆显存.*$", "", text, flags=re.M)]
    assert found == [], OTHER_WORDS[word]


@pytest.mark.parametrize("node", NODES)
def test_the_wrapper_has_its_name(node: str) -> None:
    assert re.findall(r"(?<!\w)wrapper(?!\w)", SPAN.sub("", page(node, "zh"))) == []
