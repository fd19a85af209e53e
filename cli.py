"""The command line: demo, plan, probe, simulate."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

from .blockswap.errors import BlockSwapError
from .commands.demo import demo
from .commands.output import Result
from .commands.plan import plan
from .commands.probe import probe
from .commands.simulate import simulate
from .commands.wan_model import PRESETS
from .hardware import HardwareUnavailableError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

MOST_RATIO = 1e6
"""Largest transfer time over compute time; beyond it, durations lose digits."""

MOST_LINK = 10_000.0
"""Fastest link in GB/s: ten times the NVLink of 2026."""

INTERRUPTED = 130
"""The exit code of shells for a program that SIGINT ended."""

PROGRAM = "python -m wanvideo_enhanced_blockswap"


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
    except (BlockSwapError, HardwareUnavailableError) as failure:
        return _fail(str(failure), 1, as_json=options.json)
    except ImportError as failure:
        return _fail(f'{failure}; run pip install -e ".[demo]" in the checkout', 1, as_json=options.json)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, as_json=options.json)
    except BrokenPipeError:
        # The reader of the output has closed it: Python must not flush the rest at exit.
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Runs Wan video models that are larger than the GPU.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_plan(commands)
    _add_probe(commands)
    _add_simulate(commands)
    return parser


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], Result], description: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--verbose", action="store_true", help="log decisions to standard error")
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Commands) -> None:
    command = _add(
        commands, "demo", demo, "Denoise with a real Wan transformer of random weights, unswapped and swapped."
    )
    command.add_argument("--preset", choices=tuple(PRESETS), default="small", help="dimensions of the model")
    command.add_argument("--blocks-to-swap", metavar="N", help="a number, half or all (default: automatic)")
    command.add_argument("--device", default="auto", help="auto, cpu (simulated), cuda or cuda:N")
    command.add_argument(
        "--vram", metavar="SIZE", help="memory of the card (default: so much that half of the blocks fit)"
    )
    command.add_argument("--link", metavar="GB/s", type=_link, help="host-to-device bandwidth of a simulated device")
    command.add_argument("--steps", type=_count, default=4, help="denoising steps (default: 4)")
    command.add_argument(
        "--slots", type=_count, metavar="N", help="slots of the window (default: the planner's choice)"
    )
    command.add_argument("--streams", type=_count, metavar="N", help="copy streams (default: as measured, or 1)")
    command.add_argument("--shape", metavar="WxHxF", help="size of the video (default: the preset's)")
    command.add_argument("--seed", type=_count_or_zero, default=0, help="seed of weights and noise (default: 0)")
    command.add_argument(
        "--picture", default="blockswap_timeline.png", metavar="PNG", help="file of the timeline (default: %(default)s)"
    )


def _add_plan(commands: Commands) -> None:
    command = _add(commands, "plan", plan, "Show what would be swapped on a GPU, from a checkpoint's header alone.")
    command.add_argument("model", help="a .safetensors or .gguf file of a Wan transformer")
    command.add_argument("--vram", metavar="SIZE", help="memory of the card, such as 12GiB (default: this machine's)")
    command.add_argument("--ram", metavar="SIZE", help="host memory, all of it available (default: this machine's)")
    command.add_argument("--gpu", metavar="NAME", help="a known GPU, such as 'RTX 4090'")
    command.add_argument(
        "--link",
        metavar="GB/s",
        type=_link,
        help="host-to-device bandwidth: PCIe 3.0 x16 has about 12, 4.0 about 25, 5.0 about 50",
    )
    command.add_argument("--shape", metavar="WxHxF", help="size of the video, such as 832x480x81")
    command.add_argument(
        "--beside",
        metavar="MODEL",
        action="append",
        default=[],
        help="a model in the host at the same time; repeatable",
    )
    command.add_argument("--blocks-to-swap", metavar="N", help="a number, half or all (default: automatic)")
    command.add_argument(
        "--vram-threshold-percent",
        type=_percent,
        default=50.0,
        metavar="P",
        help="ceiling on VRAM use, 30 to 90 (default: 50)",
    )


def _add_probe(commands: Commands) -> None:
    command = _add(commands, "probe", probe, "Show what the hardware layer reads, and the measured link.")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--again", action="store_true", help="measure the link even if a measurement is cached")


def _add_simulate(commands: Commands) -> None:
    command = _add(
        commands, "simulate", simulate, "Run forwards in virtual time, with the schedule that the swapper runs."
    )
    command.add_argument("--blocks", type=_count, required=True, help="blocks of the model")
    command.add_argument("--swapped", required=True, help="number of swapped blocks, or a share such as 50%%")
    command.add_argument(
        "--ratio", type=_not_negative, required=True, help="transfer time over compute time of a block"
    )
    command.add_argument("--slots", type=_count, help="slots of the window (default: the planner's choice)")
    command.add_argument("--uneven", type=_share, default=0.0, help="block sizes vary by this share, such as 0.5")
    command.add_argument("--skip", type=_list, default=[], help="blocks skipped in every second forward, such as 9,10")
    command.add_argument("--empty", action="store_true", help="run no block in every second forward")
    command.add_argument("--vace", type=_count_or_zero, default=0, help="VACE blocks, run in every second forward")
    command.add_argument("--seed", type=_count_or_zero, default=0, help="seed of the sizes (default: 0)")


def _number(text: str, *, lowest: float, highest: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not lowest <= value <= highest or math.isinf(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _link(text: str) -> float:
    return _number(text, lowest=1e-6, highest=MOST_LINK, expected=f"GB/s above 0 and up to {MOST_LINK:g}")


def _not_negative(text: str) -> float:
    return _number(text, lowest=0.0, highest=MOST_RATIO, expected=f"a number from 0 to {MOST_RATIO:g}")


def _share(text: str) -> float:
    return _number(text, lowest=0.0, highest=0.99, expected="a share from 0 to 0.99")


def _percent(text: str) -> float:
    return _number(text, lowest=30.0, highest=90.0, expected="a percentage from 30 to 90")


def _whole(text: str, *, lowest: int) -> int:
    value = _number(text, lowest=lowest, highest=100_000, expected=f"a whole number from {lowest} to 100000")
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(value)


def _count(text: str) -> int:
    return _whole(text, lowest=1)


def _count_or_zero(text: str) -> int:
    return _whole(text, lowest=0)


def _list(text: str) -> list[int]:
    return [_whole(part, lowest=0) for part in text.split(",")]
