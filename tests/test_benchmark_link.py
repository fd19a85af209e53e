"""The link's benchmark: on a simulated device its figures are the simulated link's; a missing figure has its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from wanvideo_enhanced_blockswap.blockswap import PinBudget
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend
from wanvideo_enhanced_blockswap.blockswap.engine.transfer import Transfer
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory
from wanvideo_enhanced_blockswap.blockswap.host.slabs import Slab
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier
from wanvideo_enhanced_blockswap.blockswap.simulation.backend import SimulatedRegistrar
from wanvideo_enhanced_blockswap.blockswap.simulation.streams import SimulatedHardware, SimulatedStreams
from wanvideo_enhanced_blockswap.hardware import KIB, MIB

from benchmarks import copies, link
from benchmarks.link_table import Row

CPU = torch.device("cpu")
SIZES, STREAMS = (5_000, 64 * KIB, MIB), (1, 2, 5)
OPTIONS = ["--device", "cpu", "--sizes", "5000,64KiB,1MiB", "--streams", "1,2,5"]
ASKED = link.Asked(sizes=SIZES, streams=STREAMS)


@pytest.fixture(autouse=True)
def hardware(monkeypatch: pytest.MonkeyPatch) -> SimulatedHardware:
    """A link of 7 GB/s, so that a MB takes 0.15 ms, and products of 0.05 ms."""
    hardware = SimulatedHardware(link_bytes_per_ms=7e6, default_compute_ms=0.05, compute_ms={1: 0.06})
    monkeypatch.setattr(link, "HARDWARE", hardware)
    return hardware


class Watched:
    """A simulated backend that remembers what was opened and locked."""

    def __init__(self, registrar: SimulatedRegistrar | None = None) -> None:
        self.opened: list[SimulatedStreams] = []
        self.registrar = registrar or SimulatedRegistrar()
        self.backend: Backend = replace(
            link.backend_of(CPU), open_streams=self._open, registrar=self.registrar, pin_budget=PinBudget(8 * MIB)
        )

    def _open(self, count: int, overlap: bool) -> SimulatedStreams:
        self.opened.append(SimulatedStreams(link.HARDWARE, count=count))
        return self.opened[-1]

    def rows(self, asked: link.Asked = ASKED) -> list[Row]:
        return link.LinkBench(self.backend, asked).rows(quiet=True)

    def holds_nothing(self) -> bool:
        held = sum(streams.allocated_bytes for streams in self.opened)
        return not self.registrar.locked and not self.backend.pin_budget.used_bytes and not held


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert link.main([*OPTIONS, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_figure_on_a_simulated_device_is_the_simulated_links(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys)
    assert [(row["size_bytes"], row["streams"], row["memory"], row["load"]) for row in found["rows"]] == [
        (size, count, "pinned", load) for size in SIZES for count in STREAMS for load in ("idle", "busy")
    ]
    assert {row["gbytes_per_s"] for row in found["rows"]} == {7.0}
    assert run(capsys) == found
    assert "Pageable memory is not measured" in found["notes"][0]
    assert "python -m benchmarks.link --device cpu" in found["heading"]
    assert "simulated device" in found["heading"]


def test_products_beside_a_simulated_copy_are_as_fast_as_alone_and_unknown_beside_a_short_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    busy = [row for row in run(capsys)["rows"] if row["load"] == "busy"]
    assert {row["product_slowdown"] for row in busy if row["size_bytes"] == MIB} == {0.0}
    assert {row["reason"] for row in busy if row["size_bytes"] == MIB} == {None}
    short = [row for row in busy if row["size_bytes"] < MIB]
    assert all(row["product_slowdown"] is None and "ended before one product" in row["reason"] for row in short)


def test_an_idle_device_alone_is_measured_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, "--no-busy")["rows"]
    assert [row["load"] for row in rows] == ["idle"] * len(SIZES) * len(STREAMS)
    assert {row["reason"] for row in rows} == {None}


def test_tables_are_printed_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "link.md"
    assert link.main([*OPTIONS, "--markdown", str(file)]) == 0
    printed = capsys.readouterr().out
    assert file.read_text(encoding="utf-8") == printed
    lines = [line.replace(" ", "") for line in printed.splitlines()]
    assert lines.count("|streams|1|2|5|") == 2
    assert "|1.0MB|7.00|7.00|7.00|" in lines
    assert "|1.0MB|7.00(+0.0%)|7.00(+0.0%)|7.00(+0.0%)|" in lines
    assert "- 4.9 KB, 64.0 KB: slowdown unknown" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "nonsense"], "--device: expected auto, cpu, cuda or cuda:N, got 'nonsense'"),
        (["--device", "meta"], "--device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--sizes", "1MB,12 gigs"], "expected a memory size"),
        (["--sizes", "0"], "expected sizes of at least 1 byte, got '0'"),
        (["--sizes", ""], "expected a memory size"),
        (["--streams", "1,0"], "expected whole numbers from 1 to 32, such as 1,2,4; got '1,0'"),
        (["--streams", "33"], "; got '33'"),
        (["--streams", "two"], "; got 'two'"),
        (["--streams", ""], "; got ''"),
        (["--markdown", "/no/such/folder/link.md"], "expected a file in an existing folder"),
    ],
)
def test_a_bad_option_is_told_in_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        link.main(options)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err.splitlines()[-1]


def test_a_refused_lock_leaves_the_pageable_figures_and_says_why_there_are_no_others() -> None:
    watched = Watched(SimulatedRegistrar(refuse_after=0))
    rows = watched.rows()
    pinned = [row for row in rows if row.memory == "pinned"]
    assert len(pinned) == 2 * len(SIZES) * len(STREAMS)
    assert all(row.gbytes_per_s is None and "out of memory that can be locked" in str(row.reason) for row in pinned)
    assert {row.gbytes_per_s for row in rows if row.memory == "pageable"} == {7.0}
    assert watched.holds_nothing()


def test_a_lock_beyond_the_budget_is_not_tried() -> None:
    watched = Watched()
    watched.backend.pin_budget.limit_bytes = MIB - 1
    rows = [row for row in watched.rows() if row.memory == "pinned"]
    assert {row.size_bytes for row in rows if row.gbytes_per_s is None} == {MIB}
    assert all("that may be page-locked" in str(row.reason) for row in rows if row.size_bytes == MIB)


def test_pages_are_locked_at_their_size_for_pinned_figures_alone_and_not_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched, seen = Watched(), set()
    real = Transfer.start

    def start(transfer: Transfer, index: int, slab: Slab, *, block: int) -> None:
        seen.add((slab.tier, slab.used_bytes, tuple(watched.registrar.locked.values())))
        real(transfer, index, slab, block=block)

    monkeypatch.setattr(Transfer, "start", start)
    watched.rows()
    whole_pages = {5_000: 8192, 64 * KIB: 64 * KIB, MIB: MIB}
    assert seen == {
        (tier, size, (whole_pages[size],) if tier is HostTier.PINNED else ())
        for tier in (HostTier.PINNED, HostTier.PAGEABLE)
        for size in SIZES
    }
    assert watched.holds_nothing()


@pytest.mark.parametrize(
    ("struck", "method"),
    [(Transfer, "start"), (Transfer, "wait"), (Transfer, "release"), (SimulatedStreams, "copy")],
)
def test_an_interrupt_leaves_no_lock_and_no_device_memory(
    struck: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    real: Callable[..., None] = getattr(struck, method)
    left = 3

    def strike(*arguments: object, **options: object) -> None:
        nonlocal left
        left -= 1
        real(*arguments, **options)
        if left < 0:
            assert watched.registrar.locked
            raise KeyboardInterrupt

    monkeypatch.setattr(struck, method, strike)
    with pytest.raises(KeyboardInterrupt) as ended:
        watched.rows()
    assert watched.holds_nothing()
    del ended  # until here its frames kept the pages, which would else have unlocked themselves as they went


def test_a_size_that_the_device_cannot_hold_is_left_out(
    hardware: SimulatedHardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "HARDWARE", replace(hardware, memory_bytes=MIB - 1))
    watched = Watched()
    rows = watched.rows()
    assert {row.size_bytes for row in rows if row.gbytes_per_s is None} == {MIB}
    assert all("1,048,576 bytes needed" in str(row.reason) for row in rows if row.size_bytes == MIB)
    assert watched.holds_nothing()


def test_a_size_that_the_host_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = link.read_host_memory()
    monkeypatch.setattr(link, "read_host_memory", lambda: replace(real, available_bytes=2 * MIB - 1))
    rows = Watched().rows()
    assert {row.size_bytes for row in rows if row.gbytes_per_s is None} == {MIB}
    assert len(rows) == 4 * len(SIZES) * len(STREAMS)


def test_no_figure_begins_after_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SECONDS", -1.0)
    rows = Watched().rows()
    assert len(rows) == 4 * len(SIZES) * len(STREAMS)
    assert all(row.gbytes_per_s is None and "time limit" in str(row.reason) for row in rows)


def test_products_that_cannot_run_leave_the_idle_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32 MB")

    monkeypatch.setattr(copies, "_multiplication", refuse)
    rows = Watched().rows()
    assert {row.gbytes_per_s for row in rows if row.load == "idle"} == {7.0}
    assert {row.reason for row in rows if row.load == "busy"} == {
        "no matrix product can run: CUDA out of memory. Tried to allocate 32 MB"
    }


def test_a_copy_that_products_do_not_cover_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MOST_PRODUCTS", 2)  # 0.10 ms, and a MB takes 0.15
    rows = [row for row in Watched().rows() if row.load == "busy"]
    assert {row.size_bytes for row in rows if row.gbytes_per_s is None} == {MIB}
    assert {row.reason for row in rows if row.size_bytes == MIB} == {"2 products of 0.05 ms ended before the copy"}


def test_products_that_are_slower_beside_a_copy_are_told_by_their_share(hardware: SimulatedHardware) -> None:
    count, calls = 10, 0

    def multiply(streams: Any) -> None:
        nonlocal calls
        streams.computed(calls // count % 2, streams.current())  # 0.05 ms alone, then 0.06 ms during the copy
        calls += 1

    streams = SimulatedStreams(hardware, count=2)
    slab = Slab(PageMemory(MIB, streams), MIB, (), HostTier.PAGEABLE)
    with copies.window(streams, MIB) as transfer:
        found = copies.beside_products(transfer, slab, copies.Products(multiply, 0.05), count=count)
    assert calls == 2 * count
    assert found is not None
    assert found.copy_ms == pytest.approx(MIB / 7e6)
    assert found.slowdown == pytest.approx(0.2)


def test_larger_products_go_beside_longer_copies() -> None:
    small, large = (copies.Products(lambda streams: None, each_ms) for each_ms in (0.2, 1.7))
    assert copies.choose_products((small, large), 0.01) is small
    assert copies.choose_products((small, large), 10.0) is small
    assert copies.choose_products((small, large), 70.0) is large
    assert small.count_for(10.0) * small.each_ms == pytest.approx(copies.COVER * 10.0 + copies.HEAD_MS)


def test_the_best_pinned_figure_has_the_fewest_streams_that_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert link.pinned_bytes_per_s(CPU, size_bytes=MIB, streams=(1, 2)) == (1, 7e9)
    refusing = Watched(SimulatedRegistrar(refuse_after=0)).backend
    monkeypatch.setattr(link, "backend_of", lambda device: refusing)
    with pytest.raises(BlockSwapError, match="could not be page-locked"):
        link.pinned_bytes_per_s(CPU, size_bytes=MIB)
