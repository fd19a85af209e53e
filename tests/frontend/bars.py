"""The memory bar as the tests see it: events as Python sends them, and what a node shows of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shown import planned, predicted, ran
from wanvideo_enhanced_blockswap.blockswap.errors import DeviceMemoryError
from wanvideo_enhanced_blockswap.blockswap.run.progress import (
    NOTHING_DONE,
    AdoptFigures,
    MemoryUse,
    Phase,
    Progress,
    failed,
)
from wanvideo_enhanced_blockswap.blockswap.run.report import Hint, Step
from wanvideo_enhanced_blockswap.node_progress import EVENT

from .front_end import NODE, FrontEnd

GIB = 1 << 30
MEMORY = MemoryUse(
    total=12 * GIB, other=GIB, residents=4 * GIB, window=GIB // 2, ceiling=6 * GIB, activations=GIB * 7 // 2
)
PLAN = planned(22, free=5 * GIB)
PREDICTED = predicted(30.0, 1000.0)
ADOPTING = Progress(
    phase=Phase.ADOPTING,
    memory=MEMORY,
    plan=PLAN,
    predicted=PREDICTED,
    adopt=AdoptFigures(placed=6 * GIB, all=8 * GIB, pinned=3 * GIB),
)
SAMPLING = Progress(
    phase=Phase.SAMPLING,
    memory=MEMORY,
    plan=PLAN,
    predicted=PREDICTED,
    run=replace(ran(14, 57 * GIB, forward_ms=1000.0, stall_ms=4.0), step=Step(7, 30), steps=7, forwards_per_step=2.0),
)
HINT = Hint(free_bytes=3 * GIB, percent=75, blocks=9, saved_ms=1200.0)
DONE = Progress(
    phase=Phase.DONE,
    memory=MEMORY,
    plan=PLAN,
    predicted=PREDICTED,
    run=replace(ran(60, 57 * GIB, forward_ms=1000.0, stall_ms=4.0), step=Step(30, 30), steps=30, forwards_per_step=2.0),
    hint=HINT,
)

STOPPED = replace(DONE, phase=Phase.STOPPED, hint=None)
NOT_BEGUN = Progress(phase=Phase.STOPPED, why=NOTHING_DONE)
FAILED = failed(DeviceMemoryError("out of memory"))

COPY = """id => {
    const before = new Set(app.graph.nodes);
    app.canvas.copyToClipboard([app.graph.getNodeById(id)]);
    app.canvas.pasteFromClipboard();
    return String(app.graph.nodes.find(node => !before.has(node)).id);
}"""
"""The id of a node that is a copy of another, as pasted."""

CONNECT = """id => {
    const [node, loader] = [app.graph.getNodeById(id), LiteGraph.createNode("WanVideoModelLoader")];
    loader.pos = [node.pos[0] + 1000, node.pos[1]];
    app.graph.add(loader);
    node.connect(0, loader, loader.inputs.findIndex(input => input.name === "block_swap_args"));
}"""
"""As by dragging a link to a new loader."""

PANEL = """id => {
    const walk = graph => [...graph.nodes].flatMap(node => [node, ...(node.subgraph ? walk(node.subgraph) : [])]);
    const node = walk(app.rootGraph ?? app.graph).find(each => String(each.id) === id);
    const element = node.widgets.find(widget => widget.name === "blockswap_memory")?.element;
    if (!element) return null;
    const root = element.shadowRoot;
    const bar = root.querySelector("svg[width='100%']").getBoundingClientRect();
    const place = part => {
        const box = part.getBoundingClientRect();
        return [part.dataset.part, [(box.left - bar.left) / bar.width, box.width / bar.width]];
    };
    const content = root.firstElementChild;
    let opacity = 1;
    for (let each = element; each; each = each.parentElement) opacity *= getComputedStyle(each).opacity;
    return {
        phase: element.dataset.phase,
        notice: element.dataset.notice,
        label: element.getAttribute("aria-label"),
        role: element.getAttribute("role"),
        is_shown: element.isConnected && element.checkVisibility(),
        width: bar.width,
        parts: Object.fromEntries([...root.querySelectorAll("[data-part]")].map(place)),
        legend: Object.fromEntries([...root.querySelectorAll("[data-entry]")].map(
            entry => [entry.dataset.entry, [...entry.querySelectorAll("span")].map(span => span.textContent)]
        )),
        tips: Object.fromEntries([...root.querySelectorAll("[data-zone], [data-entry]")].map(each => [
            each.dataset.zone ? `bar ${each.dataset.zone}` : each.dataset.entry, each.title,
        ])),
        head: [...root.querySelector("[data-head]")?.children ?? []].slice(0, 2).map(each => each.textContent),
        hint: root.querySelector("[data-line=hint]")?.textContent ?? null,
        alarm: root.querySelector("[data-line=failed]")?.textContent ?? null,
        opacity,
        lines: [...root.querySelectorAll("[data-line]")].map(line => line.textContent),
        progress: root.querySelector("[data-progress]")?.style.width ?? null,
        overflows: content.scrollWidth > content.clientWidth || content.scrollHeight > content.clientHeight,
    };
}"""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a node's panel shows.

    Attributes:
        phase: Of the event; "idle" before the first.
        notice: What keeps the node from working; empty if nothing does.
        label: What a screen reader says.
        role: What it takes the panel for.
        is_shown: It is on the page, and visible.
        width: Of the bar, in pixels of the screen.
        parts: Start and width of each part of the bar, from 0 to 1.
        legend: Each part's word and size.
        tips: The hover text of each part of the bar ("bar other") and of each entry of the legend.
        head: The line above the bar: the card's memory, and when it was so.
        hint: The sentence that stands out.
        alarm: The sentence that is marked as an error.
        opacity: Less than 1 on a node that takes no part in a run.
        lines: The sentences.
        progress: Of placing the weights, as in CSS; None where no progress is shown.
        overflows: Something does not fit into the panel.
    """

    phase: str
    notice: str
    label: str
    role: str
    is_shown: bool
    width: float
    parts: dict[str, tuple[float, float]]
    legend: dict[str, list[str]]
    tips: dict[str, str]
    head: list[str]
    hint: str | None
    alarm: str | None
    opacity: float
    lines: list[str]
    progress: str | None
    overflows: bool


def send(ui: FrontEnd, node: str, progress: Progress) -> None:
    """Sends it as Python does: our event, then ComfyUI's text."""
    ui.send(EVENT, {"node": node, **progress.as_json()})
    ui.send_text(node, progress.text)


def connected(ui: FrontEnd) -> str:
    """The id of a new node that is connected to a loader."""
    node = ui.add(NODE)
    ui.evaluate(CONNECT, node)
    ui.settle()
    return node


def shown(ui: FrontEnd, node: str) -> Shown | None:
    """What a node shows; None where it has no panel."""
    found: dict[str, Any] | None = ui.evaluate(PANEL, node)
    return None if found is None else Shown(**found)


def bar(ui: FrontEnd, node: str) -> Shown:
    """What a node shows, which has a panel."""
    found = shown(ui, node)
    assert found is not None
    return found


def core_texts(ui: FrontEnd) -> list[str]:
    """What ComfyUI shows of progress texts, on any node of the graph."""
    script = """() => app.graph.nodes.flatMap(node => node.widgets ?? [])
        .filter(widget => widget.name === "$$node-text-preview" && !widget.hidden).map(widget => widget.value)"""
    return list(ui.evaluate(script))
