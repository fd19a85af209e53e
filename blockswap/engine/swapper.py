"""BlockSwapper: points a block's tensors at a slot before it runs and at their masters after it; follows the ring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..device.failures import device_error
from ..device.streams import to_device
from ..errors import BlockSwapError, TransferError, UnsupportedModelError
from ..host.pages import PageMemory
from ..host.slabs import HostStore, Slab
from ..model.layout import Placement, device_bytes, slab_offsets
from ..model.profile import ProfiledModel, TensorEntry
from ..model.tensors import copy_bytes, element_view, flat, storage_key, version_of
from ..plan.schedule import Ring, Step
from ..plan.swap_plan import HostTier, SwapPlan
from ..spans import COMPUTE, STALL
from .binding import BlockBinding, TensorBinding, bind, bring_back
from .trace import Trace
from .transfer import LabelledTransfer, Transfer

OnMaster = Callable[[str, int, torch.Tensor], None]
"""Receives a streamed tensor's full name, its address before the adopt, and its master."""

OnPlaced = Callable[[SwapPlan, int, int], None]
"""Receives the plan, the number of blocks placed so far, and the bytes of slabs page-locked so far."""


@dataclass(slots=True)
class Listeners:
    """Callbacks of an adopt.

    Attributes:
        on_master: Called for each streamed tensor of a swapped block, once its bytes are in the slab.
        on_placed: Called at the start, and after each block.
    """

    on_master: OnMaster | None = None
    on_placed: OnPlaced | None = None


