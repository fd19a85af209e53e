"""All that only a GPU can show, in at most 8 minutes: `bash benchmarks/gpu_check.sh` calls it on a new machine.

    python -m benchmarks.gpu_check [--budget SECONDS] [--out FILE] [--small]

Runs the `gpu` tests and the benchmarks one after the other, each in processes of its own and with a time limit of its
own, prints one table and writes one JSON file, which is complete up to the step that ran last. A step that fails or
runs out of time is a line with the reason, and the others go on. Returns 0 if every step has its figures, 2 if one has
not, 1 without a GPU. The time of the comparison is estimated, and it gets as many blocks and shapes as fit.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Nothing but the standard library: this runs before the packages are installed.

ROOT = Path(__file__).parents[1]
BUDGET_S = 480.0
END_S = 5.0
"""Kept for what comes after the last step."""
COMPARISON_SHARE = 0.4
"""Share of the budget that the steps before the comparison leave to it."""
LEAST_S = 5.0
"""No step starts with less time: Python and torch alone take as long to import."""
LINES = 60
WIDTH = 160
"""Most characters of a reason in the table; the JSON file has all of it."""
ENGINES = ("resident", "ours", "plain", "diffusers", "mmgp")
PROCESSES = 9
"""One for the resident model, two (half of the blocks, all) for each other engine; diffusers refuses half."""

TERAFLOP = {"832x480x1": 1.05, "832x480x17": 6.04, "832x480x33": 12.6, "832x480x81": 42.0}
"""Floating-point operations of a block of the 14B model, in 1e12 (`block_flops`)."""
S_PER_TERAFLOP = 0.5 / 42.0
"""An H100 takes at most 0.5 s for a 14B block in bf16 at 832x480x81: used until a step has measured this card."""

# [Note: time of the comparison]
# A process imports torch and diffusers (8 s) and, for each block of 0.7 GB, fills the weights and moves or page-locks
# them (0.5 s). At each shape it makes 4 forwards: warm-up, the timed step, the step that the host waits for, the step
# whose copies are counted. 8 processes compute, each at the four shapes with 8 blocks 4 * 8 * 61.7 TFLOP: 23 s on an
# H100 at 0.5 s a block, 9 s at the 0.2 s that 200 TFLOP/s give. A block's copy takes 0.06 s at 12 GB/s: ours and mmgp
# make 1.5 of them (half, all), mmgp twice, diffusers 1, together about 5. The plain swap moves each block there and
# back from memory that is not page-locked, 0.35 s, and makes 1.5. With 12 s for the link:
#   8 blocks: 12 + 9 * 12 + 188 (75 at 0.2 s) + 106 = 414 s (301 s)
#   6 blocks: 12 + 9 * 11 + 141 (56 at 0.2 s) +  79 = 331 s (246 s)
#   4 blocks: 12 + 9 * 10 +  94 (38 at 0.2 s) +  53 = 249 s (193 s)
# The other steps take about 200 s with the installation of the packages, and by their limits at most 288 s of 480 s:
# what is left holds 6 blocks at 0.2 s and 4 blocks at 0.5 s.
LINK_S, START_S, START_S_PER_BLOCK, FORWARDS = 12.0, 8.0, 0.5, 4
COPY_S, PLAIN_COPY_S = 0.06 * 5, 0.35 * 1.5
"""Of one block in one forward, over all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the check is.

    Attributes:
        model: Name of the preset.
        blocks: Numbers of blocks of that size for the comparison, best first.
        shapes: Its shapes, ascending.
        compare: Its other options.
        planned: Number of blocks of the predictions.
        planned_shape: Their shape.
        adopt: Options of the adopt.
        link: Options of the link.
        overhead: Options of the host time.
        tests: Options of pytest.
    """

    model: str = "14b"
    blocks: tuple[int, ...] = (8, 6, 4)
    shapes: tuple[str, ...] = tuple(TERAFLOP)
    compare: str = "--dtype bf16"
    planned: int = 8
    planned_shape: str = "832x480x17"
    adopt: str = "--blocks 5 --repeats 2"
    link: str = "--sizes 1MiB,64MiB,512MiB --streams 1,2,4"
    overhead: str = "--turns 3"
    tests: str = ""


SMALL = Size(
    model="small",
    blocks=(4,),
    shapes=("32x32x1",),
    compare="--dtype fp32",  # a CPU, which stands for the GPU in a test, may have no bf16
    planned=4,
    planned_shape="32x32x1",
    adopt="--blocks 4 --repeats 1",
    link="--sizes 64KiB,1MiB --streams 1,2 --no-busy",
    overhead="--turns 1",
    tests="-k refused_pin",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the table.

    Attributes:
        name: What is checked.
        limit_s: Seconds that it may take.
        words: What Python runs.
        line: The figures in one line.
        figures: What the process has found, from its standard output; ValueError or OSError if it is not there.
        codes: Exit codes that come with figures.
    """

    name: str
    limit_s: float
    words: tuple[str, ...]
    line: Callable[[Any], str]
    figures: Callable[[str], Any] = json.loads
    codes: tuple[int, ...] = (0,)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        name: Of the step.
        command: What was run; empty if nothing was.
        seconds: How long it took.
        reason: Why figures are missing; empty if none are.
        result: The figures in one line.
        figures: All of them.
        stderr: The last lines of a step that failed.
    """

    name: str
    command: str = ""
    seconds: float = 0.0
    reason: str = ""
    result: str = ""
    figures: Any = None
    stderr: list[str] = field(default_factory=list)


def why_not() -> str | None:
    """One sentence if nothing can be checked here, else None."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}; install a torch that is built for the GPU"
    try:
        import torch
    except (ImportError, OSError) as failure:
        return f"torch cannot be imported ({_last(str(failure))}); install a torch that is built for the GPU"
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built without CUDA; install a torch that is built for the GPU"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; check that nvidia-smi lists one"
    return None


