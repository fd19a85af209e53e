"""Placer: puts a model's blocks where the plan has them, in a worker while the first forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..device.streams import to_device
from ..device.worker import Job
from ..errors import TransferError
from ..host.pages import PageMemory
from ..host.slabs import ComingSlab, Slab
from ..host.store import HostStore
from ..model.layout import BlockProfile, Placement, device_bytes, slab_offsets
from ..model.profile import ProfiledModel, Shell, TensorEntry
from ..model.tensors import copy_bytes, element_view, plain_view, shell_on, storage_key, version_of
from ..plan.schedule import slot_lanes
from ..plan.swap_plan import HostTier, SwapPlan
from .binding import BlockBinding, TensorBinding, bind, bring_back
from .transfer import Transfer

WORTH_LOCKING = 32 << 20
"""Bytes from which page-locking the memory that residents are gathered in is quicker than one pageable copy of them."""

OnMaster = Callable[[str, int, torch.Tensor], None]
"""Receives a streamed tensor's full name, its address before the adopt, and its master."""

OnPlaced = Callable[[SwapPlan, int, int], None]
"""Receives the plan, the number of blocks placed so far, and the bytes of slabs page-locked so far."""


@dataclass(slots=True)
class Listeners:
    """Callbacks of an adopt.

    Attributes:
        on_master: Called for each streamed tensor of a swapped block that is in no file, once its bytes are in the
            slab; in the worker, if there is one.
        on_placed: Called at the start, and after each block.
    """

    on_master: OnMaster | None = None
    on_placed: OnPlaced | None = None


@dataclass(slots=True)
class Pending:
    """A block that is being placed: its slab is filled and locked, or its resident copy made.

    Attributes:
        entries: The streamed tensors.
        found: Their states before the job.
        job: Places the block, unless a tensor was replaced, moved or edited before it.
        copied: The event behind the copy to the device, of a resident block.
        placed: The states as the job left them; None until it has succeeded.
    """

    entries: list[TensorEntry]
    found: list[tuple[int, int, int | None]]
    job: Job = field(init=False)
    copied: Any = None
    placed: list[tuple[int, int, int | None]] | None = None

    @property
    def is_as_found(self) -> bool:
        """Whether no tensor was replaced, moved or edited before the job pointed them elsewhere."""
        return _states(self.entries) == self.found

    def note_placed(self, targets: Mapping[int, int]) -> None:
        """Records where the job pointed the tensors. What is done to them meanwhile in the host thread differs from it.

        Args:
            targets: The new address of each tensor that moved, by its `id`.
        """
        self.placed = [(key, targets.get(key, address), version) for key, address, version in self.found]


def _states(entries: Iterable[TensorEntry]) -> list[tuple[int, int, int | None]]:
    """What changes if a tensor is replaced, pointed elsewhere or edited in place; 0 of one that was removed."""
    tensors = [(entry.holder.get(entry.name), entry.shells) for entry in entries]
    return [(0, 0, 0) if t is None else (id(t), t.data_ptr(), version_of(t, *shells)) for t, shells in tensors]


