"""The comparison of engines, on devices that every machine has: simulated, and the pretend accelerator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wanvideo_enhanced_blockswap.blockswap.plan import make_plan as plan
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import Onload, Ring
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS

from benchmarks import baseline
from benchmarks.compare import __main__ as compare
from benchmarks.compare.cells import Row, Task
from benchmarks.compare.comparison import complete, run_apart
from benchmarks.compare.engines import NAMES, OURS
from benchmarks.compare.limits import verdicts
from benchmarks.compare.simulated_testbed import block_flops
from benchmarks.compare.table import markdown
from benchmarks.compare.usage import copies
from benchmarks.compare.worker import run

SHAPES = ("64x64x1", "128x128x9")


def task(folder: Path, engine: str = "ours", swapped: int = 12, **changes) -> Task:
    asked = Task(
        engine=engine,
        swapped=swapped,
        model="small",
        dtype="bfloat16",
        shapes=SHAPES,
        device="cpu",
        streams=1,
        steps=3,
        warmup=2,
        folder=str(folder),
    )
    return replace(asked, **changes)


def rows_of(*tasks: Task) -> dict[tuple[str, int, str], Row]:
    rows = complete([row for one in tasks for row in run(one)], block_bytes=2 << 20, link_bytes_per_s=25e9)
    return {(row.engine, row.swapped, row.shape): row for row in rows}


# ----------------------------------------------------------------------------------------------------- virtual times


def test_no_virtual_time_is_other_than_it_was() -> None:
    worse, other = baseline.differences(baseline.measure(), json.loads(baseline.KEPT.read_text(encoding="utf-8")))
    assert not worse, "slower or larger than before:\n" + "\n".join(worse)
    assert not other, "keep the better figures with `python -m benchmarks.baseline --write`:\n" + "\n".join(other)


MOVE = Ring._move


def one_block_at_a_time(ring: Ring, position: int) -> tuple[tuple[Onload, ...], tuple[int | None, ...]]:
    """Only what is needed at once: no prefetch."""
    due = tuple(onload for onload in MOVE(ring, position)[0] if onload.block == position)
    content = list(ring.content)
    for onload in due:
        content[onload.slot] = onload.block
    return due, tuple(content)


def the_last_blocks(count: int, swapped: int) -> tuple[bool, ...]:
    return tuple(i >= count - swapped for i in range(count))


@pytest.mark.parametrize(
    ("owner", "name", "slower"), [(Ring, "_move", one_block_at_a_time), (plan, "spread", the_last_blocks)]
)
def test_a_slower_schedule_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner, name: str, slower) -> None:
    monkeypatch.setattr(owner, name, slower)
    kept = json.loads(baseline.KEPT.read_text(encoding="utf-8"))
    found = {f"ours, 6 of 12 swapped, {row.shape}: step ms": row.step_ms for row in run(task(tmp_path, swapped=6))}
    worse, _ = baseline.differences(found, {name: kept[name] for name in found})
    assert worse


def test_differences_are_told_by_which_way_they_go() -> None:
    kept = {"same": 1.0, "slower": 1.0, "faster": 1.0, "gone": 1.0}
    worse, other = baseline.differences({"same": 1.0 + 1e-6, "slower": 1.001, "faster": 0.999, "new": 5.0}, kept)
    assert [line.split(":")[0] for line in worse] == ["gone", "slower"]
    assert [line.split(":")[0] for line in other] == ["faster", "new"]


def test_the_kept_figures_have_every_engine_of_ours_and_it_is_fast() -> None:
    kept = json.loads(baseline.KEPT.read_text(encoding="utf-8"))
    for engine in OURS:
        assert any(name.startswith(f"{engine}, ") for name in kept)

    def step(engine: str, swapped: int, shape: str) -> float:
        return kept[f"{engine}, {swapped} of 12 swapped, {shape}: step ms"]

    assert step("ours", 12, "128x128x9") <= 1.01 * step("resident", 0, "128x128x9")
    link_ms = 12 * (2 << 20) / 25e9 * 1e3
    assert step("ours", 12, "64x64x1") <= 1.03 * max(link_ms, step("resident", 0, "64x64x1"))
    assert 3 * step("ours", 12, "64x64x1") <= step("plain", 12, "64x64x1")
    for swapped in baseline.SWAPS:
        for shape in baseline.SHAPES:
            for other in ("ours-tail", "ours-no-prefetch", "ours-staged", "plain"):
                assert step("ours", swapped, shape) <= step(other, swapped, shape)


# --------------------------------------------------------------------------------------------------------- the rows


def test_rows_hold_an_engine_against_the_resident_model(tmp_path: Path) -> None:
    rows = rows_of(task(tmp_path, "resident", 0), task(tmp_path), task(tmp_path, "plain", 6))
    resident, ours, plain = rows["resident", 0, SHAPES[0]], rows["ours", 12, SHAPES[0]], rows["plain", 6, SHAPES[0]]
    assert (resident.output, ours.output, plain.output) == ("reference", "equal", "equal")
    assert ours.bound_ms == pytest.approx(12 * (2 << 20) / 25e9 * 1e3)
    assert rows["ours", 12, SHAPES[1]].bound_ms == rows["resident", 0, SHAPES[1]].step_ms
    assert ours.to_device_bytes == ours.pinned_bytes == 12 * (2 << 20)
    assert ours.to_host_bytes == 0
    assert plain.to_device_bytes == plain.to_host_bytes >= 6 * (2 << 20)
    assert resident.weights_bytes == resident.peak_bytes > plain.weights_bytes > ours.weights_bytes > 2 * (2 << 20)


def test_another_output_is_told_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.compare import worker

    (reference,) = run(task(tmp_path, "resident", 0, shapes=SHAPES[:1]))
    monkeypatch.setattr(worker, "SEED", 1)
    (row,) = run(task(tmp_path, shapes=SHAPES[:1]))
    assert row.output.startswith("differs by up to ")
    assert compare.failures([reference, row]) == [f"ours, 12 swapped, 64x64x1: {row.output}"]


def test_an_engine_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    rows = [*run_apart(task(tmp_path, dtype="bf17"), timeout_s=120), *run_apart(task(tmp_path), timeout_s=0.01)]
    assert [row.shape for row in rows] == [*SHAPES, *SHAPES]
    assert rows[0].reason == "AttributeError: module 'torch' has no attribute 'bf17'"
    assert rows[2].reason == "not finished after 0 s; raise --timeout"
    assert len(compare.failures(rows)) == 4


def test_the_command_writes_results_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines = "ours,mmgp,resident"
    options = ["--device", "cpu", "--engines", engines, "--swap", "all", "--shapes", SHAPES[0], "--steps", "2"]
    assert compare.main([*options, "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(row["engine"], row["output"]) for row in printed["rows"]] == [
        ("resident", "reference"),
        ("ours", "equal"),
        ("mmgp", ""),
    ]
    assert printed["rows"][2]["reason"] == "not simulated: a GPU is needed to measure it"
    assert printed["heading"].startswith("`python -m benchmarks.compare --device cpu")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| ours | 12 |" in table
    assert "| mmgp | 12 | not simulated" in table
    assert "NOT MET" not in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_a_model_has_blocks_of_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--engines", "resident,ours", "--swap", "half,all", "--shapes", SHAPES[0]]
    found = []
    for blocks in ([], ["--blocks", "4"]):
        assert compare.main([*options, *blocks, "--steps", "2", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    whole, part = found
    assert [row["swapped"] for row in part["rows"]] == [0, 2, 4]
    assert part["block_bytes"] == whole["block_bytes"]
    assert part["rows"][2]["peak_bytes"] < part["rows"][1]["peak_bytes"] <= part["rows"][0]["peak_bytes"]
    assert part["rows"][0]["step_ms"] == pytest.approx(whole["rows"][0]["step_ms"] * 4 / 12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engines", "ours,theirs"], "--engines: expected some of resident, ours"),
        (["--swap", "13"], "from 0 to 12"),
        (["--shapes", "64x64"], "--shape: expected WxHxF"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda"),
        (["--shapes", "60x64x5"], "sides that are multiples of 16 and 4n+1 frames, got '60x64x5'"),
        (["--swap", "0"], "from 1 to 12, got 0"),
        (["--swap", "quarter"], "--swap: expected a whole number"),
        (["--out", "README.md"], "--out: expected a folder"),
        (["--model", "14b", "--device", "cpu"], "not enough RAM for --model 14b"),
        (["--steps", "0"], "expected 1 or more, got 0 and 2"),
        (["--blocks", "1"], "--blocks: expected 2 or more"),
        (["--blocks", "4", "--swap", "5"], "from 0 to 4"),
    ],
)
def test_what_cannot_be_meant_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_table_without_figures_says_so(tmp_path: Path) -> None:
    from benchmarks.compare.plot import draw

    rows = [Row(engine=name, shape="1x1x1", swapped=2, reason="there is none") for name in NAMES]
    table = markdown(rows, link_bytes_per_s=1e9)
    assert table.count("| there is none |") == len(NAMES)
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {4}
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


# ----------------------------------------------------------------------------------------------------- real devices


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(("engine", "swapped"), [("resident", 0), ("plain", 6), ("ours-no-prefetch", 6)])
def test_a_device_is_measured_by_its_own_books(
    tmp_path: Path, pretend_device: torch.device, engine: str, swapped: int
) -> None:
    (row,) = run(task(tmp_path, engine, swapped, shapes=SHAPES[:1], device="hpu:0"))
    block = 2 << 20
    assert row.reason == ""
    assert row.clock == "wall"
    assert row.step_ms > 0
    assert row.wall_ms > 0
    assert row.to_device_bytes == pytest.approx(swapped * block, rel=0.05, abs=4096)
    assert row.to_host_bytes == pytest.approx(swapped * block if engine == "plain" else 0, rel=0.05, abs=4096)
    assert row.held_bytes >= (12 - swapped) * block
    assert row.peak_bytes > row.held_bytes or swapped


def test_an_engine_that_needs_streams_is_not_offered_without(tmp_path: Path, pretend_device: torch.device) -> None:
    (row,) = run(task(tmp_path, shapes=SHAPES[:1], device="hpu:0"))
    assert row.reason == "hpu:0 has no streams: copies cannot overlap compute there"


def test_bytes_are_read_from_the_profilers_trace() -> None:
    events = [
        {"name": "Memcpy HtoD (Pinned -> Device)", "cat": "gpu_memcpy", "args": {"bytes": 100}},
        {"name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 20}},
        {"name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": 3}},
        {"name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 7}},
        {"name": "CopyHostToDevice", "args": {"bytes": 1000}},
        {"name": "a kernel"},
    ]
    moved = copies(events)
    assert (moved.to_device, moved.to_host) == (1120, 3)
    assert copies([{"name": "cudaMemcpyAsync", "cat": "cuda_runtime"}]) is None


def test_the_operations_of_a_block_are_those_of_the_14b_model() -> None:
    # 32,760 tokens of 832x480x81: 42.0 TFLOP for a block (2 S params + 4 S S d + 4 S 512 d).
    assert block_flops(PRESETS["14b"], (832, 480, 81)) == pytest.approx(42.0e12, rel=0.01)


# ----------------------------------------------------------------------------------------------------------- limits

BLOCK, LINK = 1e9, 1e10  # a tenth of a second each


def cell(engine: str, swapped: int, step_ms: float, **changes) -> Row:
    figures = {
        "shape": "1x1x1",
        "clock": "events",
        "peak_bytes": int((10 - swapped + 2) * BLOCK) + 500,
        "held_bytes": int((10 - swapped + 2) * BLOCK),
        "pinned_bytes": int(swapped * BLOCK),
        "output": "equal",
    }
    return Row(engine=engine, swapped=swapped, step_ms=step_ms, **{**figures, **changes})


def not_met(compute_ms: float, *rows: Row) -> list[str]:
    held = {"held_bytes": int(10 * BLOCK), "peak_bytes": int(10 * BLOCK) + 500}
    resident = cell("resident", 0, compute_ms, output="reference", **held)
    done = complete([resident, *rows], block_bytes=BLOCK, link_bytes_per_s=LINK)
    judged = verdicts(done, block_bytes=BLOCK, link_bytes_per_s=LINK)
    assert judged
    return [verdict.said.removeprefix("1x1x1, 10 swapped: ") for verdict in judged if not verdict.met]


def test_limits_that_are_met() -> None:
    assert not_met(2000, cell("ours", 10, 2010)) == []
    assert not_met(1000, cell("ours", 10, 1025)) == []
    assert not_met(100, cell("ours", 10, 1025), cell("plain", 10, 4000)) == []
    assert not_met(100, cell("ours", 10, 1025), cell("mmgp", 10, 1026)) == []


@pytest.mark.parametrize(
    ("compute_ms", "rows", "said"),
    [
        (2000, [cell("ours", 10, 2030)], "step over resident 1.015, at most 1.01"),
        (1000, [cell("ours", 10, 1040)], "step over bound 1.040, at most 1.03"),
        (100, [cell("ours", 10, 1060)], "share of the link 0.943, at least 0.95"),
        (100, [cell("ours", 10, 1000), cell("plain", 10, 2900)], "2.9 times as fast as plain, at least 3"),
        (1000, [cell("ours", 10, 1000, output="not finite")], "output not finite"),
        (1000, [cell("ours", 10, 1000, pinned_bytes=int(15 * BLOCK))], "page-locked over swapped bytes 1.500"),
        (1000, [cell("ours", 10, 1000, peak_bytes=int(5 * BLOCK))], "weights 4.7 GB, at most 1.9 GB"),
        (1000, [cell("ours", 10, 1000), cell("mmgp", 10, 980)], "mmgp 980 ms in 1.9 GB"),
        (
            1000,
            [cell("ours", 10, 1000), cell("accelerate", 10, 9000, peak_bytes=int(BLOCK))],
            "accelerate 9000 ms in 953.7 MB",
        ),
    ],
)
def test_limits_that_are_not_met(compute_ms: float, rows: list[Row], said: str) -> None:
    assert any(said in line for line in not_met(compute_ms, *rows))


def test_less_memory_than_ours_is_held_against_one_slot() -> None:
    peer = cell("accelerate", 10, 9000, peak_bytes=int(BLOCK))
    assert not_met(1000, cell("ours", 10, 1000), cell("ours-1-slot", 10, 2000, peak_bytes=int(BLOCK)), peer) == []


def test_without_the_resident_model_that_is_said_and_peers_are_compared_all_the_same() -> None:
    rows = [cell("ours", 10, 1000, output="first to finish"), cell("mmgp", 10, 900)]
    judged = verdicts(rows, block_bytes=BLOCK, link_bytes_per_s=LINK)
    assert [(verdict.said.removeprefix("1x1x1, 10 swapped: ")[:40], verdict.met) for verdict in judged] == [
        ("no step to compare with, because residen", False),
        ("page-locked over swapped bytes 1.000, at", True),
        ("ours 1000 ms in 1.9 GB; mmgp 900 ms in 1", False),
    ]
    assert compare.failures(rows) == []
