"""Device memory for tensors that stay there until a release, residents' and small ones, and their copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..host.pages import PageMemory
from ..host.store import HostStore
from ..model.layout import Placement, device_bytes, slab_offsets
from ..model.profile import ProfiledModel, TensorEntry
from ..model.tensors import copy_bytes, element_view, plain_view, version_of
from ..plan.swap_plan import HostTier, SwapPlan
from .binding import TensorBinding
from .transfer import Transfer

WORTH_LOCKING = 32 << 20
"""Bytes from which page-locking the memory that residents are gathered in is quicker than one pageable copy of them."""


class Residents:
    """Copies tensors to the device, where they stay until the release.

    Args:
        model: The profiled blocks.
        plan: The plan.
        store: Reads what is in files, and makes the memory that copies are gathered in.
        transfer: The device's copies.

    Attributes:
        memories: The device memory.
        leaves_mappings: Whether nothing may point into the loader's mappings of files any more.
    """

    def __init__(self, model: ProfiledModel, plan: SwapPlan, store: HostStore, transfer: Transfer) -> None:
        self._plan = plan
        self._store = store
        self._transfer = transfer
        self.memories: list[torch.Tensor] = []
        self.leaves_mappings = should_leave_mappings(model, plan)
        self._gathered: PageMemory | None = None  # host memory in which copies are gathered

    @property
    def is_copying(self) -> bool:
        """Whether copies may be in progress."""
        return self._gathered is not None

    def to_copy(self, entries: Iterable[TensorEntry]) -> list[TensorEntry]:
        """Those that are not on the device already."""
        device = self._transfer.streams.device
        return [entry for entry in entries if entry.tensor.device != device or device.type == "cpu"]

    def allocate(self, entries: Sequence[TensorEntry]) -> torch.Tensor | None:
        """Device memory for tensors, one after the other; None for no tensors."""
        if not entries:
            return None
        memory = self._transfer.allocate(device_bytes(slab_offsets(entry.extent for entry in entries)[1]))
        self.memories.append(memory)
        return memory

    def copy(self, entries: Sequence[TensorEntry], memory: torch.Tensor | None) -> tuple[Any, list[TensorBinding]]:
        """Copies tensors to their device memory; returns the event behind the copy, if any, and where each tensor is
        to point.

        They are gathered in memory of ours first, for one copy. Copies from the loader's file mapping take seconds per
        tensor with ROCm on Linux (ROCm/ROCm#6523: 5 s where the heap takes 4 ms), and are slow everywhere.
        """
        if memory is None:
            return None, []
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
        bindings = []
        for entry, start in zip(entries, starts, strict=True):
            tensor, copy = entry.tensor, element_view(memory, entry.tensor, offset=start)
            version = version_of(tensor, *entry.shells)
            bindings.append(TensorBinding(entry, tensor, self._master(entry), copy, version))
        return copied, bindings

    def _master(self, entry: TensorEntry) -> torch.Tensor:
        """The host's bytes of a tensor that goes to the device: as they are, or a copy outside the loader's mapping."""
        if not (self.leaves_mappings and entry.in_mapping) or entry.is_tied:
            return plain_view(entry.tensor)
        master = element_view(torch.empty(entry.extent, dtype=torch.uint8), entry.tensor, offset=0)
        copy_bytes(master, entry.tensor)
        return master

    def _gather(self, nbytes: int) -> PageMemory:
        """Host memory of at least `nbytes` that no copy reads; page-locked if slabs are, and if that succeeds."""
        if self._gathered is None or self._gathered.size < nbytes:
            self.drop_gathered()  # first, since both may not fit the budget
            plan = self._plan
            are_locked = nbytes >= WORTH_LOCKING and plan.pinned_bytes > 0
            # Staging is locked only after this memory has been given up.
            self._gathered = self._store.make_pages(
                nbytes, beside=plan.pinned_bytes - plan.staging_bytes if are_locked else None
            )
        self._gathered.settle()
        return self._gathered

    def drop_gathered(self) -> None:
        """Waits for the copies, then gives up the memory that they were gathered in."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            try:
                gathered.settle()  # before it goes, where an error could not be raised
            finally:
                gathered.unpin()


def should_leave_mappings(model: ProfiledModel, plan: SwapPlan) -> bool:
    """Whether that frees host memory: written pages, as of a LoRA merged in place, stay as long as the mapping."""
    written = clean = 0
    for entries, tier in zip(model.entries, plan.tiers, strict=True):
        streamed = [entry for entry in entries if entry.in_mapping and entry.placement is Placement.STREAMED]
        if tier is HostTier.FILE and any(entry.region is not None for entry in streamed):
            return False  # its masters are the mapping
        written += sum(entry.extent for entry in streamed if tier is not None and entry.region is None)
        clean += sum(entry.extent for entry in streamed if tier is None and entry.region is not None)
    return written > clean
