"""Unprepared ends: a process that exits during copies, a second release, prompts in quick succession."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_bench import LARGE_VIDEO, SMALL_VIDEO, Bench

TESTS = Path(__file__).parent

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from run_bench import SMALL_VIDEO, Bench
import torch

bench = Bench(2.6, count=4, pin_bytes=3 * 4096)
bench.forward(SMALL_VIDEO, times=2)  # the window is being filled for a third
assert bench.run.session.device_bytes > 0
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise KeyboardInterrupt", -2),
        ("with bench.run.forward(SMALL_VIDEO): sys.exit(3)", 3),
        ("del bench", 0),
    ],
)
def test_a_process_that_ends_with_copies_under_way_ends_in_peace(end: str, code: int) -> None:
    script = SCRIPT.format(tests=str(TESTS), root=str(TESTS.parent), end=end)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode in (code, 130 if code == -2 else code), ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "Exception ignored" in line or "TransferError" in line]
    assert errors == []


def test_a_second_release_is_nothing() -> None:
    bench = Bench(4.5)
    bench.forward(SMALL_VIDEO, times=2)
    bench.run.release()
    report = bench.run.last_report
    bench.run.release()
    bench.run.session.release()
    assert bench.run.last_report is report
    assert bench.simulation.streams.allocated_bytes == 0
    bench.forward(SMALL_VIDEO)


def test_runs_in_quick_succession_wait_for_one_another_s_copies() -> None:
    bench = Bench(4.5)
    for video in (SMALL_VIDEO, LARGE_VIDEO) * 5:
        bench.run.prepare(video)
        bench.run.release()
        bench.forward(video)
        bench.run.release()
        assert bench.simulation.streams.allocated_bytes == 0
    assert torch.isfinite(bench.expected).all()
