"""A picture of one step: when each block computed, waited for a copy, and was copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..blockswap.errors import BlockSwapError, SettingsError
from ..blockswap.spans import COMPUTE, FORWARD, STALL, Span

COLOURS = {COMPUTE: "#4878a8", STALL: "#c44e52"}
COPY_COLOUR = "#6aa84f"


def check_picture(path: Path) -> None:
    """Checks before the run that the picture can be drawn after it.

    Raises:
        SettingsError: The path is not that of a PNG file in a folder that exists.
    """
    import matplotlib  # noqa: F401 - so that an ImportError comes before the run

    if path.suffix.lower() != ".png" or path.is_dir():
        raise SettingsError(f"--picture: expected the path of a .png file, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"--picture: expected a folder that exists, got {str(path)!r}; make the folder first")


def draw_timeline(spans: Sequence[Span], path: Path, *, title: str) -> None:
    """Writes a PNG with a lane for compute (stalls in red) and one for each copy stream.

    Raises:
        BlockSwapError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    spans = [span for span in spans if span.lane != FORWARD]
    copies = sorted({span.lane for span in spans} - {COMPUTE, STALL})
    lanes = {lane: -i for i, lane in enumerate([COMPUTE, *copies])}
    lanes[STALL] = lanes[COMPUTE]
    figure = Figure(figsize=(14, 1.6 + 0.6 * len(copies)), layout="constrained")
    axes = figure.add_subplot()
    for lane, height in lanes.items():
        bars = [(span.begin_ms, span.duration_ms) for span in spans if span.lane == lane]
        colour = COLOURS.get(lane, COPY_COLOUR)
        axes.broken_barh(bars, (height - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.4)
    begin, end = min(s.begin_ms for s in spans), max(s.end_ms for s in spans)
    for span in spans:
        if span.lane != STALL and span.duration_ms > (end - begin) / 80:
            middle = span.begin_ms + span.duration_ms / 2
            axes.text(middle, lanes[span.lane], str(span.block), ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks([lanes[lane] for lane in [COMPUTE, *copies]], [COMPUTE, *copies])
    axes.set_xlabel("ms; numbers are blocks, red is compute waiting for a copy")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.01)
    try:
        figure.savefig(path, dpi=110)
    except OSError as cause:
        message = f"the picture cannot be written to {path}: {cause}"
        raise BlockSwapError(f"{message}; give another path with --picture") from cause
