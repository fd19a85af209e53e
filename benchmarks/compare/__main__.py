"""Engines that run a transformer larger than its device, side by side on the same weights and inputs.

    python -m benchmarks.compare --model 14b --dtype bf16 --shapes 832x480x1,832x480x81 --swap half,all --out DIR

Each engine and number of swapped blocks has its own process, which runs all shapes; a step is one forward of diffusers'
WanTransformer3DModel with random weights. `results.json`, `table.md` and `plot.png` are written to DIR after each
engine. Without a GPU a small model runs on a simulated device: its memory and bytes are counted, its times are virtual.
An engine that is missing or fails is a row with the reason. The limits follow below the tables, each with met or not
met. Returns 1 if one of our engines fails or has another output, or if a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, SettingsError
from wanvideo_enhanced_blockswap.commands.options import choose_device, parse_shape
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, refuse_if_too_large
from wanvideo_enhanced_blockswap.hardware import read_host_memory

from benchmarks.machine import origin

from .cells import EQUAL, FIRST, SHAPES, Row, parse_swaps, preset_of
from .comparison import Comparison, compare
from .engines import NAMES, OURS
from .limits import verdicts
from .plot import draw
from .table import markdown

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def failures(rows: Sequence[Row]) -> list[str]:
    """Faults of our engines: no figures, or another output than the first engine's."""
    return [
        f"{row.engine}, {row.swapped} swapped, {row.shape}: {row.reason or row.output}"
        for row in rows
        if row.engine.startswith("ours") and (row.reason or row.output not in (EQUAL, FIRST))
    ]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options, with the comparison in `asked`; a wrong one ends the process with one line."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", choices=tuple(PRESETS))
    parser.add_argument("--blocks", type=int, help="number of blocks of the model's size (default: as many as it has)")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--shapes", default=",".join(SHAPES), help="WxHxF, separated by commas")
    parser.add_argument("--swap", default="half,all", help="numbers of blocks, half, all, separated by commas")
    parser.add_argument("--engines", help=f"some of {', '.join(NAMES)} (default: all that the device can run)")
    parser.add_argument("--device", default="auto", help="auto, cpu (simulated), cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; a step is one forward")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one process may take")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md and plot.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(words)
    if min(options.steps, options.warmup) < 1:
        parser.error(f"--steps and --warmup: expected 1 or more, got {options.steps} and {options.warmup}")
    if options.blocks is not None and options.blocks < 2:
        parser.error(f"--blocks: expected 2 or more, so that half can be swapped, got {options.blocks}")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got {str(options.out)!r}")
    preset, shapes = preset_of(options.model, options.blocks), _split(options.shapes)
    try:
        options.chosen = choose_device(options.device)
        swaps = parse_swaps(options.swap, preset.layers)
        for shape in shapes:
            check_shape(shape)
        available = read_host_memory().available_bytes
        simulated = options.chosen.type == "cpu"
        refuse_if_too_large(options.model, preset, available_bytes=available, is_simulated=simulated)
    except BlockSwapError as cause:
        parser.error(str(cause).replace("--blocks-to-swap", "--swap").replace("--preset", "--model"))
    engines = _split(options.engines or ",".join(OURS if simulated else NAMES))
    unknown = [name for name in engines if name not in NAMES]
    if unknown:
        parser.error(f"--engines: expected some of {', '.join(NAMES)}; got {unknown[0]!r}")
    options.asked = Comparison(
        model=options.model,
        dtype=DTYPES[options.dtype],
        shapes=shapes,
        swaps=swaps,
        engines=engines,
        device=options.device,
        steps=options.steps,
        warmup=options.warmup,
        timeout_s=options.timeout,
        quiet=options.json,
        blocks=options.blocks,
    )
    return options


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def check_shape(text: str) -> None:
    """Raises SettingsError if Wan has no latents of this size."""
    width, height, frames = parse_shape(text)
    if min(width, height, frames) < 1 or width % 16 or height % 16 or frames % 4 != 1:
        raise SettingsError(f"--shapes: expected sides that are multiples of 16 and 4n+1 frames, got {text!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all our engines ran with the resident model's output, and every limit is met."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(words)
    title = f"`{' '.join(['python -m benchmarks.compare', *words])}`: {origin(options.chosen)}"
    results, text, wrong = {}, "", ["no engine was given; see --engines"]
    for found in compare(options.asked):
        judged = verdicts(found.rows, block_bytes=found.block_bytes, link_bytes_per_s=found.link_bytes_per_s)
        lines = [f"- {'met' if verdict.met else 'NOT MET'}: {verdict.said}" for verdict in judged]
        text = "\n".join([title, "", markdown(found.rows, link_bytes_per_s=found.link_bytes_per_s), *lines, ""])
        results = {
            "heading": title,
            "torch": torch.__version__,
            **asdict(options.asked),
            **asdict(found),
            "verdicts": [asdict(verdict) for verdict in judged],
        }
        wrong = [*failures(found.rows), *(f"not met: {verdict.said}" for verdict in judged if not verdict.met)]
        if options.out is not None:  # so that a stopped comparison has results
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (options.out / "table.md").write_text(text, encoding="utf-8")
            draw(found.rows, options.out / "plot.png")
    print(json.dumps(results) if options.json else text)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