def requirements() -> list[str]:
    """The packages that the benchmarks and the `gpu` tests need, without torch, which fits the GPU already."""
    try:
        import tomllib as toml
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as toml  # type: ignore[no-redef]
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pytest = [line for line in extras["test"] if _package(line) == "pytest"]
    return [
        line for line in [*project["dependencies"], *extras["demo"], *extras["peers"], *pytest] if not _is_torch(line)
    ]


def missing(lines: Sequence[str]) -> list[str]:
    """Those that are not installed, or pinned to another version."""
    return [line for line in lines if not _is_installed(line)]


def _is_installed(line: str) -> bool:
    version = _version(_package(line))
    return version is not None and ("==" not in line or line.split("==")[1] == version)


def _package(line: str) -> str:
    return re.split(r"[^\w.-]", line, maxsplit=1)[0]


def _is_torch(line: str) -> bool:
    return _package(line) == "torch"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(step: Step, limit_s: float, folder: Path) -> Outcome:
    """Runs a step for at most `limit_s` seconds; afterwards none of its processes is left."""
    outcome = Outcome(name=step.name, command=f"python {' '.join(step.words)}")
    begin = time.monotonic()
    paths = folder / "stdout", folder / "stderr"
    with (
        paths[0].open("wb") as out,
        paths[1].open("wb") as err,
    ):  # pipes would wait for a process that outlives the step
        process = subprocess.Popen(
            [sys.executable, *step.words], cwd=ROOT, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    outcome.seconds = round(time.monotonic() - begin, 1)
    found, said = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    try:
        outcome.figures = step.figures(found)
        outcome.result = step.line(outcome.figures)
    except (ValueError, KeyError, TypeError, OSError) as failure:  # it ended before it wrote them
        outcome.reason = f"no figures: {type(failure).__name__}: {failure}"
    if code is None:
        outcome.reason = f"not finished after {limit_s:.0f} s"
    elif code not in step.codes or outcome.reason:
        words = _last(said) or _last(found) or outcome.reason
        outcome.reason = f"ended by signal {-code}" if code < 0 else f"exit code {code}: {words}"
    if outcome.reason:
        outcome.stderr = said.splitlines()[-30:]
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of a step: those of an engine would keep the device memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ---- the steps -------------------------------------------------------------------------------------------------------


def steps_before(size: Size, scratch: Path) -> list[Step]:
    """All but the comparison. The limits are about twice what an H100 and its host are expected to take."""
    json_of = ("--device", "cuda", "--json")
    planned = f"--preset {size.model} --blocks {size.planned} --shapes {size.planned_shape} --counts half,all --steps 3"
    # The tests in the order of their duration, because what comes after the limit is lost: that of the predictions
    # runs a model of 1.3 billion parameters for a minute.
    names = ("stream_transfer", "automatic_run", "link_benchmark", "predictions")
    tests = (*("-m", "pytest", "-v", "-m", "gpu"), *(f"tests/gpu/test_{name}.py" for name in names))
    adopt = (*json_of, "--model", size.model, *size.adopt.split(), "--scratch", str(scratch))
    return [
        Step("machine", 40, ("-m", "wanvideo_enhanced_blockswap", "probe", "--json"), _machine),
        Step("link", 50, ("-m", "benchmarks.link", *json_of, *size.link.split()), _link),
        Step("adopt", 50, ("-m", "benchmarks.adopt", *adopt), _adopt),
        Step("host time", 40, ("-m", "benchmarks.host_overhead", "--json", *size.overhead.split()), _host_time),
        # Exit code 1: a prediction is outside its limit.
        Step("predictions", 70, ("-m", "benchmarks.predictions", *json_of, *planned.split()), _broken, codes=(0, 1)),
        Step("gpu tests", 110, (*tests, *size.tests.split()), _tests_line, _tests),
    ]


def comparison(size: Size, blocks: int, shapes: Sequence[str], limit_s: float, scratch: Path) -> Step:
    """The engines side by side; the file has the rows up to the engine that ran last."""
    results = scratch / "comparison" / "results.json"
    asked = f"--device cuda --engines {','.join(ENGINES)} --model {size.model} --blocks {blocks} --swap half,all"
    # An engine that hangs leaves two thirds of the time to the others.
    short = f"--steps 1 --warmup 1 --timeout {max(LEAST_S, limit_s / 3):.0f} {size.compare}"
    words = (*asked.split(), "--shapes", ",".join(shapes), *short.split(), "--out", str(results.parent))
    return Step(
        "comparison",
        limit_s,
        ("-m", "benchmarks.compare", *words),
        _limits_met,
        lambda _: json.loads(results.read_text(encoding="utf-8")),
        codes=(0, 1),  # 1: a limit is not met, or an engine has no figures
    )


def estimate_s(blocks: int, shapes: Sequence[str], s_per_teraflop: float) -> float:
    """Duration of the comparison of 14B-sized blocks; see [Note: time of the comparison]."""
    compute = FORWARDS * blocks * sum(TERAFLOP[shape] for shape in shapes) * s_per_teraflop
    copies = FORWARDS * len(shapes) * blocks * (COPY_S + PLAIN_COPY_S)
    return LINK_S + PROCESSES * (START_S + START_S_PER_BLOCK * blocks) + (PROCESSES - 1) * compute + copies


def choose(size: Size, left_s: float, s_per_teraflop: float) -> tuple[int, tuple[str, ...]] | None:
    """The number of blocks, and the shapes, of a comparison that fits; all shapes before many blocks. None if even
    one shape takes longer.
    """
    if not set(size.shapes) <= set(TERAFLOP):  # a tiny model, for which there is no estimate
        return size.blocks[0], size.shapes
    ways = ((blocks, size.shapes[:count]) for count in range(len(size.shapes), 0, -1) for blocks in size.blocks)
    return next((way for way in ways if estimate_s(*way, s_per_teraflop) <= left_s), None)


def measured_s_per_teraflop(size: Size, outcomes: Sequence[Outcome]) -> float | None:
    """This card's speed, from the predictions' step, which has two forwards, without its stalls; None if unknown."""
    rows = [row for one in outcomes if one.name == "predictions" and one.figures for row in one.figures["rows"]]
    if not rows or size.planned_shape not in TERAFLOP:
        return None
    step_ms = min(row["measured_step_ms"] - row["measured_stall_ms"] for row in rows)
    return step_ms / 1e3 / 2 / size.planned / TERAFLOP[size.planned_shape]


# ---- the figures in one line -----------------------------------------------------------------------------------------


def _machine(found: dict[str, Any]) -> str:
    device, memory, link = found["device"], found["device_memory"] or {}, found["link"] or {}
    fastest = max((speed for _, speed in link.get("pinned") or ()), default=0.0)
    return (
        f"{device['name']}, driver {device['driver'] or 'unknown'}, {_size(memory.get('free_bytes'))} of "
        f"{_size(device['total_bytes'])} free, RAM {_size(found['host_memory']['available_bytes'])} of "
        f"{_size(found['host_memory']['physical_bytes'])} available, link {fastest / 1e9:.1f} GB/s"
    )


def _tests(text: str) -> dict[str, Any]:
    """Counts and names, also of the tests before the one that was too slow.

    Raises:
        ValueError: No test ran.
    """
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text, re.MULTILINE)
    if not found:
        raise ValueError("no test ran")
    names: dict[str, list[str]] = {}
    for name, word in found:
        names.setdefault(word.lower(), []).append(name)
    return names


