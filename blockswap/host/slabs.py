"""HostStore: the host's side of every swapped block: a copy of its streamed tensors, page-locked where the plan and the
host allow, or the file that they come from.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import mmap
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...hardware.disk import FileRegion
from ...hardware.pinning import PinBudget, Registrar, register_result
from ..device.streams import Streams
from ..device.worker import Flag
from ..errors import WeightFileError
from ..model.layout import align, slab_offsets
from ..model.tensors import (
    copy_bytes,
    element_view,
    flat,
    plain_view,
    same_layout,
    span_bytes,
    storage_key,
    version_of,
)
from ..plan.swap_plan import STAGING_SLABS, HostTier
from .pages import PageMemory
from .weight_files import WeightFiles

logger = logging.getLogger(__name__)

PAGEABLE_REST = "the rest stays pageable, and its copies are slower"
FROM_FILE = "it is read from its file at each forward instead"


@dataclass(slots=True)
class Slab:
    """One block's streamed tensors in host memory, one after the other, each 256-byte aligned, with its strides.

    In the file tier there is no such memory: the masters are the loader's mapping of the file, and the bytes are read
    as they are needed.

    Attributes:
        pages: The memory; None in the file tier.
        used_bytes: Bytes that an onload copies: from the first tensor's first byte to the last tensor's last.
        views: The master of each tensor: a view of the slab with its dtype, shape and strides.
        tier: How the bytes travel.
        regions: The bytes of a file that each tensor was when the slab was filled; None where it was none. Empty once
            the slab has been edited.
        originals: The loader's tensors, if all are in a file: views of its mapping, which cost no memory.
        sources: Where each tensor's bytes came from; empty once the slab has been edited.
        bound: The tensors that point at the masters, held weakly, and the in-place edits that each had counted.
        checksums: Of the masters as they were filled; None until debug mode needs them.
    """

    pages: PageMemory | None
    used_bytes: int
    views: tuple[torch.Tensor, ...]
    tier: HostTier
    regions: tuple[FileRegion | None, ...] = ()
    originals: tuple[torch.Tensor, ...] = ()
    sources: tuple[TensorFingerprint, ...] = ()
    bound: tuple[tuple[weakref.ref[torch.Tensor], int | None], ...] = ()
    checksums: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Bytes of its memory, in whole pages."""
        return 0 if self.pages is None else self.pages.size

    @property
    def is_pinned(self) -> bool:
        """Whether its memory is page-locked."""
        return self.pages is not None and self.pages.is_pinned

    def unlock(self) -> None:
        """Waits for the last copy, then unlocks the pages."""
        if self.pages is not None:
            self.tier = HostTier.PAGEABLE
            self.pages.unpin()

    def fill(self, tensors: Sequence[torch.Tensor], regions: Sequence[FileRegion | None], files: WeightFiles) -> None:
        """Puts the tensors' bytes into their masters, except those of tensors that point at their master already.

        What is in a file is read from it: a mapping is read page by page, 7 times slower (see docs/performance.md).

        Raises:
            WeightFileError: A file has changed or cannot be read.
        """
        assert self.pages is not None, "the file tier has no memory"
        self.pages.settle()
        offsets, _ = slab_offsets(map(span_bytes, tensors))
        pieces = []
        for view, tensor, region, offset in zip(self.views, tensors, regions, offsets, strict=True):
            if tensor.data_ptr() == view.data_ptr():
                continue
            if region is None:
                copy_bytes(view, tensor)
            else:
                pieces.append((region, self.pages.buffer(offset, region.nbytes)))
        files.read(pieces)
        self.sources = tuple(map(TensorFingerprint.of, tensors, regions))
        self.regions = tuple(regions)
        if all(regions):
            self.originals = tuple(map(plain_view, tensors))
        self.checksums = None

    def forget_sources(self) -> None:
        """A master was edited: the slab has other bytes than what it was filled from."""
        self.sources, self.regions, self.originals, self.checksums = (), (), (), None

    def give_back(self, files: WeightFiles) -> None:
        """Points the tensors that point at the masters at the loader's mapping again, if the file has the same bytes.

        Edits of an inference tensor are not counted, so parts of the bytes are compared.
        """
        self.notice_edits()
        if self.pages is None or not self.originals or not self._is_as_in_file(files):
            return
        for (reference, _), view, original in zip(self.bound, self.views, self.originals, strict=True):
            tensor = reference()
            if tensor is not None and tensor.data_ptr() == view.data_ptr():
                with torch._C.DisableTorchFunctionSubclass():
                    tensor.data = original

    def _is_as_in_file(self, files: WeightFiles) -> bool:
        assert self.pages is not None
        offsets, _ = slab_offsets(map(span_bytes, self.views))
        found = []
        for region, offset in zip(self.regions, offsets, strict=True):
            assert region is not None
            size = min(COMPARED_BYTES, region.nbytes)
            for start in {0, (region.nbytes - size) // 2, region.nbytes - size}:
                part = replace(region, offset=region.offset + start, nbytes=size)
                found.append((part, bytearray(size), self.pages.buffer(offset + start, size)))
        try:
            files.read([(region, memoryview(read)) for region, read, _ in found])
        except WeightFileError as failure:
            logger.warning("weights stay in host memory, since they cannot be read again: %s", failure)
            return False
        return all(read == held for _, read, held in found)

    def watch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Records the tensors that point at the masters now, for `notice_edits`."""
        self.bound = tuple((weakref.ref(tensor), version_of(tensor)) for tensor in tensors)

    def notice_edits(self) -> None:
        """Clears `sources` if a watched tensor has been edited since `watch`."""
        for reference, version in self.bound:
            tensor = reference()
            if tensor is not None and version_of(tensor) != version:
                self.forget_sources()

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the slab has the bytes of these tensors: they are its masters, or what it was filled from."""
        return self.fits(tensors) and all(
            tensor.data_ptr() == view.data_ptr() or (bool(self.sources) and self.sources[i].matches(tensor))
            for i, (view, tensor) in enumerate(zip(self.views, tensors, strict=True))
        )

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors have the dtypes, shapes, strides and kinds of the masters."""
        return len(tensors) == len(self.views) and all(map(same_layout, tensors, self.views))

    def is_only_ours(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether only the slab and `tensors` refer to its bytes: no state dict, other block, or other tensor."""
        own = sum(tensor.data_ptr() == view.data_ptr() for tensor, view in zip(tensors, self.views, strict=True))
        # 2: the pages' tensor, and the storage object of this call.
        assert self.pages is not None
        return torch._C._storage_Use_Count(storage_key(self.pages.tensor)) <= len(self.views) + own + 2


@dataclass(slots=True)
class ComingSlab:
    """A slab that is still to be filled.

    Attributes:
        used_bytes: As of the slab.
        take: Fills it, if that has not been done, and returns it; called in the worker.
        tier: Not known before.
    """

    used_bytes: int
    take: Callable[[], Slab]
    tier: None = None


COMPARED_BYTES = 64 << 10
"""Bytes at the start, the middle and the end of a tensor that are compared with its file. An edit by a LoRA changes
nearly all elements."""

SAMPLED_ELEMENTS = 4096
"""Elements that are compared to find edits of an inference tensor, which does not count them. An edit by a LoRA
changes nearly all elements."""


@dataclass(slots=True)
class TensorFingerprint:
    """Where a slab's tensor came from, held weakly: while its storage lives, the same place has the same bytes."""

    storage: StorageWeakRef
    place: tuple[Any, ...]
    sample: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor, region: FileRegion | None = None) -> TensorFingerprint:
        # An edited page of a mapping is in no file: no sample is needed, which would read pages all over the file.
        sample = _sample(tensor) if region is None else None
        return cls(StorageWeakRef(tensor.untyped_storage()), _place(tensor), sample)

    def matches(self, tensor: torch.Tensor) -> bool:
        if self.storage.expired() or self.storage.cdata != storage_key(tensor) or self.place != _place(tensor):
            return False
        if self.sample is None:
            return True
        sample = _sample(tensor)
        return sample is not None and torch.equal(self.sample, sample)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version_of(tensor)


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Some bytes of a tensor that does not count its edits; None for a tensor that does."""
    if version_of(tensor) is not None or tensor.numel() == 0:
        return None
    elements = flat(tensor)
    # On the host: a fingerprint must not hold device memory.
    sample = elements[:: max(1, elements.numel() // SAMPLED_ELEMENTS)]
    return sample.to("cpu", copy=True).view(torch.uint8)


class Locking:
    """One thread that locks one slab's pages while the host thread fills the next slab.

    Locking takes long, since the driver walks every page, but it releases the GIL. The thread or the caller of `result`
    does the work, whichever comes first, so that nothing waits for a thread that an interrupt kept from starting.

    Args:
        pages: Filled pages.
        registrar: Locks them; a refusal is tried again once.
        budget: Counts the locked bytes.
    """

    def __init__(self, pages: PageMemory, registrar: Registrar, budget: PinBudget) -> None:
        self._pages = [pages]  # taken out before they are locked: a thread that is ending must not hold them
        self._registrar = registrar
        self._budget = budget
        self._code = -1
        self._failure: BaseException | None = None
        self._claim = threading.Lock()
        self._over = Flag()

    def start(self) -> None:
        """Starts the thread; if the system has none left, `result` does the work."""
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._lock, ())  # Thread.start would wait until the thread runs

    @property
    def is_over(self) -> bool:
        """Whether the work has ended, also in failure."""
        return self._over.is_set

    def result(self) -> int:
        """Waits for the end, through an interrupt too; 0, or the driver's error code. Raises what locking raised."""
        try:
            self._lock()
            self._over.wait()
        finally:
            self._over.wait()  # again: an interrupt ends the wait, but not the work of the driver
        failure, self._failure = self._failure, None
        if failure is None:
            return self._code
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame: the cycle would hold the pages

    def _lock(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._code = lock(self._pages.pop(), self._registrar, self._budget)
        except BaseException as failure:  # noqa: BLE001 - the host thread raises it in `result`
            self._failure = failure
        finally:
            self._over.set()


def lock(pages: PageMemory, registrar: Registrar, budget: PinBudget) -> int:
    """Locks pages, with one retry; returns 0 or the driver's error code."""
    return pages.pin(registrar, budget) and pages.pin(registrar, budget)


@dataclass(slots=True)
class HostStore:
    """Slabs of one transformer, block by block, in the tiers of a plan.

    Attributes:
        streams: The device that reads the slabs.
        registrar: Page-locks host memory for the device; None where nothing can be locked.
        budget: Shared by all stores of the process.
        room: Bytes that may be added to memory that the system cannot drop, read again for each slab; None limits
            nothing.
        slabs: Slab of each swapped block.
        spare: Page-locked memory of another model's slabs, for slabs of the same size.
        refusals: Why blocks are in a tier below the planned one; cleared by each adopt.
        is_lock_refused: Whether one of these is a page-lock, after which no other is tried.
        files: The files that weights are read from.
        regions: Of each block of the last adopt, its bytes in files.
    """

    streams: Streams
    registrar: Registrar | None
    budget: PinBudget
    room: Callable[[], int] | None = None
    slabs: dict[int, Slab] = field(default_factory=dict)
    spare: list[PageMemory] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    is_lock_refused: bool = False
    files: WeightFiles = field(default_factory=WeightFiles)
    regions: dict[int, tuple[FileRegion, ...]] = field(default_factory=dict)
    _logged: set[str] = field(default_factory=set)
    _locking: tuple[Slab, Locking] | None = None

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes of the slabs, in whole pages."""
        return sum(slab.size for slab in list(self.slabs.values()) if slab.is_pinned) + self.spare_bytes

    @property
    def spare_bytes(self) -> int:
        """Bytes of `spare`."""
        return sum(pages.size for pages in self.spare)

    def put(
        self,
        block: int,
        tensors: Sequence[torch.Tensor],
        *,
        tier: HostTier,
        regions: Sequence[FileRegion | None] | None = None,
    ) -> Slab:
        """The slab that holds the tensors of `block`, made or filled if needed, in `tier` or the best below it.

        A thread may still lock it; call `finish_locking` before the first copy.

        Args:
            block: Index of the block.
            tensors: Its streamed tensors. The caller binds them to the slab's views, then calls `Slab.watch`.
            tier: The planned tier.
            regions: The bytes of a file that each tensor is, None where it is none; None if no tensor is.

        Raises:
            HostMemoryError: The system has too little memory for the slab.
            WeightFileError: A file has changed or cannot be read.
        """
        regions = (None,) * len(tensors) if regions is None else tuple(regions)
        slab = self.slabs.get(block)
        if slab is not None:
            slab.notice_edits()
        if tier is HostTier.FILE:
            if all(regions):
                return self._put_file(block, tensors, regions)
            tier = HostTier.STAGED
        if slab is None or slab.pages is None or not slab.holds(tensors):
            if slab is None or slab.pages is None or not (slab.fits(tensors) and slab.is_only_ours(tensors)):
                self.drop(block)
                if all(regions) and not self._has_room(tensors):
                    return self._put_file(block, tensors, regions)
                slab = self.slabs[block] = self._make(tensors)
            slab.fill(tensors, regions, self.files)
        self._move(slab, tier)
        return slab

    def _put_file(self, block: int, tensors: Sequence[torch.Tensor], regions: tuple[FileRegion | None, ...]) -> Slab:
        self.drop(block)  # first: it points the tensors at the loader's mapping again
        views, used_bytes = tuple(map(plain_view, tensors)), slab_offsets(map(span_bytes, tensors))[1]
        slab = self.slabs[block] = Slab(None, used_bytes, views, HostTier.FILE, regions)
        slab.sources = tuple(map(TensorFingerprint.of, tensors, regions))
        return slab

    def _has_room(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the host has room for a new slab now, whatever it had when the plan was made."""
        size = align(slab_offsets(map(span_bytes, tensors))[1], mmap.PAGESIZE)
        if self.room is None or any(pages.size == size for pages in self.spare):
            return True
        left = self.room()
        if size > left:
            self._say(f"not enough RAM for a slab: {size:,} bytes needed, {left:,} left", fate=FROM_FILE)
        return size <= left

    def drop(self, block: int) -> None:
        """Gives up the slab of `block`, if there is one; masters live as long as parameters point at them."""
        slab = self.slabs.pop(block, None)
        if slab is not None:
            with contextlib.ExitStack() as stack:
                if slab.pages is not None:
                    stack.callback(slab.pages.unpin)
                    stack.callback(slab.pages.settle)
                    stack.callback(slab.give_back, self.files)
                self.finish_locking()  # first: a lock that succeeds after the unlocking would stay

    def hand_over(self) -> list[PageMemory]:
        """Gives up every slab whose weights are in a file; returns the page-locked memory of them, still locked."""
        self.finish_locking()
        handed = []
        for block, slab in list(self.slabs.items()):
            slab.give_back(self.files)
            if slab.pages is None or not slab.originals:
                continue
            slab.pages.settle()
            if slab.pages.is_pinned:
                handed.append(slab.pages)
            del self.slabs[block]
        return handed

    def keep_spare(self, sizes: Sequence[int]) -> None:
        """Unlocks and frees the spare memory but for one piece per slab that will be made.

        Args:
            sizes: Bytes of these slabs.
        """
        wanted, pages = Counter(align(size, mmap.PAGESIZE) for size in sizes), self.spare
        self.spare = []
        with contextlib.ExitStack() as stack:
            for one in pages:
                if wanted[one.size] > 0:
                    wanted[one.size] -= 1
                    self.spare.append(one)
                else:
                    stack.callback(one.unpin)

    def read_ahead(self, most_bytes: int) -> None:
        """Lets the system read the first blocks that have no slab into its cache of files. Blocks the calling thread
        while the disk is busy.

        Args:
            most_bytes: Bytes after which it stops.
        """
        for block, regions in sorted(self.regions.items()):
            if block not in self.slabs or self.slabs[block].pages is None:
                most_bytes -= sum(region.nbytes for region in regions)
                if most_bytes < 0:
                    return
                self.files.read_ahead(regions)

    def unlock(self) -> None:
        """Unlocks every slab after its last copy; slabs stay, and the next adopt chooses their tiers again."""
        with contextlib.ExitStack() as stack:
            for slab in self.slabs.values():
                stack.callback(slab.unlock)  # each slab, even if another fails
            self.finish_locking()

    def release(self) -> None:
        """Drops every slab."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.files.close)
            stack.callback(self.keep_spare, ())
            for block in self.slabs:
                stack.callback(self.drop, block)  # each slab, even if another fails

    def use(self, streams: Streams) -> None:
        """Called at an adopt: waits for the copies of other streams; from now on `streams` read the slabs."""
        self.refusals.clear()
        self.is_lock_refused = False
        if streams is not self.streams:
            for pages in (*(slab.pages for slab in self.slabs.values()), *self.spare):
                if pages is not None:
                    pages.settle()
                    pages.use(streams)
            self.streams = streams

    def make_staging(self) -> list[PageMemory]:
        """Staging slabs for the blocks that need them; waits first until the last slab is locked.

        After a refusal, as many pinned slabs are unlocked to make room. If the staging slabs cannot be locked, the
        staged blocks become pageable, and those of the file tier go through ordinary memory. Returns an empty list if
        no block needs one.
        """
        self.finish_locking()
        staged = [slab for slab in self.slabs.values() if slab.tier in (HostTier.STAGED, HostTier.FILE)]
        if not staged:
            return []
        if self.is_lock_refused:
            pinned = [slab for slab in self.slabs.values() if slab.tier is HostTier.PINNED]
            for slab in pinned[-STAGING_SLABS:]:
                assert slab.pages is not None
                slab.pages.unpin()
                slab.tier = HostTier.STAGED
                staged.append(slab)
        pages = self.staging_of(max(slab.used_bytes for slab in staged))
        if pages:
            return pages
        for slab in staged:
            if slab.tier is HostTier.STAGED:
                slab.tier = HostTier.PAGEABLE
        sizes = [slab.used_bytes for slab in staged if slab.tier is HostTier.FILE]
        return [PageMemory(max(sizes), self.streams) for _ in range(STAGING_SLABS)] if sizes else []

    def staging_of(self, nbytes: int) -> list[PageMemory]:
        """Page-locked staging slabs of at least `nbytes` each; none if one of them cannot be locked."""
        pages = [PageMemory(nbytes, self.streams) for _ in range(STAGING_SLABS)]
        with contextlib.ExitStack() as stack:
            for page in pages:
                stack.callback(page.unpin)
            if all(self._lock_staging(page) for page in pages):
                stack.pop_all()
                return pages
        return []

    def make_pages(self, nbytes: int, *, beside: int | None) -> PageMemory:
        """Memory for other uses than slabs, page-locked where the budget allows and the driver agrees.

        Args:
            nbytes: Bytes of it.
            beside: Bytes of slabs, locked already or not yet, that the budget must hold as well; None locks nothing.

        Raises:
            HostMemoryError: The system has no memory for it.
        """
        pages = PageMemory(nbytes, self.streams)
        if beside is not None and self.registrar is not None:
            self.finish_locking()  # first: it takes from the budget, or is refused
            left = self.budget.left_bytes - max(0, beside - self.pinned_bytes)
            if not self.is_lock_refused and pages.size <= left:
                pages.pin(self.registrar, self.budget)
        return pages

    def _lock_staging(self, pages: PageMemory) -> bool:
        if self.registrar is None or not self._is_within_budget(pages, "a staging slab"):
            return False
        return self._is_locked(lock(pages, self.registrar, self.budget), pages, "a staging slab")

    def _may_lock(self, pages: PageMemory) -> bool:
        if self.room is not None and self.room() <= 0:
            self._refuse("not enough RAM left to page-lock more of it")
            return False
        return self._is_within_budget(pages, "a slab")

    def _is_within_budget(self, pages: PageMemory, what: str) -> bool:
        left = self.budget.left_bytes
        if pages.size > left:
            self._refuse(f"not enough pin budget for {what}: {pages.size:,} bytes needed, {left:,} left")
        return pages.size <= left

    def _is_locked(self, code: int, pages: PageMemory, what: str) -> bool:
        if code:
            self._refuse(f"{what} of {pages.size:,} bytes could not be page-locked: {register_result(code)}")
        return not code

    def finish_locking(self) -> None:
        """Waits until the slab that is being locked is locked; if it cannot be, it keeps the tier below."""
        if self._locking is None:
            return
        slab, locking = self._locking
        try:
            code = locking.result()
        finally:
            if locking.is_over:
                self._locking = None
        if slab.pages is not None and self._is_locked(code, slab.pages, "a slab"):
            slab.tier = HostTier.PINNED

    def _refuse(self, why: str) -> None:
        self.is_lock_refused = True
        self._say(why, fate=PAGEABLE_REST)

    def _say(self, why: str, *, fate: str) -> None:
        self.refusals.append(why)
        if why not in self._logged:
            self._logged.add(why)
            logger.warning("%s; %s", why, fate)

    def _make(self, tensors: Sequence[torch.Tensor]) -> Slab:
        offsets, used_bytes = slab_offsets(map(span_bytes, tensors))
        size = align(max(used_bytes, 1), mmap.PAGESIZE)
        fitting = next((pages for pages in self.spare if pages.size == size), None)
        if fitting is not None:
            self.spare.remove(fitting)
        pages = fitting or PageMemory(used_bytes, self.streams)
        views = tuple(
            element_view(pages.tensor, tensor, offset=offset) for tensor, offset in zip(tensors, offsets, strict=True)
        )
        return Slab(pages, used_bytes, views, HostTier.PAGEABLE)

    def _move(self, slab: Slab, tier: HostTier) -> None:
        """Moves a filled slab to a tier, and to the tier below pinned until or unless it is locked."""
        self.finish_locking()  # one at a time: after the first refusal no other lock is tried
        assert slab.pages is not None
        if tier is not HostTier.PINNED:
            slab.pages.unpin()
        elif not slab.pages.is_pinned:
            tier = HostTier.STAGED
            if self.registrar is not None and not self.is_lock_refused and self._may_lock(slab.pages):
                self._locking = slab, Locking(slab.pages, self.registrar, self.budget)
                self._locking[1].start()  # only now: `drop` and `unlock` must know of the lock
        slab.tier = tier
