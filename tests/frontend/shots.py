"""Studio: takes the pictures of one front end and stores them where README, help pages and the template dialog look."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from . import bars
from .answers import EXAMPLES
from .film import frames, store
from .front_end import NODE, FrontEnd, Variant, browser, opened
from .made_runs import twelve_gib
from .thumbnails import SIDE, drawn, thumbnails

CLEAR = (300, 150)
"""Left and top of a part of the page that no menu covers, in pixels."""

NODE_SCALE = 1.25
"""Of a node that is shown alone: lines of its text are then whole pixels apart."""

MARGIN = 20
"""Around it, in pixels: of the canvas, for its shadow."""

JPEG_QUALITY = 90

LOOK = """([clear, left, top, scale]) => {
    const page = app.canvas.canvas.getBoundingClientRect();
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [(clear[0] - page.left) / scale - left, (clear[1] - page.top) / scale - top];
    app.canvas.setDirty(true, true);
}"""
"""Brings a point of the graph to the clear part of the page."""


DRAWN = """character => {
    const context = document.createElement("canvas").getContext("2d");
    context.font = "32px Inter, system-ui, sans-serif";
    context.fillText(character, 0, 40);
    return context.canvas.toDataURL();
}"""


def draws(ui: FrontEnd, characters: str) -> bool:
    """Whether the machine has a font with these characters, all different: without one, each is the same empty box."""
    return len({ui.evaluate(DRAWN, character) for character in characters}) == len(characters)


@contextmanager
def opened_for_pictures(language: str) -> Iterator[FrontEnd]:
    """The newest front end with Nodes 2.0, in which a node shows what matters first."""
    with browser() as chromium, opened(chromium, Variant("newest", "vue", language)) as ui:
        ui.reset()
        ui.set_setting("Comfy.NodeBadge.NodeSourceBadgeMode", "None")  # a folder's name
        yield ui


class Studio:
    """Takes pictures.

    Args:
        ui: With an empty graph.
        out: Where the pictures' folders are.
    """

    def __init__(self, ui: FrontEnd, out: Path) -> None:
        self._ui = ui
        self._out = out

    def nodes(self) -> None:
        """The node before, during and after a run."""
        run = twelve_gib()
        node = bars.connected(self._ui)
        self._store(self._node(node), "docs/node_before.png")
        bars.send(self._ui, node, run.sampling(17))
        during = self._node(node)
        self._store(during, "docs/node_during.png")
        self._store(during, f"web/docs/{NODE}/node_during.png")
        bars.send(self._ui, node, run.done(30))
        self._store(self._node(node), "docs/node_after.png")

    def film(self) -> None:
        """The node in a whole run, as a GIF."""
        node, pictures, durations = bars.connected(self._ui), [], []
        for frame in frames(twelve_gib()):
            if frame.progress is not None:
                bars.send(self._ui, node, frame.progress)
            pictures.append(self._node(node))
            durations.append(frame.ms)
        # The panel grows with its text: all frames are as high as the highest.
        height = max(picture.height for picture in pictures)
        padded = [Image.new("RGB", (picture.width, height), picture.getpixel((0, 0))) for picture in pictures]
        for ground, picture in zip(padded, pictures, strict=True):
            ground.paste(picture)
        path = self._out / "docs" / "node_run.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        store(padded, durations, path)

    def help_page(self) -> None:
        """The node during a run, for the help page in another language."""
        node = bars.connected(self._ui)
        bars.send(self._ui, node, twelve_gib().sampling(17))
        self._store(self._node(node), f"web/docs/{NODE}/node_during.{self._ui.variant.language}.png")

    def thumbnails(self) -> None:
        """One for each example, on a page of its own."""
        page = self._ui.page.context.new_page()
        page.set_viewport_size({"width": SIDE, "height": SIDE})
        for thumbnail in thumbnails():
            (file,) = EXAMPLES.glob(f"{thumbnail.example:02} *.json")
            page.set_content(drawn(thumbnail))
            self._store(_opened(page.screenshot()), f"example_workflows/{file.stem}.jpg")
        page.close()

    def _node(self, node: str) -> Image.Image:
        ui = self._ui
        left, top, *_ = ui.evaluate("id => [...app.graph.getNodeById(id).getBounding()]", node)
        ui.evaluate(LOOK, [CLEAR, left, top, NODE_SCALE])
        ui.settle()
        box = ui.page.locator(f"[data-node-id='{node}']").bounding_box()
        assert box is not None, "Nodes 2.0 are elements"
        width, height = round(box["width"]) + 2 * MARGIN, round(box["height"]) + 2 * MARGIN
        return self._picture(round(box["x"]) - MARGIN, round(box["y"]) - MARGIN, width, height)

    def _picture(self, x: float, y: float, width: float, height: float) -> Image.Image:
        assert not self._ui.errors, self._ui.errors
        shot = self._ui.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
        return _opened(shot)

    def _store(self, picture: Image.Image, name: str) -> None:
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            picture.save(path, quality=JPEG_QUALITY, optimize=True, subsampling=0)
        else:
            picture.save(path, optimize=True)


def _opened(shot: bytes) -> Image.Image:
    return Image.open(io.BytesIO(shot)).convert("RGB")