def _tests_line(found: dict[str, list[str]]) -> str:
    wrong = [name.split("::")[-1] for word in ("failed", "error") for name in found.get(word, ())]
    return "; ".join([", ".join(f"{len(names)} {word}" for word, names in found.items()), *wrong])


def _link(found: dict[str, Any]) -> str:
    """The fastest copy of the largest size from each kind of memory."""
    rows = [row for row in found["rows"] if row["gbytes_per_s"] is not None]
    if not rows:
        raise ValueError(found["rows"][0]["reason"])
    size = max(row["size_bytes"] for row in rows)
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted((row for row in rows if row["size_bytes"] == size), key=lambda row: row["gbytes_per_s"]):
        best[row["memory"], row["load"]] = row
    words = [_link_words(*kind, row) for kind, row in sorted(best.items(), reverse=True)]
    return f"{size / (1 << 20):.0f} MB: {'; '.join(words)}"


def _link_words(memory: str, load: str, row: dict[str, Any]) -> str:
    slower = "" if row["product_slowdown"] is None else f", products {row['product_slowdown']:+.1%}"
    return f"{memory} {load} {row['gbytes_per_s']:.1f} GB/s ({row['streams']} streams{slower})"


def _adopt(found: dict[str, Any]) -> str:
    warm, cold = found["warm"], found.get("cold") or found["warm"]
    refused = f"; {warm['refusals'][0]}" if warm["refusals"] else ""
    return (
        f"{found['blocks']} blocks, {_size(warm['swapped_bytes'])}: {warm['adopt_gbytes_per_s']:.2f} GB/s in "
        f"{warm['placed_s']:.2f} s, page-locking {warm['lock_s']:.2f} s of it, first copy after "
        f"{warm['first_copy_s']:.2f} s (cold {cold['first_copy_s']:.2f} s); from file {warm['file_gbytes_per_s']:.1f} "
        f"GB/s (cold {cold['file_gbytes_per_s']:.1f} GB/s, plain reads {cold['read_gbytes_per_s']:.1f} GB/s); a copy "
        f"in memory {found['copy_gbytes_per_s']:.1f} GB/s; page-locked over swapped "
        f"{found['pinned_over_swapped']:.3f}{refused}"
    )


