"""Hostile .gguf files: a valid header with lies in its counts, lengths, types, offsets, alignment and names."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass, field

from hostile import NAMES, NUMBERS, change_bytes, change_size, change_tensors, model

UINT32, FLOAT32, STRING, ARRAY, UINT64, FLOAT64 = 4, 6, 8, 9, 10, 12
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "F8_E4M3": (8, 32, 34)}
"""Of each stored type of a model: GGML's number, elements of a block, bytes of a block. GGUF has Q8_0 for fp8."""
TYPE_NUMBERS = (*range(45), 255, 2**31, 2**32 - 1)
COUNTS = (0, 1, 2, 65, 2**14 + 1, 2**20, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)
LONGEST = 2**17
"""Bytes of a file: GGUFReader goes through an array element by element, and each takes some microseconds."""
ALIGNMENTS = (0, 1, 2, 3, 8, 31, 64, 4096, 2**20, 2**31, 2**32 - 1)


@dataclass
class Table:
    """A tensor as it will be written."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int
    name_length: int | None = None
    dim_count: int | None = None


@dataclass
class Draft:
    """A file as it will be written."""

    tensors: list[Table]
    size: int  # of the data
    pairs: list[bytes] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    pair_count: int | None = None
    alignment: int = 32


def gguf_input(rng: random.Random) -> tuple[bytes, int]:
    """Content, and the length that the file is then stretched or cut to."""
    tensors = model(rng)
    lies = rng.choice((0, 1, 1, 1, 2, 3))
    consistent = sum(rng.random() < 0.4 for _ in range(lies))
    for _ in range(consistent):
        change_tensors(rng, tensors)
    draft = draft_of(rng, tensors)
    for _ in range(lies - consistent):
        rng.choice(LIES)(rng, draft)
    content = bytes_of(draft)
    if lies and rng.random() < 0.15:
        content = change_bytes(rng, content)
    start = len(content) + -len(content) % max(1, min(draft.alignment, 2**20))
    size = start + max(0, min(draft.size, 2**42))
    if lies and rng.random() < 0.1:
        size = change_size(rng, size)
    return content, min(size, LONGEST)


def draft_of(rng: random.Random, tensors: list[tuple[str, str, tuple[int, ...]]]) -> Draft:
    """The table with the offsets that belong to it, five dimensions flattened as converters do."""
    draft = Draft([], 0, [pair("general.architecture", STRING, text("wan"))])
    for name, kind, shape in tensors:
        number, block, block_bytes = TYPES[kind]
        dims = [*reversed(shape)]
        if len(dims) == 5 and rng.random() < 0.7:
            values = b"".join(struct.pack("<i", max(-(2**31), min(size, 2**31 - 1))) for size in shape)
            draft.pairs.append(pair(f"comfy.gguf.orig_shape.{name}", ARRAY, array(5, 5, values)))
            dims = [math.prod(dims)]
        draft.tensors.append(Table(name.encode("utf-8", "surrogatepass"), dims, number, draft.size))
        draft.size += math.prod(dims) // block * block_bytes
        draft.size += -draft.size % draft.alignment
    return draft


def text(value: str, length: int | None = None) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data) if length is None else length) + data


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def unsigned(value: int, bits: int) -> bytes:
    """Any number, wrapped into this many bits."""
    return (value % 2**bits).to_bytes(bits // 8, "little")


def lie_in_a_tensor(rng: random.Random, draft: Draft) -> None:
    tensor = rng.choice(draft.tensors)
    kind = rng.randrange(6)
    if kind == 0:
        tensor.kind = rng.choice(TYPE_NUMBERS)
    elif kind == 1:
        tensor.offset = rng.choice((*NUMBERS, tensor.offset + rng.choice((-32, -1, 1, 32)), draft.size))
    elif kind == 2:
        tensor.name_length = rng.choice((*COUNTS, len(tensor.name) + 1, max(0, len(tensor.name) - 1)))
    elif kind == 3:
        tensor.dim_count = rng.choice((*COUNTS, len(tensor.dims) + 1))
    elif kind == 4:
        tensor.name = rng.choice((b"\xff\xfe", b"\x1b[2J", b"", rng.choice(draft.tensors).name))
    else:
        tensor.dims = [rng.choice(NUMBERS) for _ in tensor.dims]


def lie_in_counts(rng: random.Random, draft: Draft) -> None:
    if rng.random() < 0.5:
        draft.tensor_count = rng.choice((*COUNTS, len(draft.tensors) + 1, len(draft.tensors) - 1))
    else:
        draft.pair_count = rng.choice((*COUNTS, len(draft.pairs) + 1))


def lie_in_the_start(rng: random.Random, draft: Draft) -> None:
    draft.magic = rng.choice((b"GGUF", b"FUGG", b"GGML", b"\x00" * 4, b"PK\x03\x04"))
    draft.version = rng.choice((0, 1, 2, 3, 4, 2**16, 3 << 24, 2**32 - 1))


def lie_in_pairs(rng: random.Random, draft: Draft) -> None:
    """A pair more: nested arrays, lengths beyond the file, types that are none, NaN, a key twice, shapes that lie."""
    name = rng.choice(draft.tensors).name.decode("utf-8", "replace")
    shape_key = f"comfy.gguf.orig_shape.{rng.choice((name, 'patch_embedding.weight'))}"
    sizes = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 5, 400)))]
    nested = array(ARRAY, 1, b"") * rng.choice((1, 2, 1001, 30_000)) + array(UINT32, 1, b"\x00" * 4)
    value = struct.pack("<d", rng.choice((math.nan, math.inf, -0.0)))
    length = rng.choice(COUNTS)
    pairs = (
        pair("nested", ARRAY, nested),
        pair("claims", ARRAY, array(rng.choice((0, 7, 8, 9, 10)), length, b"")),
        pair("text", STRING, text("x", length)),
        text(rng.choice(NAMES), length) + struct.pack("<I", UINT32) + b"\x00" * 4,
        pair(rng.choice(NAMES), STRING, text(rng.choice(NAMES))),
        pair("float", FLOAT64, value),
        pair("floats", ARRAY, array(FLOAT64, 1, value)),
        pair("kind", rng.choice((13, 99, 2**32 - 1)), b"\x00" * 8),
        pair("general.architecture", STRING, text("again")),
        pair(shape_key, ARRAY, array(UINT64, len(sizes), b"".join(unsigned(size, 64) for size in sizes))),
        pair(shape_key, rng.choice((STRING, FLOAT32, ARRAY, UINT32)), text("\x00" * 20)),
        pair(shape_key, ARRAY, array(FLOAT64, 2, value * 2)),
    )
    draft.pairs.append(rng.choice(pairs))


def lie_in_alignment(rng: random.Random, draft: Draft) -> None:
    draft.alignment = rng.choice(ALIGNMENTS)
    kind, bits = rng.choice(((UINT32, 32), (UINT32, 32), (UINT64, 64), (FLOAT32, 32), (STRING, 64)))
    draft.pairs.append(pair("general.alignment", kind, unsigned(draft.alignment, bits)))


LIES = (
    *(lie_in_a_tensor, lie_in_a_tensor, lie_in_a_tensor, lie_in_pairs, lie_in_pairs),
    *(lie_in_counts, lie_in_the_start, lie_in_alignment),
)


def bytes_of(draft: Draft) -> bytes:
    tensor_count = len(draft.tensors) if draft.tensor_count is None else draft.tensor_count
    pair_count = len(draft.pairs) if draft.pair_count is None else draft.pair_count
    parts = [draft.magic, struct.pack("<IQQ", draft.version, tensor_count, pair_count), *draft.pairs]
    for tensor in draft.tensors:
        length = len(tensor.name) if tensor.name_length is None else tensor.name_length
        count = len(tensor.dims) if tensor.dim_count is None else tensor.dim_count
        dims = b"".join(unsigned(size, 64) for size in tensor.dims)
        parts += [struct.pack("<Q", length), tensor.name, unsigned(count, 32), dims]
        parts += [unsigned(tensor.kind, 32), unsigned(tensor.offset, 64)]
    return b"".join(parts)
