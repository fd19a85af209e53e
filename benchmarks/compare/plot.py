"""Step time and device memory against the number of swapped blocks, shape by shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanvideo_enhanced_blockswap.hardware import GIB, MIB

from .cells import Row

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999", "#f0e442", "#000000")
"""Colours that colour-blind people can tell apart too (Okabe and Ito 2008)."""
MARKERS = "osD^vPX*h<>"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the rows with figures; each line starts with the resident model, at 0 swapped blocks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    shown = [row for row in rows if not row.reason]
    shapes = list(dict.fromkeys(row.shape for row in shown))
    engines = list(dict.fromkeys(row.engine for row in shown if row.swapped))
    figure = Figure(figsize=(1.5 + 4.2 * max(1, len(shapes)), 8.2), layout="constrained")
    if not shapes:
        figure.text(0.5, 0.5, "no engine has figures", ha="center")
    unit, size = ("GB", GIB) if max((row.peak_bytes or 0 for row in shown), default=0) >= GIB else ("MB", MIB)
    labelled = {}
    for column, shape in enumerate(shapes):
        cells = [row for row in shown if row.shape == shape]
        time = figure.add_subplot(2, len(shapes), column + 1, title=shape, ylabel="step in ms", yscale="log")
        memory = figure.add_subplot(2, len(shapes), len(shapes) + column + 1, ylabel=f"peak device memory in {unit}")
        for i, engine in enumerate(engines):
            points = sorted(
                (row.swapped, row.step_ms or 0.0, (row.peak_bytes or 0) / size)
                for row in cells
                if row.engine == engine or not row.swapped
            )
            swapped, milliseconds, peaks = zip(*points, strict=True)
            # The first line is broad and pale, so that lines on top of it stay visible.
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            style |= {"linewidth": 1.3} if i else {"linewidth": 7.0, "alpha": 0.4, "markersize": 11}
            (labelled[engine],) = time.plot(swapped, milliseconds, **style)
            memory.plot(swapped, peaks, **style)
        bounds = sorted({(row.swapped, row.bound_ms) for row in cells if row.bound_ms is not None})
        if bounds:
            (labelled["bound"],) = time.plot(*zip(*bounds, strict=True), color="black", linestyle=":")
        for kind in (time.yaxis.set_major_formatter, time.yaxis.set_minor_formatter):
            kind(FuncFormatter(lambda value, _: f"{value:g}"))
        memory.set_ylim(bottom=0)
        for axes in (time, memory):
            axes.set_xlabel("blocks swapped")
            axes.set_xticks(sorted({row.swapped for row in cells}))
    if labelled:
        figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
