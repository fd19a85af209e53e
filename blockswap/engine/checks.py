"""Debug mode's comparison of a slot with its slab."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import TransferError
from ..host.slabs import Slab
from ..model.tensors import flat

WORD = 8


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a strided tensor's bytes as 64-bit integers that wrap around, and of the bytes left over.

    It finds words that were lost, moved or left from an earlier copy, but not words that changed places.

    Args:
        tensor: Starts at a multiple of eight bytes, as in slabs and slots.
    """
    with torch.inference_mode():
        data = flat(tensor).view(torch.uint8)
        whole = data.numel() // WORD * WORD
        return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum(dtype=torch.int64))


def check_slot(name: str, paths: Sequence[str], views: Sequence[torch.Tensor], slab: Slab) -> None:
    """Compares the tensors that a block is about to use with those that its slab was filled with.

    Args:
        name: The block's name.
        paths: Names of its streamed tensors within the block.
        views: The tensors in the slot; the compute stream already waits for their copy.
        slab: The slab that they were copied from.

    Raises:
        TransferError: A tensor differs.
    """
    if slab.checksums is None:
        slab.checksums = tuple(map(checksum, slab.views))
    for path, view, expected in zip(paths, views, slab.checksums, strict=True):
        found = checksum(view)
        if found != expected:
            raise TransferError(
                f"{name}.{path} has other bytes on the device than when it was adopted (checksum {found:x} instead of "
                f"{expected:x}): another node edited it through .data, or a copy went wrong; remove other nodes that "
                "patch the model, and report this if it happens again"
            )
