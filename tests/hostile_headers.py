"""Headers of model files that do not describe their tensors, each with the words in which it must be refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path


def raw_safetensors(path: Path, header: str | bytes, data: int = 0) -> Path:
    """A file with exactly this header and this many bytes of data."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


ONE = f'"a":{entry()}'
ODD = "a has no valid dtype, shape and data_offsets"
NO_JSON = "its header is not JSON"
LYING_SAFETENSORS = {
    "lists nested 30,000 deep": ('{"a":' + "[" * 30_000, NO_JSON),
    "closed lists nested 30,000 deep": ('{"a":' + "[" * 30_000 + "]" * 30_000 + "}", NO_JSON),
    "a list": (f"[{entry()}]", "its header is not a JSON object"),
    "an entry that is a text": ('{"a":"b"}', ODD),
    "an entry that is a list": ('{"a":[]}', ODD),
    "a field too few": ('{"a":{"dtype":"F32","shape":[2]}}', ODD),
    "a type in the place of a shape": (f'{{"a":{entry(shape=chr(34) + "F32" + chr(34))}}}', ODD),
    "a number of 6,000 digits": (f'{{"a":{entry(shape="[" + "9" * 6000 + "]")}}}', NO_JSON),
    "a size of 30 digits": (f'{{"a":{entry(shape="[" + "9" * 30 + "]")}}}', ODD),
    "a size below zero": (f'{{"a":{entry(shape="[-2]")}}}', ODD),
    "a size that is a fraction": (f'{{"a":{entry(shape="[2.0]")}}}', ODD),
    "a size that is true": (f'{{"a":{entry(shape="[true,2]")}}}', ODD),
    "a million dimensions": (f'{{"a":{entry(shape="[" + "2," * 1_000_000 + "2]")}}}', ODD),
    "three offsets": (f'{{"a":{entry(offsets="[0,8,8]")}}}', ODD),
    "an end before its begin": (f'{{"a":{entry(offsets="[8,0]")}}}', ODD),
    "fewer bytes than its shape can have": (f'{{"a":{entry(shape="[17]")}}}', ODD),
    "a shape whose product overflows": (f'{{"a":{entry(shape=f"[{2**32},{2**32}]", offsets="[0,0]")}}}', ODD),
    "a type that a terminal would obey": (f'{{"a":{entry(dtype=json.dumps(chr(27) + "[31m"))}}}', ODD),
    "a hole before the first": (f'{{"a":{entry(offsets="[8,16]")}}}', "expected a at byte 0, .* got 8"),
    "two on the same bytes": (f'{{{ONE},"b":{entry()}}}', "expected b at byte 8, .* got 0"),
    "a name twice": (f'{{{ONE},"a":{entry(offsets="[8,16]")}}}', "expected a at byte 0, .* got 8"),
    "a comma too many": (f"{{{ONE},}}", NO_JSON),
    "something behind": (f"{{{ONE}}}x", NO_JSON),
    "a mark of byte order before": (f"\ufeff{{{ONE}}}", NO_JSON),
    "UTF-16": (f"{{{ONE}}}".encode("utf-16-le"), NO_JSON),
    "nothing": (b"", NO_JSON),
}


ODD_NAMES = ("\x1b[2J\x1b[31mall is well", "a\nerror: b", "\u202eevil", "\ud800", "", "n" * 70_000)


LYING_SIZES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "patches of no rows": ({"patch_embedding.weight": (128, 16, 1, 0, 2)}, "5 dimensions .*, got shape .* 0, 2"),
    "a head without dimensions": ({"head.head.weight": ()}, "has no output layer"),
    "a head without rows": ({"head.head.weight": (0, 128)}, "has no output layer"),
    "a query without rows": ({"blocks.1.self_attn.q.weight": (0, 128)}, r"blocks\.1 has no matrices"),
    "a query of 10^19 rows and no column": ({"blocks.1.self_attn.q.weight": (2**63 - 1, 0)}, "has no matrices"),
    "a block of a 200-digit number": ({f"blocks.{'9' * 200}.x": (1,)}, ""),
    "a block whose number begins with 0": ({"blocks.01.self_attn.q.weight": (1,)}, ""),
    "9,999 blocks but a few": ({"blocks.9999.x": (1,)}, "has blocks.9999 but lacks 9997 of the blocks"),
    "300 blocks": ({f"blocks.{i}.x": (1,) for i in range(300)}, "has 300 blocks, more than the 128"),
}


