"""Texts of the memory bar and of the settings: every language has what the JavaScript reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_help import LANGUAGES, NUMBER, TRANSLATED, leaves, locale

ROOT = Path(__file__).parents[1]
JS = ROOT / "web" / "js"
FILES = ("main", "settings")
BAR = "wanVideoEnhancedBlockSwap"

PLACEHOLDER = re.compile(r"\[\w+\]")
# A property of an object, and a text on its line or the next.
PROPERTY = re.compile(r'^\s+(\w+):\s+"((?:[^"\\]|\\.)*)",$', re.MULTILINE)
CATEGORY = re.compile(r"category: \[(\w+), (\w+), ")
CONSTANT = re.compile(r'^(?:export )?const (\w+) = "([^"]*)";$', re.MULTILINE)


def texts(language: str, file: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8")))


def script(name: str) -> str:
    return (JS / name).read_text(encoding="utf-8")


def english_of_the_bar() -> dict[str, str]:
    """The words in texts.js."""
    body = script("texts.js").split("export const ENGLISH = {\n")[1].split("\n};")[0]
    return dict(PROPERTY.findall(body))


def english_of_the_settings() -> dict[str, dict[str, str]]:
    """Names and tooltips in settings.js, by the key that the dialog looks for."""
    constants = dict(CONSTANT.findall(script("settings.js")))
    found = {}
    for each in script("settings.js").split("  {\n    id: ")[1:]:
        name = each.split(",", 1)[0]
        texts = dict(PROPERTY.findall(each))
        found[constants.get(name, name.strip('"')).replace(".", "_")] = {
            part: texts[part] for part in ("name", "tooltip")
        }
    return found


def categories() -> set[str]:
    constants = dict(CONSTANT.findall(script("settings.js")))
    return {constants[name] for names in CATEGORY.findall(script("settings.js")) for name in names}


# English


def test_english_is_what_the_bar_says_without_its_locale() -> None:
    assert texts("en", "main")[BAR] == english_of_the_bar() != {}


def test_english_is_what_the_settings_say_without_their_locale() -> None:
    assert texts("en", "settings") == english_of_the_settings() != {}


def test_the_sections_of_the_dialog_have_names() -> None:
    assert set(texts("en", "main")["settingsCategories"]) == categories()
    assert len(categories()) == 3


def test_no_name_of_a_section_is_the_front_ends_own() -> None:
    # Such a name would be given to the sections of other packages as well.
    assert [key for key in texts("en", "main")["settingsCategories"] if not key.startswith("WanVideo ")] == []


def test_the_bar_has_no_word_that_is_never_said() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in JS.glob("*.js"))
    assert [word for word in english_of_the_bar() if f'"{word}"' not in code] == []


# Every language


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_the_texts_of_english_in_its_order(language: str, file: str) -> None:
    assert [path for path, _ in leaves(texts(language, file))] == [path for path, _ in leaves(texts("en", file))]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_has_words_and_nothing_that_vue_i18n_would_interpret(language: str, file: str) -> None:
    for path, text in leaves(texts(language, file)):
        assert text == text.strip() != "", path
        assert not set(text) & set("{}@|"), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_has_the_placeholders_and_the_numbers_of_the_english_text(language: str) -> None:
    for file in FILES:
        english = dict(leaves(texts("en", file)))
        for path, text in leaves(texts(language, file)):
            for pattern in (PLACEHOLDER, NUMBER):
                assert sorted(pattern.findall(text)) == sorted(pattern.findall(english[path])), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_no_sentence_is_left_in_english(language: str) -> None:
    for file in FILES:
        english = dict(leaves(texts("en", file)))
        found = {path: text for path, text in leaves(texts(language, file)) if " " in PLACEHOLDER.sub("", text).strip()}
        assert [path for path, text in found.items() if text == english[path] and path[0] != "settingsCategories"] == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_setting_calls_its_widget_by_the_name_that_it_has_on_the_node(language: str) -> None:
    widget = locale(language)["WanVideoEnhancedBlockSwap"]["inputs"]["vram_threshold_percent"]["name"]
    assert widget in texts(language, "settings")["WanVideoEnhancedBlockSwap_DefaultCeiling"]["name"]
