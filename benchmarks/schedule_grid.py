"""Step time over the bound max(compute, transfer) of the blocks that ran, for a grid of plans, in virtual time.

    python -m benchmarks.schedule_grid [--json]

Each cell is one `simulate` command. The worst cell of each group is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence

from wanvideo_enhanced_blockswap.cli import main as command_line

BLOCKS = (30, 40, 48)
SHARES = ("25%", "50%", "75%", "100%")
RATIOS = ("0.25", "0.5", "1", "1.5", "2", "4")
NEAR_SHARES = ("70%", "80%", "90%")
NEAR_RATIOS = ("1.1", "1.2", "1.25", "1.4")
SEEDS = ("0", "1", "2", "3", "4")

Cell = tuple[str, ...]


def grid(shares: Sequence[str] = SHARES, ratios: Sequence[str] = RATIOS) -> Iterator[Cell]:
    """The options of each cell."""
    for blocks, share, ratio in itertools.product(BLOCKS, shares, ratios):
        yield "--blocks", str(blocks), "--swapped", share, "--ratio", ratio


def groups() -> dict[str, list[Cell]]:
    """Name and cells of each group."""
    every, near = list(grid()), list(grid(NEAR_SHARES, NEAR_RATIOS))
    two = ("--slots", "2")
    return {
        "equal blocks, 2 slots": [(*cell, *two) for cell in every],
        "equal blocks near balance, 2 slots": [(*cell, *two) for cell in near],
        "equal blocks near balance, planner's slots": near,
        "one block skipped in every second forward": [(*cell, "--skip", "9") for cell in every],
        "three blocks skipped in every second forward": [(*cell, "--skip", "9,10,11") for cell in every],
        "every second forward runs none": [(*cell, "--empty") for cell in every],
        "15 VACE blocks in every second forward": [(*cell, "--vace", "15") for cell in every],
        "sizes within 50 %, 2 slots": [(*cell, *two, "--uneven", "0.5", "--seed", s) for cell in every for s in SEEDS],
        "sizes within 50 %, planner's slots": [
            (*cell, "--uneven", "0.5", "--seed", s) for cell in every for s in SEEDS
        ],
        "sizes within 50 % near balance, planner's slots": [
            (*cell, "--uneven", "0.5", "--seed", s) for cell in near for s in SEEDS
        ],
    }


def ratio_to_bound(cell: Cell) -> float:
    """What `simulate` prints for one cell."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command_line(["simulate", *cell, "--json"])
    return float(json.loads(printed.getvalue())["ratio_to_bound"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the worst cell of each group."""
    parser = argparse.ArgumentParser(prog="benchmarks.schedule_grid", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    found = {}
    for name, cells in groups().items():
        worst, cell = max((ratio_to_bound(cell), cell) for cell in cells)
        found[name] = {"worst_ratio_to_bound": round(worst, 4), "cells": len(cells), "where": " ".join(cell)}
    if options.json:
        print(json.dumps(found))
    else:
        for name, row in found.items():
            print(f"{row['worst_ratio_to_bound']:.4f}  {name}, {row['cells']} cells: {row['where']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
