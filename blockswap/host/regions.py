"""Which tensors are bytes of a file, as they stand."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...hardware.disk import FileMappings, FileRegion
from ..model.tensors import flat, span_bytes
from .slabs import Slab


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
            for view, region in zip(slab.views, slab.regions, strict=False):
                if region is not None:
                    self._of_slab[view.data_ptr()] = region

    def region_of(self, tensor: torch.Tensor) -> FileRegion | None:
        """The file's bytes that the tensor is; None if it is in other memory, or if that is unknown."""
        nbytes = span_bytes(tensor)
        if tensor.device.type != "cpu" or nbytes == 0:
            return None
        known = self._of_slab.get(tensor.data_ptr())
        if known is not None and known.nbytes == nbytes:
            return known

        def sample(start: int, size: int) -> bytes:
            return bytes(flat(tensor).view(torch.uint8)[start : start + size].tolist())

        return self._mappings.region(tensor.data_ptr(), nbytes, sample)
