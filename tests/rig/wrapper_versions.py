"""Which versions of the wrapper this package swaps in, and with what result: the table in docs/compatibility.md.

    python tests/rig/wrapper_versions.py COMFYUI_DIR COMFYUI_PYTHON WRAPPER… [--copies COPY…] [--precision fp16]

Each WRAPPER is a folder with one version. Each COPY is one with a renamed or changed copy, which is loaded beside the
wrapper in COMFYUI_DIR; the loader and the sampler are the copy's. Each runs in a ComfyUI process of its own: without
swapping, with half of the blocks swapped, and with automatic tuning.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

from comfy_client import Comfy, ComfyProcessError, started
from rig_runs import HALF, Runs
from rig_variants import VARIANTS, Case

TRIED = ("bf16", "gguf", "lora_merged", "lora_unmerged", "vace", "two_experts")
COUNTS = (HALF, "auto")


def main(comfyui: Path, python: str, wrappers: list[str], copies: list[str], precision: dict[str, str]) -> None:
    """Prints the table.

    Args:
        comfyui: ComfyUI's folder.
        python: Its interpreter.
        wrappers: Folders of versions.
        copies: Folders of copies.
        precision: The loader's input `base_precision`, if it is to be another one.
    """
    cases = {name: VARIANTS[name] | {"load": VARIANTS[name]["load"] | precision} for name in TRIED}
    folders = [("RIG_WRAPPER", Path(one)) for one in wrappers] + [("RIG_COPY", Path(one)) for one in copies]
    print(f"| version | {' | '.join(TRIED)} |")
    print(f"| --- | {' | '.join('---' for _ in TRIED)} |")
    for variable, wrapper in folders:
        os.environ.update({"RIG_WRAPPER": "", "RIG_COPY": "", variable: str(wrapper.resolve())})
        with tempfile.TemporaryDirectory() as scratch, started(python, comfyui, Path(scratch)) as comfy:
            print(f"| {_version(wrapper)} | {' | '.join(_row(comfy, cases))} |", flush=True)
    print(
        f"\n{datetime.now(UTC):%Y-%m-%d}, of each: latents with {COUNTS[0]} blocks swapped, and with automatic tuning."
    )


def _version(wrapper: Path) -> str:
    found = re.findall(r'^(name|version) = "(.+)"', (wrapper / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    return " ".join(value for _, value in found)


def _row(comfy: Comfy, cases: dict[str, Case]) -> list[str]:
    try:
        comfy.load_package()
        return [_result(Runs(comfy, cases), variant) for variant in TRIED]
    except ComfyProcessError as failure:
        return [str(failure).splitlines()[-1]] * len(TRIED)


def _result(runs: Runs, variant: str) -> str:
    try:
        unswapped = runs.unswapped(variant)
        return "; ".join(_compared(runs.of(variant, count), unswapped) for count in COUNTS)
    except AssertionError as failure:
        return str(failure).splitlines()[0]


def _compared(run: SimpleNamespace, unswapped: SimpleNamespace) -> str:
    latents = "same" if run.latents == unswapped.latents else "**different**"
    how = "swapped" if run.plans else "the wrapper's own swapping"
    return f"{latents}, {how}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("python")
    parser.add_argument("wrappers", nargs="*")
    parser.add_argument("--copies", nargs="+", default=[])
    parser.add_argument("--precision")
    given = parser.parse_args()
    precision = {"base_precision": given.precision} if given.precision else {}
    main(given.comfyui, given.python, given.wrappers, given.copies, precision)
