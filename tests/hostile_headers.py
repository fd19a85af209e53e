"""Headers of model files as an attacker would write them, each with the words in which it must be refused."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path


def raw_safetensors(path: Path, header: str | bytes, data: int = 0) -> Path:
    """A file with this header, whatever it says, and so many bytes of data."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


ONE = f'"a":{entry()}'
TEXT = "a tensor's name of 1 to 256 printable ASCII letters"
LYING_SAFETENSORS = {
    "lists nested 30,000 deep": ('{"a":' + "[" * 30_000, "expects dtype, shape and data_offsets of a at byte 5"),
    "objects nested 30,000 deep": ('{"a":' * 30_000, "expects dtype, shape and data_offsets of a at byte 5"),
    "nested metadata": ('{"__metadata__":' + '{"a":' * 30_000, "expects metadata as texts"),
    "NaN in the metadata": (f'{{"__metadata__":{{"a":NaN}},{ONE}}}', "expects metadata as texts"),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},{ONE}}}', "expects metadata once"),
    "an entry that is a text": ('{"a":"b"}', "expects dtype, shape and data_offsets of a"),
    "an entry that is a list": ('{"a":[]}', "expects dtype, shape and data_offsets of a"),
    "a field too many": ('{"a":{"x":1,' + entry()[1:] + "}", "expects dtype, shape and data_offsets of a"),
    "a field twice": ('{"a":{"dtype":"F32","dtype":"F32","shape":[2]}}', "but got others"),
    "a type in the place of a shape": (f'{{"a":{entry(shape=chr(34) + "F32" + chr(34))}}}', "but got others"),
    "a number of 6,000 digits": (
        f'{{"a":{entry(shape="[" + "9" * 6000 + "]")}}}',
        "expects whole numbers of up to 19 digits",
    ),
    "a size of 30 digits": (f'{{"a":{entry(shape="[" + "9" * 30 + "]")}}}', "expects whole numbers of up to 19 digits"),
    "a size below zero": (f'{{"a":{entry(shape="[-2]")}}}', "expects dtype, shape and data_offsets of a"),
    "a size with a leading zero": (f'{{"a":{entry(shape="[02]")}}}', "expects whole numbers of up to 19 digits"),
    "a size that is no number": (f'{{"a":{entry(shape="[2,,1]")}}}', "expects whole numbers of up to 19 digits"),
    "a size that is a fraction": (f'{{"a":{entry(shape="[2.0]")}}}', "expects dtype, shape and data_offsets of a"),
    "nine dimensions": (f'{{"a":{entry(shape="[2,1,1,1,1,1,1,1,1]")}}}', "up to 8 dimensions of a but got 9"),
    "three offsets": (f'{{"a":{entry(offsets="[0,8,8]")}}}', "expects a begin and an end of a but got"),
    "an end before its begin": (f'{{"a":{entry(offsets="[8,0]")}}}', r"expects a begin and an end of a but got .*8, 0"),
    "fewer bytes than its shape and type": (
        f'{{"a":{entry(shape="[3]")}}}',
        r"F32 of shape \[3\] for a but its .* 8 ",
    ),
    "a shape whose product overflows": (
        f'{{"a":{entry(shape=f"[{2**32},{2**32}]", offsets="[0,0]")}}}',
        "for a but its offsets hold 0 bytes",
    ),
    "a type of 0 bits": (f'{{"a":{entry(dtype=chr(34) + "F0" + chr(34), offsets="[0,0]")}}}', "expects a type of 4, 6"),
    "a type in other letters": (
        f'{{"a":{entry(dtype=chr(34) + "f32" + chr(34))}}}',
        "expects dtype, shape and d",
    ),
    "a hole before the first": (f'{{"a":{entry(offsets="[8,16]")}}}', "expects a at byte 0 of the data, .* but got 8"),
    "two on the same bytes": (f'{{{ONE},"b":{entry()}}}', "expects b at byte 8 of the data, .* but got 0"),
    "a name twice": (f'{{{ONE},"a":{entry(offsets="[8,16]")}}}', "expects each tensor once but got a twice"),
    "a comma too many": (f"{{{ONE},}}", f"expects {TEXT}"),
    "something behind": (f"{{{ONE}}}x", "expects nothing more at byte .* but got b'x'"),
    "a mark of byte order before": (f"\ufeff{{{ONE}}}", "expects an object at byte 0"),
    "UTF-16": (f"{{{ONE}}}".encode("utf-16-le"), f"expects {TEXT}"),
    "nothing": (b"", "expects an object at byte 0 but got its end"),
}


