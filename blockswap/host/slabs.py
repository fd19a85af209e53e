"""Slabs: a block's weights on the host, as a copy of ours or as bytes of a file."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...hardware.disk import FileMappings, FileRegion
from ..errors import WeightFileError
from ..model.layout import slab_offsets
from ..model.tensors import (
    copy_bytes,
    element_view,
    flat,
    plain_view,
    region_of,
    same_layout,
    span_bytes,
    storage_key,
    version_of,
)
from ..plan.swap_plan import HostTier
from .pages import PageMemory
from .weight_files import WeightFiles

logger = logging.getLogger(__name__)


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
        """Puts the tensors' bytes into their masters, except those that the slab has already.

        What is in a file is read from it: a mapping is read page by page, several times slower (docs/architecture.md).

        Raises:
            WeightFileError: A file has changed or cannot be read.
        """
        assert self.pages is not None, "the file tier has no memory"
        held = self._held(tensors, regions)
        self.pages.settle()
        self.forget_sources()  # first: after an error, the slab holds something of both
        offsets, _ = slab_offsets(map(span_bytes, tensors))
        pieces = []
        for view, tensor, region, offset, is_held in zip(self.views, tensors, regions, offsets, held, strict=True):
            if is_held:
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

    def holds(self, tensors: Sequence[torch.Tensor], regions: Sequence[FileRegion | None]) -> bool:
        """Whether the slab has the bytes of these tensors: they are its masters, or what it was filled from.

        A tensor that was filled from a file and is in none now, or in a changed one, has other bytes. One that shows
        the same bytes of an unchanged file has the same, whichever mapping it is a view of.
        """
        return self.fits(tensors) and all(self._held(tensors, regions))

    def _held(self, tensors: Sequence[torch.Tensor], regions: Sequence[FileRegion | None]) -> list[bool]:
        """Of each tensor, in the layout of the masters, whether its master has its bytes."""
        pairs, known = list(zip(tensors, self.views, strict=True)), len(self.sources)
        return [
            tensor.data_ptr() == view.data_ptr()
            or (i < known and self.regions[i] == region and (region is not None or self.sources[i].matches(tensor)))
            for i, ((tensor, view), region) in enumerate(zip(pairs, regions, strict=True))
        ]

    def relaid(self, tensors: Sequence[torch.Tensor]) -> Slab | None:
        """This slab, or one in the same memory that has the bytes of the tensors before the first that is new, as when
        a LoRA was changed or taken away. None if others refer to the memory, it is too small, or too much would be
        unused.
        """
        if self.pages is None:
            return None
        if self.fits(tensors):
            return self if self.is_only_ours(tensors) else None
        pairs = enumerate(zip(tensors, self.views, strict=False))
        fewest = min(len(tensors), len(self.views))
        kept = next((i for i, (tensor, view) in pairs if not same_layout(tensor, view)), fewest)
        offsets, used_bytes = slab_offsets(map(span_bytes, tensors))
        if not kept or not self.size - self.size // UNUSED_SHARE <= used_bytes <= self.size:
            return None
        if not self.is_only_ours(tensors[:kept]):  # one that is in the slab and moves would be written over
            return None
        added = zip(tensors[kept:], offsets[kept:], strict=True)
        views = [element_view(self.pages.tensor, tensor, offset=offset) for tensor, offset in added]
        slab = Slab(self.pages, used_bytes, (*self.views[:kept], *views), self.tier, self.regions[:kept])
        slab.sources = self.sources[:kept]
        return slab

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors have the dtypes, shapes, strides and kinds of the masters."""
        return len(tensors) == len(self.views) and all(map(same_layout, tensors, self.views))

    @property
    def is_unused(self) -> bool:
        """Whether only the slab refers to its bytes."""
        return self._has_no_other_users_than(0)

    def is_only_ours(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether only the slab and `tensors` refer to its bytes: no state dict, other block, or other tensor."""
        own = sum(tensor.data_ptr() == view.data_ptr() for tensor, view in zip(tensors, self.views, strict=False))
        return self._has_no_other_users_than(own)

    def _has_no_other_users_than(self, tensors: int) -> bool:
        """Whether the slab and so many tensors are all that refers to its bytes."""
        assert self.pages is not None
        # 2: the pages' tensor, and the storage object of this call.
        return torch._C._storage_Use_Count(storage_key(self.pages.tensor)) <= len(self.views) + tensors + 2


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


UNUSED_SHARE = 4
"""At most a quarter of a slab's memory stays unused when tensors have gone: four LoRAs of rank 64 take a twelfth of the
blocks of Wan 14B in bf16, and a sixth in fp8."""

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


class RegionFinder:
    """Finds the file behind tensors at one moment.

    Args:
        slabs: Slabs that have taken the place of tensors; one that has not been edited has the bytes of their file.
    """

    def __init__(self, slabs: Iterable[Slab]) -> None:
        self._mappings = FileMappings.read()
        self._of_slab: dict[int, FileRegion] = {}
        for slab in slabs:
            slab.notice_edits()
            if slab.pages is None:
                continue  # its masters are a mapping, whose pages show if they were written
            for view, region in zip(slab.views, slab.regions, strict=False):
                if region is not None:
                    self._of_slab[view.data_ptr()] = region

    def region_of(self, tensor: torch.Tensor) -> FileRegion | None:
        """The file's bytes that the tensor is; None if it is in other memory, or if that is unknown."""
        known = self._of_slab.get(tensor.data_ptr()) if tensor.device.type == "cpu" else None
        if known is not None and known.nbytes == span_bytes(tensor):
            return known
        return region_of(tensor, self._mappings)

    def in_mapping(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in a mapping of a file, written since or not."""
        return tensor.device.type == "cpu" and self._mappings.shows(tensor.data_ptr())