def _host_time(found: dict[str, Any]) -> str:
    packed = found["us_per_block_gguf_like"]
    return (
        f"{found['us_per_block_plain']:.1f} µs a block of {found['tensors_per_block']} tensors, GGUF-like {packed:.1f}"
    )


def _broken(found: dict[str, Any]) -> str:
    return f"{len(found['rows']) - found['broken']} of {len(found['rows'])} within their limits"


def _limits_met(found: dict[str, Any]) -> str:
    met = sum(one["met"] for one in found["verdicts"])
    return f"{met} of {len(found['verdicts'])} limits met; link {found['link_bytes_per_s'] / 1e9:.1f} GB/s"


# ---- the table -------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """At most `LINES` lines; what does not fit is in the JSON file alone."""
    lines = [
        f"# GPU check: {report['gpu']}, driver {report['driver']}, {report['host']}, {report['date']}",
        f"`{report['command']}`, {report['wall_s']:.0f} of {report['budget_s']:.0f} s; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version),
        "",
        "| step | s | result |",
        "| --- | --- | --- |",
    ]
    for outcome in outcomes:
        words = "; ".join(filter(None, (outcome.reason, outcome.result)))
        lines.append(f"| {outcome.name} | {outcome.seconds:.0f} | {_short(words)} |")
    by_name = {outcome.name: outcome.figures for outcome in outcomes if outcome.figures}
    if "predictions" in by_name:
        lines += ["", *_predicted(by_name["predictions"]["rows"])]
    if "comparison" in by_name:
        lines += ["", *_compared(by_name["comparison"])]
    cut = f"- … {len(lines) - LINES + 1} more lines: see {report['out']}"
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], cut]


