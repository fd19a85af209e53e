"""The one command for a GPU: without one it is one sentence, and whatever a step does, the others have their lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS

from benchmarks import gpu_check
from benchmarks.compare.simulated_testbed import block_flops
from benchmarks.gpu_check import Check, Outcome, Size, Step
from tests.pretend_cuda import build

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
PRETEND = build.why_not()


def script(*words: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script, with this interpreter as `python3` unless another PATH is given."""
    path = path or os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), *words],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def check_of(out: Path, *steps: Step, budget_s: float = 100.0) -> Check:
    """A check of these steps; the comparison has no time."""
    report = dict.fromkeys(("gpu", "driver", "host", "date", "command"), "")
    check = Check(
        Size(),
        budget_s=budget_s,
        begin=time.monotonic(),
        report={**report, "budget_s": budget_s, "versions": {}, "out": out.name},
        out=out,
    )
    check.run(lambda *_: list(steps))
    return check


def python(name: str, code: str, limit_s: float = 60.0) -> Step:
    return Step(name, limit_s, ("-c", code), str)


GOOD = python("good", "print(7)")


# ------------------------------------------------------------------------------------------------------ without a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_one_sentence() -> None:
    done = script()
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"torch {torch.__version__} "), done.stderr


def test_without_python_the_script_says_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = script(path=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("python3 is not on PATH; install Python 3.10"), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "torch is not installed for"),
        ("raise ImportError('libcudart.so.13: no such file')", "torch cannot be imported (libcudart.so.13: no such"),
        ("class version: cuda = hip = None\n__version__ = '2.0+cpu'", "torch 2.0+cpu is built without CUDA; install"),
        (
            "class version: cuda = '13.0'\nclass cuda: is_available = lambda: False\n__version__ = '2.0'",
            "torch 2.0 finds no GPU; check that nvidia-smi lists one",
        ),
    ],
)
def test_without_a_torch_for_a_gpu_it_is_one_sentence(source: str | None, words: str, tmp_path: Path) -> None:
    if source is not None:
        (tmp_path / "torch.py").write_text(source)
    # -S: without the packages of this environment, as on a new machine.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu_check", "--why-not"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(words), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_packages_are_those_of_the_extras_without_torch() -> None:
    names = {gpu_check._package(line) for line in gpu_check.requirements()}
    assert {"psutil", "diffusers", "mmgp", "ramtorch", "safetensors", "pytest"} <= names
    assert "torch" not in names
    assert gpu_check.missing(["pytest>=9", "pytest==0.1", "no-such-package>=1"]) == [
        "pytest==0.1",
        "no-such-package>=1",
    ]


# ------------------------------------------------------------------------------------------------------- single steps


def test_a_step_that_fails_or_exceeds_its_time_is_a_line_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    steps = (
        python("raises", "raise SystemExit('no such card')"),
        python("crashes", "import os; os.abort()"),
        python("says nothing", "pass"),
        python("hangs", "import time; print(1, flush=True); time.sleep(600)", 1.0),
        GOOD,
    )
    check = check_of(out, *steps)
    reasons = {outcome.name: outcome.reason for outcome in check.outcomes}
    assert reasons["raises"] == "exit code 1: no such card"
    assert reasons["crashes"] == "ended by signal 6"
    assert reasons["says nothing"].startswith("exit code 0: no figures: JSONDecodeError")
    assert reasons["hangs"] == "not finished after 1 s"
    assert reasons["good"] == ""
    lines = gpu_check.table(check._report, check.outcomes)
    assert "| raises | 0 | exit code 1: no such card |" in [line.replace("| 1 | exit", "| 0 | exit") for line in lines]
    assert any(line.startswith("| good |") and line.endswith("| 7 |") for line in lines)
    assert any(line.startswith("| hangs |") and line.endswith("not finished after 1 s; 1 |") for line in lines)
    kept = json.loads(out.read_text(encoding="utf-8"))["steps"]
    assert [step["name"] for step in kept] == [outcome.name for outcome in check.outcomes]
    assert kept[0]["stderr"] == ["no such card"]


