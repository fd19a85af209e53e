"""Placer: puts a model's blocks where the plan has them, in a worker while the first forward runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..device.streams import to_device
from ..device.worker import Job
from ..errors import TransferError
from ..host.slabs import ComingSlab, Slab
from ..host.store import HostStore
from ..model.layout import BlockProfile, Placement, slab_offsets
from ..model.profile import ProfiledModel, Shell, TensorEntry
from ..model.tensors import element_view, shell_on, storage_key, version_of
from ..plan.schedule import slot_lanes
from ..plan.swap_plan import HostTier, SwapPlan
from .binding import BlockBinding, TensorBinding, bind, bring_back
from .residents import Residents
from .transfer import Transfer

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
        entries: The streamed tensors and the small parameters.
        found: Their states before the job.
        job: Places the block, unless a tensor was replaced, moved or edited before it.
        copied: The event behind the copy to the device, of a resident block.
        bindings: Its tensors, which stay where they are until the block's turn.
        placed: The states as the job left them; None until it has succeeded.
    """

    entries: list[TensorEntry]
    found: list[tuple[int, int, int | None]]
    job: Job = field(init=False)
    copied: Any = None
    bindings: Sequence[TensorBinding] = ()
    placed: list[tuple[int, int, int | None]] | None = None

    @property
    def is_as_found(self) -> bool:
        """Whether no tensor was replaced, moved or edited before the job pointed them elsewhere."""
        return _states(self.entries) == self.found

    def follow(self, given_back: Mapping[int, int]) -> None:
        """Takes it as found that giving up the block's slab has pointed tensors elsewhere.

        Args:
            given_back: Their new addresses by the old ones, if all of them have moved.
        """
        moved = [(key, given_back.get(address, address), version) for key, address, version in self.found]
        if _states(self.entries) == moved:
            self.found = moved

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


