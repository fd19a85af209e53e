"""The tensor table of a .gguf file, from its first bytes: [Note: Untrusted headers] in untrusted.py; pure."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ..model.layout import align
from ..model.wan import TensorInfo
from .untrusted import LONGEST_HEADER, LONGEST_NAME, MOST_DIMENSIONS, MOST_TENSORS, HeaderError

MAGIC = b"GGUF"

VERSIONS = (2, 3)
"""Since 2023-08; the first had counts of 32 bits."""

ALIGNMENT = 32
"""Of the data and of each tensor, where the file names no other."""

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter for each type of number in the key-value pairs."""

WHOLE = "BbHhIiQq"

UINT32, STRING, ARRAY = 4, 8, 9

LENGTH = struct.Struct("<Q")

TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""GGML's types by number: name, elements of a block, bytes of a block. A test compares it with the gguf package's."""

ALIGNMENT_KEY = b"general.alignment"

SHAPE_KEY = b"comfy.gguf.orig_shape."
"""Before a tensor's name: its shape, where a converter has flattened it because GGML's quantisation cannot hold it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the table; its place is relative to the data."""

    name: str
    stored: TensorInfo
    begin: int


def gguf_table(start: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors by name, with the shapes that torch gives them.

    Args:
        start: The file's beginning: all of its header, if that is no longer than `LONGEST_HEADER`.
        size: Bytes of the whole file.

    Raises:
        HeaderError: It is another file, cut short, or says what cannot be.
    """
    cursor = _Cursor(start, size)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise HeaderError(f"expects {MAGIC!r} but begins with {start[: len(MAGIC)]!r}")
    version, tensor_count, pair_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise HeaderError(f"expects version 2 or 3 but has {version}", remedy="convert the model again")
    for what, count in (("tensors", tensor_count), ("key-value pairs", pair_count)):
        if count > MOST_TENSORS:
            raise HeaderError(f"expects up to {MOST_TENSORS:,} {what} but claims {count:,}")
    alignment, shapes = _pairs(cursor, pair_count)
    found: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        entry = _entry(cursor, shapes)
        if entry.name in found:
            raise HeaderError(f"expects each tensor once but got {entry.name} twice")
        found[entry.name] = entry
    _check_places(list(found.values()), start=align(cursor.at, alignment), alignment=alignment, size=size)
    return {name: entry.stored for name, entry in found.items()}


class _Cursor:
    """Takes one piece after the other off a header."""

    def __init__(self, start: bytes, size: int) -> None:
        self._data = start
        self._size = size
        self.at = 0

    def skip(self, count: int) -> None:
        """Goes past so many bytes, which must be there."""
        end = self.at + count
        if end > self._size:
            raise HeaderError(f"expects {count:,} bytes at byte {self.at:,} but its {self._size:,} bytes end before")
        if end > len(self._data):
            raise HeaderError(
                f"expects a header of up to {LONGEST_HEADER:,} bytes but has one of {end:,} or more",
                remedy="convert the model again without its metadata",
            )
        self.at = end

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self._data[self.at - count : self.at]

    def number(self, letter: str) -> int:
        """A number of the type that struct gives this letter."""
        return int(self.numbers(letter, 1)[0])

    def numbers(self, letter: str, count: int) -> tuple[int, ...]:
        begin = self.at
        self.skip(count * struct.calcsize(f"<{letter}"))
        return struct.unpack_from(f"<{count}{letter}", self._data, begin)

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def skip_texts(self, count: int) -> None:
        """Goes past so many texts; a vocabulary has some hundred thousand."""
        data, last, end = self._data, len(self._data) - LENGTH.size, self.at
        for _ in range(count):
            end += LENGTH.size + (LENGTH.unpack_from(data, end)[0] if end <= last else 0)
            if end > len(data):
                break
        self.skip(end - self.at)


