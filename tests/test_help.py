"""Help pages and translations cover every input, and quote nodes and messages as they are now."""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wanvideo_enhanced_blockswap as package
from checkpoint_files import wan_shapes
from facts import Facts, make_plan
from test_report import FULL, brief, plan
from wanvideo_enhanced_blockswap.blockswap.model.activations import activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.recognise import TensorInfo, profile_tensors
from wanvideo_enhanced_blockswap.blockswap.model.wan import tokens_for
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations
from wanvideo_enhanced_blockswap.blockswap.run.text import plan_text, summary
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import GIB, DeviceMemory, DeviceSpec, HostMemory, HostPlatform, Vendor

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
NODES = {name: node for name, node in package.NODE_CLASS_MAPPINGS.items() if not getattr(node, "DEPRECATED", False)}
LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "ru", "zh")
TRANSLATED = tuple(language for language in LANGUAGES if language != "en")
CHINESE = {"Inputs": "参数", "The bar on the node": "节点上的显存条", "Settings": "设置", "Questions": "常见问题"}
PAGES = [(node, language) for node in NODES for language in ("en", "zh")]

NUMBER = re.compile(r"\d+(?:\.\d+)?")
SPAN = re.compile(r"`([^`\n]+)`")
ABSOLUTE_PATH = re.compile(r"(?<![\w./])/(?:bin|data|etc|home|mnt|opt|root|tmp|Users|usr|var|work)\b|\b[A-Za-z]:\\")