def _point_at_copies(bindings: Iterable[TensorBinding]) -> None:
    for one in bindings:
        if one.copy is not None:
            bind((one.tensor,), (one.copy,))


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
        self._small: dict[int, TensorBinding] = {}
        self._shells: list[tuple[Shell, torch.Tensor]] = []
        self._fixed: list[tuple[TensorEntry, torch.Tensor, torch.Tensor]] = []
        self._residents = Residents(model, plan, store, transfer)

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
        inside = {storage_key(memory) for memory in (*self._residents.memories, *self._transfer.window)}
        bound, self._bound = self._bound, []
        shells, self._shells = self._shells, []
        fixed, self._fixed = self._fixed, []
        memories, self._residents.memories = self._residents.memories, []
        with contextlib.ExitStack() as stack:  # runs every step, even if another fails, from the last to the first
            for memory in memories:
                stack.callback(self._transfer.free, memory)
            stack.callback(self._transfer.close_window)
            for entry, original, moved in fixed:
                stack.callback(bring_back, entry, original, moved)
            if self._residents.is_copying:  # placing has failed, and its error holds this object
                stack.callback(self._residents.drop_gathered)
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
        residents = self._residents
        small = residents.to_copy(entry for entry in everything if entry.placement is Placement.SMALL)
        self._bind_copies(residents.copy(small, residents.allocate(small))[1])
        self._small = {id(bound.tensor): bound for bound in self._bound}
        for block in range(len(self._plan.swapped)):
            for bound in self._beside_streamed(block):  # with the rest of its shell, which is placed later
                bind((bound.tensor,), (bound.master,))
        for profile, inside in zip(self._model.profile.blocks, self._model.entries, strict=True):
            for entry in inside:
                if entry.placement is Placement.FIXED:
                    self._move(profile.name, entry)
        blocks = [[e for e in entries if e.placement is Placement.STREAMED] for entries in self._model.entries]
        works: list[Callable[[Pending], None]] = []
        for block, streamed in enumerate(blocks):
            if self._plan.swapped[block]:
                works.append(partial(self._fill_slab, block, streamed))
            else:
                entries = residents.to_copy(streamed)
                works.append(partial(self._place_resident, block, entries, residents.allocate(entries)))
        self._transfer.note_allocations()
        self._store.regions = {i: tuple(e.region for e in one if e.region is not None) for i, one in enumerate(blocks)}
        tiers = enumerate(self._plan.tiers)
        self._store.keep_spare([self._profile(i).slab_bytes for i, tier in tiers if tier is HostTier.PINNED])
        self._report_placed()
        unlocked = self._transfer.unlocked
        assert unlocked is not None, "blocks are placed by a worker"
        for block, work in enumerate(works):
            watched = self._watched(block)
            pending = self.pending[block] = Pending(watched, _states(watched))
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
            self._bind_copies(pending.bindings)
            self.bindings[block] = self._binding(block)
        del self.pending[block]
        if not self.pending:
            self._complete()
        self._report_placed()
        return True

    def has_failed(self, block: int) -> bool:
        """Whether a block could not be placed, though nobody has changed it."""
        pending = self.pending.get(block)
        return pending is not None and pending.placed is None and pending.is_as_found

    def replaced(self, block: int) -> str | None:
        """The path of the first tensor of a block that is not as it was placed; None where it is not known."""
        entries, pending = self._watched(block), self.pending.get(block)
        if pending is not None:
            pairs = zip(pending.placed or pending.found, _states(entries), strict=True)
            changed = [before != now for before, now in pairs]
        else:
            binding = self.bindings[block]
            if not any(binding.addresses):
                return None  # edited in place, which is noticed by a count of all of them
            kept = zip(entries, binding.watched, binding.addresses, strict=True)
            changed = [e.holder.get(e.name) is not tensor or tensor.data_ptr() != at for e, tensor, at in kept]
        return next((entry.path for entry, is_changed in zip(entries, changed, strict=True) if is_changed), None)

    def _complete(self) -> None:
        """All blocks are placed."""
        assert self._transfer.unlocked is not None
        self._store.finish_locking()
        self._residents.drop_gathered()
        self._store.keep_spare(())
        self._transfer.unlocked.settle()

    def _report_placed(self) -> None:
        if self._listeners.on_placed is not None:
            self._listeners.on_placed(self._plan, len(self.bindings), self._store.pinned_bytes)

    def _fill_slab(self, block: int, streamed: Sequence[TensorEntry], pending: Pending) -> None:
        tier = self._plan.tiers[block]
        assert tier is not None, f"block {block} is swapped without a host tier"
        tensors = [entry.tensor for entry in streamed]
        addresses, given_back = [tensor.data_ptr() for tensor in tensors], self._store.given_back(block)
        slab = self._store.put(block, tensors, tier=tier, regions=[entry.region for entry in streamed])
        pending.follow(given_back)
        slab.originals = () if self._residents.leaves_mappings else slab.originals
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
        given_back = self._store.given_back(block)
        regions = self._store.leave_slab(block, [e.tensor for e in entries], [e.region for e in entries])
        pending.follow(given_back)
        for entry, region in zip(entries, regions, strict=True):
            entry.region = region
        pending.copied, bindings = self._residents.copy(entries, memory)
        if pending.is_as_found:  # if not, its memory goes when the block is placed again
            pending.bindings = bindings
            pending.note_placed({})

    def _bind_copies(self, bindings: Sequence[TensorBinding]) -> None:
        """Points tensors at their copies on the device, until the release."""
        self._bound += bindings
        _point_at_copies(bindings)

    def _move(self, block: str, entry: TensorEntry) -> None:
        """Replaces a tensor that cannot be pointed elsewhere by a copy on the device; release brings it back."""
        original, what = entry.tensor, f"{block}.{entry.path} ({type(entry.tensor).__name__}, {entry.extent:,} bytes)"
        moved = to_device(original, self._transfer.streams.device, what=what)
        self._fixed.append((entry, original, moved))
        entry.holder[entry.name] = moved

    def _profile(self, block: int) -> BlockProfile:
        return self._model.profile.blocks[block]

    def _watched(self, block: int) -> list[TensorEntry]:
        """The streamed tensors, and the small parameters: a forward may replace small buffers."""
        entries = self._model.entries[block]
        small = [entry for entry in entries if entry.placement is Placement.SMALL and not entry.is_buffer]
        return [*(entry for entry in entries if entry.placement is Placement.STREAMED), *small]

    def _binding(self, block: int) -> BlockBinding:
        entries = self._model.entries[block]
        streamed = [entry for entry in entries if entry.placement is Placement.STREAMED]
        watched = self._watched(block)
        beside = self._beside_streamed(block)
        if not self._plan.swapped[block]:
            _point_at_copies(beside)
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
            binding.slot_addresses = [[view.data_ptr() for view in slot] for slot in binding.slots]
            binding.streamed += [bound.tensor for bound in beside]
            binding.masters += [bound.master for bound in beside]
            for slot in binding.slots:
                slot += [bound.copy for bound in beside if bound.copy is not None]
        for shell in binding.shells:
            self._bind_shell(shell, binding)
        binding.counting = [tensor for tensor in binding.streamed if version_of(tensor) is not None]
        binding.versions = [tensor._version for tensor in binding.counting]
        return binding

    def _beside_streamed(self, block: int) -> list[TensorBinding]:
        """The small tensors in shells that stream. Their bytes stay on the device, but between forwards they point at
        their masters with the rest of the shell: its class expects to find all of it on one device.
        """
        together = {id(e): e for shell in self._model.shells[block] if shell.is_streamed for e in shell.entries}
        keys = [id(e.tensor) for e in together.values() if e.placement is Placement.SMALL and not e.is_tied]
        return [self._small[key] for key in keys if key in self._small]

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
