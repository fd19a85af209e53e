"""The package on the pretend CUDA runtime: random sessions, faults, and mutants that they must see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_mutants import MUTANTS, ROOT, Mutant, copy_package

from tests.pretend_cuda import build

reason = build.why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

STRUCK = (
    "rule 6: no host wait for copies that were struck",
    "rule 6: no host wait for a copy that was struck in the worker",
)
"""Mutants that show where the driver fails in the middle of the engine's work."""

HARMLESS = (
    "rule 7: the window goes while the worker fills it",
    "rule 7: the worker reads a file into a staging slab that is being copied",
    "rule 1: the first copy of a resident does not wait for its allocation",
)
"""torch gives the window's memory to others only when the last view of it goes: those of the blocks outlive the wait
for the staging slabs' copies. The other two hardly ever matter: two files are read between two uses of a staging slab,
and one before a resident's first copy. The simulated device, where a copy may land any time later, sees all three."""

ORDER = [
    mutant
    for mutant in MUTANTS
    if mutant.name.startswith("rule") and not mutant.name.startswith("rule 8") and mutant.name not in HARMLESS
]
"""Rule 8 is about a second device, which the pretend CUDA runtime does not have."""

ASYNC = {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
"""ComfyUI's default allocator. torch's own gives memory back only within the process, later than cudaFreeAsync does."""


def run(*words: str, package: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module with this interpreter, in the checkout; with another copy of the package if one is given."""
    environment = {**os.environ, **environment, **({} if package is None else {"PYTHONPATH": str(package.parent)})}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.parametrize("environment", [{}, ASYNC], ids=["native", "cudaMallocAsync"])
def test_random_sessions_give_the_unswapped_outputs_and_leave_nothing(environment: dict[str, str]) -> None:
    done = run("tests.pretend_cuda.stress", "20", "90", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for trouble in ("exception", "interrupt", "close inside", "no memory"):
        assert repr(trouble) in done.stdout, done.stdout


@pytest.mark.parametrize("environment", [{}, ASYNC], ids=["native", "cudaMallocAsync"])
def test_quantised_weights_stream_as_planned_and_give_the_unswapped_outputs(environment: dict[str, str]) -> None:
    done = run("tests.pretend_cuda.shells", "0", "2", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 sessions, 0 with something wrong" in done.stdout, done.stdout


def test_whichever_call_of_the_runtime_fails_the_result_is_right_or_the_error_ours_and_nothing_is_left() -> None:
    done = run("tests.pretend_cuda.faults", "--every", "61")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", ORDER, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_broken_is_seen(mutant: Mutant, tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    path = package / "blockswap" / mutant.file
    source = path.read_text()
    assert source.count(mutant.before) == 1, f"{mutant.name}: the code has changed; write the mutant anew"
    path.write_text(source.replace(mutant.before, mutant.after))
    if mutant.name in STRUCK:
        done = run("tests.pretend_cuda.faults", "--of", "cudaEventRecord", "--code", "1", package=package)
    else:
        done = run("tests.pretend_cuda.stress", "0", "200", "--until-wrong", package=package)
    assert done.returncode == 1, f"{mutant.name} survived:\n{done.stdout}{done.stderr}"
    assert "with something wrong" in done.stdout or "wrong: {" in done.stdout, done.stdout + done.stderr


def test_the_memory_of_comfyuis_allocator_may_be_refused_at_each_call() -> None:
    for code in ("1", "2"):
        done = run("tests.pretend_cuda.faults", "--of", "cudaMallocAsync", "--code", code, "--every", "3", **ASYNC)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_command_runs_over_it_and_takes_it_for_cuda() -> None:
    words = ("--json", "--steps", "1", "--shape", "64x64x1")
    done = run("tests.pretend_cuda", "-m", "wanvideo_enhanced_blockswap", "demo", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["measured_by"], told["outputs_equal"]) == ("cuda", True)


def test_the_comparisons_engines_give_equal_outputs_over_it() -> None:
    words = ("--shapes=64x64x1", "--swap=half", "--steps=1", "--warmup=1", "--engines=resident,ours", "--json")
    done = run("tests.pretend_cuda", "-m", "benchmarks.compare", *words)  # its limits are for a GPU's speed
    rows = json.loads(done.stdout)["rows"]
    assert [(row["engine"], row["output"], row["reason"]) for row in rows] == [
        ("resident", "reference", ""),
        ("ours", "equal", ""),
    ], done.stderr