class BlockSwapper:
    """Places a model's blocks as planned and runs them; made at adopt, dropped at release.

    Args:
        model: The profiled blocks, with their weights in host memory (or on the device already).
        plan: The plan.
        store: Holds the slab of every swapped block.
        transfer: The device's copies.
        listeners: Called while blocks are placed.

    Attributes:
        trace: Receives spans of time; None records nothing. May be switched between forwards.
        entered: Number of blocks entered in this forward.

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
        self._listeners = listeners or Listeners()
        self.trace: Trace | None = None
        self.entered = 0
        self._checks = False
        self._ring = Ring(plan.swapped, slots=plan.slots)
        self._bound: list[TensorBinding] = []
        self._fixed: list[tuple[TensorEntry, torch.Tensor, torch.Tensor]] = []
        self._memories: list[torch.Tensor] = []
        self._gathered: PageMemory | None = None  # host memory in which `_copy_to_device` gathers, during `_place`
        self._running: tuple[int, int | None, Any] | None = None  # block, slot, mark at its start
        self._copies: Transfer | LabelledTransfer = transfer
        try:
            with torch.no_grad():
                self._place()
                self._blocks = [self._binding(i) for i in range(len(model.entries))]
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
        self.entered, self._checks = 0, checks
        is_profiled = torch._C._autograd._profiler_enabled()
        self._copies = LabelledTransfer(self._transfer) if is_profiled else self._transfer

    def enter(self, block: int) -> bool:
        """Prepares block `block` to run: releases the slot of the block before, starts prefetches, and points this
        block's tensors at the device. Copies are issued first, so that they run while the host points the tensors.

        Returns:
            False if a tensor of the block was replaced or moved, so that a new swapper must be made.
        """
        try:
            binding = self._blocks[block]
            with self._transfer.streams.guard():  # Rule 8
                self._finish()
                if not binding.is_unchanged():
                    return False
                self.entered += 1
                if binding.counting and binding.was_edited():
                    self._ring.forget(block)
                    self._store.slabs[block].sources, self._store.slabs[block].checksums = (), None
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

    def leave(self) -> None:
        """Ends a forward that went well: releases the last slot and prefetches the next forward's first blocks."""
        with self._transfer.streams.guard():  # Rule 8
            self._finish()
            self._apply(self._ring.leave())

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
        inside = {storage_key(memory) for memory in (*self._memories, *self._transfer.window)}
        bound, self._bound = self._bound, []
        fixed, self._fixed = self._fixed, []
        memories, self._memories, self._running = self._memories, [], None
        with contextlib.ExitStack() as stack:  # runs every step, even if another fails, from the last to the first
            for memory in memories:
                stack.callback(self._transfer.free, memory)
            stack.callback(self._transfer.close_window)
            for entry, original, moved in fixed:
                stack.callback(bring_back, entry, original, moved)
            if self._gathered is not None:  # placing has failed, and its error holds this object
                stack.callback(self._drop_gathered)
                stack.callback(self._transfer.settle_placed)
            for one in bound:
                stack.callback(self._restore_master, one, inside)
            with self._transfer.streams.guard():  # Rule 8
                self._transfer.follow()

    def _restore_master(self, bound: TensorBinding, inside: Container[int]) -> None:
        self._transfer.counters.returned_bytes += bound.restore_master(inside)

    def _finish(self) -> None:
        """Points the tensors of the block that ran at their masters again; all its kernels have been queued."""
        if self._running is None:
            return
        block, slot, began = self._running
        binding = self._blocks[block]
        if slot is not None:
            bind(binding.streamed, binding.masters)
        self._transfer.computed(block, slot)
        if self.trace is not None:
            self.trace.add(COMPUTE, block, began, self._transfer.mark())
        self._running = None  # only now: `abort` binds the masters of the block that an exception left in its slot
        if binding.counting and binding.was_edited():
            raise UnsupportedModelError(
                f"the forward of {self._model.profile.blocks[block].name} edited one of its weights in place, and the "
                "edit is lost with the slot; keep that tensor in a buffer"
            )

    def _check(self, block: int) -> None:
        streamed = [entry for entry in self._model.entries[block] if entry.placement is Placement.STREAMED]
        views = [entry.tensor for entry in streamed]
        name = self._model.profile.blocks[block].name
        check_slot(name, [entry.path for entry in streamed], views, self._store.slabs[block])

    def _apply(self, step: Step) -> None:
        self._transfer.follow()
        if step.released is not None:
            self._copies.release(step.released)
        for onload in step.onloads:
            self._copies.start(onload.slot, self._store.slabs[onload.block], block=onload.block)

    def _place(self) -> None:
        """Makes window and slabs, copies small tensors and residents, and points every tensor at its place."""
        self._transfer.open_window(slots=self._plan.slots, slot_bytes=self._plan.slot_bytes)
        everything = [entry for entries in self._model.entries for entry in entries]
        self._copy_to_device([entry for entry in everything if entry.placement is Placement.SMALL])
        for entry in everything:
            if entry.placement is Placement.FIXED:
                self._move(entry)
        self._report_placed(0)
        for block, entries in enumerate(self._model.entries):
            streamed = [entry for entry in entries if entry.placement is Placement.STREAMED]
            if self._plan.swapped[block]:
                self._fill_slab(block, streamed)
            else:
                self._store.drop(block)
                self._copy_to_device(streamed)
            if block + 1 == len(self._model.entries):
                self._store.finish_locking()  # so that the last progress update includes the final lock
            self._report_placed(block + 1)
        self._drop_gathered()

    def _report_placed(self, count: int) -> None:
        if self._listeners.on_placed is not None:
            self._listeners.on_placed(self._plan, count, self._store.pinned_bytes)

    def _fill_slab(self, block: int, streamed: Sequence[TensorEntry]) -> None:
        tier = self._plan.tiers[block]
        assert tier is not None, f"block {block} is swapped without a host tier"
        tensors = [entry.tensor for entry in streamed]
        addresses = [tensor.data_ptr() for tensor in tensors]
        slab = self._store.put(block, tensors, tier=tier)
        bind(tensors, slab.views)
        slab.watch(tensors)
        for entry, tensor, master in zip(streamed, tensors, slab.views, strict=True):
            self._bound.append(TensorBinding(entry, tensor, master, None, version_of(tensor)))
        if self._listeners.on_master is not None:
            name = self._model.profile.blocks[block].name
            for entry, address, master in zip(streamed, addresses, slab.views, strict=True):
                self._listeners.on_master(f"{name}.{entry.path}", address, master)

    def _copy_to_device(self, entries: Sequence[TensorEntry]) -> None:
        """Copies tensors into one new device buffer and points them there; tensors on the device already stay.

        They are gathered in memory of ours first, for one copy. Copies from the loader's file mapping take seconds per
        tensor with ROCm on Linux (ROCm/ROCm#6523: 5 s where the heap takes 4 ms), and are slow everywhere.
        """
        device = self._transfer.streams.device
        entries = [e for e in entries if e.tensor.device != device or device.type == "cpu"]
        offsets, end = slab_offsets(entry.extent for entry in entries)
        if not entries:
            return
        gathered = self._gather(end)
        memory = self._transfer.allocate(device_bytes(end))
        self._memories.append(memory)
        offset_of = {id(entry): offset for entry, offset in zip(entries, offsets, strict=True)}
        starts = [offset_of[id(entry.leader or entry)] + entry.offset for entry in entries]
        for entry, start in zip(entries, starts, strict=True):
            copy_bytes(element_view(gathered.tensor, entry.tensor, offset=start), entry.tensor)
        self._transfer.place(memory, gathered, end)
        for entry, start in zip(entries, starts, strict=True):
            tensor = entry.tensor
            copy = element_view(memory, tensor, offset=start)
            with torch._C.DisableTorchFunctionSubclass():
                master = tensor.detach()
            self._bound.append(TensorBinding(entry, tensor, master, copy, version_of(tensor)))
            bind((tensor,), (copy,))

    def _gather(self, nbytes: int) -> PageMemory:
        """Host memory of at least `nbytes` that no copy reads; page-locked if slabs are, and if that succeeds."""
        if self._gathered is None or self._gathered.size < nbytes:
            self._drop_gathered()  # first, since both may not fit the budget
            plan = self._plan
            are_locked = any(tier in (HostTier.PINNED, HostTier.STAGED) for tier in plan.tiers)
            # Staging is locked only after this memory has been given up.
            self._gathered = self._store.make_pages(
                nbytes, beside=plan.pinned_bytes - plan.staging_bytes if are_locked else None
            )
        self._gathered.settle()
        return self._gathered

    def _drop_gathered(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            gathered.unpin()

    def _move(self, entry: TensorEntry) -> None:
        """Replaces a tensor that cannot be pointed elsewhere by a copy on the device; release brings it back."""
        original = entry.tensor
        moved = to_device(original.detach(), self._transfer.streams.device)
        if isinstance(original, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=original.requires_grad)
        self._fixed.append((entry, original, moved))
        entry.holder[entry.name] = moved

    def _binding(self, block: int) -> BlockBinding:
        entries = self._model.entries[block]
        streamed = [entry for entry in entries if entry.placement is Placement.STREAMED]
        small = [entry for entry in entries if entry.placement is Placement.SMALL and not entry.is_buffer]
        watched = [*streamed, *small]
        moving = {entry.name for entry in streamed if entry.is_buffer and self._plan.swapped[block]}
        binding = BlockBinding(
            watched=[entry.tensor for entry in watched],
            holders=[entry.holder for entry in watched],
            names=[entry.name for entry in watched],
            addresses=[entry.tensor.data_ptr() for entry in watched],
            moved=[(entry.holder, entry.name, moved) for entry, _, moved in self._fixed if entry in entries],
            buffers=[
                (holder, {name for name, held in holder.items() if held is not None}, moving & set(holder))
                for holder in self._model.buffers[block]
                if holder
            ],
            bare=[holder for holder in self._model.buffers[block] if not holder],
            device=self._transfer.streams.device,
        )
        if self._plan.swapped[block]:
            slab = self._store.slabs[block]
            offsets, _ = slab_offsets(entry.extent for entry in streamed)
            binding.streamed = [entry.tensor for entry in streamed]
            binding.counting = [tensor for tensor in binding.streamed if version_of(tensor) is not None]
            binding.versions = [tensor._version for tensor in binding.counting]
            binding.masters = list(slab.views)
            binding.slots = [
                [element_view(memory, like, offset=offset) for like, offset in zip(slab.views, offsets, strict=True)]
                for memory in self._transfer.window
            ]
        return binding


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
