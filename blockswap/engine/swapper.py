"""BlockSwapper: points a block's tensors at a slot before it runs and at their masters after it; follows the ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..device.failures import device_error
from ..errors import BlockSwapError, TransferError, UnsupportedModelError
from ..host.pages import PageMemory
from ..host.slabs import Slab
from ..host.store import HostStore
from ..model.layout import Placement
from ..model.profile import ProfiledModel, TensorEntry, refuse_grad
from ..model.tensors import flat
from ..plan.schedule import Ring, Step
from ..plan.swap_plan import HostTier, SwapPlan
from ..spans import COMPUTE, STALL
from .binding import bind
from .others import OneAtATime
from .placer import Listeners, Placer
from .trace import Trace
from .transfer import LabelledTransfer, Transfer


class BlockSwapper:
    """Runs a model's blocks as planned, each as soon as it is placed; made at adopt, dropped at release.

    Args:
        model: The profiled blocks, with their weights in host memory (or on the device already).
        plan: The plan.
        store: Holds the slab of every swapped block.
        transfer: The device's copies.
        listeners: Called while blocks are placed.

    Attributes:
        trace: Receives spans of time; None records nothing. May be switched between forwards.
        entered: Number of blocks entered in this forward.
        moved: Blocks of which others pointed a tensor elsewhere while they ran in this forward, and its full name.

    Raises:
        DeviceMemoryError: The device cannot hold the plan; every tensor is as it was before the call.
    """

    def __init__(
        self,
        model: ProfiledModel,
        plan: SwapPlan,
        store: HostStore,
        transfer: Transfer,
        listeners: Listeners | None = None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._store = store
        self._transfer = transfer
        self._placer = Placer(model, plan, store, transfer, listeners or Listeners())
        self.trace: Trace | None = None
        self.entered = 0
        self.moved: list[tuple[int, str]] = []
        self._checks = False
        self._ring = Ring(plan.swapped, slots=plan.slots, lanes=model.profile.lanes)
        self._blocks = self._placer.bindings
        self._pending = self._placer.pending
        self._running: tuple[int, int | None, Any] | None = None  # block, slot, mark at its start
        self._copies: Transfer | LabelledTransfer = transfer
        try:
            with torch.no_grad():
                self._placer.start()
        except BaseException:
            self.release()
            raise

    def prefetch(self) -> None:
        """Starts to fill the window with the first blocks, before any forward."""
        with self._transfer.streams.guard():  # Rule 8
            self._apply(self._ring.leave())

    def begin(self, *, checks: bool) -> None:
        """Starts a forward, with labels if a profiler is running.

        Args:
            checks: Compare each slot with its slab before a block uses it.
        """
        self.entered, self.moved, self._checks = 0, [], checks
        is_profiled = torch._C._autograd._profiler_enabled()
        self._copies = LabelledTransfer(self._transfer) if is_profiled else self._transfer

    def enter(self, block: int) -> bool:
        """Prepares block `block` to run: releases the slot of the block before, starts prefetches, and points this
        block's tensors at the device. Copies are issued first, so that they run while the host points the tensors.

        Returns:
            False if a tensor of the block was replaced or moved, so that a new swapper must be made.
        """
        try:
            with self._transfer.streams.guard():  # Rule 8
                self._finish()
                if self._pending and not self._placer.wait_for(block):
                    return False
                binding = self._blocks[block]
                if not binding.is_unchanged():
                    return False
                self.entered += 1
                if binding.counting and binding.was_edited():
                    slab = self._store.slabs[block]
                    if slab.tier is not HostTier.FILE:
                        slab.forget_sources()
                    if slab.tier is HostTier.FILE or binding.shells:
                        # The edit is in memory alone and not in the file, or it may be of a scale beside the slab.
                        binding.outdate()
                        return False
                    self._ring.forget(block)
                step = self._ring.enter(block)
                before = None if self.trace is None else self._transfer.mark()  # here, since starting a copy may block
                self._apply(step)
                slot = step.slot
                if slot is not None:
                    self._copies.wait(slot)
                after = None if self.trace is None else self._transfer.mark()
                self._running = block, slot, after
                if slot is None:
                    return True
                bind(binding.streamed, binding.slots[slot])
                if self._checks:
                    self._check(block)
            if self.trace is not None:
                self.trace.add(STALL, block, before, after)
        except RuntimeError as failure:  # not by the decorator, which would cost time in every block
            if isinstance(failure, BlockSwapError):
                raise
            raise device_error(failure, "a block was starting") from failure
        return True

    def replaced(self, block: int) -> str | None:
        """The full name of a weight that has kept `enter` from preparing a block; None if the block was not placed,
        since that has failed in an earlier forward.
        """
        if self._placer.has_failed(block):
            return None
        return self._full_name(block, self._placer.replaced(block))

    def _full_name(self, block: int, path: str | None) -> str:
        name = self._model.profile.blocks[block].name
        return f"{name}.{path}" if path else f"a weight of {name}"

    def leave(self) -> None:
        """Ends a forward that went well: releases the last slot and prefetches the next forward's first blocks."""
        with self._transfer.streams.guard():  # Rule 8
            self._finish()
            self._apply(self._ring.leave())
            if self._pending and self.entered:
                self.settle()

    def settle(self) -> bool:
        """Waits until every block is placed.

        Returns:
            False if a tensor was replaced or moved meanwhile, so that a new swapper must be made.
        """
        with self._transfer.streams.guard():  # Rule 8
            return all(self._placer.wait_for(block) for block in list(self._pending))

    def abort(self) -> None:
        """Cleans up after an exception anywhere in a forward: every tensor points at its master, no copy is in
        progress, all slots are empty. May be called again.
        """
        if self._running is not None:
            binding = self._blocks[self._running[0]]
            bind(binding.streamed, binding.masters)
            binding.was_edited()
            self._running = None
        self._transfer.reset()
        self._ring.reset()

    def release(self) -> None:
        """Points every tensor at its master; frees residents, small tensors and window. Idempotent."""
        self._running = None
        self._placer.release()

    def _finish(self) -> None:
        """Points the tensors of the block that ran at their masters again; all its kernels have been queued."""
        if self._running is None:
            return
        block, slot, began = self._running
        binding = self._blocks[block]
        if slot is not None:
            expected = binding.slot_addresses[slot]
            with torch._C.DisableTorchFunctionSubclass():
                addresses = list(map(torch.Tensor.data_ptr, binding.streamed[: len(expected)]))
            if addresses != expected:
                self._note_moved(block, [one == at for one, at in zip(addresses, expected, strict=True)].index(False))
            bind(binding.streamed, binding.masters)
        self._transfer.computed(block, slot)
        if self.trace is not None:
            self.trace.add(COMPUTE, block, began, self._transfer.mark())
        self._running = None  # only now: `abort` binds the masters of the block that an exception left in its slot
        if binding.counting and binding.was_edited():
            if binding.shells:
                binding.outdate()  # a scale beside the slot may have kept the edit
            raise UnsupportedModelError(
                f"{self._model.profile.blocks[block].name} edited one of its weights in place while it ran, and the "
                "edit is lost when the block leaves the GPU; keep that tensor in a buffer"
            )

    def _note_moved(self, block: int, number: int) -> None:
        entry = self._streamed(block)[number]
        self.moved.append((block, self._full_name(block, entry.path)))

    def _check(self, block: int) -> None:
        streamed = self._streamed(block)
        views = [entry.tensor for entry in streamed]
        name = self._model.profile.blocks[block].name
        check_slot(name, [entry.path for entry in streamed], views, self._store.slabs[block])

    def _streamed(self, block: int) -> list[TensorEntry]:
        return [entry for entry in self._model.entries[block] if entry.placement is Placement.STREAMED]

    def _apply(self, step: Step) -> None:
        self._transfer.follow()
        if step.released is not None:
            self._copies.release(step.released)
        for onload in step.onloads:
            block = onload.block
            slab = self._placer.slab(block) if block in self._pending else self._store.slabs[block]
            self._copies.start(onload.slot, slab, block=block)


