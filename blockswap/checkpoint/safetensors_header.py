"""The tensor table of a .safetensors file, from its first bytes: [Note: Untrusted headers] in untrusted.py; pure.

The header is JSON of one fixed form, and is read as that form alone. A general JSON parser would take 28 bytes of
memory for each byte of some texts, and go as deep as the file nests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ..model.wan import TensorInfo
from .untrusted import LONGEST_HEADER, LONGEST_NAME, MOST_DIMENSIONS, MOST_TENSORS, HeaderError

LONGEST_BY_FORMAT = 100_000_000
"""Bytes; the format refuses longer headers, so a larger number is some other file's first bytes."""

LENGTH_BYTES = 8

BITS = (4, 6, 8, 16, 32, 64, 128)
"""Of an element; every stored type of the format has one of these in its name (F8_E4M3, BF16), but for BOOL."""

SHOWN_BYTES = 24

# For a masked header, in which each quote ends its text: so no pattern repeats a group, and time is by bytes.
_SPACE = rb"[ \t\n\r]*"
_VALUE = rb'"(dtype|shape|data_offsets)"' + _SPACE + b":" + _SPACE
_VALUE += rb'("[A-Z][A-Z0-9_]{0,31}"|\[[0-9, \t\n\r]{0,8192}\])' + _SPACE
_OPEN = re.compile(rb"\{" + _SPACE)
_CLOSE = re.compile(rb"\}" + _SPACE)
_NEXT = re.compile(_SPACE + rb"([,}])" + _SPACE)
_NAME = re.compile(rb'"([ !#-\[\]-~]{1,%d})"' % LONGEST_NAME + _SPACE + b":" + _SPACE)
_TEXT = rb'"[^"\x00-\x1f]*"'
_TEXT_PAIR = re.compile(_TEXT + _SPACE + b":" + _SPACE + _TEXT)
_ENTRY = re.compile(rb"\{" + _SPACE + (b"," + _SPACE).join([_VALUE] * 3) + rb"\}")
_NUMBER = re.compile(rb"0|[1-9][0-9]{0,18}")
_METADATA = b"__metadata__"


