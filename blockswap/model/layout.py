"""What a model's bytes look like: blocks, their tensors, and where each lies in a slab; pure, no torch."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from .groups import MAIN, lane_of

SLAB_ALIGNMENT = 256
"""Bytes between tensor starts in a slab: the alignment of a fresh CUDA allocation's interior, which kernels may assume
(cuBLAS picks its vectorised paths from 16 bytes up, cuDNN and TMA want up to 128)."""

DEVICE_GRANULARITY = 512
"""Bytes to which torch's CUDA caching allocator rounds every allocation (kMinBlockSize in CUDACachingAllocator.h)."""

SMALL_TENSOR_BYTES = 256 * 1024
"""Largest cut-off under which a tensor always stays on the device. Wan 14B's largest non-matrix tensor is the fp32
modulation, 6 x 5120 x 4 = 122,880 bytes; its smallest matrix is 5120 x 5120 in Q4_K, 14.7 MB, and Wan 1.3B's 1.3 MB."""

SMALL_TENSOR_SHARE = 64
"""The cut-off is also at most a 64th of its block's bytes, so that the matrices of a tiny model still stream: with the
ratio of Wan's layers (a modulation of 6 rows against matrices of `width` rows) it separates them from width 64 up."""


class Placement(Enum):
    """Where a tensor of a block lives."""

    STREAMED = "streamed"
    """Through a slot of the window while its block is swapped, in the block's own device buffer while resident."""
    SMALL = "small"
    """Always on the device: under the cut-off, or a buffer that a forward may change."""
    FIXED = "fixed"
    """Always on the device, moved as a whole: a wrapper subclass that cannot be taken apart."""
    HOST = "host"
    """Always on the host: Python reads it, and on the device each read would wait for the GPU."""


def align(size: int, granularity: int) -> int:
    """`size` rounded up to a multiple of `granularity`."""
    return -(-size // granularity) * granularity


def device_bytes(size: int) -> int:
    """Device memory that one allocation of `size` bytes takes."""
    return align(size, DEVICE_GRANULARITY)


def slab_offsets(sizes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Aligned byte offsets of consecutive tensors, and the end of the last one."""
    offsets, end = [], 0
    for size in sizes:
        start = align(end, SLAB_ALIGNMENT)
        offsets.append(start)
        end = start + size
    return tuple(offsets), end


def small_cutoff(block_bytes: int) -> int:
    """Bytes under which a tensor of a block of `block_bytes` always stays on the device."""
    return min(SMALL_TENSOR_BYTES, block_bytes // SMALL_TENSOR_SHARE)


@dataclass(frozen=True, slots=True)
class TensorProfile:
    """One parameter or buffer of a block.

    Attributes:
        name: Dotted name inside the block, without `_orig_mod.`.
        nbytes: Bytes from its first element to its last, as stored; 0 if another tensor's bytes hold it already. For a
            FIXED tensor, the device memory that its parts take.
        placement: Where it lives.
        reason: Why it does not stream; empty if it does.
        in_file: Its bytes are, as they stand, bytes of a file on disk, which the system can drop from memory.
    """

    name: str
    nbytes: int
    placement: Placement
    reason: str = ""
    in_file: bool = False


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """One transformer block: its name in the model and its tensors."""

    name: str
    tensors: tuple[TensorProfile, ...]

    @property
    def nbytes(self) -> int:
        """All bytes of the block, as stored."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the block's streamed tensors, without alignment."""
        return sum(t.nbytes for t in self.tensors if t.placement is Placement.STREAMED)

    @property
    def slab_bytes(self) -> int:
        """Length of the block's streamed tensors in a slab, with alignment: what one onload copies."""
        return slab_offsets(t.nbytes for t in self.tensors if t.placement is Placement.STREAMED)[1]

    @property
    def file_bytes(self) -> int:
        """The part of `streamed_bytes` that is in a file. A slab adds it to the memory that the system cannot drop; the
        rest is such memory already, and the slab takes its place.
        """
        return sum(t.nbytes for t in self.tensors if t.placement is Placement.STREAMED and t.in_file)

    @property
    def is_in_file(self) -> bool:
        """Whether all streamed tensors are in a file, so that the block needs no slab."""
        return 0 < self.streamed_bytes == self.file_bytes

    @property
    def slab_host_bytes(self) -> int:
        """Host memory of the block's slab: `slab_bytes` in whole pages."""
        return align(self.slab_bytes, mmap.PAGESIZE)

    @property
    def added_host_bytes(self) -> int:
        """What a slab of the block adds to the memory that the system cannot drop."""
        return self.slab_host_bytes if self.is_in_file else align(self.file_bytes, mmap.PAGESIZE)


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model's blocks in execution order (VACE blocks first), and the bytes outside them.

    Attributes:
        blocks: The blocks.
        other_bytes: All bytes outside them.
        files: Paths of the files that tensors are in, the one with the most bytes first.
    """

    blocks: tuple[BlockProfile, ...]
    other_bytes: int = 0
    files: tuple[str, ...] = ()

    @property
    def block_bytes(self) -> int:
        """All bytes of all blocks."""
        return sum(b.nbytes for b in self.blocks)

    @property
    def nbytes(self) -> int:
        """All bytes of the model."""
        return self.block_bytes + self.other_bytes

    @property
    def anonymous_bytes(self) -> int:
        """Bytes of the blocks that are in no file: host memory that holds them cannot be dropped."""
        return sum(t.nbytes for b in self.blocks for t in b.tensors if not t.in_file)

    @property
    def small_device_bytes(self) -> int:
        """Device memory of all tensors that always stay there: one buffer, and an allocation per FIXED tensor."""
        small = [t.nbytes for b in self.blocks for t in b.tensors if t.placement is Placement.SMALL]
        fixed = [t.nbytes for b in self.blocks for t in b.tensors if t.placement is Placement.FIXED]
        return device_bytes(slab_offsets(small)[1]) + sum(map(device_bytes, fixed))

    @property
    def fixed(self) -> dict[str, tuple[list[str], int]]:
        """Names and bytes of the FIXED tensors, by the reason why they do not stream."""
        found: dict[str, tuple[list[str], int]] = {}
        for block, tensor in ((b, t) for b in self.blocks for t in b.tensors if t.placement is Placement.FIXED):
            names, nbytes = found.get(tensor.reason, ([], 0))
            found[tensor.reason] = [*names, f"{block.name}.{tensor.name}"], nbytes + tensor.nbytes
        return found

    @property
    def lanes(self) -> tuple[int, ...]:
        """For each block the number of its lane: 0, or that of a group that has a slot of its own."""
        named = [lane_of(block.name) for block in self.blocks]
        number = {lane: n for n, lane in enumerate([MAIN, *dict.fromkeys(lane for lane in named if lane != MAIN)])}
        return tuple(number[lane] for lane in named)

    def resident_device_bytes(self, indices: Iterable[int]) -> int:
        """Device memory of the streamed tensors of the blocks at `indices` when they are resident."""
        return sum(device_bytes(self.blocks[i].slab_bytes) for i in indices)

    def slot_bytes(self, indices: Iterable[int]) -> int:
        """Device memory of one slot: the largest slab among the blocks at `indices`."""
        return device_bytes(max((self.blocks[i].slab_bytes for i in indices), default=0))
