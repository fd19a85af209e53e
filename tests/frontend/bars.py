"""The memory bar as the tests see it: events as Python sends them, and what a node shows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shown import planned, predicted, ran
from wanvideo_enhanced_blockswap.blockswap.run.progress import (
    AdoptFigures,
    MemoryUse,
    Phase,
    Progress,
)
from wanvideo_enhanced_blockswap.node_progress import EVENT

from .front_end import FrontEnd

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
    run=ran(7, 61_300_000_000, forward_ms=1000.0, stall_ms=4.0, copy_bytes_per_s=11_900_000_000.0),
)
DONE = Progress(phase=Phase.DONE, memory=MEMORY, plan=PLAN, predicted=PREDICTED, run=SAMPLING.run)

COPY = """id => {
    const before = new Set(app.graph.nodes);
    app.canvas.copyToClipboard([app.graph.getNodeById(id)]);
    app.canvas.pasteFromClipboard();
    return String(app.graph.nodes.find(node => !before.has(node)).id);
}"""
"""The id of a node that is a copy of another, as pasted."""

PANEL = """id => {
    const walk = graph => [...graph.nodes].flatMap(node => [node, ...(node.subgraph ? walk(node.subgraph) : [])]);
    const node = walk(app.rootGraph ?? app.graph).find(each => String(each.id) === id);
    const element = node.widgets.find(widget => widget.name === "blockswap_memory")?.element;
    if (!element) return null;
    const root = element.shadowRoot;
    const bar = root.querySelector("svg").getBoundingClientRect();
    const place = part => {
        const box = part.getBoundingClientRect();
        return [part.dataset.part, [(box.left - bar.left) / bar.width, box.width / bar.width]];
    };
    const content = root.firstElementChild;
    return {
        phase: element.dataset.phase,
        label: element.getAttribute("aria-label"),
        role: element.getAttribute("role"),
        is_shown: element.isConnected && element.checkVisibility(),
        width: bar.width,
        parts: Object.fromEntries([...root.querySelectorAll("[data-part]")].map(place)),
        legend: Object.fromEntries([...root.querySelectorAll("[data-entry]")].map(
            entry => [entry.dataset.entry, [...entry.querySelectorAll("span")].map(span => span.textContent)]
        )),
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
        label: What a screen reader says.
        role: What it takes the panel for.
        is_shown: It is on the page, and visible.
        width: Of the bar, in pixels of the screen.
        parts: Start and width of each part of the bar, from 0 to 1.
        legend: Each part's word and size.
        lines: The sentences.
        progress: Of placing the weights, as in CSS; None where no progress is shown.
        overflows: Something does not fit into the panel.
    """

    phase: str
    label: str
    role: str
    is_shown: bool
    width: float
    parts: dict[str, tuple[float, float]]
    legend: dict[str, list[str]]
    lines: list[str]
    progress: str | None
    overflows: bool


def send(ui: FrontEnd, node: str, progress: Progress) -> None:
    """Sends it as Python does: our event, then ComfyUI's text."""
    ui.send(EVENT, {"node": node, **progress.as_json()})
    ui.send_text(node, progress.text)


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
