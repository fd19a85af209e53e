"""Which versions of the wrapper and of ComfyUI, and with which of ComfyUI's flags: the tables in docs/compatibility.md.

    python tests/rig/versions.py COMFYUI_DIR COMFYUI_PYTHON [--wrappers WRAPPER…] [--copies COPY…] [--comfyuis DIR…]
        [--flags=FLAGS…] [--precision fp16]

Each WRAPPER is a folder with one version. Each COPY is one with a renamed or changed copy, which is loaded beside the
wrapper in COMFYUI_DIR; the loader and the sampler are the copy's. Each DIR is another ComfyUI with a wrapper. FLAGS are
of one command line ("--flags=--cache-none --highvram"); ComfyUI is started with them, and with RIG_DEVICE=cuda on the
pretend CUDA runtime. Each runs in a ComfyUI process of its own: without swapping, with half of the blocks swapped, and
with automatic tuning.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from comfy_client import Comfy, ComfyProcessError, started
from rig_runs import HALF, Runs
from rig_variants import VARIANTS, Case

TRIED = ("bf16", "gguf", "lora_merged", "lora_unmerged", "vace", "two_experts")
COUNTS = (HALF, "auto")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("python")
    for option in ("--wrappers", "--copies", "--comfyuis"):
        parser.add_argument(option, type=Path, nargs="+", default=[])
    parser.add_argument("--flags", action="append", default=[])
    parser.add_argument("--precision", help="the loader's input base_precision, if it is to be another one")
    asked = parser.parse_args()
    precision = {} if asked.precision is None else {"base_precision": asked.precision}
    cases = {name: VARIANTS[name] | {"load": VARIANTS[name]["load"] | precision} for name in TRIED}
    print(f"| version | {' | '.join(TRIED)} |")
    print(f"| --- | {' | '.join('---' for _ in TRIED)} |")
    for name, comfyui, changes in _rows(asked):
        with (
            tempfile.TemporaryDirectory() as scratch,
            started(asked.python, comfyui, Path(scratch), **changes) as comfy,
        ):
            print(f"| {name} | {' | '.join(_row(comfy, cases))} |", flush=True)
    print(
        f"\n{datetime.now(UTC):%Y-%m-%d}, of each: latents with {COUNTS[0]} blocks swapped, and with automatic tuning."
    )


def _rows(asked: argparse.Namespace) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Of each row: its name, ComfyUI's folder, and what is in the environment."""
    for variable, folders in (("RIG_WRAPPER", asked.wrappers), ("RIG_COPY", asked.copies)):
        for folder in folders:
            yield _version(folder), asked.comfyui, {variable: str(folder.resolve())}
    yield from ((_version(folder), folder, {}) for folder in asked.comfyuis)
    yield from ((flags, asked.comfyui, {"RIG_FLAGS": flags}) for flags in asked.flags)


def _version(folder: Path) -> str:
    found = re.findall(r'^(name|version) = "(.+)"', (folder / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    return " ".join(value for _, value in found)


def _row(comfy: Comfy, cases: dict[str, Case]) -> list[str]:
    try:
        comfy.load_package()
        return [_result(Runs(comfy, cases), variant) for variant in TRIED]
    except ComfyProcessError as failure:
        return [str(failure).splitlines()[-1]] * len(TRIED)


def _result(runs: Runs, variant: str) -> str:
    return "; ".join(_compared(runs, variant, count) for count in COUNTS)


def _compared(runs: Runs, variant: str, count: object) -> str:
    try:
        run, unswapped = runs.of(variant, count), runs.unswapped(variant)
    except AssertionError as failure:
        return str(failure).splitlines()[0]
    latents = "same" if run.latents == unswapped.latents else "**different**"
    how = "swapped" if run.plans else "the wrapper's own swapping"
    return f"{latents}, {how}"


if __name__ == "__main__":
    main()