def _predicted(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| shape | swapped | slots | weights: predicted | measured | step: predicted | measured |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        weights, step = (
            (row[f"predicted_{name}"], row[f"measured_{name}"], row[f"measured_{name}"] / row[f"predicted_{name}"] - 1)
            for name in ("weight_bytes", "step_ms")
        )
        yield (
            f"| {row['shape']} | {row['blocks_swapped']} | {row['slots']} | {_size(weights[0])} | {_size(weights[1])} "
            f"({weights[2]:+.1%}) | {_ms(step[0])} | {_ms(step[1])} ({step[2]:+.1%}) |"
        )


def _compared(found: dict[str, Any]) -> Iterator[str]:
    """A line for each engine and number of swapped blocks, then the reasons and the limits that are not met."""
    shapes = list(dict.fromkeys(row["shape"] for row in found["rows"]))
    yield f"{found['blocks']} blocks of {found['model']}, {found['dtype']}: step (a forward), over its bound; peak VRAM"
    yield ""
    yield f"| engine | swapped | {' | '.join(shapes)} |"
    yield f"| --- | --- |{' --- |' * len(shapes)}"
    notes: dict[str, int] = {}
    ways = dict.fromkeys((row["engine"], row["swapped"]) for row in found["rows"])
    for engine, swapped in ways:
        cells = {row["shape"]: row for row in found["rows"] if (row["engine"], row["swapped"]) == (engine, swapped)}
        words = [_cell(cells[shape], notes) for shape in shapes if shape in cells]
        yield f"| {engine} | {swapped} | {' | '.join(words)} |"
    yield ""
    yield from (_short(f"- [{number}] {reason}") for reason, number in notes.items())
    yield from (_short(f"- NOT MET: {one['said']}") for one in found["verdicts"] if not one["met"])


def _cell(row: dict[str, Any], notes: dict[str, int]) -> str:
    if row["reason"]:
        return f"[{notes.setdefault(row['reason'], len(notes) + 1)}]"
    over = f" x {row['step_ms'] / row['bound_ms']:.3f}" if row["bound_ms"] else ""
    output = "" if row["output"] in ("equal", "reference") else f", output {row['output']}"
    return f"{_ms(row['step_ms'])}{over}, {_size(row['peak_bytes'])}{output}"


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return "unknown"
    return f"{nbytes / (1 << 30):.2f} GB" if nbytes >= 1 << 28 else f"{nbytes / (1 << 20):.1f} MB"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


# ---- the whole -------------------------------------------------------------------------------------------------------


class Check:
    """All steps, within one budget.

    Args:
        size: How large they are.
        budget_s: Seconds for all of them.
        begin: When the budget began, by `time.monotonic`.
        report: The machine and the command; gets the outcomes.
        out: File for the report.
    """

    def __init__(self, size: Size, *, budget_s: float, begin: float, report: dict[str, Any], out: Path) -> None:
        self._size = size
        self._budget_s = budget_s
        self._begin = begin
        self._report = report
        self._out = out
        self.outcomes: list[Outcome] = []

    @property
    def left_s(self) -> float:
        """Seconds left of the budget, less those in which processes end and the packages are removed."""
        return self._budget_s - END_S - (time.monotonic() - self._begin)

    def run(self, steps: Callable[[Size, Path], list[Step]] = steps_before) -> None:
        """Runs the steps, then the comparison."""
        shared = Path("/dev/shm")  # files in memory: a slow disk would take the time of other steps
        needed = 5 << 30  # the adopt's files
        is_roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > needed
        with tempfile.TemporaryDirectory(prefix="gpu_check_", dir=shared if is_roomy else None) as scratch:
            folder = Path(scratch)
            for step in steps(self._size, folder):
                self._step(step, folder, kept_s=COMPARISON_SHARE * self._budget_s)
            self._compare(folder)

    def _step(self, step: Step, folder: Path, *, kept_s: float) -> None:
        limit_s = min(step.limit_s, self.left_s - kept_s)
        if limit_s < min(LEAST_S, step.limit_s):
            kept = f", {kept_s:.0f} s kept for the comparison" if kept_s else ""
            reason = f"skipped: {max(0.0, self.left_s):.0f} s of {self._budget_s:.0f} s left{kept}"
            self.add(Outcome(name=step.name, reason=reason))
            return
        print(f"{step.name}: at most {limit_s:.0f} s", file=sys.stderr, flush=True)
        self.add(run(step, limit_s, folder))

    def _compare(self, folder: Path) -> None:
        known = measured_s_per_teraflop(self._size, self.outcomes)
        speed = S_PER_TERAFLOP if known is None else known
        chosen = choose(self._size, self.left_s, speed)
        if chosen is None:
            least = estimate_s(self._size.blocks[-1], self._size.shapes[:1], speed)
            reason = f"skipped: {least:.0f} s estimated for {self._size.blocks[-1]} blocks at {self._size.shapes[0]}"
            self.add(Outcome(name="comparison", reason=f"{reason}, {max(0.0, self.left_s):.0f} s left"))
            return
        blocks, shapes = chosen
        self._step(comparison(self._size, blocks, shapes, self.left_s, folder), folder, kept_s=0.0)
        for shape in self._size.shapes[len(shapes) :]:
            took = estimate_s(blocks, self._size.shapes[: self._size.shapes.index(shape) + 1], speed)
            self.add(Outcome(name=f"at {shape}", reason=f"skipped for time: {took:.0f} s estimated with it"))

    def add(self, outcome: Outcome) -> None:
        """Adds an outcome and writes the report, so that a check that is stopped has one."""
        self.outcomes.append(outcome)
        self._report["wall_s"] = round(time.monotonic() - self._begin, 1)
        self._report["steps"] = [asdict(one) for one in self.outcomes]
        self._out.write_text(json.dumps(self._report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(words: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions, the command and the date."""
    import torch

    try:
        from .machine import host

        cpu = host()
    except ImportError:  # a package could not be installed
        cpu = f"{os.cpu_count()} cores of {platform.machine()}"
    packages = ("torch", *map(_package, requirements()))
    return {
        "command": " ".join(["bash benchmarks/gpu_check.sh", *words]),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": "unknown",
        "driver": "unknown",
        "host": cpu,
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "torch": torch.__version__,
            "CUDA": torch.version.cuda or torch.version.hip,
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything (default: 480)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_check.json", help="file for all figures")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the check itself")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # when the script began, in seconds since 1970
    parser.add_argument("--packages", default="", help=argparse.SUPPRESS)  # why packages could not be installed
    parser.add_argument("--why-not", action="store_true", help="only check that there is a GPU")
    parser.add_argument("--missing", action="store_true", help="only list the packages that are missing")
    options = parser.parse_args(words)
    if not options.out.parent.is_dir() or options.out.is_dir():
        parser.error(f"--out: expected a file in an existing folder, got {str(options.out)!r}")
    if options.missing:
        print("\n".join(missing(requirements())))
        return 0
    spent = 0.0 if options.began is None else max(0.0, time.time() - options.began)
    begin = time.monotonic() - spent
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    if options.why_not:
        return 0
    shown = [word for word in words if not word.startswith(("--began=", "--packages="))]
    report = {**describe(shown), "budget_s": options.budget, "out": options.out.name}
    size = SMALL if options.small or os.environ.get("GPU_CHECK_SMALL", "0") not in ("", "0") else Size()
    check = Check(size, budget_s=options.budget, begin=begin, report=report, out=options.out)
    lacking = missing(requirements())
    if lacking or spent:
        why = f"{options.packages or 'not installed'}: {', '.join(lacking)}" if lacking else ""
        check.add(Outcome(name="packages", seconds=round(spent, 1), reason=why, result="" if lacking else "all there"))
    check.run()
    for outcome in check.outcomes:
        if outcome.name == "machine" and outcome.figures:
            report["gpu"], report["driver"] = (
                outcome.figures["device"][name] or "unknown" for name in ("name", "driver")
            )
    print("\n".join(table(report, check.outcomes)))
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 2 if any(outcome.reason for outcome in check.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
