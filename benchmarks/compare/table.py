"""Rows as a table for a document."""

from __future__ import annotations

from collections.abc import Sequence

from wanvideo_enhanced_blockswap.hardware import format_bytes

from .cells import Row

COLUMNS = (
    *("engine", "swapped", "step", "waited for", "over bound", "over resident", "peak", "weights", "reserved"),
    *("driver", "host", "page-locked", "to device", "back", "output"),
)


def markdown(rows: Sequence[Row], *, link_bytes_per_s: float) -> str:
    """A table for each shape, engines in the order of the rows, with an explanation of the columns."""
    shapes = dict.fromkeys(row.shape for row in rows)
    tables = [_table(shape, [row for row in rows if row.shape == shape]) for shape in shapes]
    clocks = ", ".join(sorted({row.clock for row in rows if row.clock}))
    versions = dict.fromkeys(row.versions for row in rows if row.versions)
    words = [
        f"- step: median duration by the device's clock ({clocks or 'none'}), while the host may run ahead; waited "
        "for: median by the host's clock, where the host waits at the end of each step",
        "- over bound: step divided by the bound, the longer of the resident model's step and the time to copy the "
        f"swapped blocks at {link_bytes_per_s / 1e9:.2f} GB/s; over resident: step divided by the resident model's",
        "- peak: most device memory allocated (on a simulated device, weights and slots only); weights: peak minus "
        "what the resident model's step takes above its weights; reserved: most device memory held by torch's "
        "allocator; driver: device memory by the driver's count, minus what was in use before the model was built",
        "- host: decrease of the host's available memory; page-locked: host memory locked by torch's allocator and by "
        "the engine; to device, back: bytes copied in one step",
        *([f"- versions: {', '.join(versions)}"] if versions else []),
    ]
    return "\n".join([*tables, *words]) + "\n"


def _table(shape: str, rows: Sequence[Row]) -> str:
    base = next((row.step_ms for row in rows if not row.swapped and row.step_ms), None)
    cells = [[row.engine, str(row.swapped), *(_figures(row, base) if not row.reason else [])] for row in rows]
    # A column that no row has a figure for is left out.
    kept = [i for i in range(len(COLUMNS)) if i <= 2 or any(len(row) > i and row[i] for row in cells)]
    lines = [f"### {shape}", "", f"| {' | '.join(COLUMNS[i] for i in kept)} |", "|" + " --- |" * len(kept)]
    for row, found in zip(rows, cells, strict=True):
        shown = [found[i] if len(found) > i else "" for i in kept]
        if row.reason:
            shown = [*found, row.reason, *[""] * (len(kept) - 3)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def _figures(row: Row, base: float | None) -> list[str]:
    return [
        _ms(row.step_ms),
        _ms(row.wall_ms),
        _ratio(row.over_bound),
        _ratio(row.step_ms / base if row.step_ms is not None and base else None),
        *map(
            _bytes,
            (
                *(row.peak_bytes, row.weights_bytes, row.reserved_bytes, row.driver_bytes, row.host_bytes),
                *(row.pinned_bytes, row.to_device_bytes, row.to_host_bytes),
            ),
        ),
        row.output,
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bytes(value: int | None) -> str:
    return "" if value is None else format_bytes(max(0, value))