NO_NAMES = {
    "control characters": "\x1b[2J\x1b[31mall is well",
    "a line end": "a\nerror: b",
    "a direction of writing": "\u202eevil",
    "no letter": "",
    "257 letters": "n" * 257,
    "70,000 letters": "n" * 70_000,
}


LYING_SIZES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "patches of no rows": ({"patch_embedding.weight": (128, 16, 1, 0, 2)}, "5 dimensions but its shape is .* 0, 2"),
    "a head without dimensions": ({"head.head.weight": ()}, "expects an output layer"),
    "a head without rows": ({"head.head.weight": (0, 128)}, "expects an output layer"),
    "a query without rows": ({"blocks.1.self_attn.q.weight": (0, 128)}, r"expects the matrices .* in blocks\.1"),
    "a query of 10^19 rows and no column": ({"blocks.1.self_attn.q.weight": (2**63 - 1, 0)}, "expects the matrices"),
    "a block of a 200-digit number": ({f"blocks.{'9' * 200}.x": (1,)}, ""),
    "a block whose number begins with 0": ({"blocks.01.self_attn.q.weight": (1,)}, ""),
    "9,999 blocks but a few": ({"blocks.9999.x": (1,)}, "expects blocks 0 to 9999 but lacks 9997 of them"),
    "300 blocks": ({f"blocks.{i}.x": (1,) for i in range(300)}, "expects up to 128 blocks but has 300"),
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
LYING_GGUF = {
    "2^60 tensors": (gguf_header(counts=(HUGE, 0)), "expects up to 16,384 tensors but claims 1,152,9"),
    "2^60 pairs": (gguf_header(counts=(0, HUGE)), "expects up to 16,384 key-value pairs but claims 1,152,9"),
    "a pair that is not there": (gguf_header(counts=(0, 1)), "expects 8 bytes at byte 24 but its 24 bytes end before"),
    "a key of 2^60 letters": (
        gguf_header(pairs=[gguf_text(b"a", HUGE)]),
        "expects 1,152,9.* but its 33 bytes end b",
    ),
    "a text of 2^60 letters": (
        gguf_header(pairs=[gguf_pair(b"a", 8, gguf_text(b"a", HUGE))]),
        "expects 1,152,9.* bytes end before",
    ),
    "an array of 2^60 numbers": (
        gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 0, HUGE))]),
        "expects 1,152,9.* bytes end before",
    ),
    "an array of 2^60 texts": (
        gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 8, HUGE) + bytes(800))]),
        "expects 808 bytes at byte 49 but its 849 bytes end before",
    ),
    "an array of texts of which one has 2^60 letters": (
        gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 8, 3) + gguf_text(b"") + gguf_text(b"", HUGE))]),
        "expects 1,152,9.* bytes end before",
    ),
    "arrays nested 30,000 deep": (
        gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 9, 1) * 30_000)]),
        "expects a value's type from 0 to 12 at byte 49 but got 9",
    ),
    "a type of value that there is not": (gguf_header(pairs=[gguf_pair(b"a", 13, b"")]), "from 0 to 12 .* but got 13"),
    "a key twice": (gguf_header(pairs=[gguf_pair(b"a", 0, b"\0")] * 2), "expects each key once but got b'a' twice"),
    "an alignment of 0": (
        gguf_header(pairs=[gguf_pair(b"general.alignment", 4, bytes(4))]),
        "of two .* but got 0",
    ),
    "an alignment of 2^31": (
        gguf_header([gguf_tensor()], [gguf_pair(b"general.alignment", 4, struct.pack("<I", 2**31))]),
        "expects 2,147,483,656 bytes by its header but has",
    ),
    "an alignment that is a text": (
        gguf_header(pairs=[gguf_pair(b"general.alignment", 8, gguf_text(b"32"))]),
        "power of two .* but got None, type 8",
    ),
    "a name of 2^60 letters": (gguf_header([gguf_text(b"a", HUGE)]), "expects 1,152,9.* bytes end before"),
    "a name twice": (gguf_header([gguf_tensor(), gguf_tensor(offset=32)]), "expects each tensor once but got a twice"),
    "2^31 dimensions": (gguf_header([gguf_text(b"a") + struct.pack("<I", 2**31)]), "8 dimensions of a but got 2,147,4"),
    "a shape whose product overflows": (
        gguf_header([gguf_tensor(sizes=(2**32, 2**32))]) + bytes(64),
        "expects 73,786,976,294,838,206,[0-9]+ bytes by its header but has",
    ),
    "a type of GGML that there is not": (gguf_header([gguf_tensor(kind=99)]), "known here for a but got number 99"),
    "rows that no block fits": (gguf_header([gguf_tensor(kind=8)]), "multiple of 32 elements for a in Q8_0 but got 2"),
    "a tensor beyond the end": (
        gguf_header([gguf_tensor(offset=2**62)]),
        "expects 4,611,.* bytes by its header",
    ),
    "two on the same bytes": (
        gguf_header([gguf_tensor(sizes=(16,)), gguf_tensor(b"b", offset=32)]) + bytes(200),
        "expects b at a multiple of 32 from 64 up, where the tensor before ends, but got 32",
    ),
    "a tensor that is not aligned": (
        gguf_header([gguf_tensor(offset=8)]) + bytes(99),
        "expects a at a multiple of",
    ),
    "a noted shape of other size": (gguf_header([gguf_tensor()], [noted(10, 3)]), "2 elements of a but the noted .*3"),
    "a noted shape below zero": (
        gguf_header([gguf_tensor()], [noted(11, -1, -2)]),
        "2 elements of a but the .*-1",
    ),
    "a noted shape of 400 sizes": (
        gguf_header([gguf_tensor()], [noted(10, *[1] * 400)]),
        "up to 8 whole numbers for b'c",
    ),
    "a noted shape that is a text": (
        gguf_header([gguf_tensor()], [gguf_pair(b"comfy.gguf.orig_shape.a", 8, gguf_text(b"2"))]),
        "up to 8 whole numbers for b'c",
    ),
    "version 1": (gguf_header(version=1), "expects version 2 or 3 but has 1; convert the model again"),
    "another order of bytes": (gguf_header(version=3 << 24), "expects version 2 or 3 but has 50331648"),
    "another kind of file": (b"GGML" + bytes(20), "expects b'GGUF' but begins with b'GGML'"),
}


