"""The command line: demo, plan, probe, simulate."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from .blockswap.errors import BlockSwapError
from .commands.demo import demo
from .commands.output import Result
from .commands.plan import plan
from .commands.probe import probe
from .commands.simulate import simulate
from .commands.wan_model import PRESETS
from .commands.what_fits import what_fits
from .hardware import HardwareUnavailableError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

PROGRAM = "python -m wanvideo_enhanced_blockswap"

SLOTS = "streaming blocks that are on the GPU at a time (default: chosen by the plan)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    With `--json`, standard output holds one JSON object and nothing else: the result, or `{"error": …}`.

    Returns:
        0 if the command succeeded, 1 if it failed, 2 for an invalid command line, 130 after an interrupt.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(words)
    except UsageError as failure:
        return _fail(f"{failure} (--help shows the options)", 2, as_json="--json" in words)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        result = options.run(options)
        print(json.dumps(result.data) if options.json else result.text, flush=True)
    except UsageError as failure:
        return _fail(f"{failure} (--help shows the options)", 2, as_json=options.json)
    except (BlockSwapError, HardwareUnavailableError) as failure:
        return _fail(str(failure), 1, as_json=options.json)
    except ImportError as failure:
        return _fail(f'{failure}; run pip install -e ".[demo]" in the checkout', 1, as_json=options.json)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, as_json=options.json)  # the code of shells for a program that SIGINT ended
    except BrokenPipeError:
        # The reader has closed the output: Python must not flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if result.succeeded else 1


def _fail(message: str, code: int, *, as_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))
    return code


class UsageError(Exception):
    """The command line is invalid."""


class Parser(argparse.ArgumentParser):
    """Raises an error where argparse prints it and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _number(lowest: float, highest: float, expected: str, kind: type = float) -> Callable[[str], Any]:
    """A type for argparse: a `kind` of number within limits."""

    def parse(text: str) -> Any:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest or kind(value) != value:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return kind(value)

    return parse


_COUNT = _number(1, 100_000, "a whole number from 1 to 100000", int)
_COUNT_OR_ZERO = _number(0, 100_000, "a whole number from 0 to 100000", int)
_LINK = _number(1e-6, 10_000, "GB/s above 0 and up to 10000")  # ten times the NVLink of 2026
_RATIO = _number(0, 1e6, "a number from 0 to 1e+06")  # beyond it, durations lose digits


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Runs Wan video models that are larger than the GPU.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_demo, _add_plan, _add_probe, _add_simulate):
        add(commands)
    return parser


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], Result], description: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--verbose", action="store_true", help="say more, in the words of developers")
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Commands) -> None:
    does = "Run a real Wan transformer with random weights, first whole, then with blocks that stream."
    command = _add(commands, "demo", demo, does)
    add = command.add_argument
    add("--preset", choices=tuple(PRESETS), default="small", help="dimensions of the model")
    add("--blocks-to-swap", metavar="N", help="a number, half or all (default: automatic)")
    add("--device", default="auto", help="auto, cpu (simulated), cuda or cuda:N")
    add("--vram", metavar="SIZE", help="memory of the card, such as 8GB (default: enough for half of the blocks)")
    add("--link", metavar="GB/s", type=_LINK, help="speed of copies to a simulated GPU")
    add("--steps", type=_COUNT, default=4, help="denoising steps (default: 4)")
    add("--slots", type=_COUNT, metavar="N", help=SLOTS)
    add(
        "--streams",
        type=_COUNT,
        metavar="N",
        help="parts of a block that are copied at once (default: as measured, or 1)",
    )
    add("--shape", metavar="WxHxF", help="size of the video (default: the preset's)")
    add("--seed", type=_COUNT_OR_ZERO, default=0, help="seed of weights and noise (default: 0)")
    default = "blockswap_timeline.png"
    add("--picture", default=default, metavar="PNG", help=f"file of the timeline (default: {default})")


