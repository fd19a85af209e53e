"""Where a slab's bytes came from, so that they are read again only if they may have changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .tensors import flat, storage_key, version_of

SAMPLED_ELEMENTS = 4096
"""Elements by which an inference tensor is compared with what was read from it before. It counts no edits; one that
changes weights as a LoRA does changes nearly all of them."""


@dataclass(slots=True)
class Source:
    """Where a slab's tensor came from, held weakly: living storage at the same place is the same bytes."""

    storage: StorageWeakRef
    place: tuple[Any, ...]
    sample: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Source:
        return cls(StorageWeakRef(tensor.untyped_storage()), _place(tensor), _sample(tensor))

    def is_still(self, tensor: torch.Tensor) -> bool:
        if self.storage.expired() or self.storage.cdata != storage_key(tensor) or self.place != _place(tensor):
            return False
        sample = _sample(tensor)
        return self.sample is None or (sample is not None and torch.equal(self.sample, sample))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version_of(tensor)


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Some bytes of a tensor that does not count its edits; None for one that does."""
    if version_of(tensor) is not None or tensor.numel() == 0:
        return None
    elements = flat(tensor)
    # On the host: a fingerprint of weights on the device must not keep memory there.
    sample = elements[:: max(1, elements.numel() // SAMPLED_ELEMENTS)]
    return sample.to("cpu", copy=True).view(torch.uint8)