def _pairs(cursor: _Cursor, count: int) -> tuple[int, dict[bytes, tuple[int, ...]]]:
    """The alignment, and the shapes that are noted, by their tensor's name; what else there is nobody reads."""
    alignment, shapes, keys = ALIGNMENT, dict[bytes, tuple[int, ...]](), set[bytes]()
    for _ in range(count):
        key, kind = cursor.text(), cursor.number("I")
        if key in keys:
            raise HeaderError(f"expects each key once but got {key[:40]!r} twice")
        keys.add(key)
        if key == ALIGNMENT_KEY:
            alignment = _alignment(cursor, kind)
        elif key.startswith(SHAPE_KEY):
            shapes[key.removeprefix(SHAPE_KEY)] = _noted_shape(cursor, key, kind)
        else:
            _skip_value(cursor, kind)
    return alignment, shapes


def _alignment(cursor: _Cursor, kind: int) -> int:
    alignment = cursor.number("I") if kind == UINT32 else None
    if alignment is None or alignment.bit_count() != 1:
        raise HeaderError(f"expects a power of two of type {UINT32} for its alignment but got {alignment}, type {kind}")
    return alignment


def _noted_shape(cursor: _Cursor, key: bytes, kind: int) -> tuple[int, ...]:
    letter = NUMBERS.get(cursor.number("I")) if kind == ARRAY else None
    count = cursor.number("Q") if letter is not None else 0
    if letter is None or letter not in WHOLE or count > MOST_DIMENSIONS:
        raise HeaderError(f"expects up to {MOST_DIMENSIONS} whole numbers for {key[:80]!r} but got others")
    return cursor.numbers(letter, count)


def _skip_value(cursor: _Cursor, kind: int) -> None:
    count = 1
    if kind == ARRAY:
        kind, count = cursor.number("I"), cursor.number("Q")
    if kind in NUMBERS:
        cursor.skip(count * struct.calcsize(f"<{NUMBERS[kind]}"))
    elif kind == STRING:
        cursor.skip_texts(count)
    else:  # an array inside an array, which no reader knows, has its number as well
        raise HeaderError(f"expects a value's type from 0 to 12 at byte {cursor.at:,} but got {kind}")


def _entry(cursor: _Cursor, shapes: Mapping[bytes, tuple[int, ...]]) -> _Entry:
    key, dimensions = cursor.text(), cursor.number("I")
    name = _name(key)
    if dimensions > MOST_DIMENSIONS:
        raise HeaderError(f"expects up to {MOST_DIMENSIONS} dimensions of {name} but got {dimensions:,}")
    sizes = cursor.numbers("Q", dimensions)
    number, begin = cursor.number("I"), cursor.number("Q")
    if number not in TYPES:
        raise HeaderError(
            f"expects a type of GGML that is known here for {name} but got number {number}",
            remedy="take a file of another type, or update this package",
        )
    kind, block, block_bytes = TYPES[number]
    count, row = math.prod(sizes), sizes[0] if sizes else 1
    if row % block:
        raise HeaderError(f"expects rows of a multiple of {block} elements for {name} in {kind} but got {row:,}")
    shape = shapes.get(key, sizes[::-1])
    if math.prod(shape) != count or min(shape, default=1) < 0:
        raise HeaderError(f"expects {count:,} elements of {name} but the noted shape is {list(shape)}")
    return _Entry(name, TensorInfo(shape, kind, count // block * block_bytes), begin)


def _name(key: bytes) -> str:
    text = key.decode("latin-1")
    if not 1 <= len(key) <= LONGEST_NAME or not text.isascii() or not text.isprintable():
        rule = f"a tensor's name of 1 to {LONGEST_NAME} printable ASCII letters"
        raise HeaderError(f"expects {rule} but got {len(key):,} bytes beginning with {key[:40]!r}")
    return text


def _check_places(entries: list[_Entry], *, start: int, alignment: int, size: int) -> None:
    """Every tensor lies in the file, and on no other's bytes."""
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.stored.nbytes)):
        if entry.begin < end or entry.begin % alignment:
            rule = f"a multiple of {alignment:,} from {end:,} up, where the tensor before ends"
            raise HeaderError(f"expects {entry.name} at {rule}, but got {entry.begin:,}")
        end = entry.begin + entry.stored.nbytes
    if start + end > size:
        raise HeaderError(f"expects {start + end:,} bytes by its header but has {size:,}")
