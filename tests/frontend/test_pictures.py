"""The pictures that `pictures.py` makes: they are there, fit their places, are shipped, and say what is true now."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageChops, ImageSequence, ImageStat
from wanvideo_enhanced_blockswap.blockswap.run.progress import Phase

from . import bars
from .answers import EXAMPLES, WEB
from .film import frames, store
from .front_end import NODE, ROOT, FrontEnd, Variant
from .made_runs import STEPS, twelve_gib
from .shots import Studio
from .thumbnails import BADGE, Thumbnail, thumbnails

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DOCS = ROOT / "docs"
HELP = WEB / "docs" / NODE
JS = WEB / "js"
WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
THUMBNAILS = [file.with_suffix(".jpg") for file in WORKFLOWS]
NODE_PICTURES = [DOCS / f"node_{when}.png" for when in ("before", "during", "after")]
FILM = DOCS / "node_run.gif"
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


def test_the_documents_show_them() -> None:
    shown = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [file.name for file in NODE_PICTURES if f"]({file.name})" not in shown] == []
    assert f"](docs/{FILM.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_film_is_short_small_and_begins_again() -> None:
    assert FILM.stat().st_size <= 1 << 20
    with Image.open(FILM) as film:
        assert (film.format, film.info["loop"]) == ("GIF", 0)
        assert 480 <= film.width <= 640
        shown_ms = sum(frame.info["duration"] for frame in ImageSequence.Iterator(film))
    assert 6_000 <= shown_ms <= 10_000


@pytest.mark.parametrize("language", HELP_PICTURES)
def test_a_help_page_s_picture_is_small(language: str) -> None:
    file = HELP_PICTURES[language]
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.width <= 640
    assert file.stat().st_size <= 60 * KIB


# What they show


def test_the_film_goes_through_a_run_from_its_beginning_to_its_end() -> None:
    shown = [frame.progress for frame in frames(twelve_gib())]
    assert shown[0] is None
    phases = [progress.phase for progress in shown[1:] if progress is not None]
    assert list(dict.fromkeys(phases)) == [Phase.ADOPTING, Phase.SAMPLING, Phase.DONE]
    steps = [progress.run.step for progress in shown[1:] if progress is not None and progress.run is not None]
    assert [step.number for step in steps if step is not None] == [*range(1, STEPS + 1), STEPS]


def test_a_film_has_each_picture_for_its_time(tmp_path: Path) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    store([Image.new("RGB", (40, 20), colour) for colour in colours], [100, 200, 300], tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        found = [
            (frame.info["duration"], frame.convert("RGB").getpixel((5, 5))) for frame in ImageSequence.Iterator(film)
        ]
    assert found == [(100, colours[0]), (200, colours[1]), (300, colours[2])]


def test_there_is_a_drawing_for_every_example() -> None:
    assert [thumbnail.example for thumbnail in thumbnails()] == [int(file.name[:2]) for file in WORKFLOWS]


@pytest.mark.parametrize("thumbnail", thumbnails(), ids=lambda thumbnail: str(thumbnail.example))
def test_a_thumbnail_names_a_card_of_its_example_s_title_or_note(thumbnail: Thumbnail) -> None:
    file = WORKFLOWS[thumbnail.example - 1]
    sizes = re.findall(r"\d+", thumbnail.card)
    assert {f"{size} GB" for size in sizes} <= set(re.findall(r"\d+ GB", file.stem))


@pytest.mark.parametrize("file", THUMBNAILS, ids=lambda file: file.name[:2])
def test_nothing_of_a_thumbnail_is_below_the_dialog_s_badge(file: Path) -> None:
    with Image.open(file) as picture:
        covered = picture.crop((0, 0, *BADGE)).resize((16, 6))
    assert max(ImageStat.Stat(covered).stddev) < 12  # the ground alone


WITHOUT_CHINESE = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <selectfont>
    <rejectfont><pattern><patelt name="lang"><string>zh-cn</string></patelt></pattern></rejectfont>
  </selectfont>
</fontconfig>
"""


def test_no_picture_is_taken_where_no_font_has_chinese(chromium: Browser, tmp_path: Path) -> None:
    fonts = tmp_path / "fonts.conf"
    fonts.write_text(WITHOUT_CHINESE, encoding="utf-8")
    script = Path(__file__).with_name("pictures.py")
    environment = {**os.environ, "FONTCONFIG_FILE": str(fonts)}
    command = [sys.executable, str(script), "--out", str(tmp_path / "out")]
    taken = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (taken.returncode, taken.stderr.strip()) == (
        1,
        "a font with Chinese is missing: apt-get install fonts-noto-cjk",
    )
    assert not (tmp_path / "out").exists()


FILMED = [Variant("newest", "vue", "en")]


@pytest.mark.parametrize("front_end", FILMED, indirect=True, ids=str)
def test_the_film_is_made_in_the_front_end(ui: FrontEnd, tmp_path: Path) -> None:
    Studio(ui, tmp_path).film()
    with Image.open(tmp_path / "docs" / FILM.name) as film, Image.open(FILM) as stored:
        assert film.n_frames == stored.n_frames == len(list(frames(twelve_gib())))


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
