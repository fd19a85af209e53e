"""What LoRAs cost in time and host memory with the wrapper's own swapping, and with ours; all blocks are swapped.

    COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m benchmarks.lora_cost [--repeats 5]

Four LoRAs, a bf16 model of 30 blocks, and the real ComfyUI and WanVideoWrapper on tests/rig's pretend accelerator.
Without COMFYUI_DIR it is the stand-in of tests/standin with 4 tiny blocks, which shows only that the command works.
Each repeat is a fresh process in which every run is made twice, and the second one counts; the package is loaded for
ours alone. A run has one forward and goes from the loader, or from WanVideoSetLoRAs with the loader cached, to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from .machine import dated, host

TESTS = Path(__file__).parents[1] / "tests"
WAYS = ("wrapper", "ours")
RUNS = ("none", "merged", "unmerged", "none again", "cached", "set", "changed")
"""In this order: each of the last three finds loaded what the one before has left."""
PROMPTS = {
    "merged by the loader": ("none", "merged"),
    "unmerged, by the loader": ("none", "unmerged"),
    "set on a cached model": ("cached", "set"),
    "other strengths on a cached model": ("cached", "changed"),
}
"""The run without LoRAs, and the one with them."""
FIGURES = {"wall": (1, "{:.2f} s"), "cpu": (1, "{:.2f} s"), "memory": (1 << 20, "{:.0f} MB")}

Found = dict[str, dict[str, float]]
"""Of each run, its FIGURES."""


def in_comfyui(way: str, folder: Path) -> Found:
    """One repeat in the rig, whose models are in a folder that all repeats share."""
    sys.path.insert(0, str(TESTS / "rig"))
    from comfy_client import started
    from rig_variants import BF16, BLOCKS, FOUR, native, ours, several

    unmerged, halves = several(FOUR, merge=False), {name: strength / 2 for name, strength in FOUR.items()}
    case = {"load": {"model": BF16}, "sample": {"steps": 1, "cfg": 1.0}, "swap_at": "set"}
    case["swap"] = ours(BLOCKS) if way == "ours" else native(BLOCKS + 1)
    changes = {
        "merged": {"lora": several(FOUR, merge=True)},
        "unmerged": {"lora": unmerged},
        "cached": {"cached": True},
        "set": {"cached": True, "lora": unmerged, "lora_at": "set"},
        "changed": {"cached": True, "lora": several(halves, merge=False), "lora_at": "set"},
    }
    found: Found = {}
    with started(os.environ.get("COMFYUI_PYTHON") or sys.executable, Path(os.environ["COMFYUI_DIR"]), folder) as comfy:
        if comfy.skipped is not None:
            raise SystemExit(f"nothing was measured: {comfy.skipped}")
        if way == "ours":
            comfy.load_package()
        for run in (*RUNS, *RUNS):
            seen = comfy.run(case, **changes.get(run, {}))
            if hasattr(seen, "error"):
                raise SystemExit(f"{way}, {run}: {seen.error}")
            found[run] = {"wall": seen.total_s, "cpu": seen.cpu_s}
        for run in ("none", "merged", "unmerged"):
            found[run]["memory"] = comfy.run(case, **changes.get(run, {}), memory=True).host_peaks["anonymous"]
    return found


def in_stand_in(way: str) -> Found:
    """One repeat in the stand-in."""
    sys.path[:0] = [str(TESTS), str(TESTS / "pretend")]
    import pretend_accelerator

    pretend_accelerator.install()
    from gate_bench import BLOCKS, DEVICE, GateBench, arguments
    from standin import Workflow, swap_args

    bench = GateBench() if way == "ours" else None
    found: Found = {}
    for run, variant in (("none", "fp32"), ("merged", "loras_merged"), ("unmerged", "loras_unmerged")) * 2:
        begin, used = time.perf_counter(), time.process_time()
        workflow = Workflow(variant, device=DEVICE)
        workflow.load(arguments(BLOCKS) if bench else swap_args(BLOCKS + 1))
        workflow.sample(steps=1, cfg=1.0)
        found[run] = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - used}
        found[run]["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def table(found: Mapping[str, Sequence[Found]]) -> str:
    """What the LoRAs of each prompt cost each way, and what is ours of it: the difference, over the wrapper's run."""
    heads = (f"{figure}: wrapper | ours | ours of it" for figure in FIGURES)
    lines = [f"| four LoRAs | {' | '.join(heads)} |", "| --- |" + " --- |" * 3 * len(FIGURES)]
    for prompt, (without, run) in PROMPTS.items():
        cells = []
        for figure, (unit, text) in FIGURES.items():
            if figure not in found["ours"][0].get(run, {}):
                cells += ["", "", ""]
                continue
            costs = [median(one[run][figure] - one[without][figure] for one in found[way]) for way in WAYS]
            whole = median(one[run][figure] for one in found["wrapper"])
            cells += [text.format(cost / unit) for cost in costs] + [f"{(costs[1] - costs[0]) / whole:+.1%}"]
        lines.append(f"| {prompt} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_cost")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each way")
    parser.add_argument(
        "--width", type=int, default=384, help="of the model: a multiple of 24, and none of the real ones"
    )
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    is_real = "COMFYUI_DIR" in os.environ
    if options.once:
        way, folder = options.once
        print(json.dumps(in_comfyui(way, Path(folder)) if is_real else in_stand_in(way)))
        return 0
    found: dict[str, list[Found]] = {way: [] for way in WAYS}
    # A large model's freed tensors go back to the system; of a small one, the C library would keep them.
    environment = os.environ | {"RIG_WIDTH": str(options.width), "MALLOC_MMAP_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS * options.repeats:
            command = [sys.executable, "-m", "benchmarks.lora_cost", "--once", way, folder]
            once = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found[way].append(json.loads(once.stdout.splitlines()[-1]))
    where = f"{'ComfyUI and WanVideoWrapper' if is_real else 'the stand-in'}, median of {options.repeats}"
    print(f"{where}: {dated(host())}, load {os.getloadavg()[1]:.1f}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
