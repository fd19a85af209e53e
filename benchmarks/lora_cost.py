"""What LoRAs cost in time and host memory: with the wrapper's own swapping alone, and with ours; all blocks swapped.

    COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m benchmarks.lora_cost [--repeats 5]

Runs the real ComfyUI and WanVideoWrapper of tests/rig, with a model of 30 blocks; without COMFYUI_DIR the stand-in of
tests/standin, whose model of 4 blocks shows only that the command runs. Each repeat is a fresh process that runs every
prompt once before it is timed; the package is loaded for ours alone. A run is one forward, from the loader (or from
WanVideoSetLoRAs, with the loader cached) to the end.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .machine import dated, host

TESTS = Path(__file__).parents[1] / "tests"
WAYS = ("wrapper", "ours")
PROMPTS = {
    "merged by the loader": (None, "merged"),
    "unmerged, by the loader": (None, "unmerged"),
    "set on a cached model": ("cached", "set"),
    "another strength on a cached model": ("set", "changed"),
}
"""Kinds of runs: the one that the LoRAs are compared with, and the one with them; None loads the model without any."""
KINDS = (None, "merged", "unmerged", None, "cached", "set", "changed")
"""The order of the runs: each finds loaded what the one before has left."""
WIDTH = 768
MIB = 1 << 20

Found = dict[str, dict[str, float]]
"""Of each kind of run: `wall` and `cpu` seconds, and the highest `memory` where it was measured."""


def in_comfyui(way: str) -> Found:
    """One repeat in the rig."""
    sys.path.insert(0, str(TESTS / "rig"))
    from comfy_client import started
    from rig_variants import BF16, BLOCKS, FOUR, native, ours, several

    swap = ours(BLOCKS) if way == "ours" else native(BLOCKS + 1)
    halved = {name: strength / 2 for name, strength in FOUR.items()}
    loras = {
        "merged": {"lora": several(FOUR, merge=True)},
        "unmerged": {"lora": several(FOUR, merge=False)},
        "set": {"lora": several(FOUR, merge=False), "lora_at": "set", "cached": True},
        "changed": {"lora": several(halved, merge=False), "lora_at": "set", "cached": True},
        "cached": {"cached": True},
    }
    plain = {"load": {"model": BF16}, "sample": {"steps": 1, "cfg": 1.0}, "swap": swap, "swap_at": "set"}
    python, found = os.environ.get("COMFYUI_PYTHON") or sys.executable, {}
    with started(python, Path(os.environ["COMFYUI_DIR"]), _shared()) as comfy:
        if comfy.skipped is not None:
            raise SystemExit(f"nothing was measured: {comfy.skipped}")
        if way == "ours":
            comfy.load_package()

        def run(kind: str | None, **more: Any) -> Any:
            seen = comfy.run(plain | loras.get(str(kind), {}), **more)
            if hasattr(seen, "error"):
                raise SystemExit(f"{way}, {kind}: {seen.error}")
            return seen

        for _ in range(2):
            for kind in KINDS:
                seen = run(kind)
                found[str(kind)] = {"wall": seen.total_s, "cpu": seen.cpu_s}
        for kind in (None, "merged", "unmerged"):
            found[str(kind)]["memory"] = run(kind, memory=True).host_peaks["anonymous"]
    return found


def in_stand_in(way: str) -> Found:
    """One repeat in this process, which must be fresh."""
    sys.path[:0] = [str(TESTS), str(TESTS / "pretend")]
    import pretend_accelerator

    pretend_accelerator.install()
    from gate_bench import BLOCKS, DEVICE, GateBench, arguments
    from standin import Workflow, swap_args

    swap = arguments(BLOCKS) if way == "ours" else swap_args(BLOCKS + 1)
    bench = GateBench() if way == "ours" else None
    variants = {"None": "fp32", "merged": "lora_merged", "unmerged": "lora_unmerged", "set": "lora_set"}
    found: Found = {}
    for _ in range(2):
        for kind, variant in variants.items():
            begin, used = time.perf_counter(), time.process_time()
            workflow = Workflow(variant, device=DEVICE)
            workflow.load(swap)
            workflow.sample(steps=1, cfg=1.0)
            found[kind] = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - used}
            found[kind]["memory"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if bench is not None:
        bench.gate.restore()
    return found | {"cached": found["None"], "changed": found["set"]}


def _shared() -> Path:
    """A folder for models, the same in all repeats."""
    folder = Path(os.environ["LORA_COST_FOLDER"])
    folder.mkdir(exist_ok=True)
    return folder


def repeat(way: str) -> Found:
    """One repeat in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.lora_cost", "--once", way]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table(found: Mapping[str, Sequence[Found]]) -> str:
    """What each prompt costs above the one without its LoRAs, each way, and what is ours of it."""
    lines = ["| | " + " | ".join(f"{one}: wrapper | ours | ours of it" for one in ("wall", "CPU", "memory")) + " |"]
    lines.append("| --- |" + " --- |" * 9)
    shown: dict[str, tuple[float, Callable[[float], str]]] = {
        "wall": (1, "{:.2f} s".format),
        "cpu": (1, "{:.2f} s".format),
        "memory": (MIB, "{:.0f} MiB".format),
    }
    for prompt, (without, kind) in PROMPTS.items():
        cells = []
        for figure, (unit, text) in shown.items():
            if any(figure not in one[str(kind)] or figure not in one[str(without)] for one in found["ours"]):
                cells += ["", "", ""]
                continue
            runs = {way: median(one[str(kind)][figure] for one in found[way]) for way in WAYS}
            costs = {
                way: median(one[str(kind)][figure] - one[str(without)][figure] for one in found[way]) for way in WAYS
            }
            cells += [text(costs[way] / unit) for way in WAYS]
            cells.append(f"{(costs['ours'] - costs['wrapper']) / runs['wrapper']:+.1%}")
        lines.append(f"| {prompt} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_cost")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each way")
    parser.add_argument("--once", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    is_real = bool(os.environ.get("COMFYUI_DIR"))
    if options.once:
        print(json.dumps((in_comfyui if is_real else in_stand_in)(options.once)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        # A large model's freed tensors go back to the system; of a small one, the C library would keep them.
        os.environ |= {"LORA_COST_FOLDER": scratch, "RIG_WIDTH": str(WIDTH), "MALLOC_MMAP_THRESHOLD_": "65536"}
        found: dict[str, list[Found]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way in WAYS:
                found[way].append(repeat(way))
    where = "ComfyUI and WanVideoWrapper" if is_real else "the stand-in"
    print(f"{where}, median of {options.repeats}: {dated(host())}, load {os.getloadavg()[1]:.1f}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
