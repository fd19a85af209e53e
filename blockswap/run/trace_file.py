"""Trace files: spans as Chrome's trace events, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ...hardware.files import write_json
from ..errors import BlockSwapError
from ..spans import COMPUTE, COPY, FORWARD, STALL, Span

if TYPE_CHECKING:
    from ..engine.trace import Trace

_PROCESS = {"pid": 1, "tid": 0}
_ORDER = (FORWARD, COMPUTE, STALL, COPY)


def chrome_trace(spans: Iterable[Span], *, names: Sequence[str]) -> dict[str, object]:
    """One track for each lane, in a form that json.dump writes; some 150 bytes for each span in the file.

    A lane is what one stream did, so that nothing in it can overlap; clocks of limited resolution say so all the same,
    and Perfetto drops what overlaps. So a span begins at the earliest where the one before it in its lane ends.

    Args:
        spans: In any order.
        names: Of the blocks, in execution order.
    """
    lanes: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.begin_ms, span.end_ms)):
        lanes.setdefault(span.lane, []).append(span)
    events: list[object] = [_metadata("process_name", _PROCESS, name="blockswap")]
    for number, lane in enumerate(sorted(lanes, key=_place), start=1):
        track = {"pid": _PROCESS["pid"], "tid": number}
        events.append(_metadata("thread_name", track, name=lane))
        events.append(_metadata("thread_sort_index", track, sort_index=number))
        end_ns = 0
        for span in lanes[lane]:
            begin_ns = max(end_ns, round(span.begin_ms * 1e6))
            end_ns = max(begin_ns, round(span.end_ms * 1e6))
            # Whole nanoseconds, so that a begin and a duration add up to the end.
            times = {"ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3}
            events.append({"ph": "X", "cat": lane} | _label(span, names) | track | times)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_run_trace(folder: Path, trace: Trace, *, names: Sequence[str]) -> str:
    """Writes a run's trace. Returns where it is, or why it could not be written."""
    path = folder / trace_name(datetime.now())
    try:
        write_trace(path, chrome_trace(trace.spans(), names=names))
    except BlockSwapError as failure:
        return str(failure)
    return f"trace: {path}" + (f", without the last {trace.dropped:,} spans" if trace.dropped else "")


def trace_name(now: datetime) -> str:
    """A file name that sorts by time and suits every file system, such as blockswap-20261123-142355-012345.json."""
    return f"blockswap-{now:%Y%m%d-%H%M%S-%f}.json"


def write_trace(path: Path, trace: Mapping[str, object]) -> None:
    """Writes a trace to `path`: all of it or nothing, in place of what is there; makes the folder.

    Raises:
        BlockSwapError: The folder cannot be made or the file not be written, usually for a full disk or missing rights.
    """
    try:
        write_json(path, trace)
    except OSError as cause:
        raise BlockSwapError(
            f"the trace could not be written to {path}: {cause}; free some space or choose another folder"
        ) from cause


def _metadata(kind: str, track: dict[str, int], **args: object) -> dict[str, object]:
    return {"ph": "M", "name": kind} | track | {"args": args}


def _label(span: Span, names: Sequence[str]) -> dict[str, object]:
    """What the span is called, with the block it belongs to; a forward has its number alone."""
    if span.lane == FORWARD:
        return {"name": f"forward {span.block}", "args": {"forward": span.block}}
    block = names[span.block]
    name = {COMPUTE: block, STALL: f"wait for {block}"}.get(span.lane, f"onload {block}")
    return {"name": name, "args": {"block": span.block, "block_name": block}}


def _place(lane: str) -> tuple[int, int, str]:
    """Forwards above compute, stalls and copies; copy streams by number; lanes unknown here at the end."""
    kind, _, number = lane.partition(" ")
    first = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
    return first, int(number) if number.isdecimal() else 0, lane
