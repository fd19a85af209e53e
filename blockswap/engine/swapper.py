"""BlockSwapper: what each block's tensors point at, and when; carries out the ring's steps, block by block."""

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
from ..host.slabs import HostStore, Slab
from ..model.layout import Placement, device_bytes, slab_offsets
from ..model.profile import ProfiledModel, TensorEntry
from ..model.tensors import copy_bytes, element_view, flat, span_bytes, storage_key, version_of
from ..plan.schedule import Ring, Step
from ..plan.swap_plan import SwapPlan
from ..spans import COMPUTE, STALL
from .binding import BlockBinding, TensorBinding, bind, bring_back
from .trace import Trace
from .transfer import LabelledTransfer, Transfer

OnMaster = Callable[[str, int, torch.Tensor], None]
"""Receives the full name of a streamed tensor, the address of its bytes before the adopt, and their master."""

OnPlaced = Callable[[SwapPlan, int, int], None]
"""Receives the plan, the number of blocks that are placed by now, and how many bytes of slabs are page-locked."""


@dataclass(slots=True)
class Listeners:
    """Callbacks of an adopt.

    Attributes:
        on_master: Called for each streamed tensor of a swapped block, once its bytes are in the slab.
        on_placed: Called at the start, and for each block once its weights are placed.
    """

    on_master: OnMaster | None = None
    on_placed: OnPlaced | None = None


class BlockSwapper:
    """Places a model's blocks as the plan says and runs them; made at adopt, gone at release.

    Args:
        model: The profiled blocks, their weights in host memory (or on the device already).
        plan: Which blocks are swapped, and through what.
        store: Holds the slab of every swapped block.
        transfer: The device's copies.
        listeners: Called while blocks are placed.

    Attributes:
        trace: Receives spans of time; None records nothing. May be switched between forwards.
        entered: Blocks that have run in this forward.

    Raises:
        DeviceMemoryError: The device cannot hold the plan; every tensor is as it was before.
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
        self._running: tuple[int, int | None, Any] | None = None  # block, its slot, when it began
        self._copies: Transfer | LabelledTransfer = transfer
        try:
            with torch.no_grad():
                self._place()
                self._blocks = [self._binding(i) for i in range(len(model.entries))]
        except BaseException:
            self.release()
            raise

    def prefetch(self) -> None:
        """Fills the window with the first blocks, before any forward."""
        with self._transfer.streams.guard():  # Rule 8
            self._apply(self._ring.leave())

    def begin(self, *, checks: bool) -> None:
        """A forward begins; a profiler that runs now sees labels in it.

        Args:
            checks: Compare each slot with its slab before a block uses it.
        """
        self.entered, self._checks = 0, checks
        is_profiled = torch._C._autograd._profiler_enabled()
        self._copies = LabelledTransfer(self._transfer) if is_profiled else self._transfer

    def enter(self, block: int) -> bool:
        """Block `block` is about to run: the one before gives its slot back, the next ones are prefetched, and this
        one's tensors point at the device. Copies are issued first: they are under way while the host re-points.

        Returns:
            False if a tensor of the block was replaced or moved: the swapper must be made anew.
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
                before = None if self.trace is None else self._transfer.mark()  # copies may block as they start
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
        except RuntimeError as failure:  # not by the decorator: this is called for every block
            if isinstance(failure, BlockSwapError):
                raise
            raise device_error(failure, "a block was beginning") from failure
        return True

    def leave(self) -> None:
        """The forward has ended well: the last slot is given back, the next forward's first blocks are prefetched."""
        with self._transfer.streams.guard():  # Rule 8
            self._finish()
            self._apply(self._ring.leave())

    def abort(self) -> None:
        """After an exception at any point of the forward: every tensor points at its master, no copy is under way, no
        slot holds anything. May be called again.
        """
        if self._running is not None:
            binding = self._blocks[self._running[0]]
            bind(binding.streamed, binding.masters)
            binding.was_edited()
            self._running = None
        self._transfer.reset()
        self._ring.reset()

    def release(self) -> None:
        """Every tensor points at its master; residents, small tensors and window are given up. Idempotent."""
        inside = {storage_key(memory) for memory in (*self._memories, *self._transfer.window)}
        bound, self._bound = self._bound, []
        fixed, self._fixed = self._fixed, []
        memories, self._memories, self._running = self._memories, [], None
        with contextlib.ExitStack() as stack:  # every step, even if another fails; from the last to the first
            for memory in memories:
                stack.callback(self._transfer.free, memory)
            stack.callback(self._transfer.close_window)
            for entry, original, moved in fixed:
                stack.callback(bring_back, entry, original, moved)
            for one in bound:
                stack.callback(self._restore_master, one, inside)
            with self._transfer.streams.guard():  # Rule 8
                self._transfer.follow()

    def _restore_master(self, bound: TensorBinding, inside: Container[int]) -> None:
        self._transfer.counters.returned_bytes += bound.restore_master(inside)

    def _finish(self) -> None:
        """The block that ran has been queued in full: its tensors point at their masters again."""
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
                f"{self._model.profile.blocks[block].name} expects weights that its forward only reads but one was "
                "edited in place; the edit is lost with its slot: keep that tensor in a buffer"
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
        """The window, small tensors, residents and slabs; every tensor at its master or its copy on the device."""
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
        """Copies tensors into one new device buffer and points them there; those on the device already stay."""
        device = self._transfer.streams.device
        entries = [e for e in entries if e.tensor.device != device or device.type == "cpu"]
        offsets, end = slab_offsets(entry.extent for entry in entries)
        if not entries:
            return
        memory = self._transfer.allocate(device_bytes(end))
        self._memories.append(memory)
        starts = {id(entry): offset for entry, offset in zip(entries, offsets, strict=True)}
        for entry in entries:
            tensor = entry.tensor
            start = starts[id(entry.leader or entry)] + entry.offset
            copy = element_view(memory, tensor, offset=start)
            copy_bytes(copy, tensor)
            self._transfer.counters.placed_bytes += span_bytes(tensor)
            with torch._C.DisableTorchFunctionSubclass():
                master = tensor.detach()
            self._bound.append(TensorBinding(entry, tensor, master, copy, version_of(tensor)))
            bind((tensor,), (copy,))

    def _move(self, entry: TensorEntry) -> None:
        """A tensor that cannot be re-pointed is replaced by a moved one, and comes back at release."""
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
                f"{name}.{path} has other bytes on the device than it was adopted with (checksum {found:x}, "
                f"{expected:x} expected): it was edited through .data by another node, or a copy went wrong; remove "
                "other nodes that patch the model, and report it if it stays"
            )
