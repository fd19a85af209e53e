"""What a person writes on the command line, in the units of the code."""

from __future__ import annotations

from ..blockswap.errors import SettingsError
from ..hardware import MIB, parse_bytes

LARGEST_SIDE = 100_000
"""Pixels or frames; far above any video."""


def parse_size(option: str, text: str) -> int:
    """Bytes, from `12GiB`, `8 GB` and the like.

    Raises:
        SettingsError: This is no size, or so small a one that the unit has been forgotten.
    """
    try:
        size = parse_bytes(text)
    except ValueError as cause:
        raise SettingsError(f"{option}: {cause}") from cause
    if 0 < size < MIB:
        raise SettingsError(f"{option} expects a memory size such as 12GiB but got {text!r}, which is {size} bytes")
    return size


def parse_count(asked: str | None, blocks: int) -> int | None:
    """A number of blocks: 0 to `blocks`, `half` or `all`; None, which leaves it to the plan, stays None."""
    if asked is None:
        return None
    named = {"half": blocks // 2, "all": blocks}
    if asked in named:
        return named[asked]
    rule = f"--blocks-to-swap expects a whole number from 0 to {blocks}, the number of blocks, or half or all,"
    try:
        count = int(asked)
    except ValueError:
        raise SettingsError(f"{rule} but got {asked!r}") from None
    if not 0 <= count <= blocks:
        raise SettingsError(f"{rule} but got {count}")
    return count


def parse_shape(shape: str) -> tuple[int, int, int]:
    """Width, height and frames, from `832x480x81`."""
    try:
        width, height, frames = (int(part) for part in shape.lower().split("x"))
    except ValueError:
        raise SettingsError(f"--shape expects WxHxF such as 832x480x81 but got {shape[:40]!r}") from None
    if max(width, height, frames) > LARGEST_SIDE:
        raise SettingsError(f"--shape expects at most {LARGEST_SIDE} of each but got {shape[:40]!r}")
    return width, height, frames
