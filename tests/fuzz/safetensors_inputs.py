"""Hostile .safetensors files: a valid header with lies in its length, text, offsets, types, nesting and names."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field

from hostile import NAMES, NUMBERS, change_bytes, change_size, change_tensors, model

DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "F4", "F6_E2M3", "C64"),
    *("", "f32", "F0", "I", "F99999999", "\x1b[31mF32", "F32\n", "__class__", "D" * 300, "F" + "3" * 5000),
)
ODD_VALUES = (
    *("null", "true", "NaN", "-Infinity", "1.5", "1e400", "-0", "01", "1_0", '"3"', "[]", "{}", "[[1]]", "+1", "0x10"),
    *("9" * 30, "9" * 6000, '"\\ud800"', '"\\u0000"', '"', "'x'", "//", "/*", ",", ""),
)
METADATA = (
    *('{"format":"pt"}', "{}", '{"x":"\\"\\\\"}', '{"x":"\x1b[2J"}', '{"x":"名"}', '{"workflow":"{\\"a\\":[1]}"}'),
    *('{"x":NaN}', '{"x":1}', '{"x":null}', '{"x":{}}', '{"x":["y"]}', "null", "[]", '"x"', '{"x"}', '{"x":"y",}'),
)
LONGEST_NUMBER = 10**410
HEADER_LENGTHS = (0, 1, 2, 2**23, 2**23 + 1, 10**8, 10**8 + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
BITS = re.compile(r"\d+")


@dataclass
class Draft:
    """A file as it will be written."""

    entries: list[tuple[str, str]] = field(default_factory=list)  # name and value as JSON texts
    metadata: str | None = None
    size: int = 0  # of the data
    length: int | None = None  # written in place of the header's own


def safetensors_input(rng: random.Random) -> tuple[bytes, int]:
    """Content, and the length that the file is then stretched or cut to."""
    tensors = model(rng)
    lies = rng.choice((0, 1, 1, 1, 2, 3))
    consistent = sum(rng.random() < 0.4 for _ in range(lies))
    for _ in range(consistent):
        change_tensors(rng, tensors)
    draft = draft_of(rng, tensors)
    for _ in range(lies - consistent):
        rng.choice(LIES)(rng, draft)
    text = text_of(draft)
    if lies and rng.random() < 0.15:
        text = change_text(rng, text)
    header = text.encode("utf-8", "surrogatepass")
    if lies and rng.random() < 0.15:
        header = change_bytes(rng, header)
    length = len(header) if draft.length is None else draft.length
    content = length.to_bytes(8, "little") + header
    size = len(content) + max(0, min(draft.size, 2**42))
    if lies and rng.random() < 0.1:
        size = change_size(rng, size)
    return content, size


def draft_of(rng: random.Random, tensors: list[tuple[str, str, tuple[int, ...]]]) -> Draft:
    """The table with the offsets that belong to it."""
    draft, end = Draft(), 0
    for name, dtype, shape in tensors:
        bits = BITS.search(dtype)
        begin, end = end, end + math.prod(shape) * int(bits.group() if bits else 8) // 8
        draft.entries.append((json.dumps(name), entry(rng, json.dumps(dtype), list(shape), [begin, end])))
    draft.size = end
    if rng.random() < 0.3:
        draft.metadata = METADATA[rng.randrange(6)]
    return draft


def entry(rng: random.Random, dtype: str, shape: object, offsets: object) -> str:
    fields = [f'"dtype":{dtype}', f'"shape":{written(shape)}', f'"data_offsets":{written(offsets)}']
    if rng.random() < 0.1:
        rng.shuffle(fields)
    return "{" + rng.choice((",", ", ", " ,\n\t")).join(fields) + "}"


def written(value: object) -> str:
    """As JSON, also of numbers so long that Python refuses to write them out."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return "9" * 6000 if isinstance(value, int) and abs(value) > LONGEST_NUMBER else str(value)


def lie_in_a_value(rng: random.Random, draft: Draft) -> None:
    """A type, number or whole list replaced by something that JSON or the format does not know."""
    at = rng.randrange(len(draft.entries))
    name, value = draft.entries[at]
    parts = list(re.finditer(r'"dtype":("[^"]*")|\[[^\]]*\]|-?\d+', value))
    if not parts:
        return
    part = rng.choice(parts)
    new = rng.choice((rng.choice(ODD_VALUES), json.dumps(rng.choice(DTYPES)), str(rng.choice(NUMBERS)), deep(rng)))
    if part.group().startswith('"dtype"'):
        new = f'"dtype":{new}'
    draft.entries[at] = name, value[: part.start()] + new + value[part.end() :]