def inputs_of(node: str) -> dict[str, Any]:
    types = NODES[node].INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def locale(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def own_texts() -> dict[str, Any]:
    """What the nodes say themselves, in the form of a locale."""
    return {
        node: {
            "display_name": package.NODE_DISPLAY_NAME_MAPPINGS[node],
            "description": NODES[node].DESCRIPTION,
            "inputs": {
                name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs_of(node).items()
            },
            "outputs": {
                str(index): {"name": name, "tooltip": tooltip}
                for index, (name, tooltip) in enumerate(
                    zip(NODES[node].RETURN_NAMES, NODES[node].OUTPUT_TOOLTIPS, strict=True)
                )
            },
        }
        for node in NODES
    }


def leaves(texts: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each text of a locale with its place."""
    if not isinstance(texts, dict):
        yield path, texts
        return
    for key, value in texts.items():
        yield from leaves(value, (*path, key))


def page(node: str, language: str) -> str:
    path = DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def section(node: str, language: str, heading: str) -> str:
    """What is below a heading of the second level, given in English."""
    wanted = heading if language == "en" else CHINESE[heading]
    return page(node, language).split(f"\n## {wanted}\n")[1].split("\n## ")[0]


def inputs_told(node: str, language: str) -> dict[str, tuple[str, str]]:
    """What a page calls each input, and its default with the range, by the identifier."""
    found = {}
    for line in re.findall(r"^- (\*\*.+)$", section(node, language, "Inputs"), re.MULTILINE):
        head, text = re.split(r": |：", line, maxsplit=1)
        found[head.split("`")[1]] = (head, re.split(r"\. |\.$|。", text)[0])
    return found


@functools.cache
def literals() -> str:
    """Every text in the shipped code, with what is filled in left out."""
    files = [*ROOT.glob("*.py"), *(ROOT / "blockswap").glob("**/*.py"), *(ROOT / "hardware").glob("*.py")]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("…".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def indented(text: str) -> str:
    """As a block of code on a page."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# Translations


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_locale_has_the_nodes_inputs_and_outputs_and_nothing_else(language: str) -> None:
    assert sorted(path for path, _ in leaves(locale(language))) == sorted(path for path, _ in leaves(own_texts()))


def test_no_other_language_has_a_folder() -> None:
    assert sorted(folder.name for folder in (ROOT / "locales").iterdir()) == list(LANGUAGES)


def test_english_is_what_the_nodes_say() -> None:
    assert locale("en") == own_texts()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_a_locale_has_words_and_nothing_that_vue_i18n_would_interpret(language: str) -> None:
    for path, text in leaves(locale(language)):
        assert text == text.strip() != "", path
        assert not set(text) & set("{}@|"), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_no_sentence_is_left_in_english(language: str) -> None:
    english = dict(leaves(own_texts()))
    sentences = {path: text for path, text in leaves(locale(language)) if path[-1] != "name"}
    assert [path for path, text in sentences.items() if text == english[path]] == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_has_the_numbers_of_the_english_text(language: str) -> None:
    english = dict(leaves(own_texts()))
    for path, text in leaves(locale(language)):
        assert sorted(NUMBER.findall(text)) == sorted(NUMBER.findall(english[path])), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_calls_other_inputs_by_the_names_that_they_have_on_the_node(language: str) -> None:
    for node, texts in locale(language).items():
        for name, (_, options) in inputs_of(node).items():
            others = [other for other in inputs_of(node) if "_" in other and other != name]
            called = [other for other in others if re.search(rf"\b{other}\b", options["tooltip"])]
            missing = [o for o in called if texts["inputs"][o]["name"] not in texts["inputs"][name]["tooltip"]]
            assert not missing, (node, name)


# Help pages


def test_every_node_has_a_page_in_both_languages_and_no_page_is_of_another_node() -> None:
    found = {str(path.relative_to(DOCS).as_posix()) for path in DOCS.rglob("*.md")}
    assert found == {f"{node}.md" for node in NODES} | {f"{node}/zh.md" for node in NODES}


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_page_has_every_input_in_the_order_of_the_node(node: str, language: str) -> None:
    assert list(inputs_told(node, language)) == list(inputs_of(node))


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_page_has_the_default_and_the_range_of_each_widget(node: str, language: str) -> None:
    switches = {"en": ("off", "on"), "zh": ("关", "开")}[language]
    for name, (_, told) in inputs_told(node, language).items():
        kind, options = inputs_of(node)[name]
        if kind == "BOOLEAN":
            assert told == switches[options["default"]], name
        elif kind in ("INT", "FLOAT"):
            step = [options["step"]] if options["step"] != 1 else []
            expected = [options["default"], options["min"], options["max"], *step]
            assert [float(number) for number in NUMBER.findall(told)] == expected, name


@pytest.mark.parametrize("node", NODES)
def test_a_chinese_page_names_the_inputs_as_the_node_shows_them(node: str) -> None:
    names = {name: text["name"] for name, text in locale("zh")[node]["inputs"].items()}
    # Before the identifier, which is in full-width brackets.
    told = {name: head for name, (head, _) in inputs_told(node, "zh").items()}
    assert told == {name: f"**{shown}**（`{name}`）" for name, shown in names.items()}


@pytest.mark.parametrize("node", NODES)
def test_both_languages_have_the_same_sections_and_tables(node: str) -> None:
    marks = [re.findall(r"^(#+(?= )|\||- |\d\.)", page(node, language), re.MULTILINE) for language in ("en", "zh")]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_page_is_headed_by_the_nodes_name(node: str, language: str) -> None:
    assert page(node, language).splitlines()[0] == f"# {locale(language)[node]['display_name']}"


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_page_has_no_absolute_path_and_images_where_the_front_end_looks_for_them(node: str, language: str) -> None:
    text = page(node, language)
    assert ABSOLUTE_PATH.search(text) is None
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(r"src=\"([^\"]+)", text):
        assert not re.match(r"/|\w+:|\.\.", target)
        assert (DOCS / target).is_file()  # it resolves addresses on a translated page against this folder, too


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_messages_that_a_page_quotes_are_those_of_the_code(node: str, language: str) -> None:
    said = literals()
    spans = [span for span in SPAN.findall(page(node, language)) if not span.startswith("python ")]
    pieces = [piece.strip(" .,:;()") for span in spans for piece in re.split(r"…|\d[\d.]*", span)]
    assert [piece for piece in pieces if " " in piece and piece not in said] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_calls_the_parts_of_the_bar_and_the_settings_what_the_front_end_calls_them(language: str) -> None:
    folder = ROOT / "locales" / language
    main, settings = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("main", "settings"))
    words = main["wanVideoEnhancedBlockSwap"]
    parts = [words[name] for name in ("other", "residents", "window", "activations", "free", "ceiling")]
    names = [setting["name"] for setting in settings.values()]
    for heading, shown in (("The bar on the node", parts), ("Settings", names)):
        told = section("WanVideoEnhancedBlockSwap", language, heading)
        assert re.findall(r"^- \*\*(.+?)\*\*", told, re.MULTILINE) == shown


# Examples on the pages


def example_plan() -> str:
    """Wan 14B image to video in fp8 at 832x480x81 on 12 GB of which 1 GB is in use, under the defaults."""
    shapes = wan_shapes(5120, 13824, 40, channels=36)
    sizes = {name: 1 if "blocks." in name and len(shape) == 2 else 2 for name, shape in shapes.items()}
    stored = {
        name: TensorInfo(shape, "F8_E4M3" if sizes[name] == 1 else "BF16", math.prod(shape) * sizes[name])
        for name, shape in shapes.items()
    }
    found = profile_tensors("an example", stored)
    expected = activation_bytes(found.architecture, tokens_for(found.architecture, 832, 480, 81), found.forward_options)
    facts = Facts(
        spec=DeviceSpec("NVIDIA GeForce RTX 3060", Vendor.NVIDIA, "cuda:0", None, None, 28, False, None, None, None),
        memory=DeviceMemory(12 * GIB, 11 * GIB - found.model.other_bytes, "a test"),
        host=HostMemory(32 * GIB, 14 * GIB, None, None, HostPlatform.WINDOWS),
        activations=Activations(nbytes=expected, is_measured=False),
    )
    made = make_plan(found.model, SwapSettings(), facts)
    return plan_text(made, card=facts.spec.name)


def example_report() -> str:
    """The report of the report's own test, without what does not come in ComfyUI."""
    return summary(replace(FULL, notes=()))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    ("node", "example"),
    [
        ("WanVideoEnhancedBlockSwapPlan", example_plan),
        ("WanVideoEnhancedBlockSwapReport", example_report),
    ],
)
def test_an_example_on_a_page_is_what_the_code_says(node: str, example: Any, language: str) -> None:
    assert indented(example()) in page(node, language)


