"""The command line: demo, plan, probe, simulate."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from .commands.result import Result

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

MOST_RATIO = 1e6
"""Transfer over compute; beyond it, durations lose their digits."""

MOST_LINK = 10_000.0
"""GB/s; ten times NVLink of 2026."""

LINK_HELP = "host-to-device bandwidth in 1e9 bytes per second: PCIe 3.0 x16 some 12, 4.0 some 25, 5.0 some 50"

INTERRUPTED = 130
"""What shells report of a program that SIGINT has ended."""

PROGRAM = "python -m wanvideo_enhanced_blockswap"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    With `--json`, standard output holds one JSON object and nothing else: the result, or `{"error": …}`.

    Returns:
        0; 1 if the command failed or did not show what it is there to show; 2 for a command line that cannot be read;
        130 after an interrupt.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(words)
    except UsageError as failure:
        return _fail(f"{failure} (--help tells more)", 2, as_json="--json" in words)
    # Here and in the commands, and not at the head: `--help` and mistyped options answer without loading torch.
    from .blockswap.errors import BlockSwapError
    from .hardware import HardwareUnavailableError

    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        result = options.run(options)
        print(json.dumps(result.data) if options.json else result.text, flush=True)
    except (BlockSwapError, HardwareUnavailableError) as failure:
        return _fail(str(failure), 1, as_json=options.json)
    except ModuleNotFoundError as failure:
        return _fail(f"the command expects {failure.name} but it is not installed", 1, as_json=options.json)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, as_json=options.json)
    except BrokenPipeError:
        # Whoever read the output has gone; what is left must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if result.succeeded else 1


def _fail(message: str, code: int, *, as_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))
    return code


class UsageError(Exception):
    """The command line cannot be read."""


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

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


def _add(commands: Commands, name: str, said: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=said, description=said)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--verbose", action="store_true", help="log what is decided, to standard error")
    return command


def _add_demo(commands: Commands) -> None:
    demo = _add(commands, "demo", "A real Wan transformer with random weights denoises, unswapped and swapped.")
    demo.add_argument("--preset", choices=("small", "1.3b", "14b"), default="small", help="dimensions of the model")
    demo.add_argument("--blocks-to-swap", metavar="N", help="a number, half or all; left out: automatic")
    demo.add_argument("--device", default="auto", help="auto, cpu (simulated), cuda or cuda:N")
    demo.add_argument(
        "--vram",
        metavar="SIZE",
        help="memory of the card; left out: half of the blocks fit",
    )
    demo.add_argument("--link", metavar="GB/s", type=_link, help="host-to-device bandwidth of a simulated device")
    demo.add_argument("--steps", type=_count, default=4, help="denoising steps (default 4)")
    demo.add_argument("--slots", type=_count, metavar="N", help="slots of the window; left out: the planner's choice")
    demo.add_argument("--streams", type=_count, metavar="N", help="copy streams; left out: measured, or 1")
    demo.add_argument("--shape", metavar="WxHxF", help="size of the video; left out: the preset's")
    demo.add_argument("--seed", type=_count_or_zero, default=0, help="of weights and noise (default 0)")
    demo.add_argument("--picture", default="blockswap_timeline.png", metavar="PNG", help="where the timeline is drawn")
    demo.set_defaults(run=_demo)


def _add_plan(commands: Commands) -> None:
    plan = _add(commands, "plan", "From a checkpoint's header alone: what would be swapped on this or that GPU.")
    plan.add_argument("model", help="a .safetensors or .gguf file of a Wan transformer")
    plan.add_argument("--vram", metavar="SIZE", help="memory of the card, such as 12GiB; left out: this machine's")
    plan.add_argument("--ram", metavar="SIZE", help="host memory, all of it available; left out: this machine's")
    plan.add_argument("--gpu", metavar="NAME", help="a known GPU, such as 'RTX 4090'")
    plan.add_argument("--link", metavar="GB/s", type=_link, help=LINK_HELP)
    plan.add_argument("--shape", metavar="WxHxF", help="size of the video, such as 832x480x81")
    plan.add_argument(
        "--beside", metavar="MODEL", action="append", default=[], help="a model that the host holds as well; repeatable"
    )
    plan.add_argument("--blocks-to-swap", metavar="N", help="a number, half or all; left out: automatic")
    plan.add_argument(
        "--vram-threshold-percent",
        type=_percent,
        default=50.0,
        metavar="P",
        help="ceiling on VRAM use, 30 to 90 (default 50)",
    )
    plan.set_defaults(run=_plan)


def _add_probe(commands: Commands) -> None:
    probe = _add(commands, "probe", "What the hardware layer reads, and the measured link.")
    probe.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    probe.add_argument("--again", action="store_true", help="measure the link even if a measurement is kept")
    probe.set_defaults(run=_probe)


def _add_simulate(commands: Commands) -> None:
    simulate = _add(commands, "simulate", "Forwards in virtual time, by the schedule that the swapper runs.")
    simulate.add_argument("--blocks", type=_count, required=True, help="blocks of the model")
    simulate.add_argument("--swapped", required=True, help="how many of them are swapped, or a share such as 50%%")
    simulate.add_argument("--ratio", type=_not_negative, required=True, help="transfer over compute time of a block")
    simulate.add_argument("--slots", type=_count, help="slots of the window; left out: the planner's choice")
    simulate.add_argument("--uneven", type=_share, default=0.0, help="block sizes vary by this share, such as 0.5")
    simulate.add_argument("--skip", type=_list, default=[], help="blocks skipped in every second forward, such as 9,10")
    simulate.add_argument("--empty", action="store_true", help="every second forward runs no block")
    simulate.add_argument("--vace", type=_count_or_zero, default=0, help="VACE blocks, run in every second forward")
    simulate.add_argument("--seed", type=_count_or_zero, default=0, help="of the sizes (default 0)")
    simulate.set_defaults(run=_simulate)


def _demo(options: argparse.Namespace) -> Result:
    from .commands.demo import demo

    return demo(options)


def _plan(options: argparse.Namespace) -> Result:
    from .commands.plan import plan

    return plan(options)


def _probe(options: argparse.Namespace) -> Result:
    from .commands.probe import probe

    return probe(options)


def _simulate(options: argparse.Namespace) -> Result:
    from .commands.simulate import simulate

    return simulate(options)


def _number(text: str, *, lowest: float, highest: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not lowest <= value <= highest or math.isinf(value):
        raise argparse.ArgumentTypeError(f"expects {expected} but got {text!r}")
    return value


def _link(text: str) -> float:
    return _number(text, lowest=1e-6, highest=MOST_LINK, expected=f"GB/s, a number above 0 and up to {MOST_LINK:g},")


def _not_negative(text: str) -> float:
    return _number(text, lowest=0.0, highest=MOST_RATIO, expected=f"a number from 0 to {MOST_RATIO:g}")


def _share(text: str) -> float:
    return _number(text, lowest=0.0, highest=0.99, expected="a share from 0 to 0.99")


def _percent(text: str) -> float:
    return _number(text, lowest=30.0, highest=90.0, expected="a percentage from 30 to 90")


def _whole(text: str, *, lowest: int) -> int:
    value = _number(text, lowest=lowest, highest=100_000, expected=f"a whole number from {lowest} to 100000")
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expects a whole number but got {text!r}")
    return int(value)


def _count(text: str) -> int:
    return _whole(text, lowest=1)


def _count_or_zero(text: str) -> int:
    return _whole(text, lowest=0)


def _list(text: str) -> list[int]:
    return [_whole(part, lowest=0) for part in text.split(",")]
