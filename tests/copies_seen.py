"""Copies of weights to a device as torch dispatches them, with the memory that each one reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.host.pages import PageMemory


class CopiesToDevice(TorchDispatchMode):
    """Address and bytes of the host memory that each copy to a device reads, in the thread that enters this.

    Args:
        patch: Records the pages that are made.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.reads: list[tuple[int, int]] = []
        self.pages: list[tuple[int, int]] = []
        make = PageMemory.__init__

        def remember(pages: PageMemory, *arguments: Any) -> None:
            make(pages, *arguments)
            self.pages.append((pages.tensor.data_ptr(), pages.size))

        patch.setattr(PageMemory, "__init__", remember)

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function is torch.ops.aten.copy_.default:
            source, target = given[1], given[0].device
        elif function is torch.ops.aten._to_copy.default:
            source, target = given[0], named.get("device") or given[0].device
        else:
            return function(*given, **named)
        if source.device.type == "cpu" != torch.device(target).type:
            self.reads.append((source.data_ptr(), source.nbytes))
        return function(*given, **named)

    @property
    def foreign(self) -> list[tuple[int, int]]:
        """Copies that read other memory than ours."""
        return [
            (first, nbytes)
            for first, nbytes in self.reads
            if not any(start <= first and first + nbytes <= start + size for start, size in self.pages)
        ]


def assert_placed_in_few_copies_of_our_memory(session: SwapSession, patch: pytest.MonkeyPatch) -> None:
    """An adopt copies each resident block once, all small tensors once, and what it prefetches."""
    with torch.inference_mode(), CopiesToDevice(patch) as seen:
        plan = session.adopt()
    assert seen.foreign == []
    residents = len(plan.swapped) - plan.swapped_count
    assert 1 <= len(seen.reads) <= residents + 1 + plan.slots * plan.streams
