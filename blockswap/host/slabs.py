"""HostStore: one host copy of every swapped block's streamed tensors, page-locked where the plan and the host allow."""

from __future__ import annotations

import _thread
import contextlib
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...hardware.pinning import PinBudget, Registrar, register_result
from ..device.streams import Streams
from ..device.worker import Flag
from ..model.layout import slab_offsets
from ..model.tensors import copy_bytes, element_view, flat, same_layout, span_bytes, storage_key, version_of
from ..plan.swap_plan import STAGING_SLABS, HostTier
from .pages import PageMemory

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Slab:
    """One block's streamed tensors in host memory, one after the other, each 256-byte aligned, with its strides.

    Attributes:
        pages: The memory.
        used_bytes: Bytes that an onload copies: from the first tensor's first byte to the last tensor's last.
        views: The master of each tensor: a view of the slab with its dtype, shape and strides.
        tier: How the bytes travel.
        sources: Where each tensor's bytes came from; empty once the slab has been edited.
        bound: The tensors that point at the masters, held weakly, and the in-place edits that each had counted.
        checksums: Of the masters as they were filled; None until debug mode needs them.
    """

    pages: PageMemory
    used_bytes: int
    views: tuple[torch.Tensor, ...]
    tier: HostTier
    sources: tuple[TensorFingerprint, ...] = ()
    bound: tuple[tuple[weakref.ref[torch.Tensor], int | None], ...] = ()
    checksums: tuple[int, ...] | None = None

    def unlock(self) -> None:
        """Waits for the last copy, then unlocks the pages."""
        self.tier = HostTier.PAGEABLE
        self.pages.unpin()

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copies the tensors' bytes into their masters, except those of tensors that point at their master already."""
        self.pages.settle()
        for view, tensor in zip(self.views, tensors, strict=True):
            if tensor.data_ptr() != view.data_ptr():
                copy_bytes(view, tensor)
        self.sources = tuple(map(TensorFingerprint.of, tensors))
        self.checksums = None

    def watch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Records the tensors that point at the masters now, for `notice_edits`."""
        self.bound = tuple((weakref.ref(tensor), version_of(tensor)) for tensor in tensors)

    def notice_edits(self) -> None:
        """Clears `sources` if a watched tensor has been edited since `watch`."""
        for reference, version in self.bound:
            tensor = reference()
            if tensor is not None and version_of(tensor) != version:
                self.sources = ()

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
        return torch._C._storage_Use_Count(storage_key(self.pages.tensor)) <= len(self.views) + own + 2


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
    def of(cls, tensor: torch.Tensor) -> TensorFingerprint:
        return cls(StorageWeakRef(tensor.untyped_storage()), _place(tensor), _sample(tensor))

    def matches(self, tensor: torch.Tensor) -> bool:
        if self.storage.expired() or self.storage.cdata != storage_key(tensor) or self.place != _place(tensor):
            return False
        sample = _sample(tensor)
        return self.sample is None or (sample is not None and torch.equal(self.sample, sample))


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
        slabs: Slab of each swapped block.
        refusals: Why blocks are in a tier below the planned one; cleared by each adopt.
    """

    streams: Streams
    registrar: Registrar | None
    budget: PinBudget
    slabs: dict[int, Slab] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    _logged: set[str] = field(default_factory=set)
    _locking: tuple[Slab, Locking] | None = None

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes of the slabs, in whole pages."""
        return sum(slab.pages.size for slab in self.slabs.values() if slab.pages.is_pinned)

    def put(self, block: int, tensors: Sequence[torch.Tensor], *, tier: HostTier) -> Slab:
        """The slab that holds the tensors of `block`, made or filled if needed, in `tier` or the best below it.

        A thread may still lock it; call `finish_locking` before the first copy.

        Args:
            block: Index of the block.
            tensors: Its streamed tensors. The caller binds them to the slab's views, then calls `Slab.watch`.
            tier: The planned tier.

        Raises:
            HostMemoryError: The system has too little memory for the slab.
        """
        slab = self.slabs.get(block)
        if slab is not None:
            slab.notice_edits()
        if slab is None or not slab.holds(tensors):
            if slab is None or not (slab.fits(tensors) and slab.is_only_ours(tensors)):
                self.drop(block)
                slab = self.slabs[block] = self._make(tensors)
            slab.fill(tensors)
        self._move(slab, tier)
        return slab

    def drop(self, block: int) -> None:
        """Gives up the slab of `block`, if there is one; masters live as long as parameters point at them."""
        slab = self.slabs.pop(block, None)
        if slab is not None:
            with contextlib.ExitStack() as stack:
                stack.callback(slab.pages.unpin)
                stack.callback(slab.pages.settle)
                self.finish_locking()  # first: a lock that succeeds after the unlocking would stay

    def unlock(self) -> None:
        """Unlocks every slab after its last copy; slabs stay, and the next adopt chooses their tiers again."""
        with contextlib.ExitStack() as stack:
            for slab in self.slabs.values():
                stack.callback(slab.unlock)  # each slab, even if another fails
            self.finish_locking()

    def release(self) -> None:
        """Drops every slab."""
        with contextlib.ExitStack() as stack:
            for block in self.slabs:
                stack.callback(self.drop, block)  # each slab, even if another fails

    def use(self, streams: Streams) -> None:
        """Called at an adopt: waits for the copies of other streams; from now on `streams` read the slabs."""
        self.refusals.clear()
        if streams is not self.streams:
            for slab in self.slabs.values():
                slab.pages.settle()
                slab.pages.use(streams)
            self.streams = streams

    def make_staging(self) -> list[PageMemory]:
        """Page-locked staging slabs for the staged blocks; waits first until the last slab is locked.

        After a refusal, as many pinned slabs are unlocked to make room. If the staging slabs cannot be locked, the
        staged blocks become pageable. Returns an empty list then, and if no block is staged.
        """
        self.finish_locking()
        staged = [slab for slab in self.slabs.values() if slab.tier is HostTier.STAGED]
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
        with contextlib.ExitStack() as stack:
            for page in pages:
                stack.callback(page.unpin)
            if all(self._lock_staging(page) for page in pages):
                stack.pop_all()
                return pages
        for slab in staged:
            slab.tier = HostTier.PAGEABLE
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
            if not self.refusals and pages.size <= left:
                pages.pin(self.registrar, self.budget)
        return pages

    def _lock_staging(self, pages: PageMemory) -> bool:
        if self.registrar is None or not self._is_within_budget(pages, "a staging slab"):
            return False
        return self._is_locked(lock(pages, self.registrar, self.budget), pages, "a staging slab")

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
        if self._is_locked(code, slab.pages, "a slab"):
            slab.tier = HostTier.PINNED

    def _refuse(self, why: str) -> None:
        self.refusals.append(why)
        if why not in self._logged:
            self._logged.add(why)
            logger.warning("%s; the rest stays pageable, and its copies are slower", why)

    def _make(self, tensors: Sequence[torch.Tensor]) -> Slab:
        offsets, used_bytes = slab_offsets(map(span_bytes, tensors))
        pages = PageMemory(used_bytes, self.streams)
        views = tuple(
            element_view(pages.tensor, tensor, offset=offset) for tensor, offset in zip(tensors, offsets, strict=True)
        )
        return Slab(pages, used_bytes, views, HostTier.PAGEABLE)

    def _move(self, slab: Slab, tier: HostTier) -> None:
        """Moves a filled slab to a tier, and to the tier below pinned until or unless it is locked."""
        self.finish_locking()  # one at a time: after the first refusal no other lock is tried
        if tier is not HostTier.PINNED:
            slab.pages.unpin()
        elif not slab.pages.is_pinned:
            tier = HostTier.STAGED
            if self.registrar is not None and not self.refusals and self._is_within_budget(slab.pages, "a slab"):
                self._locking = slab, Locking(slab.pages, self.registrar, self.budget)
                self._locking[1].start()  # only now: `drop` and `unlock` must know of the lock
        slab.tier = tier