def test_the_log_of_debug_mode_in_the_documents_is_what_the_code_says() -> None:
    log = "\n".join(brief(plan(24, 0, streams=16)))
    assert indented(log) in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_ram_on_a_page_is_what_the_documents_predict(language: str) -> None:
    fits = (ROOT / "docs" / "what-fits.md").read_text(encoding="utf-8")
    (_, *models), _, *table = cells(section("WanVideoEnhancedBlockSwap", language, "Questions"))
    predicted = {}
    for model in models:
        kind = model.removeprefix("GGUF ")
        told = fits.split(f"### Wan 2.1/2.2 14B text to video, {kind}\n")[1].split("\n### ")[0]
        predicted[model] = {row[0]: row[3] for row in cells(told)}
    cards = {"8 GB": "RTX 4060", "12 GB": "RTX 3060 12GB", "16 GB": "RTX 4060 Ti 16GB"}
    assert table == [[card, *(predicted[model][known] for model in models)] for card, known in cards.items()]


def test_the_ram_that_is_enough_on_a_page_is_what_the_documents_compute() -> None:
    of_machine = cells((ROOT / "docs" / "ram.md").read_text(encoding="utf-8"))
    read = {(row[0], row[1]): row[5] for row in of_machine}  # from the model's file in each pass
    assert read["16 GB", "Wan 2.1 14B fp8"] == read["32 GB", "Wan 2.1 14B fp16"] == "-"
    assert read["8 GB", "Wan 2.1 14B fp8"] != "-" != read["16 GB", "Wan 2.1 14B fp16"]
