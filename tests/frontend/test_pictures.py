"""The pictures that `pictures.py` makes: they are there, fit their places, are shipped, and say what is true now."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from . import bars
from .answers import EXAMPLES, WEB
from .front_end import NODE, ROOT, FrontEnd, Variant
from .scenes import Scene, scenes, twelve_gib

DOCS = ROOT / "docs"
HELP = WEB / "docs" / NODE
JS = WEB / "js"
WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
THUMBNAILS = [file.with_suffix(".jpg") for file in WORKFLOWS]
NODE_PICTURES = [DOCS / f"node_{when}.png" for when in ("before", "during", "after")]
HELP_PICTURES = {"en": HELP / "node_during.png", "zh": HELP / "node_during.zh.png"}
KIB = 1 << 10


# Files


def test_every_example_has_a_thumbnail_and_no_thumbnail_is_left_over() -> None:
    assert sorted(EXAMPLES.glob("*.jpg")) == THUMBNAILS


@pytest.mark.parametrize("file", THUMBNAILS, ids=lambda file: file.name[:2])
def test_a_thumbnail_is_a_small_square_of_twice_the_size_that_the_dialog_shows(file: Path) -> None:
    with Image.open(file) as picture:
        assert (picture.format, picture.size) == ("JPEG", (512, 512))
    assert file.stat().st_size <= 80 * KIB


def test_thumbnails_are_told_apart_at_a_glance() -> None:
    glances = {file: Image.open(file).convert("L").resize((32, 32)) for file in THUMBNAILS}
    for one, other in itertools.combinations(THUMBNAILS, 2):
        difference = ImageStat.Stat(ImageChops.difference(glances[one], glances[other])).mean[0]
        assert difference > 4, (one.stem, other.stem)


def test_the_node_s_pictures_are_of_one_size_and_readable_at_full_size() -> None:
    sizes = set()
    for file in NODE_PICTURES:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            sizes.add(picture.size)
        assert file.stat().st_size <= 60 * KIB
    ((width, height),) = sizes
    assert 480 <= width <= 640
    assert height <= width


@pytest.mark.parametrize("file", [*NODE_PICTURES[:2], *HELP_PICTURES.values()], ids=lambda file: file.name)
def test_a_picture_of_the_node_has_the_colour_of_each_part_of_the_bar(file: Path) -> None:
    found = [rgb for _, rgb in Image.open(file).getcolors(1 << 20)]
    colours = re.findall(
        r"\b(other|residents|window|activations): \"#(\w{6})\"", (JS / "memory_bar.js").read_text("utf-8")
    )
    assert len(colours) == 4
    for name, colour in colours:
        wanted = bytes.fromhex(colour)
        # Stripes that are a pixel wide blend with their ground.
        assert min(sum(abs(a - b) for a, b in zip(rgb, wanted, strict=True)) for rgb in found) < 40, name


def test_the_readme_shows_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in NODE_PICTURES if f"](docs/{file.name})" not in readme] == []


@pytest.mark.parametrize("language", HELP_PICTURES)
def test_a_help_page_s_picture_is_small(language: str) -> None:
    file = HELP_PICTURES[language]
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.width <= 640
    assert file.stat().st_size <= 60 * KIB


# What they show


def test_there_is_a_scene_for_every_example() -> None:
    assert [scene.example for scene in scenes()] == [int(file.name[:2]) for file in WORKFLOWS]


@pytest.mark.parametrize("scene", scenes(), ids=lambda scene: str(scene.example))
def test_what_a_swap_node_shows_can_follow_from_what_it_asks_for(scene: Scene) -> None:
    workflow = json.loads(WORKFLOWS[scene.example - 1].read_text(encoding="utf-8"))
    asked = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == NODE]
    told = [part.progress for part in scene.parts if part.progress]
    assert len(told) == len(asked)
    for progress, (blocks, _, _, is_auto, ceiling, *_) in zip(told, asked, strict=True):
        memory, plan = progress.memory, progress.plan
        assert memory is not None
        assert plan is not None
        assert memory.ceiling == memory.total * ceiling / 100
        assert memory.other + memory.residents + memory.window <= memory.ceiling
        assert is_auto or plan.swapped_count == blocks


LANGUAGES = [Variant("newest", "vue", language) for language in HELP_PICTURES]


@pytest.mark.parametrize("front_end", LANGUAGES, indirect=True, ids=str)
def test_the_sentences_below_the_picture_on_a_help_page_are_those_of_the_picture(ui: FrontEnd) -> None:
    language = ui.variant.language
    page = WEB / "docs" / (f"{NODE}.md" if language == "en" else f"{NODE}/{language}.md")
    node = ui.add(NODE)
    bars.send(ui, node, twelve_gib().sampling(17))
    said = [line.replace("\u00a0", " ") for line in bars.bar(ui, node).lines]
    assert "\n".join(f"    {line}" for line in said) in page.read_text(encoding="utf-8")


def test_the_help_panel_shows_the_picture_of_its_language(ui: FrontEnd) -> None:
    node = ui.add(NODE)
    ui.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
    ui.page.get_by_test_id("info-button").click()
    picture = ui.page.locator(".node-help-content img")
    picture.wait_for()
    ui.wait_for("() => document.querySelector('.node-help-content img').complete")
    file = HELP_PICTURES[ui.variant.language]
    with Image.open(file) as expected:
        assert picture.evaluate("image => image.naturalWidth") == expected.width
    assert str(picture.get_attribute("src")).endswith(f"/docs/{NODE}/{file.name}")
