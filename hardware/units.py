"""Byte counts as people write them, and back."""

from __future__ import annotations

import re
from decimal import Decimal

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {"": 1, "b": 1}
_FACTORS |= {f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
# The largest size that is accepted: 1 EiB, far above any machine, so that a slip of the keyboard is an error at once.
_MAX_BYTES = 1 << 60


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


def format_count(number: int, thing: str) -> str:
    """A number of things, such as "1 block" and "2 blocks"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def parse_bytes(text: str) -> int:
    """The byte count that a person wrote, such as "12GiB", "8 GB", "1.5 GiB" or "123"; fractions of a byte are cut.

    Args:
        text: a number and a unit in any case: none or B for bytes, KB to TB for powers of ten, KiB to TiB for powers of
            two.

    Raises:
        ValueError: the text is no size, usually a negative number or a bare "G", which could mean either kind of unit.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        expected = "a positive number and a unit (B, KB, MB, GB, TB: powers of ten; KiB, MiB, GiB, TiB: powers of two)"
        raise ValueError(f"memory size: expected {expected}, got {text!r}; write it like 12GiB")
    size = Decimal(match.group(1)) * factor
    if size > _MAX_BYTES:
        raise ValueError(f"memory size: expected at most {_MAX_BYTES} bytes (1 EiB), got {text!r}")
    return int(size)