class Holdings:
    """The device memory and page-locked memory of a session. Holds no reference to the session, so that a finalizer can
    free it when a session is dropped without `close`.
    """

    def __init__(self) -> None:
        self.store: HostStore | None = None
        self.transfer: Transfer | None = None
        self.swapper: BlockSwapper | OneAtATime | None = None

    @property
    def slabs(self) -> dict[int, Slab]:
        """The slab of each swapped block."""
        return {} if self.store is None else self.store.slabs

    @property
    def staging_bytes(self) -> int:
        """Host memory of the staging slabs."""
        return sum(pages.size for pages in self._staging)

    @property
    def locked_staging_bytes(self) -> int:
        """The page-locked part of it."""
        return sum(pages.size for pages in self._staging if pages.is_pinned)

    @property
    def _staging(self) -> list[PageMemory]:
        transfer = self.transfer
        return [] if transfer is None or transfer.unlocked is None else transfer.unlocked.slabs

    def drop_device(self) -> None:
        """Points tensors at their masters and frees window, residents and staging, even if a step fails."""
        swapper, transfer = self.swapper, self.transfer
        self.swapper = self.transfer = None
        try:
            if swapper is not None:
                swapper.release()
        finally:
            if transfer is not None:
                transfer.close()

    def drop(self) -> None:
        """The same, and unlocks the slabs. Waits for all copies, also for those that an exception cut short."""
        store, self.store = self.store, None
        try:
            if self.transfer is not None:
                self.transfer.reset()
        finally:
            try:
                self.drop_device()
            finally:
                if store is not None:
                    store.release()


def block_hook(
    holds: Holdings, enter: Callable[[], Callable[[int], None] | None], block: int, named: tuple[str, nn.Module]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """The hook that runs before a block and sees its arguments.

    Args:
        holds: What the session holds; another swapper takes the place of the first when blocks are placed again.
        enter: Returns the session's `enter`, None once the session is gone. A hook that held the session itself would
            keep a dropped session alive until the garbage collector runs.
        block: Index of the block.
        named: Its name and module.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_block(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            refuse_grad((named,), (arguments, keywords))
        swapper = holds.swapper
        if swapper is not None and swapper.enter(block):
            return
        alive = enter()
        assert alive is not None, "hooks are registered only inside a session's forward"
        alive(block)

    return before_block


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
                f"{name}.{path} has other bytes on the GPU than in RAM (checksum {found:x} instead of "
                f"{expected:x}): another node edited it through .data, or a copy went wrong; remove other nodes that "
                "patch the model, and report this if it happens again"
            )
