"""A real run of ComfyUI with the real WanVideoWrapper: without swapping, with the wrapper's own swapping, with ours.

A pretend accelerator counts device memory and bytes moved; it has no clock, so there are no times.

    COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m benchmarks.before_after [--variant bf16] [--out docs]

writes before_after.json and before_after.png. It uses the environment and the models (30 blocks) of tests/rig.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RIG = ROOT / "tests" / "rig"

MIB = 1 << 20
COLOURS = ("#999999", "#E69F00", "#0072B2", "#56B4E9")
"""Okabe and Ito's colours, which colour-blind people can tell apart too."""


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
    sys.path.insert(0, str(RIG))
    from comfy_client import started
    from rig_variants import BLOCKS, VARIANTS, native, ours

    ways: dict[str, dict[str, Any]] = {
        "without swapping": {},
        # The wrapper swaps one block fewer than this number.
        "wrapper's own, all blocks": {"swap": native(BLOCKS + 1)},
        "ours, all blocks": {"swap": ours(BLOCKS)},
        "ours, half": {"swap": ours(BLOCKS // 2)},
    }
    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, started(python, Path(os.environ["COMFYUI_DIR"]), Path(scratch)) as c:
        if c.skipped is not None:
            raise SystemExit(f"nothing was measured: {c.skipped}")
        c.load_package()
        latents = ""
        for way, changes in ways.items():
            found = c.run(VARIANTS[variant], **changes)
            if hasattr(found, "error"):
                raise SystemExit(f"{way}: {found.error}")
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


def draw(rows: list[Row], caption: str, path: Path) -> None:
    """A panel for each figure, a bar for each way."""
    panels = (
        ("device memory at the peak", [row.peak_bytes for row in rows]),
        ("copied to the device", [row.to_device_bytes for row in rows]),
        ("copied back to the host", [row.to_host_bytes for row in rows]),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.6), sharey=True, layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        sizes = [value / MIB for value in values]
        bars = axis.barh([row.way for row in rows], sizes, color=COLOURS)
        axis.bar_label(bars, [f"{size:.1f}" for size in sizes], padding=3, fontsize=8)
        axis.set_title(f"{title}, MiB", fontsize=9)
        axis.set_xlim(0, max(*sizes, 1) * 1.2)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> str:
    """The machine, for the caption."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else "CPU"
    return f"pretend accelerator on {os.cpu_count()} cores of {name}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after")
    parser.add_argument("--variant", default="bf16", help="one of the variants of tests/rig")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    if "COMFYUI_DIR" not in os.environ:
        parser.error("COMFYUI_DIR is not set; set it to the folder of a ComfyUI with ComfyUI-WanVideoWrapper")
    rows = measure(options.variant)
    command = f"python -m benchmarks.before_after --variant {options.variant}"
    date = datetime.date.today().isoformat()
    origin = {"machine": machine(), "command": command, "date": date, "variant": options.variant}
    (options.out / "before_after.json").write_text(
        json.dumps({**origin, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8"
    )
    caption = (
        f"tiny {options.variant} Wan model, 30 blocks, {rows[0].forwards} forwards; {machine()}; {command}; {date}"
    )
    draw(rows, caption, options.out / "before_after.png")
    for row in rows:
        figures = f"{row.peak_bytes:>14,} peak {row.to_device_bytes:>14,} to device {row.to_host_bytes:>14,} back"
        print(f"{row.way:<28}{figures}  {'same latents' if row.same_latents else 'OTHER LATENTS'}")
    return 0 if all(row.same_latents for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
