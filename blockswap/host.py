"""HostStore: one host copy of every block's streamed tensors, page-locked if it may be, and the tiers below that."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .decision import STAGING_SLABS, HostTier
from .layout import slab_offsets
from .pages import REGISTER_RESULTS, PageMemory, PinBudget, Registrar
from .streams import Streams
from .tensors import element_view, flat, same_layout, span_bytes, version_of

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    """Where a slab's tensor came from, held weakly: living storage at the same place is the same bytes."""

    storage: StorageWeakRef
    place: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Source:
        return cls(StorageWeakRef(tensor.untyped_storage()), _place(tensor))

    def is_still(self, tensor: torch.Tensor) -> bool:
        return (
            not self.storage.expired()
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and self.place == _place(tensor)
        )


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version_of(tensor)


@dataclass(slots=True)
class Slab:
    """One block's streamed tensors in host memory, one behind the other, each 256-byte aligned, strides kept.

    Attributes:
        pages: The memory.
        used_bytes: Length from the first tensor's first byte to the last one's last: what an onload copies.
        views: The master of each tensor: its dtype, shape and strides over the slab's bytes.
        tier: How the bytes travel.
        sources: Where each tensor's bytes came from; empty once they were edited.
        versions: In-place edits that each tensor had counted when it was put here.
        reading: The staging job that reads the slab, if any.
    """

    pages: PageMemory
    used_bytes: int
    views: tuple[torch.Tensor, ...]
    tier: HostTier
    sources: tuple[_Source, ...] = ()
    versions: tuple[int | None, ...] = ()
    reading: Any = None

    @property
    def memory(self) -> torch.Tensor:
        """The bytes, uint8, `(whole pages,)`."""
        return self.pages.tensor

    @property
    def is_staged(self) -> bool:
        """Whether copies go through the worker."""
        return self.tier is HostTier.STAGED

    def settle(self) -> None:
        """Waits on the host until nothing reads the slab any more: neither a copy nor the worker."""
        if self.reading is not None:
            self.reading.join()
            self.reading = None
        self.pages.settle()

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Writes the tensors' bytes into their masters, unless they are these masters already."""
        self.settle()
        with torch.inference_mode(mode=False), torch.no_grad():
            for view, tensor in zip(self.views, tensors, strict=True):
                if tensor.data_ptr() != view.data_ptr():
                    flat(view).copy_(flat(tensor))
        self.sources = tuple(_Source.of(tensor) for tensor in tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the slab's bytes are these tensors': its own masters, or the living storage it was filled from."""
        return self.fits(tensors) and all(
            self.is_master(i, tensor) or (bool(self.sources) and self.sources[i].is_still(tensor))
            for i, tensor in enumerate(tensors)
        )

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors of these dtypes, shapes and strides lie in the slab as they are."""
        return len(tensors) == len(self.views) and all(map(same_layout, tensors, self.views))

    def is_master(self, index: int, tensor: torch.Tensor) -> bool:
        """Whether `tensor` points at the slab's own bytes of the tensor at `index`."""
        return tensor.data_ptr() == self.views[index].data_ptr()

    def may_be_refilled(self, tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> bool:
        """Whether nobody's bytes are lost if the slab is filled with other ones.

        Args:
            tensors: What it is to be filled with.
            pointers: Addresses of all tensors of the model, sorted: weights may have changed places.
        """
        begin = self.memory.data_ptr()
        inside = pointers[bisect_left(pointers, begin) : bisect_left(pointers, begin + self.pages.size)]
        own = {t.data_ptr() for i, t in enumerate(tensors[: len(self.views)]) if self.is_master(i, t)}
        return self.fits(tensors) and own.issuperset(inside)


@dataclass(slots=True)
class HostStore:
    """Slabs of one transformer, block by block, in the tiers of a plan.

    Attributes:
        streams: The device that reads the slabs.
        registrar: Page-locks for it; None where nothing can be locked.
        budget: Shared by all stores of the process.
        slabs: Slab of each swapped block.
        refusals: What kept a block from its planned tier; each is said once.
    """

    streams: Streams
    registrar: Registrar | None
    budget: PinBudget
    slabs: dict[int, Slab] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def put(self, block: int, tensors: Sequence[torch.Tensor], *, tier: HostTier, pointers: Sequence[int]) -> Slab:
        """The slab that holds the tensors of `block`, made or filled if need be, in `tier` or the best below it.

        Args:
            block: Index of the block.
            tensors: Its streamed tensors.
            tier: Where they should be.
            pointers: Addresses of all tensors of the model, sorted.

        Raises:
            HostMemoryError: The system has no memory for it.
        """
        slab = self.slabs.get(block)
        if slab is not None and slab.versions != tuple(map(version_of, tensors)):
            slab.sources = ()
        if slab is None or not slab.holds(tensors):
            if slab is None or not slab.may_be_refilled(tensors, pointers):
                self.drop(block)
                slab = self.slabs[block] = self._make(tensors)
            slab.fill(tensors)
        self._move(slab, tier)
        return slab

    def drop(self, block: int) -> None:
        """`block` has no need of a slab any more; its masters live on as long as parameters point at them."""
        slab = self.slabs.pop(block, None)
        if slab is not None:
            slab.settle()
            slab.pages.unpin()

    def release(self) -> None:
        """Unlocks everything after its last copy. Masters live on as long as parameters point at them."""
        for block in list(self.slabs):
            self.drop(block)

    def use(self, streams: Streams) -> None:
        """From here on `streams` read the slabs; copies of others are waited for first."""
        if streams is not self.streams:
            for slab in self.slabs.values():
                slab.settle()
                slab.pages.use(streams)
            self.streams = streams

    def make_staging(self) -> list[PageMemory]:
        """Page-locked staging slabs for the staged blocks; none if there are no such blocks, or if the pages cannot be
        locked: the blocks are pageable then. A lock refused before is tried once more with as many slabs unlocked.
        """
        staged = [slab for slab in self.slabs.values() if slab.is_staged]
        if not staged:
            return []
        if self.refusals:
            pinned = [slab for slab in self.slabs.values() if slab.tier is HostTier.PINNED]
            for slab in pinned[-STAGING_SLABS:]:
                slab.pages.unpin()
                slab.tier = HostTier.STAGED
                staged.append(slab)
        size = max(slab.used_bytes for slab in staged)
        pages = [PageMemory(size, self.streams) for _ in range(STAGING_SLABS)]
        if all(self.lock(page, "a staging slab", again=True) for page in pages):
            return pages
        for page in pages:
            page.unpin()
        for slab in staged:
            slab.tier = HostTier.PAGEABLE
        return []

    def bytes_in(self, tier: HostTier) -> int:
        """Host memory of the slabs of one tier."""
        return sum(slab.pages.size for slab in self.slabs.values() if slab.tier is tier)

    def lock(self, pages: PageMemory, what: str, *, again: bool = False) -> bool:
        """Page-locks, with one retry; a refusal is said, and ends the trying unless `again`."""
        if self.registrar is None or (self.refusals and not again):
            return False
        if pages.size > self.budget.left_bytes:
            self._refuse(
                f"{what} expects {pages.size:,} bytes of the pin budget but {self.budget.left_bytes:,} are left"
            )
            return False
        result = pages.pin(self.registrar, self.budget) and pages.pin(self.registrar, self.budget)
        if result:
            why = REGISTER_RESULTS.get(result, "an error of the driver")
            self._refuse(f"{what} of {pages.size:,} bytes could not be page-locked: code {result}, {why}")
        return not result

    def _refuse(self, why: str) -> None:
        self.refusals.append(why)
        logger.warning("%s; what is left stays pageable, and its copies are slower", why)

    def _make(self, tensors: Sequence[torch.Tensor]) -> Slab:
        offsets, used_bytes = slab_offsets(map(span_bytes, tensors))
        pages = PageMemory(used_bytes, self.streams)
        views = tuple(
            element_view(pages.tensor, tensor, offset=offset) for tensor, offset in zip(tensors, offsets, strict=True)
        )
        return Slab(pages, used_bytes, views, HostTier.PAGEABLE)

    def _move(self, slab: Slab, tier: HostTier) -> None:
        """Changes the tier of a filled slab; what cannot be locked falls to the planned tier's next."""
        if tier is not HostTier.PINNED:
            slab.pages.unpin()
        elif not slab.pages.is_pinned and not self.lock(slab.pages, "a slab"):
            tier = HostTier.STAGED
        slab.tier = tier
