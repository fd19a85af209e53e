"""HostStore: the host's side of every swapped block: a copy of its streamed tensors, page-locked where the plan and the
host allow, or the file that they come from.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ...hardware.disk import FileRegion
from ...hardware.pinning import PinBudget, Registrar, register_result
from ..device.streams import Streams
from ..model.layout import align, slab_offsets
from ..model.tensors import element_view, plain_view, span_bytes
from ..plan.swap_plan import STAGING_SLABS, HostTier
from .pages import Locking, PageMemory, lock
from .slabs import Slab, TensorFingerprint
from .weight_files import WeightFiles

logger = logging.getLogger(__name__)

PAGEABLE_REST = "the rest stays unlocked, and its copies are slower"
FROM_FILE = "it is read from the model's file in each pass instead"


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
                slab, regions = None, self.leave_slab(block, tensors, regions)
                if all(regions):
                    return self._put_file(block, tensors, regions)
            tier = HostTier.STAGED
        if slab is None or slab.pages is None or not slab.holds(tensors, regions):
            slab = None if slab is None else slab.relaid(tensors)
            if slab is None:
                regions = self.leave_slab(block, tensors, regions)
                if all(regions) and not self._has_room(tensors):
                    return self._put_file(block, tensors, regions)
                slab = self._make(tensors)
            self.slabs[block] = slab
            slab.fill(tensors, regions, self.files)
        self._move(slab, tier)
        return slab

    def _put_file(self, block: int, tensors: Sequence[torch.Tensor], regions: tuple[FileRegion | None, ...]) -> Slab:
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
            self._say(f"not enough RAM for a block: {size:,} bytes needed, {left:,} left", fate=FROM_FILE)
        return size <= left

    def leave_slab(
        self, block: int, tensors: Sequence[torch.Tensor], regions: Sequence[FileRegion | None]
    ) -> tuple[FileRegion | None, ...]:
        """Drops the slab of `block`, if there is one; returns the regions that have the bytes of the tensors.

        A tensor that still points into the slab has been edited, or may have been where edits are not counted.
        """
        slab = self.slabs.get(block)
        self.drop(block)
        if slab is None or slab.pages is None:
            return tuple(regions)
        inside = {view.data_ptr() for view in slab.views}
        pairs = zip(tensors, regions, strict=True)
        return tuple(None if tensor.data_ptr() in inside else region for tensor, region in pairs)

    def given_back(self, block: int) -> dict[int, int]:
        """Where giving up the slab of `block` points its tensors, by the address that they have in it: at the loader's
        mapping. Empty if they would stay.
        """
        slab = self.slabs.get(block)
        pairs = [] if slab is None else zip(slab.views, slab.originals, strict=False)  # no originals: not as in a file
        return {view.data_ptr(): original.data_ptr() for view, original in pairs}

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
        """Gives up the spare memory, and slabs that nothing points at, or that are as their file; returns what of it is
        locked, so.

        Nothing points at the slabs of a GGUF model after its run: the wrapper drops its weights and copies them anew.
        """
        self.finish_locking()
        handed, self.spare = self.spare, []
        for block, slab in list(self.slabs.items()):
            slab.give_back(self.files)
            if slab.pages is None or not slab.is_unused:
                continue
            slab.pages.settle()
            if slab.pages.is_pinned:
                handed.append(slab.pages)
            del self.slabs[block]
        return handed

    def take(self, spare: Sequence[PageMemory]) -> None:
        """Keeps memory that another store has handed over."""
        for pages in spare:
            pages.use(self.streams)
        self.spare += spare

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
            slab = self.slabs.get(block)  # read once: a new run may drop it meanwhile
            if slab is None or slab.pages is None:
                most_bytes -= sum(region.nbytes for region in regions)
                if most_bytes < 0:
                    return
                self.files.read_ahead(regions)

    def unlock(self) -> None:
        """Unlocks every slab after its last copy; the next adopt chooses their tiers again. Spare memory goes."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.keep_spare, ())
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

    def make_staging(self, *, locked: bool = True) -> list[PageMemory]:
        """Staging slabs for the blocks that need them; waits first until the last slab is locked.

        After a refusal, as many pinned slabs are unlocked to make room. If the staging slabs cannot be locked, the
        staged blocks become pageable, and those of the file tier go through ordinary memory. Returns an empty list if
        no block needs one.

        Args:
            locked: Lock them, if that is possible.
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
        pages = self.staging_of(max(slab.used_bytes for slab in staged)) if locked else []
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
        if self.registrar is None or not self._is_within_budget(pages, "copies in two steps"):
            return False
        return self._is_locked(lock(pages, self.registrar, self.budget), pages, "copies in two steps")

    def _may_lock(self, pages: PageMemory) -> bool:
        if self.room is not None and self.room() <= 0:
            self._refuse("not enough RAM left to lock more of it")
            return False
        return self._is_within_budget(pages, "a block")

    def _is_within_budget(self, pages: PageMemory, what: str) -> bool:
        left = self.budget.left_bytes
        if pages.size > left:
            self._refuse(f"not enough locked RAM allowed for {what}: {pages.size:,} bytes needed, {left:,} left")
        return pages.size <= left

    def _is_locked(self, code: int, pages: PageMemory, what: str) -> bool:
        if code:
            self._refuse(f"RAM for {what}, {pages.size:,} bytes, could not be locked: {register_result(code)}")
        return not code

    def finish_locking(self) -> None:
        """Waits until the slab that is being locked is locked; if it cannot be, it keeps the tier below."""
        present = self._locking  # read once: the worker and the host thread may both come here
        if present is None:
            return
        slab, locking = present
        try:
            code = locking.result()
        finally:
            if locking.is_over:
                self._locking = None
        if slab.pages is not None and self._is_locked(code, slab.pages, "a block"):
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
