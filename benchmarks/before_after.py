"""A real run of ComfyUI with the real WanVideoWrapper: without swapping, with the wrapper's own swapping, with ours.

A pretend accelerator counts device memory and bytes moved; it has no clock, so there are no times. With --clock, the
pretend CUDA runtime (tests/pretend_cuda, which needs torch's CUDA build) paces the link: blocks take 1/4 to 4 times as
long to copy as a forward without swapping takes to compute. Times are the wall clock's, computed on a CPU.

    COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m benchmarks.before_after [--clock] [--variant bf16] [--out docs]

writes before_after.json, or before_after_clock.json and before_after_clock.png. before_after.png shows figures of both;
--draw draws it again. With --memory, it prints a table of the most host memory that a run takes, for several variants.
It uses the environment and the models (30 blocks) of tests/rig.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RIG = ROOT / "tests" / "rig"

MIB = 1 << 20
RESIDENT = "without swapping"
CLOCK = "link paced, computed on a CPU"
RATIOS = (0.25, 0.5, 1, 2, 4)
"""Time to copy all blocks over the time to compute a forward."""
FIGURES = ("before_after.json", "before_after_clock.json")
SHOWN_RATIO = 0.5
"""The one that before_after.png shows."""
IN_MEMORY = ("bf16", "fp8", "fp8_scaled", "gguf", "lora_unmerged", "two_experts")
"""Variants whose host memory is measured."""
FORWARDS = 4
"""Of each run with --clock; the first, which places blocks, and the last are not timed."""
COLOURS = ("#999999", "#E69F00", "#0072B2", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind people can tell apart too."""
COLOURS_OF_STEPS = (*COLOURS[:2], "#D55E00", *COLOURS[2:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run the same prompt."""

    way: str
    peak_bytes: int
    to_device_bytes: int
    to_host_bytes: int
    forwards: int
    same_latents: bool


def measure(variant: str) -> list[Row]:
    """Runs the same prompt each way; ComfyUI loads the model again for each."""
    from rig_variants import BLOCKS, VARIANTS, native, ours

    ways: dict[str, dict[str, Any]] = {
        RESIDENT: {},
        # The wrapper swaps one block fewer than this number.
        "wrapper's own, all blocks": {"swap": native(BLOCKS + 1)},
        "ours, all blocks": {"swap": ours(BLOCKS)},
        "ours, half": {"swap": ours(BLOCKS // 2)},
    }
    rows: list[Row] = []
    with _comfyui() as c:
        latents = ""
        for way, changes in ways.items():
            found = _run(c, way, VARIANTS[variant], **changes)
            latents = latents or found.latents
            rows.append(
                Row(
                    way=way,
                    peak_bytes=found.peak_bytes,
                    to_device_bytes=found.h2d_bytes,
                    to_host_bytes=found.d2h_bytes,
                    forwards=len(found.forwards),
                    same_latents=found.latents == latents,
                )
            )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A forward of one way at one speed of the link: the shortest of some.

    Attributes:
        transfer_over_compute: Time to copy all blocks, over `seconds` without swapping.
        over_resident: `seconds` over those without swapping, which were taken just before.
    """

    transfer_over_compute: float
    way: str
    seconds: float
    over_resident: float
    same_latents: bool


def measure_steps(variant: str) -> list[Step]:
    """Runs the same prompt each way at each speed of the link, all in one process."""
    from rig_variants import BLOCKS, VARIANTS, native, ours

    prefetching = native(BLOCKS + 1, prefetch=1)
    prefetching["inputs"]["use_non_blocking"] = True
    ways = {
        "wrapper's own, all blocks": {"swap": native(BLOCKS + 1)},
        "wrapper's own, all blocks, its prefetch": {"swap": prefetching},
        "ours, all blocks": {"swap": ours(BLOCKS, num_cuda_streams=1)},
        "ours, half": {"swap": ours(BLOCKS // 2, num_cuda_streams=1)},
    }
    case = VARIANTS[variant] | {"link_gbps": 0}
    case["sample"] = case["sample"] | {"steps": FORWARDS, "cfg": 1.0}
    os.environ |= {
        "RIG_DEVICE": "cuda",
        "PRETEND_CUDA_LATE": "",
        "PRETEND_CUDA_POISON": "0",
        "PRETEND_CUDA_PAGEABLE_WAITS": "1",
    }
    steps: list[Step] = []
    with _comfyui() as c:
        _run(c, "ours", case, **ways["ours, half"])  # measures the link, unpaced, for all that follow
        for ratio in RATIOS:
            resident = _run(c, RESIDENT, case)  # now, since the machine may be busier or idler than before
            gbps = sum(resident.block_bytes) / (ratio * _seconds(resident)) / 1e9
            found = {RESIDENT: resident}
            found |= {way: _run(c, way, case, link_gbps=gbps, **changes) for way, changes in ways.items()}
            steps += [
                Step(
                    transfer_over_compute=ratio,
                    way=way,
                    seconds=round(_seconds(run), 4),
                    over_resident=round(_seconds(run) / _seconds(resident), 3),
                    same_latents=run.latents == resident.latents,
                )
                for way, run in found.items()
            ]
    return steps


def memory_table() -> Iterator[str]:
    """Host memory of a run, from loading to the end, with the wrapper's own swapping and with ours."""
    from rig_variants import BLOCKS, VARIANTS, native, ours

    ways = {RESIDENT: None, "wrapper's own": native(BLOCKS + 1), "ours": ours(BLOCKS)}
    yield "| | blocks | " + " | ".join(f"{way}: anonymous | file | both at once" for way in ways) + " |"
    yield "| --- |" + " --- |" * (1 + 3 * len(ways))
    # A large model's freed tensors go back to the system; of a tiny one, the C library would keep them.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    with _comfyui() as c:
        for swap in ways.values():  # what is imported and allocated once
            _run(c, "first", VARIANTS[IN_MEMORY[0]], swap=swap)
        for variant in IN_MEMORY:
            _run(c, "first", VARIANTS[variant])  # makes the model's file
            runs = [_run(c, way, VARIANTS[variant], swap=swap, memory=True) for way, swap in ways.items()]
            sizes = [
                sum(runs[0].block_bytes),
                *(run.host_peaks[k] for run in runs for k in ("anonymous", "file", "rss")),
            ]
            yield f"| {variant} | {' | '.join(f'{size / MIB:.0f}' for size in sizes)} |"


def _seconds(run: Any) -> float:
    """Of the shortest forward: other programs only make them longer."""
    return min(after - before for before, after in list(pairwise(run.began_s))[1:])


@contextlib.contextmanager
def _comfyui() -> Iterator[Any]:
    """The rig's ComfyUI with the package, during the body."""
    from comfy_client import started

    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    with tempfile.TemporaryDirectory() as scratch, started(python, Path(os.environ["COMFYUI_DIR"]), Path(scratch)) as c:
        if c.skipped is not None:
            raise SystemExit(f"nothing was measured: {c.skipped}")
        c.load_package()
        yield c


def _run(comfy: Any, way: str, case: dict[str, Any], **changes: Any) -> Any:
    found = comfy.run(case, **changes)
    if hasattr(found, "error"):
        raise SystemExit(f"{way}: {found.error}")
    return found


def draw_steps(steps: list[Step], caption: str, path: Path) -> None:
    """A line for each way."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    ways = dict.fromkeys(step.way for step in steps)
    for way, colour in zip(ways, COLOURS_OF_STEPS, strict=True):
        of_way = [step for step in steps if step.way == way]
        ratios = [step.transfer_over_compute for step in of_way]
        axis.plot(ratios, [step.over_resident for step in of_way], marker="o", ms=4, color=colour, label=way)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
    axis.set_xlabel("time to copy all blocks / time to compute a forward", fontsize=8)
    axis.set_ylabel("forward / without swapping", fontsize=8)
    axis.set_title(f"wall clock, {CLOCK}", fontsize=9)
    axis.legend(fontsize=7)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(folder: Path) -> None:
    """Draws before_after.png from the figures of both measurements: what is saved first, then what that takes."""
    missing = [name for name in FIGURES if not (folder / name).exists()]
    if missing:
        print(f"before_after.png is not drawn: {folder} has no {' and no '.join(missing)}; measure these as well")
        return
    rows, steps = (
        json.loads((folder / name).read_text(encoding="utf-8"))[key]
        for name, key in zip(FIGURES, ("rows", "steps"), strict=True)
    )
    ways = [row["way"] for row in rows]
    over = {step["way"]: step["over_resident"] for step in steps if step["transfer_over_compute"] == SHOWN_RATIO}
    panels = (
        ("copied back to RAM, MB", [row["to_host_bytes"] / MIB for row in rows], "{:.0f}"),
        ("a step, over one without swapping*", [over[way] for way in ways], "{:.2f}"),
        ("VRAM at the peak, MB", [row["peak_bytes"] / MIB for row in rows], "{:.0f}"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(8.4, 2.9), sharey=True, layout="constrained")
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh(ways, values, color=COLOURS)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=8)
        axis.set_xlim(0, max(*values, 1) * 1.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel(caption_of(folder), fontsize=7)
    figure.savefig(folder / "before_after.png", dpi=150)
    plt.close(figure)


def caption_of(folder: Path) -> str:
    """Where the figures come from, and what the second panel compares."""
    whole, clocked = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FIGURES)
    model = f"tiny {whole['variant']} Wan model, 30 blocks, {whole['rows'][0]['forwards']} passes"
    return (
        f"{model}; no GPU: {whole['machine']}\n{whole['command']} [--clock]; {whole['date']}, {clocked['date']}\n"
        f"* {clocked['clock']}: copying all blocks takes {SHOWN_RATIO:g} of the time of a step without swapping"
    )


def machine(device: str = "pretend accelerator") -> str:
    """The machine, for the caption."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else "CPU"
    return f"{device} on {os.cpu_count()} cores of {name}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after")
    parser.add_argument("--variant", default="bf16", help="one of the variants of tests/rig")
    parser.add_argument("--clock", action="store_true", help="times with a paced link, on the pretend CUDA runtime")
    parser.add_argument("--memory", action="store_true", help="prints a table of host memory, in MB")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--draw", action="store_true", help="draws before_after.png again and measures nothing")
    options = parser.parse_args(arguments)
    if options.draw:
        draw(options.out)
        return 0
    if "COMFYUI_DIR" not in os.environ:
        parser.error("COMFYUI_DIR is not set; set it to the folder of a ComfyUI with ComfyUI-WanVideoWrapper")
    sys.path.insert(0, str(RIG))
    if options.memory:
        print(f"`python -m benchmarks.before_after --memory`: {machine()}, {datetime.date.today().isoformat()}\n")
        for line in memory_table():
            print(line, flush=True)
        return 0
    if options.clock:
        return clock(options.variant, options.out)
    rows = measure(options.variant)
    command = f"python -m benchmarks.before_after --variant {options.variant}"
    date = datetime.date.today().isoformat()
    origin = {"machine": machine(), "command": command, "date": date, "variant": options.variant}
    (options.out / "before_after.json").write_text(
        json.dumps({**origin, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8"
    )
    draw(options.out)
    for row in rows:
        figures = f"{row.peak_bytes:>14,} peak {row.to_device_bytes:>14,} to device {row.to_host_bytes:>14,} back"
        print(f"{row.way:<28}{figures}  {'same latents' if row.same_latents else 'OTHER LATENTS'}")
    return 0 if all(row.same_latents for row in rows) else 1


def clock(variant: str, out: Path) -> int:
    """The command with --clock."""
    steps, load = measure_steps(variant), os.getloadavg()[1]
    command = f"python -m benchmarks.before_after --clock --variant {variant}"
    date = datetime.date.today().isoformat()
    where = f"{machine('pretend CUDA')}, load {load:.1f}"
    origin = {"machine": where, "command": command, "date": date, "variant": variant, "clock": CLOCK}
    (out / "before_after_clock.json").write_text(
        json.dumps({**origin, "steps": [asdict(step) for step in steps]}, indent=1) + "\n", encoding="utf-8"
    )
    caption = f"tiny {variant} Wan model, 30 blocks; {where}; {command}; {date}"
    draw_steps(steps, caption, out / "before_after_clock.png")
    draw(out)
    for step in steps:
        figures = f"{step.transfer_over_compute:>5} {step.way:<40}{step.over_resident:>8.2f} {step.seconds:>8.3f} s"
        print(f"{figures}  {'same latents' if step.same_latents else 'OTHER LATENTS'}")
    return 0 if all(step.same_latents for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
