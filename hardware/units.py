"""Byte counts as people write them, and back."""

from __future__ import annotations

import re
from decimal import Decimal

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(b|[kmgt](?:i?b)?)?\s*", re.IGNORECASE | re.ASCII)
_MOST_TB = 1 << 20  # far above any machine, so that a slip of the keyboard is an error at once


def format_bytes(n: int, *, like: int | None = None) -> str:
    """A byte count such as "12.3 GB", of 1024³ bytes each, as on the box of a card; a negative count keeps its sign.

    Args:
        n: The count.
        like: Another one, 0 or more, whose unit it is given; None for its own.
    """
    sign, size = ("-", -n) if n < 0 else ("", n)
    measure = size if like is None else like
    if measure < KIB:
        return f"{sign}{size} B"
    for unit, name in ((KIB, "KB"), (MIB, "MB")):
        if round(measure / unit, 1) < KIB:
            return f"{sign}{size / unit:.1f} {name}"
    return f"{sign}{size / GIB:.1f} GB"


def format_speed(bytes_per_s: float) -> str:
    """The speed of a link in its data sheet's units: 1 GB/s is 10**9 bytes in a second."""
    giga = bytes_per_s / 1e9
    return f"{giga:.1f} GB/s" if giga >= 1 else f"{1000 * giga:.1f} MB/s"


def format_count(number: int, thing: str) -> str:
    """A number of things, such as "1 block" and "2 blocks"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def parse_bytes(text: str, *, unit: str = "B") -> int:
    """The byte count that a person wrote, such as "12GB", "1.5 GiB", "8G" or "123"; fractions of a byte are cut.

    Args:
        text: A number and a unit in any case. As in `format_bytes`, 1 GB is 1024³ bytes, and so is 1 GiB.
        unit: That of a number without one.

    Raises:
        ValueError: The text is no size, usually a negative number.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a memory size such as 12GB, got {text!r}")
    size = Decimal(match[1]) * 1024 ** "BKMGT".index((match[2] or unit)[0].upper())
    if size > _MOST_TB * 1024**4:
        raise ValueError(f"expected a memory size of at most {_MOST_TB} TB, got {text!r}")
    return int(size)
