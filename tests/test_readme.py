"""README is for users: short sentences, plain words, figures that hold today; what it links to is there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_help import PAGES, SPAN, literals, page
from wanvideo_enhanced_blockswap.cli import main

from benchmarks import before_after

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOR_USERS, FOR_DEVELOPERS = README.split("\n## For developers\n")
MOST_LINES, MOST_WORDS = 120, 25

JARGON = re.compile(
    r"\b(forwards?|slots?|(?<!context )windows?(?!\w)|residents?|stalls?|ceilings?|page-lock\w*|pinned|adopt\w*|slabs?"
    r"|tiers?|MiB|GiB)\b"
)
"""Words of this package's developers. "Windows" is a system."""

MODELS = {
    "14B GGUF Q4_K_M": ("Wan 2.1/2.2 14B text to video, Q4_K_M",),
    "14B fp8": ("Wan 2.1/2.2 14B text to video, fp8", "Wan 2.2 14B image to video, fp8"),
    "14B fp16 or bf16": ("Wan 2.1/2.2 14B text to video, fp16",),
    "InfiniteTalk 14B fp8": ("InfiniteTalk 14B, fp8",),
}
"""Rows of README's table, and the models of `plan --table` that each stands for."""

OF_THE_WRAPPER = "Swapping … transformer blocks"

CARDS = {"8 GB": "RTX 4060", "12 GB": "RTX 3060 12GB", "16 GB": "RTX 4060 Ti 16GB", "24 GB": "RTX 4090"}

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def prose(markdown: str) -> str:
    """Without code blocks, tables, pictures and addresses; paragraphs and items of lists stay apart."""
    lines = [line for line in markdown.splitlines() if not re.match(r"\||!\[|#| {4,}\S", line)]
    text = re.sub(r"^(- |\d\. )", "\n\n", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text).replace("*", "")


def sentences(markdown: str) -> list[str]:
    return [
        " ".join(sentence.split())
        for paragraph in re.split(r"\n\s*\n", prose(markdown))
        for sentence in re.split(r"(?<=[.?!])\s+", paragraph)
        if sentence.strip()
    ]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def in_20_seconds(node: str, language: str) -> str:
    title, text = page(node, language).split("\n## ")[1].split("\n", 1)
    assert title == {"en": "In 20 seconds", "zh": "20 秒上手"}[language]
    return text


def anchors(markdown: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_the_check_of_sentences_sees_them() -> None:
    text = "# A title\n\nOne two. Three\nfour `five`!\n\n- Six [seven](eight.md)?\n  Nine\n\n    code here\n| a | b |\n"
    assert sentences(text) == ["One two.", "Three four `five`!", "Six seven?", "Nine"]


def test_a_sentence_for_users_has_at_most_25_words() -> None:
    long = [sentence for sentence in sentences(FOR_USERS) if len(sentence.split()) > MOST_WORDS]
    long += [cell for row in cells(FOR_USERS) for cell in row if len(cell.split()) > MOST_WORDS]
    assert long == []


@pytest.mark.parametrize(("text", "found"), [("a slot", "slot"), ("Windows", None), ("a context window", None)])
def test_the_check_of_words_sees_them(text: str, found: str | None) -> None:
    match = JARGON.search(text)
    assert (match and match.group()) == found


def test_readme_has_no_word_of_developers_for_users() -> None:
    assert JARGON.findall(re.sub(r"\]\([^)]+\)", "]", FOR_USERS)) == []


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_help_page_begins_with_what_is_read_in_20_seconds(node: str, language: str) -> None:
    text = in_20_seconds(node, language)
    assert JARGON.findall(text) == []
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > MOST_WORDS] == []
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE) == ["1", "2", "3"]
    assert len(text.split()) <= 140


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_help_page_has_no_line_of_code_that_scrolls_except_what_the_nodes_print(node: str, language: str) -> None:
    text = page(node, language)
    assert "──" not in text  # a drawing of wires is as wide as the names of its nodes


def test_which_card_runs_what_is_what_plan_says_today(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--table", "--json"]) == 0
    rows = {(row["model"], row["card"], row["shape"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    head, _, *table = cells(README.split("## Which card runs what")[1].split("\nIn these cells")[0])
    assert [heading.split(",")[0] for heading in head[2:]] == list(CARDS)
    assert [row[0] for row in table[::2]] == [row[0] for row in table[1::2]] == list(MODELS)
    for label, video, *shown in table:
        for model in MODELS[label]:
            for card, cell in zip(CARDS.values(), shown, strict=True):
                row = rows[model, card, f"{video}x81"]
                fits = f"{row['kept']} · {(row['forward_ms'] or 0) / 1e3:.0f} s"
                assert cell == (f"too little {row['missing']}" if row["missing"] else fits), (label, video, card)
                assert row["missing"] or row["bound"] == "computation"  # the GPU should never wait


@pytest.mark.parametrize("command", [r"pip install .*pytest.*", r"pip install .* demo"])
def test_a_command_that_ci_takes_from_it_is_there_once(command: str) -> None:
    assert rf"s/^    \({command}\)$/\1/p" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(re.findall(f"^    {command}$", README, re.MULTILINE)) == 1
    assert re.search(f"^    {command}$", FOR_DEVELOPERS, re.MULTILINE)


@pytest.mark.parametrize(
    "text",
    [FOR_USERS, (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")],
    ids=["README", "troubleshooting"],
)
def test_messages_that_are_quoted_are_those_of_the_code(text: str) -> None:
    spans = {span for span in SPAN.findall(text) if not re.match(r"bash |python ", span)} - {OF_THE_WRAPPER}
    pieces = [piece.strip(" .,:;()%") for span in spans for piece in re.split(r"…|\d[\d.]*", span)]
    assert [piece for piece in pieces if " " in piece and piece not in literals()] == []


def test_the_first_picture_is_of_the_figures_of_both_measurements(tmp_path: Path) -> None:
    for name in before_after.FIGURES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    assert before_after.main(["--draw", "--out", str(tmp_path)]) == 0
    drawn, stored = (tmp_path / "before_after.png", ROOT / "docs" / "before_after.png")
    with Image.open(drawn) as one, Image.open(stored) as other:
        assert one.size == other.size


def test_the_first_picture_is_not_drawn_from_one_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "docs" / before_after.FIGURES[0], tmp_path)
    assert before_after.main(["--draw", "--out", str(tmp_path)]) == 0
    assert f"has no {before_after.FIGURES[1]}" in capsys.readouterr().out
    assert not (tmp_path / "before_after.png").exists()


def test_it_is_installed_from_the_repository_of_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.+)"$', project, re.MULTILINE)
    folder = repository.rsplit("/", 1)[1]
    assert f"git clone {repository}\n" in README
    assert f"pip install -r {folder}/requirements.txt" in README
    portable = r"..\..\..\python_embeded\python.exe -m pip install -r requirements.txt"
    assert f"run this in its folder `{folder}`:\n\n      {portable}\n" in README
    assert f"({repository}/issues)" in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target
