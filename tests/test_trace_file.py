"""Trace files: what Perfetto needs of them, and that a failed write leaves nothing."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError
from wanvideo_enhanced_blockswap.blockswap.run.trace_file import chrome_trace, trace_name, write_trace
from wanvideo_enhanced_blockswap.blockswap.spans import COMPUTE, FORWARD, STALL, Span

NAMES = ("blocks.0", "blocks.1")
SPANS = (
    Span("copy 0", 1, 0.0, 2.0),
    Span(COMPUTE, 0, 0.5, 1.5),
    Span(STALL, 1, 1.5, 2.0),
    Span(COMPUTE, 1, 2.0, 3.25),
    Span(FORWARD, 7, 0.25, 3.5),
)


def events(spans: Sequence[Span], kind: str) -> list[Any]:
    """The events of one kind, as they are read from the file."""
    trace = json.loads(json.dumps(chrome_trace(spans, names=NAMES), allow_nan=False))
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def tracks(spans: Sequence[Span]) -> dict[int, str]:
    """The name of each track."""
    return {e["tid"]: e["args"]["name"] for e in events(spans, "M") if e["name"] == "thread_name"}


def test_times_are_in_microseconds() -> None:
    (event,) = events([Span(COMPUTE, 0, 0.5, 1.75)], "X")
    assert (event["ts"], event["dur"]) == (500.0, 1250.0)


def test_each_lane_is_a_track_with_its_name() -> None:
    names = tracks(SPANS)
    assert sorted(names.values()) == ["compute", "copy 0", "forward", "stall"]
    assert all(names[event["tid"]] == event["cat"] for event in events(SPANS, "X"))


def test_the_process_is_named_once() -> None:
    assert [e["args"] for e in events(SPANS, "M") if e["name"] == "process_name"] == [{"name": "blockswap"}]


def test_tracks_stand_in_the_order_of_the_work_and_copy_streams_by_number() -> None:
    lanes = ["copy 10", "copy 2", STALL, COMPUTE, FORWARD, "other"]
    spans = [Span(lane, 0, 0.0, 1.0) for lane in lanes]
    names = tracks(spans)
    order = {e["args"]["sort_index"]: e["tid"] for e in events(spans, "M") if e["name"] == "thread_sort_index"}
    assert [names[order[i]] for i in sorted(order)] == [FORWARD, COMPUTE, STALL, "copy 2", "copy 10", "other"]


def test_events_are_named_after_their_block_and_what_happened_to_it() -> None:
    assert {event["name"]: event["args"] for event in events(SPANS, "X")} == {
        "blocks.0": {"block": 0, "block_name": "blocks.0"},
        "blocks.1": {"block": 1, "block_name": "blocks.1"},
        "wait for blocks.1": {"block": 1, "block_name": "blocks.1"},
        "onload blocks.1": {"block": 1, "block_name": "blocks.1"},
        "forward 7": {"forward": 7},
    }


def test_a_trace_without_a_span_opens_as_well() -> None:
    assert events([], "X") == []
    assert len(events([], "M")) == 1


def in_ns(event: Any) -> tuple[int, int]:
    """Start and end as Perfetto counts, in whole nanoseconds."""
    begin = round(event["ts"] * 1e3)
    return begin, begin + round(event["dur"] * 1e3)


moments = st.floats(0, 1e7, allow_nan=False)
some_spans = st.lists(
    st.tuples(st.sampled_from([COMPUTE, "copy 0"]), moments, st.floats(0, 5)).map(
        lambda t: Span(t[0], 0, t[1], t[1] + t[2])
    ),
    max_size=20,
)


@settings(deadline=None, derandomize=True)
@given(some_spans)
def test_no_two_events_of_a_track_overlap(spans: list[Span]) -> None:
    by_track = defaultdict(list)
    for event in events(spans, "X"):
        by_track[event["tid"]].append(in_ns(event))
    assert sum(map(len, by_track.values())) == len(spans)
    for found in by_track.values():
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 50), min_size=2, max_size=30))
def test_spans_that_touch_keep_their_times_to_the_nanosecond(lengths: list[float]) -> None:
    ends = list(itertools.accumulate(lengths))
    spans = [Span(COMPUTE, 0, begin, end) for begin, end in itertools.pairwise([0.0, *ends])]
    expected = [(round(span.begin_ms * 1e6), round(span.end_ms * 1e6)) for span in spans]
    assert [in_ns(event) for event in events(spans, "X")] == expected


def test_a_span_that_begins_before_the_one_before_it_ends_begins_where_that_ends() -> None:
    found = events([Span("copy 0", 0, 0.0, 2.0), Span("copy 0", 1, 1.5, 3.0)], "X")
    assert [in_ns(event) for event in found] == [(0, 2_000_000), (2_000_000, 3_000_000)]


def test_a_written_trace_is_the_trace_and_nothing_else_is_left(tmp_path: Path) -> None:
    trace, path = chrome_trace(SPANS, names=NAMES), tmp_path / "new" / "folder" / "trace.json"
    write_trace(path, trace)
    assert json.loads(path.read_text(encoding="utf-8")) == trace
    assert list(path.parent.iterdir()) == [path]


def test_a_trace_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    write_trace(path, {"traceEvents": []})
    assert json.loads(path.read_text(encoding="utf-8")) == {"traceEvents": []}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_others_may_read_a_trace_as_any_file_of_this_user(tmp_path: Path) -> None:
    usual, path = tmp_path / "usual", tmp_path / "trace.json"
    usual.touch()
    write_trace(path, {})
    assert path.stat().st_mode == usual.stat().st_mode


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("owner", "step"), [(json, "dump"), (os, "replace"), (Path, "open"), (Path, "mkdir")])
def test_a_failed_write_says_where_and_why_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, step: str
) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, refuse)
        with pytest.raises(BlockSwapError, match=r"trace\.json.*No space left on device") as caught:
            write_trace(path, {"traceEvents": []})
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_an_interrupt_amid_the_write_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(json, "dump", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_trace(tmp_path / "trace.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BlockSwapError, match="could not be written"):
        write_trace(tmp_path / "file" / "trace.json", {})


def test_names_sort_by_time_and_hold_nothing_that_a_file_system_refuses() -> None:
    moments = [datetime(2026, 1, 2, 3, 4, 5, 6), datetime(2026, 1, 2, 3, 4, 5, 70), datetime(2026, 11, 2)]
    names = [trace_name(moment) for moment in moments]
    assert names == sorted(set(names))
    assert names[0] == "blockswap-20260102-030405-000006.json"
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)