def lie_in_offsets(rng: random.Random, draft: Draft) -> None:
    """Offsets that overlap, leave holes, run backwards or are another tensor's."""
    at = rng.randrange(len(draft.entries))
    name, value = draft.entries[at]
    found = re.search(r'"data_offsets":\[(-?\d{1,500}),(-?\d{1,500})\]', value)
    if found is None:
        return
    begin, end = int(found[1]), int(found[2])
    near = (-1, 1, 2, 64, -64)
    pairs = ((end, begin), (begin + rng.choice(near), end), (begin, end + rng.choice(near)), (begin, begin), (0, end))
    shifted = tuple(number + rng.choice(near) for number in (begin, end))
    hostile = rng.choice(NUMBERS), rng.choice(NUMBERS)
    pair = rng.choice((*pairs, shifted, hostile))
    draft.entries[at] = name, value.replace(found.group(), f'"data_offsets":[{pair[0]},{pair[1]}]')


def lie_in_fields(rng: random.Random, draft: Draft) -> None:
    """A field is missing, doubled, unknown, or an entry is none at all."""
    at = rng.randrange(len(draft.entries))
    name, value = draft.entries[at]
    fields = re.findall(r'"\w+":(?:"[^"]*"|\[[^\]]*\])', value)
    if rng.random() < 0.4 and fields:
        fields.remove(rng.choice(fields))
    else:
        more = ('"extra":1', '"shape":[1]', '"dtype":"F32"', '"data_offsets":[0,0]', '""', deep(rng))
        fields.append(rng.choice(more))
    draft.entries[at] = name, rng.choice(("{" + ",".join(fields) + "}", rng.choice(ODD_VALUES), deep(rng)))


def lie_in_names(rng: random.Random, draft: Draft) -> None:
    """A name in other clothes, or twice."""
    at = rng.randrange(len(draft.entries))
    name, value = draft.entries[at]
    escaped = '"' + "".join(f"\\u{ord(letter):04x}" for letter in name.strip('"') if ord(letter) < 0xFFFF) + '"'
    raw = f'"{rng.choice(NAMES)}"'
    draft.entries[at] = rng.choice((escaped, raw, json.dumps(rng.choice(NAMES)), name)), value
    if rng.random() < 0.3:
        draft.entries.append((name, value))


def lie_in_metadata(rng: random.Random, draft: Draft) -> None:
    draft.metadata = rng.choice((*METADATA, deep(rng), rng.choice(ODD_VALUES)))


def lie_in_length(rng: random.Random, draft: Draft) -> None:
    real = len(text_of(draft).encode("utf-8", "surrogatepass"))
    draft.length = rng.choice((*HEADER_LENGTHS, max(0, real - 1), real + 1, real // 2, real + rng.randrange(5000)))


def deep(rng: random.Random) -> str:
    """Nesting, some of it closed."""
    depth = rng.choice((1, 2, 3, 100, 100, 1001, 1001, 1001, 30_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"":', "}]")))
    return opened * depth + rng.choice(("", "0")) + closed * (depth if rng.random() < 0.7 else depth - 1)


def change_text(rng: random.Random, text: str) -> str:
    """The header's whole text in other clothes."""
    kind = rng.randrange(6)
    if kind == 0:
        return text + " " * rng.choice((1, 7, 5000))
    if kind == 1:
        return rng.choice(("\ufeff", " ", "\n", "//\n", "[")) + text
    if kind == 2:
        return text + rng.choice(("\x00" * 8, "{}", "]", ",", text))
    if kind == 3:
        return text.replace(",", rng.choice((",,", " ", ", \n", ";")), rng.choice((1, -1)))
    if kind == 4:
        return text.encode("utf-16", "surrogatepass").decode("latin-1")
    return deep(rng)


def text_of(draft: Draft) -> str:
    items = [f"{name}:{value}" for name, value in draft.entries]
    if draft.metadata is not None:
        items.insert(0, f'"__metadata__":{draft.metadata}')
    return "{" + ",".join(items) + "}"


LIES = (
    *(lie_in_a_value, lie_in_a_value, lie_in_a_value, lie_in_offsets, lie_in_offsets, lie_in_fields),
    *(lie_in_names, lie_in_metadata, lie_in_length),
)
