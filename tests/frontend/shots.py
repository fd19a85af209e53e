"""Studio: takes the pictures of one front end and stores them where README, help pages and the template dialog look."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import bars
from .answers import EXAMPLES
from .film import frames, store
from .front_end import NODE, FrontEnd, Variant, browser, opened
from .scenery import scenery
from .scenes import Part, Scene, scenes, twelve_gib

if TYPE_CHECKING:
    from playwright.sync_api import Route

CLEAR = (300, 150)
"""Left and top of a part of the page that no menu covers, in pixels."""

NODE_SCALE = 1.25
"""Of a node that is shown alone: lines of its text are then whole pixels apart."""

MARGIN = 20
"""Around it, in pixels: of the canvas, for its shadow."""

THUMBNAIL = 512
"""Pixels of a side: the dialog shows at most 256, on a fine screen with two pixels for one."""

JPEG_QUALITY = 90

TITLE = 30
"""Height of a node's title, which lies above the node's place."""

AWAY = 5000
"""Far outside the picture."""

LOOK = """([clear, left, top, scale]) => {
    const page = app.canvas.canvas.getBoundingClientRect();
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [(clear[0] - page.left) / scale - left, (clear[1] - page.top) / scale - top];
    app.canvas.setDirty(true, true);
}"""
"""Brings a point of the graph to the clear part of the page."""

HEIGHTS = """heights => {
    for (const [id, height] of heights) {
        const node = app.graph.getNodeById(id);
        node.setSize([node.size[0], height]);
    }
}"""
"""Once more, for loading has made room for all widgets, and Nodes 2.0 show fewer."""

IMAGE = """([id, name]) => {
    const widget = app.graph.getNodeById(id).widgets.find(each => each.name === "image");
    widget.options.values.push(name);
    widget.value = name;
    widget.callback(name);
}"""


@contextmanager
def opened_for_pictures(language: str) -> Iterator[FrontEnd]:
    """The newest front end with Nodes 2.0, in which a node shows what matters first."""
    with browser() as chromium, opened(chromium, Variant("newest", "vue", language)) as ui:
        ui.reset()
        ui.set_setting("Comfy.NodeBadge.NodeSourceBadgeMode", "None")  # a folder's name
        ui.page.route("**/view?*", _view)
        yield ui


def _view(route: Route) -> None:
    time = "evening" if "evening" in route.request.url else "morning"
    route.fulfill(body=scenery(time), content_type="image/png")


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
        node = self._ui.add(NODE)
        self._store(self._node(node), "docs/node_before.png")
        bars.send(self._ui, node, run.sampling(17))
        during = self._node(node)
        self._store(during, "docs/node_during.png")
        self._store(during, f"web/docs/{NODE}/node_during.png")
        bars.send(self._ui, node, run.done(60))
        self._store(self._node(node), "docs/node_after.png")

    def film(self) -> None:
        """The node in a whole run, as a GIF."""
        node, pictures, durations = self._ui.add(NODE), [], []
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
        node = self._ui.add(NODE)
        bars.send(self._ui, node, twelve_gib().sampling(17))
        self._store(self._node(node), f"web/docs/{NODE}/node_during.{self._ui.variant.language}.png")

    def thumbnails(self) -> None:
        """One for each example."""
        for scene in scenes():
            (file,) = EXAMPLES.glob(f"{scene.example:02} *.json")
            picture = self._scene(scene, json.loads(file.read_text(encoding="utf-8")))
            self._store(picture, f"example_workflows/{file.stem}.jpg")

    def _scene(self, scene: Scene, workflow: dict[str, Any]) -> Image.Image:
        ui, nodes = self._ui, _arranged(workflow, scene)
        ui.load(workflow)
        ui.evaluate(HEIGHTS, [[node, part.height] for part, node in zip(scene.parts, nodes, strict=True)])
        for part, node in zip(scene.parts, nodes, strict=True):
            if part.progress:
                bars.send(ui, node, part.progress)
            if part.text:
                ui.send("executed", {"node": node, "display_node": node, "output": {"text": [part.text]}})
            if part.image:
                ui.evaluate(IMAGE, [node, f"{part.image}.png"])
        ui.evaluate(LOOK, [CLEAR, 0, 0, THUMBNAIL / scene.side])
        ui.wait_for("() => [...document.images].every(image => image.complete)")
        ui.settle()
        return self._picture(*CLEAR, THUMBNAIL, THUMBNAIL)

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
        return Image.open(io.BytesIO(shot)).convert("RGB")

    def _store(self, picture: Image.Image, name: str) -> None:
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            picture.save(path, quality=JPEG_QUALITY, optimize=True, subsampling=0)
        else:
            picture.save(path, optimize=True)


def _arranged(workflow: dict[str, Any], scene: Scene) -> list[str]:
    """Moves the parts to their places, and all others out of the picture, where links lead; gives the parts' ids."""
    parts = [_node_of(part, workflow) for part in scene.parts]
    left = min(node["pos"][0] for node in parts)
    others = [node for node in workflow["nodes"] if node not in parts]
    for node in others:
        is_behind = node["pos"][0] > left
        node["pos"] = [node["pos"][0] + AWAY if is_behind else -AWAY, node["pos"][1] - (0 if is_behind else AWAY)]
    for node, part in zip(parts, scene.parts, strict=True):
        x, y, width = part.place
        node["pos"], node["size"] = [x, y + TITLE], [width, part.height]
    workflow["nodes"] = others + parts  # the later lies above the earlier
    workflow["groups"] = []
    return [str(node["id"]) for node in parts]


def _node_of(part: Part, workflow: dict[str, Any]) -> dict[str, Any]:
    of_kind = [node for node in workflow["nodes"] if node["type"] == part.kind]
    node: dict[str, Any] = sorted(of_kind, key=lambda node: node["id"])[part.number]
    return node
