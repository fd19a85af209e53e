"""Checksums: whether a slot holds what its slab was filled with. For debug mode: each look waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import TransferError
from .host import Slab
from .tensors import flat

WORD = 8


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a strided tensor's bytes, taken as 64-bit integers that wrap around, and of those that are left over.

    A copy that has lost, moved or kept from before whole words is found; swapped words are not.

    Args:
        tensor: Its first byte lies at a multiple of eight, as in slabs and slots.
    """
    with torch.inference_mode():
        data = flat(tensor).view(torch.uint8)
        whole = data.numel() // WORD * WORD
        return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum(dtype=torch.int64))


def check_slot(name: str, paths: Sequence[str], views: Sequence[torch.Tensor], slab: Slab) -> None:
    """Compares what a block is about to use with what its slab was filled with.

    Args:
        name: The block's.
        paths: Of its streamed tensors.
        views: These in the slot; the compute stream waits for the copy already.
        slab: Where they were copied from.

    Raises:
        TransferError: A tensor differs.
    """
    if slab.checksums is None:
        slab.checksums = tuple(map(checksum, slab.views))
    for path, view, expected in zip(paths, views, slab.checksums, strict=True):
        found = checksum(view)
        if found != expected:
            raise TransferError(
                f"{name}.{path} expects the bytes it was adopted with (checksum {expected:x}) on the device but got "
                f"others ({found:x}); it was edited through .data by another node, or a copy went wrong: remove other "
                "nodes that patch the model, and report it if it stays"
            )
