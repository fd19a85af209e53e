"""What an attacker writes in place of a number, a name or a type, in both header formats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from checkpoint_files import wan_shapes

T = TypeVar("T")
Tensor = tuple[str, str, tuple[int, ...]]  # name, stored type, shape

NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400),
)
NAMES = (
    "",
    " ",
    "../../../etc/passwd",
    "/dev/zero",
    "C:\\Windows\\win.ini",
    "\x1b[2J\x1b[31mall is well\x1b[0m",
    "one\nerror: two",
    "\r\x08\x00\x7f",
    "\u202eevil",
    "\ud800",
    "名前.weight",
    "n" * 255,
    "n" * 257,
    "n" * 70_000,
    "{}%s%n{0.__class__}",
    "__metadata__",
    "model.diffusion_model.patch_embedding.weight",
    "vace_blocks.0.self_attn.q.weight",
    *(f"blocks.{number}.self_attn.q.weight" for number in ("-1", "00", "01", "٣", "1e3", "300", "9999", "1" * 50, "")),
    f"blocks.{'9' * 5000}.ffn.0.weight",
    *(f"blocks.0.{name}" for name in ("self_attn.q.weight", "ffn.0.weight", "", ".", "self_attn.q.weight.")),
)
ARCHITECTURE = ("patch_embedding.weight", "head.head.weight", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight")
"""Tensors whose shapes become the model's sizes, which later steps divide by."""

MODELS = [wan_shapes(32, 64, blocks, vace) for blocks, vace in ((1, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1))]
"""Width 32, so that GGUF can quantise them."""


def model(rng: random.Random) -> list[Tensor]:
    """A small Wan transformer; mostly without what no size is read from."""
    is_whole = rng.random() < 0.1
    shapes = MODELS[rng.randrange(len(MODELS))]
    kind = rng.choice(("BF16", "BF16", "F32", "F16", "F8_E4M3"))
    return [
        (name, kind if len(shape) == 2 else "F32", shape)
        for name, shape in shapes.items()
        if is_whole or "attn" not in name or "self_attn.q" in name
    ]


def change_shape(rng: random.Random, shape: Sequence[int]) -> tuple[int, ...]:
    """Another shape: a size replaced, dimensions added, dropped, turned or zeroed."""
    changed = list(shape)
    kind = rng.randrange(6)
    if kind == 0 and changed:
        changed[rng.randrange(len(changed))] = rng.choice(NUMBERS)
    elif kind == 1:
        changed += [rng.choice((0, 1, 2, 2**63 - 1))] * rng.choice((1, 4, 20, 300))
    elif kind == 2:
        changed = changed[: rng.randrange(len(changed) + 1)]
    elif kind == 3:
        changed.reverse()
    elif kind == 4:
        changed = [0] * len(changed)
    else:
        changed = [rng.choice((0, 1, 32, 2**40)) for _ in changed]
    return tuple(changed)


def change_tensors(rng: random.Random, tensors: list[Tensor]) -> None:
    """One lie about the table itself, which stays consistent: its names, its shapes, what is in it."""
    at = rng.randrange(len(tensors))
    if rng.random() < 0.5:
        at = next((i for i, tensor in enumerate(tensors) if tensor[0] == rng.choice(ARCHITECTURE)), at)
    name, kind, shape = tensors[at]
    choice = rng.randrange(6)
    if choice <= 1:
        tensors[at] = name, kind, change_shape(rng, shape)
    elif choice == 2:
        tensors[at] = rng.choice(NAMES), kind, shape
    elif choice == 3:
        tensors.append((rng.choice((*NAMES, name)), kind, shape))
    elif choice == 4:
        del tensors[at]
        tensors.append((name, kind, shape)) if rng.random() < 0.3 or not tensors else None
    else:
        rng.shuffle(tensors)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """A few bytes replaced, taken out, put in, doubled, or the whole cut."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        some = rng.choice((b"\x00", b"\xff" * 8, b"[" * 40, b'"', b"{", b"}", b"-", b"9" * 30, b"\\", b"NaN", b"\n"))
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:at] = some
        elif kind == 2:
            changed[at : at + len(some)] = some
        elif kind == 3:
            del changed[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice((8, 60, 200))]
        else:
            del changed[at:]
    return bytes(changed)


def change_size(rng: random.Random, size: int) -> int:
    """Another length of the whole file; what is added costs no disk."""
    return max(0, rng.choice((size - 1, size + 1, size // 2, size + rng.randrange(9000), 8, 2**30, 2**40)))