def gguf_text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def gguf_pair(key: bytes, kind: int, value: bytes) -> bytes:
    return gguf_text(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: bytes = b"a", sizes: Sequence[int] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf_header(
    tensors: Sequence[bytes] = (),
    pairs: Sequence[bytes] = (),
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    counted = counts or (len(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", version, *counted) + b"".join((*pairs, *tensors))


def noted(kind: int, *numbers: int) -> bytes:
    """A noted shape for the tensor `a`; 10 is an unsigned number of 64 bits, 11 a signed one."""
    values = struct.pack(f"<{len(numbers)}{'Q' if kind == 10 else 'q'}", *numbers)
    return gguf_pair(b"comfy.gguf.orig_shape.a", 9, struct.pack("<IQ", kind, len(numbers)) + values)


HUGE = 2**60
CUT = r"expected [\d,]+ bytes or more according to its header, got [\d,]+"
ELEMENTS = "the shape of a does not have its 2 elements"
PACKAGE = "the gguf package cannot read it"
LYING_GGUF = {
    "2^60 tensors": (gguf_header(counts=(HUGE, 0)), CUT),
    "2^60 pairs": (gguf_header(counts=(0, HUGE)), CUT),
    "a key of 2^60 letters": (gguf_header(pairs=[gguf_text(b"a", HUGE)]), CUT),
    "a text of 2^60 letters": (gguf_header(pairs=[gguf_pair(b"a", 8, gguf_text(b"a", HUGE))]), CUT),
    "an array of 2^60 numbers": (gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 0, HUGE))]), CUT),
    "an array of 2^60 texts": (gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 8, HUGE) + bytes(800))]), CUT),
    "an array of 2^19 numbers": (
        gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 0, 2**19) + bytes(2**19))]),
        "its header has too many entries; convert the model again without metadata",
    ),
    "arrays nested 30,000 deep": (
        gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 9, 1) * 30_000)]),
        f"{PACKAGE} .RecursionError",
    ),
    "a type of value that there is not": (gguf_header(pairs=[gguf_pair(b"a", 13, b"")]), PACKAGE),
    "a key twice": (gguf_header(pairs=[gguf_pair(b"a", 0, b"\0")] * 2), f"{PACKAGE} .KeyError: 'Duplicate a"),
    "a key that is no text": (gguf_header(pairs=[gguf_pair(b"\xff", 0, b"\0")]), PACKAGE),
    "an alignment of 0": (gguf_header(pairs=[gguf_pair(b"general.alignment", 4, bytes(4))]), PACKAGE),
    "an alignment of 2^31": (
        gguf_header([gguf_tensor()], [gguf_pair(b"general.alignment", 4, struct.pack("<I", 2**31))]),
        CUT,
    ),
    "an alignment that is a text": (
        gguf_header(pairs=[gguf_pair(b"general.alignment", 8, gguf_text(b"32"))]),
        PACKAGE,
    ),
    "a name twice": (gguf_header([gguf_tensor(), gguf_tensor(offset=32)]) + bytes(99), PACKAGE),
    "2^31 dimensions": (gguf_header([gguf_text(b"a") + struct.pack("<I", 2**31)]), CUT),
    "a shape whose product overflows": (gguf_header([gguf_tensor(sizes=(2**32, 2**32))]) + bytes(64), PACKAGE),
    "a type of GGML that there is not": (gguf_header([gguf_tensor(kind=99)]), PACKAGE),
    "rows that no block fits": (gguf_header([gguf_tensor(kind=8)]) + bytes(64), PACKAGE),
    "a tensor beyond the end": (gguf_header([gguf_tensor(offset=2**62)]), CUT),
    "an offset that overflows": (gguf_header([gguf_tensor(offset=2**64 - 1)]), PACKAGE),
    "a noted shape of other size": (gguf_header([gguf_tensor()], [noted(10, 3)]) + bytes(64), ELEMENTS),
    "a noted shape below zero": (gguf_header([gguf_tensor()], [noted(11, -1, -2)]) + bytes(64), ELEMENTS),
    "a noted shape of 400 sizes": (gguf_header([gguf_tensor()], [noted(10, 2, *[1] * 400)]) + bytes(64), ELEMENTS),
    "a noted shape that is a text": (
        gguf_header([gguf_tensor()], [gguf_pair(b"comfy.gguf.orig_shape.a", 8, gguf_text(b"x"))]) + bytes(64),
        PACKAGE,
    ),
    "version 1": (gguf_header(version=1), PACKAGE),
    "another kind of file": (b"GGML" + bytes(20), PACKAGE),
    "nothing": (b"", PACKAGE),
}