def _add_plan(commands: Commands) -> None:
    command = _add(commands, "plan", _plan, "Show how a model would run on a GPU; only the header of its file is read.")
    add = command.add_argument
    add(
        "model",
        nargs="?",
        help="a .safetensors or .gguf file of a Wan transformer; of a model in several files, one or the index",
    )
    tables = "a Markdown table of cards and sizes of video: for MODEL, or for the models that people run most"
    add("--table", action="store_true", help=tables)
    module = "a file that the loader merges into the model, such as VACE's or InfiniteTalk's; repeatable"
    add("--module", metavar="FILE", action="append", default=[], help=module)
    lora = "a LoRA that is not merged into the weights (a merged one changes no size); repeatable"
    add("--lora", metavar="FILE", action="append", default=[], help=lora)
    add(
        "--vram",
        metavar="SIZE",
        help="memory of the card, such as 12GB; 1 GB is 1024^3 bytes, as on its box (default: this machine's)",
    )
    add("--ram", metavar="SIZE", help="RAM, in the same unit (default: this machine's)")
    available = "what is available of it before the model is loaded (default: all of --ram)"
    add("--available-ram", metavar="SIZE", help=available)
    names = "a card by its name, such as 'RTX 4090', '4060 Ti 16GB' or 'RX 9070 XT'"
    add("--gpu", metavar="NAME", help=names)
    speeds = "PCIe 3.0 x16 has about 12, 4.0 about 25, 5.0 about 50 (default: 80%% of the card's own)"
    add("--link", metavar="GB/s", type=_LINK, help=f"speed of copies to the GPU: {speeds}")
    disk = "speed of reading the model's file: a hard disk has about 0.2, SATA 0.5, NVMe 3 to 7"
    add("--disk", metavar="GB/s", type=_LINK, help=disk)
    add("--shape", metavar="WxHxF", help="size of the video, such as 832x480x81")
    add("--context-window", metavar="F", type=_COUNT, help="frames of one context window (default: the whole video)")
    beside = "a model in RAM at the same time, such as the other expert of Wan 2.2; repeatable"
    add("--beside", "--experts", metavar="MODEL", action="append", default=[], help=beside)
    add("--blocks-to-swap", metavar="N", help="a number, half or all (default: automatic)")
    percent = _number(30, 90, "a percentage from 30 to 90")
    most = "how much of the card may be in use beside the computation, 30 to 90 (default: 50)"
    add("--vram-threshold-percent", type=percent, default=50.0, metavar="P", help=most)


def _plan(options: argparse.Namespace) -> Result:
    if options.table:
        return what_fits(options)
    if options.model is None:
        raise UsageError("the following arguments are required: model (or --table)")
    return plan(options)


def _add_probe(commands: Commands) -> None:
    command = _add(
        commands, "probe", probe, "Show what is read of this machine, and the measured speed of copies to the GPU."
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--again", action="store_true", help="measure again even if a measurement is stored")


def _add_simulate(commands: Commands) -> None:
    does = "Compute how long a pass of the model takes when blocks stream, in block times."
    command = _add(commands, "simulate", simulate, does)
    add = command.add_argument
    add("--blocks", type=_COUNT, required=True, help="blocks of the model")
    add("--swapped", required=True, help="number of blocks that stream, or a share such as 50%%")
    add("--ratio", type=_RATIO, required=True, help="time of copying a block over time of computing it")
    add("--slots", type=_COUNT, metavar="N", help=SLOTS)
    share = _number(0, 0.99, "a share from 0 to 0.99")
    add("--uneven", type=share, default=0.0, help="block sizes vary by this share, such as 0.5")
    add("--skip", type=_list, default=[], help="blocks skipped in every second pass, such as 9,10")
    add("--empty", action="store_true", help="run no block in every second pass")
    add("--vace", type=_COUNT_OR_ZERO, default=0, help="VACE blocks, run in every second pass")
    add("--seed", type=_COUNT_OR_ZERO, default=0, help="seed of the sizes (default: 0)")


def _list(text: str) -> list[int]:
    return [_COUNT_OR_ZERO(part) for part in text.split(",")]