def test_no_process_of_a_step_outlives_it(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    check_of(tmp_path / "out.json", python("parent", parent, 3.0))
    assert alive.exists()
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_steps_leave_the_comparison_its_share_of_the_budget(tmp_path: Path) -> None:
    check = check_of(tmp_path / "out.json", GOOD, budget_s=8.0)
    good, comparison = check.outcomes
    assert (good.name, good.command) == ("good", "")
    assert good.reason == "skipped: 3 s of 8 s left, 3 s kept for the comparison"
    assert comparison.reason.startswith("skipped: ")
    assert "s estimated for 4 blocks at 832x480x1, " in comparison.reason


def test_what_pytest_has_reported_counts_even_if_it_did_not_finish() -> None:
    text = "tests/a.py::test_b[1-x y] PASSED [ 8%]\ntests/a.py::test_c FAILED [ 9%]\ntests/a.py::test_d "
    found = gpu_check._tests(text)
    assert found == {"passed": ["tests/a.py::test_b[1-x y]"], "failed": ["tests/a.py::test_c"]}
    assert gpu_check._tests_line(found) == "1 passed, 1 failed; test_c"


# ------------------------------------------------------------------------------------------------ the comparison's time


def test_the_work_of_a_block_is_that_of_the_14b_model() -> None:
    for shape, teraflop in gpu_check.TERAFLOP.items():
        width, height, frames = map(int, shape.split("x"))
        assert block_flops(PRESETS["14b"], (width, height, frames)) == pytest.approx(teraflop * 1e12, rel=0.05)


def test_the_estimates_are_those_of_the_note() -> None:
    shapes = tuple(gpu_check.TERAFLOP)
    for blocks, slow, fast in ((8, 414, 301), (6, 331, 246), (4, 249, 193)):
        assert gpu_check.estimate_s(blocks, shapes, 0.5 / 42) == pytest.approx(slow, abs=2)
        assert gpu_check.estimate_s(blocks, shapes, 0.2 / 42) == pytest.approx(fast, abs=2)


@pytest.mark.parametrize(
    ("left_s", "blocks", "count"), [(430, 8, 4), (340, 6, 4), (250, 4, 4), (240, 6, 3), (120, 4, 1), (90, None, 0)]
)
def test_the_comparison_gets_the_shapes_and_then_the_blocks_that_fit(left_s: float, blocks: int, count: int) -> None:
    shapes = tuple(gpu_check.TERAFLOP)[:count]
    chosen = gpu_check.choose(Size(), left_s, gpu_check.S_PER_TERAFLOP)
    assert chosen == (None if blocks is None else (blocks, shapes))


def test_a_cards_speed_is_that_of_its_predictions_without_the_stalls() -> None:
    rows = [
        {"measured_step_ms": 1288.0, "measured_stall_ms": 321.6},
        {"measured_step_ms": 1500.0, "measured_stall_ms": 0.0},
    ]
    known = Outcome(name="predictions", figures={"rows": rows})
    assert gpu_check.measured_s_per_teraflop(Size(), [known]) == pytest.approx(0.01)
    assert gpu_check.measured_s_per_teraflop(Size(), [Outcome(name="predictions", reason="exit code 1")]) is None


# ------------------------------------------------------------------------------------------------------------ the table


def row(engine: str, swapped: int, shape: str, reason: str = "") -> dict[str, object]:
    figures = {"step_ms": 1234.5, "bound_ms": 1200.0, "peak_bytes": 3 << 30, "output": "equal"}
    return {"engine": engine, "swapped": swapped, "shape": shape, "reason": reason, **figures}


def test_the_table_has_at_most_60_lines_however_much_is_wrong() -> None:
    shapes = tuple(gpu_check.TERAFLOP)
    rows = [
        row(engine, swapped, shape, f"{engine} failed at {shape}" * 20 if engine == "mmgp" else "")
        for engine in gpu_check.ENGINES
        for swapped in (4, 8)
        for shape in shapes
    ]
    verdicts = [{"said": f"limit {i}", "met": False} for i in range(200)]
    found = {"rows": rows, "verdicts": verdicts, "blocks": 8, "model": "14b", "dtype": "bfloat16"}
    outcomes = [Outcome(name="step", reason="x" * 999), Outcome(name="comparison", figures=found)]
    report = dict.fromkeys(("gpu", "driver", "host", "date", "command"), "")
    report |= {"wall_s": 1.0, "budget_s": 2.0, "versions": {}, "out": "gpu_check.json"}
    lines = gpu_check.table(report, outcomes)
    assert len(lines) == 60
    assert "more lines: see gpu_check.json" in lines[-1]
    assert max(map(len, lines)) < 250
    assert "| ours | 8 | " + " | ".join(["1,234 ms x 1.029, 3.00 GB"] * 4) + " |" in lines
    assert "| mmgp | 8 | [1] | [2] | [3] | [4] |" in lines
    assert "- NOT MET: limit 0" in lines


# -------------------------------------------------------------------------------------------------------- pretend CUDA


@pytest.mark.skipif(PRETEND is not None, reason=PRETEND or "")
def test_the_whole_runs_on_the_pretend_cuda_runtime(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    site = ROOT / "tests" / "pretend_cuda" / "site"
    # A busy machine without a GPU takes several times as long as a GPU.
    done = script("--out", str(out), "--budget", "1500", PYTHONPATH=str(site), GPU_CHECK_SMALL="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept["gpu"] in lines[0]
    figures = {step["name"]: step["figures"] for step in kept["steps"] if step["command"]}
    assert list(figures) == ["machine", "link", "adopt", "host time", "predictions", "gpu tests", "comparison"]
    assert all(any(line.startswith(f"| {name} | ") for line in lines) for name in figures)
    rows = {(found["engine"], found["swapped"]): found for found in figures["comparison"]["rows"]}
    assert {engine for engine, _ in rows} == set(gpu_check.ENGINES)
    for way in (("ours", 2), ("ours", 4), ("plain", 2), ("plain", 4), ("diffusers", 4), ("mmgp", 4)):
        assert (rows[way]["output"], rows[way]["reason"]) == ("equal", "")
        assert any(line.startswith(f"| {way[0]} | {way[1]} | ") for line in lines)