def safetensors_table(start: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors by name.

    Args:
        start: The file's beginning: all of its header, if that is no longer than `LONGEST_HEADER`.
        size: Bytes of the whole file.

    Raises:
        HeaderError: It is another file, cut short, or says what cannot be.
    """
    header = _header(start, size)
    tensors: dict[str, TensorInfo] = {}
    places: list[tuple[int, int, str]] = []
    for name, fields in _entries(_Scanner(header)):
        if name in tensors:
            raise HeaderError(f"expects each tensor once but got {name} twice")
        if len(tensors) == MOST_TENSORS:
            raise HeaderError(f"expects up to {MOST_TENSORS:,} tensors but has more", remedy="name a Wan transformer")
        tensors[name], begin, end = _tensor(name, fields)
        places.append((begin, end, name))
    end = 0
    for begin, after, name in sorted(places):
        if begin != end:
            raise HeaderError(
                f"expects {name} at byte {end:,} of the data, where the one before ends, but got {begin:,}"
            )
        end = after
    if LENGTH_BYTES + len(header) + end != size:
        raise HeaderError(f"expects {LENGTH_BYTES + len(header) + end:,} bytes by its header but has {size:,}")
    return tensors


def _header(start: bytes, size: int) -> bytes:
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or length > LONGEST_BY_FORMAT:
        raise HeaderError(f"expects the length of a header but its {size:,} bytes begin with {start[:LENGTH_BYTES]!r}")
    if size < LENGTH_BYTES + length:
        raise HeaderError(f"expects a header of {length:,} bytes but the whole file has {size:,}")
    if length > LONGEST_HEADER:
        raise HeaderError(
            f"expects a header of up to {LONGEST_HEADER:,} bytes but has one of {length:,}",
            remedy="save the model again without its metadata",
        )
    return start[LENGTH_BYTES : LENGTH_BYTES + length]


class _Scanner:
    """Takes one piece after the other off a header."""

    def __init__(self, header: bytes) -> None:
        self._header = header
        # An escape becomes two DELs, which are taken only where any text may stand: then each quote is a real one.
        self._masked = header.replace(b"\\\\", b"\x7f\x7f").replace(b'\\"', b"\x7f\x7f")
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._masked)

    def take(self, pattern: re.Pattern[bytes], expected: str) -> tuple[bytes, ...]:
        """The groups of what stands here."""
        match = pattern.match(self._masked, self._at)
        if match is None:
            raise self.refusal(expected)
        self._at = match.end()
        return match.groups()

    def passes(self, pattern: re.Pattern[bytes]) -> bool:
        """Whether this stands here; goes past it if so."""
        match = pattern.match(self._masked, self._at)
        self._at = self._at if match is None else match.end()
        return match is not None

    def refusal(self, expected: str) -> HeaderError:
        found = self._header[self._at : self._at + SHOWN_BYTES]
        got = repr(found) if found else "its end"
        return HeaderError(f"its header cannot be parsed: expects {expected} at byte {self._at:,} but got {got}")


def _entries(scanner: _Scanner) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Each tensor's name and its three fields, as they stand."""
    scanner.take(_OPEN, "an object")
    has_metadata, mark = False, b"}" if scanner.passes(_CLOSE) else b","
    while mark == b",":
        (name,) = scanner.take(_NAME, f"a tensor's name of 1 to {LONGEST_NAME} printable ASCII letters")
        if name != _METADATA:
            fields = scanner.take(_ENTRY, f"dtype, shape and data_offsets of {name.decode('ascii')[:SHOWN_BYTES]}")
            yield name.decode("ascii"), fields
        elif has_metadata:
            raise scanner.refusal("metadata once")
        else:
            has_metadata = True
            _pass_metadata(scanner)
        (mark,) = scanner.take(_NEXT, "a comma or the end of the object")
    if not scanner.is_at_end:
        raise scanner.refusal("nothing more")


def _pass_metadata(scanner: _Scanner) -> None:
    """Goes past an object that holds texts alone; whatever they say, nobody reads them."""
    scanner.take(_OPEN, "an object of metadata")
    mark = b"}" if scanner.passes(_CLOSE) else b","
    if mark == b"}":
        return
    while mark == b",":
        scanner.take(_TEXT_PAIR, "metadata as texts")
        (mark,) = scanner.take(_NEXT, "a comma or the end of the metadata")


def _tensor(name: str, fields: tuple[bytes, ...]) -> tuple[TensorInfo, int, int]:
    """The tensor, and where its bytes begin and end."""
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    texts = {key: value for key, value in values.items() if value.startswith(b'"')}
    if len(values) < len(fields) // 2 or texts.keys() != {b"dtype"}:
        raise HeaderError(f"expects dtype as a text, shape and data_offsets as lists for {name} but got others")
    dtype = texts[b"dtype"][1:-1].decode("ascii")
    shape, offsets = _numbers(name, values[b"shape"]), _numbers(name, values[b"data_offsets"])
    bits = int((re.findall(r"\d+", dtype) or ["8"])[0])
    if bits not in BITS:
        raise HeaderError(f"expects a type of {', '.join(map(str, BITS))} bits for {name} but got {dtype}")
    if len(shape) > MOST_DIMENSIONS:
        raise HeaderError(f"expects up to {MOST_DIMENSIONS} dimensions of {name} but got {len(shape)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004  # a begin and an end
        raise HeaderError(f"expects a begin and an end of {name} but got offsets {list(offsets[:4])}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * bits != nbytes * 8:
        raise HeaderError(f"expects {dtype} of shape {list(shape)} for {name} but its offsets hold {nbytes:,} bytes")
    return TensorInfo(shape, dtype, nbytes), offsets[0], offsets[1]


def _numbers(name: str, text: bytes) -> tuple[int, ...]:
    """A list of whole numbers of up to 19 digits, from its JSON."""
    inner = text[1:-1]
    parts = [part.strip() for part in inner.split(b",")] if inner.strip() else []
    if not all(map(_NUMBER.fullmatch, parts)):
        raise HeaderError(f"expects whole numbers of up to 19 digits for {name} but got {text[:SHOWN_BYTES]!r}")
    return tuple(map(int, parts))