class Placer:
    """Places a model's blocks as planned.

    `start` allocates the device memory. The blocks are placed after that in execution order, by the worker if the
    device has streams, so that a forward can begin while most blocks are still on their way.

    Args:
        model: The profiled blocks, with their weights in host memory (or on the device already).
        plan: The plan.
        store: Holds the slab of every swapped block.
        transfer: The device's copies.
        listeners: Called while blocks are placed.

    Attributes:
        pending: The blocks that are not placed yet.
        bindings: The tensors of those that are.
    """

    def __init__(
        self, model: ProfiledModel, plan: SwapPlan, store: HostStore, transfer: Transfer, listeners: Listeners
    ) -> None:
        self._model = model
        self._plan = plan
        self._store = store
        self._transfer = transfer
        self._listeners = listeners
        self.pending: dict[int, Pending] = {}
        self.bindings: dict[int, BlockBinding] = {}
        self._lanes = model.profile.lanes
        self._slot_lanes = slot_lanes(plan.swapped, self._lanes, plan.slots)
        self._bound: list[TensorBinding] = []
        self._masters: dict[int, torch.Tensor] = {}  # of the small tensors
        self._shells: list[tuple[Shell, torch.Tensor]] = []
        self._fixed: list[tuple[TensorEntry, torch.Tensor, torch.Tensor]] = []
        self._memories: list[torch.Tensor] = []
        self._leaves_mappings = self._should_leave_mappings()
        self._gathered: PageMemory | None = None  # host memory in which `_copy_to_device` gathers

    def slab(self, block: int) -> Slab | ComingSlab:
        """The slab of a swapped block, or what fills it first."""
        if block not in self.pending:
            return self._store.slabs[block]
        return ComingSlab(self._profile(block).slab_bytes, partial(self._placed_slab, block, self.pending[block]))

    def release(self) -> None:
        """Stops placing; points every tensor at its master; frees residents, small tensors and window. Idempotent."""
        try:
            self._stop()
        finally:
            self._release()

    def _stop(self) -> None:
        if self.pending:
            assert self._transfer.unlocked is not None
            self._transfer.unlocked.drain()
            for pending in self.pending.values():
                if hasattr(pending, "job"):  # an interrupt may have come before it was submitted
                    pending.job.forget()
            self.pending.clear()

    def _release(self) -> None:
        inside = {storage_key(memory) for memory in (*self._memories, *self._transfer.window)}
        bound, self._bound = self._bound, []
        shells, self._shells = self._shells, []
        fixed, self._fixed = self._fixed, []
        memories, self._memories = self._memories, []
        with contextlib.ExitStack() as stack:  # runs every step, even if another fails, from the last to the first
            for memory in memories:
                stack.callback(self._transfer.free, memory)
            stack.callback(self._transfer.close_window)
            for entry, original, moved in fixed:
                stack.callback(bring_back, entry, original, moved)
            if self._gathered is not None:  # placing has failed, and its error holds this object
                stack.callback(self._drop_gathered)
                stack.callback(self._transfer.settle_placed)
            for shell, master in shells:
                if shell.is_whole:
                    stack.callback(bind, (shell.tensor,), (master,))
            for one in bound:
                stack.callback(self._restore_master, one, inside)
            with self._transfer.streams.guard():  # Rule 8
                self._transfer.follow()

    def _restore_master(self, bound: TensorBinding, inside: Container[int]) -> None:
        self._transfer.counters.returned_bytes += bound.restore_master(inside)

    def start(self) -> None:
        """Allocates device memory, copies small tensors, and hands the rest to the worker.

        Raises:
            DeviceMemoryError: The device cannot hold the plan.
        """
        self._transfer.open_window(self._plan.window)
        everything = [entry for entries in self._model.entries for entry in entries]
        small = self._to_copy(entry for entry in everything if entry.placement is Placement.SMALL)
        self._copy_to_device(small, self._allocate(small))
        self._masters = {id(bound.tensor): bound.master for bound in self._bound}
        for entry in everything:
            if entry.placement is Placement.FIXED:
                self._move(entry)
        blocks = [[e for e in entries if e.placement is Placement.STREAMED] for entries in self._model.entries]
        works: list[Callable[[Pending], None]] = []
        for block, streamed in enumerate(blocks):
            if self._plan.swapped[block]:
                works.append(partial(self._fill_slab, block, streamed))
            else:
                entries = self._to_copy(streamed)
                works.append(partial(self._place_resident, block, entries, self._allocate(entries)))
        self._transfer.note_allocations()
        self._store.regions = {i: tuple(e.region for e in one if e.region is not None) for i, one in enumerate(blocks)}
        tiers = enumerate(self._plan.tiers)
        self._store.keep_spare([self._profile(i).slab_bytes for i, tier in tiers if tier is HostTier.PINNED])
        self._report_placed()
        unlocked = self._transfer.unlocked
        assert unlocked is not None, "blocks are placed by a worker"
        for block, (streamed, work) in enumerate(zip(blocks, works, strict=True)):
            pending = self.pending[block] = Pending(streamed, _states(streamed))
            pending.job = unlocked.worker.submit_idle(partial(self._place_block, pending, work))

    def _place_block(self, pending: Pending, work: Callable[[Pending], None]) -> None:
        """In the worker: places one block."""
        if pending.is_as_found:
            with torch.no_grad(), self._transfer.streams.guard():  # Rule 8
                work(pending)

    def _placed_slab(self, block: int, pending: Pending) -> Slab:
        """In the worker: the slab of a block, filled before its turn if it is needed now."""
        pending.job.run()
        if pending.placed is None:
            raise TransferError(f"{self._profile(block).name} was not placed")  # `wait_for` raises why
        self._store.finish_locking()
        return self._store.slabs[block]

    def wait_for(self, block: int) -> bool:
        """Waits until a block is placed; False if it cannot be, since one of its tensors has changed."""
        pending = self.pending.get(block)
        if pending is None:
            return True
        pending.job.wait()
        if pending.placed is None or pending.placed != _states(pending.entries):
            return False
        if pending.copied is not None:
            self._transfer.wait_placed(pending.copied)
        with torch.no_grad():
            self.bindings[block] = self._binding(block)
        del self.pending[block]
        if not self.pending:
            self._complete()
        self._report_placed()
        return True

    def _complete(self) -> None:
        """All blocks are placed."""
        assert self._transfer.unlocked is not None
        self._store.finish_locking()
        self._drop_gathered()
        self._store.keep_spare(())
        self._transfer.unlocked.settle()

    def _report_placed(self) -> None:
        if self._listeners.on_placed is not None:
            self._listeners.on_placed(self._plan, len(self.bindings), self._store.pinned_bytes)

    def _fill_slab(self, block: int, streamed: Sequence[TensorEntry], pending: Pending) -> None:
        tier = self._plan.tiers[block]
        assert tier is not None, f"block {block} is swapped without a host tier"
        tensors = [entry.tensor for entry in streamed]
        addresses = [tensor.data_ptr() for tensor in tensors]
        slab = self._store.put(block, tensors, tier=tier, regions=[entry.region for entry in streamed])
        slab.originals = () if self._leaves_mappings else slab.originals
        if not pending.is_as_found:
            self._store.drop(block)  # it may hold something of both
            return
        bind(tensors, slab.views)
        pending.note_placed({id(tensor): view.data_ptr() for tensor, view in zip(tensors, slab.views, strict=True)})
        slab.watch(tensors)
        for entry, tensor, master in zip(streamed, tensors, slab.views, strict=True):
            self._bound.append(TensorBinding(entry, tensor, master, None, version_of(tensor, *entry.shells)))
        if self._listeners.on_master is not None:
            name = self._profile(block).name
            for entry, address, master in zip(streamed, addresses, slab.views, strict=True):
                if entry.region is None:  # what is in a file costs its loader no memory
                    self._listeners.on_master(f"{name}.{entry.path}", address, master)

    def _place_resident(
        self, block: int, entries: Sequence[TensorEntry], memory: torch.Tensor | None, pending: Pending
    ) -> None:
        regions = self._store.leave_slab(block, [e.tensor for e in entries], [e.region for e in entries])
        for entry, region in zip(entries, regions, strict=True):
            entry.region = region
        pending.copied = self._copy_to_device(entries, memory, pending)

    def _to_copy(self, entries: Iterable[TensorEntry]) -> list[TensorEntry]:
        """Those that are not on the device already."""
        device = self._transfer.streams.device
        return [entry for entry in entries if entry.tensor.device != device or device.type == "cpu"]

    def _allocate(self, entries: Sequence[TensorEntry]) -> torch.Tensor | None:
        """Device memory for tensors, one after the other; None for no tensors."""
        if not entries:
            return None
        memory = self._transfer.allocate(device_bytes(slab_offsets(entry.extent for entry in entries)[1]))
        self._memories.append(memory)
        return memory

    def _copy_to_device(
        self, entries: Sequence[TensorEntry], memory: torch.Tensor | None, pending: Pending | None = None
    ) -> Any:
        """Copies tensors to their device memory and points them there; returns the event behind the copy, if any.

        They are gathered in memory of ours first, for one copy. Copies from the loader's file mapping take seconds per
        tensor with ROCm on Linux (ROCm/ROCm#6523: 5 s where the heap takes 4 ms), and are slow everywhere.
        """
        targets: dict[int, int] = {}
        if memory is None:
            if pending is not None:
                pending.note_placed(targets)
            return None
        offsets, end = slab_offsets(entry.extent for entry in entries)
        gathered = self._gather(end)
        offset_of = {id(entry): offset for entry, offset in zip(entries, offsets, strict=True)}
        starts = [offset_of[id(entry.leader or entry)] + entry.offset for entry in entries]
        pieces = []
        for entry, start in zip(entries, starts, strict=True):
            if entry.region is None:
                copy_bytes(element_view(gathered.tensor, entry.tensor, offset=start), entry.tensor)
            else:
                pieces.append((entry.region, gathered.buffer(start, entry.region.nbytes)))
        self._store.files.read(pieces)
        copied = self._transfer.place(memory, gathered, end)
        if pending is not None and not pending.is_as_found:
            return copied  # its memory goes when the block is placed again
        for entry, start in zip(entries, starts, strict=True):
            tensor = entry.tensor
            copy = element_view(memory, tensor, offset=start)
            targets[id(tensor)] = copy.data_ptr()
            version = version_of(tensor, *entry.shells)
            self._bound.append(TensorBinding(entry, tensor, self._master(entry), copy, version))
            bind((tensor,), (copy,))
        if pending is not None:
            pending.note_placed(targets)
        return copied

    def _master(self, entry: TensorEntry) -> torch.Tensor:
        """The host's bytes of a tensor that goes to the device: as they are, or a copy outside the loader's mapping."""
        if not (self._leaves_mappings and entry.in_mapping) or entry.is_tied:
            return plain_view(entry.tensor)
        master = element_view(torch.empty(entry.extent, dtype=torch.uint8), entry.tensor, offset=0)
        copy_bytes(master, entry.tensor)
        return master

    def _should_leave_mappings(self) -> bool:
        """Whether that frees host memory: written pages, as of a LoRA merged in place, stay as long as the mapping."""
        written = clean = 0
        for entries, tier in zip(self._model.entries, self._plan.tiers, strict=True):
            streamed = [entry for entry in entries if entry.in_mapping and entry.placement is Placement.STREAMED]
            if tier is HostTier.FILE and any(entry.region is not None for entry in streamed):
                return False  # its masters are the mapping
            written += sum(entry.extent for entry in streamed if tier is not None and entry.region is None)
            clean += sum(entry.extent for entry in streamed if tier is None and entry.region is not None)
        return written > clean

    def _gather(self, nbytes: int) -> PageMemory:
        """Host memory of at least `nbytes` that no copy reads; page-locked if slabs are, and if that succeeds."""
        if self._gathered is None or self._gathered.size < nbytes:
            self._drop_gathered()  # first, since both may not fit the budget
            plan = self._plan
            are_locked = nbytes >= WORTH_LOCKING and plan.pinned_bytes > 0
            # Staging is locked only after this memory has been given up.
            self._gathered = self._store.make_pages(
                nbytes, beside=plan.pinned_bytes - plan.staging_bytes if are_locked else None
            )
        self._gathered.settle()
        return self._gathered

    def _drop_gathered(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            try:
                gathered.settle()  # before it goes, where an error could not be raised
            finally:
                gathered.unpin()

    def _move(self, entry: TensorEntry) -> None:
        """Replaces a tensor that cannot be pointed elsewhere by a copy on the device; release brings it back."""
        original = entry.tensor
        moved = to_device(original.detach(), self._transfer.streams.device)
        if isinstance(original, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=original.requires_grad)
        self._fixed.append((entry, original, moved))
        entry.holder[entry.name] = moved

    def _profile(self, block: int) -> BlockProfile:
        return self._model.profile.blocks[block]

    def _binding(self, block: int) -> BlockBinding:
        entries = self._model.entries[block]
        streamed = [entry for entry in entries if entry.placement is Placement.STREAMED]
        small = [entry for entry in entries if entry.placement is Placement.SMALL and not entry.is_buffer]
        watched = [*streamed, *small]
        beside = self._beside_streamed(block) if self._plan.swapped[block] else []
        copies = list(map(plain_view, beside))
        bind(beside, [self._masters[id(tensor)] for tensor in beside])
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
            shells=self._model.shells[block],
        )
        if self._plan.swapped[block]:
            slab = self._store.slabs[block]
            offsets, _ = slab_offsets(entry.extent for entry in streamed)
            binding.streamed = [entry.tensor for entry in streamed]
            binding.masters = list(slab.views)
            # A slot of another lane, which it never runs from, may be too small for it.
            binding.slots = [
                [element_view(memory, like, offset=offset) for like, offset in zip(slab.views, offsets, strict=True)]
                if lane == self._lanes[block]
                else []
                for memory, lane in zip(self._transfer.window, self._slot_lanes, strict=True)
            ]
            binding.streamed += beside
            binding.masters += [self._masters[id(tensor)] for tensor in beside]
            for slot in binding.slots:
                slot += copies
        for shell in binding.shells:
            self._bind_shell(shell, binding)
        binding.counting = [tensor for tensor in binding.streamed if version_of(tensor) is not None]
        binding.versions = [tensor._version for tensor in binding.counting]
        return binding

    def _beside_streamed(self, block: int) -> list[torch.Tensor]:
        """The small tensors in shells that stream. Their bytes stay on the device, but between forwards they point at
        their masters with the rest of the shell: its class expects to find all of it on one device.
        """
        together = {id(e): e for shell in self._model.shells[block] if shell.is_streamed for e in shell.entries}
        tensors = [e.tensor for e in together.values() if e.placement is Placement.SMALL and not e.is_tied]
        return [tensor for tensor in tensors if id(tensor) in self._masters]

    def _bind_shell(self, shell: Shell, binding: BlockBinding) -> None:
        """Lets a shell follow its streamed tensors; one without any is on the device until the release."""
        tensor = shell.tensor
        master, copy = shell_on(tensor.device, tensor), shell_on(binding.device, tensor)
        self._shells.append((shell, master))
        if binding.slots and shell.is_streamed:
            binding.streamed.append(tensor)
            binding.masters.append(master)
            for slot in binding.slots:
                slot.append(copy)
        else:
            bind((tensor,), (copy,))