TOO_LONG_GGUF = gguf_header(pairs=[gguf_pair(b"a", 9, struct.pack("<IQ", 0, 8 << 20) + bytes(9 << 20))])


def many_tensors() -> list[str]:
    """The most and longest names that a table may have, of blocks of a Wan model."""
    prefix = "model.diffusion_model."
    blocks = [f"{prefix}blocks.{i % 128}.{i}.".ljust(256, "n") for i in range(2**14 - 1)]
    return [f"{prefix}patch_embedding.weight", *blocks]


def costly_files(folder: Path) -> Iterator[Path]:
    """Headers about as long as one may be, each filled with what costs most."""
    longest = 8 << 20
    zero = entry(dtype='"U8"', shape="[0]", offsets="[0,0]")
    texts = {
        "many.safetensors": "{" + ",".join(f'"{name}":{zero}' for name in many_tensors()) + "}",
        "spaces.safetensors": "{" + " " * (longest - 1),
        "escapes.safetensors": '{"__metadata__":{"a":"' + '\\"' * (longest // 2 - 100),
        "letters.safetensors": '{"__metadata__":{"a":"' + "名" * (longest // 3 - 100),
        "pairs.safetensors": '{"__metadata__":{' + '"":"",' * (longest // 12),
        "lists.safetensors": '{"a":' + "[]," * (longest // 3 - 100),
        "digits.safetensors": '{"a":{"dtype":"F32","shape":[' + "9" * (longest - 100),
        "long.safetensors": "{" + " " * longest,
    }
    for name, header in texts.items():
        yield raw_safetensors(folder / name, header)
    vocabulary = gguf_pair(b"a", 9, struct.pack("<IQ", 8, longest // 16) + bytes(longest // 2))
    parts = {
        "many.gguf": gguf_header([gguf_tensor(name.encode(), [0]) for name in many_tensors()]) + bytes(64),
        "keys.gguf": gguf_header(pairs=[gguf_pair(b"%0200d" % i, 0, b"\0") for i in range(2**14)]) + bytes(64),
        "texts.gguf": gguf_header(pairs=[vocabulary]) + bytes(64),
        "numbers.gguf": TOO_LONG_GGUF,
    }
    for name, content in parts.items():
        (folder / name).write_bytes(content)
        yield folder / name
