"""What a session holds on the device and in page-locked memory, how it is given up, and how blocks come to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .host import HostStore
from .swapper import BlockSwapper
from .transfer import Transfer


class Holdings:
    """What a session holds on the device and in page-locked memory. It does not know the session, so that it can be
    given up when a session is dropped without `close`.
    """

    def __init__(self) -> None:
        self.store: HostStore | None = None
        self.transfer: Transfer | None = None
        self.swapper: BlockSwapper | None = None

    @property
    def staging_bytes(self) -> int:
        """Host memory of the staging slabs."""
        transfer = self.transfer
        return 0 if transfer is None or transfer.staging is None else sum(p.size for p in transfer.staging.slabs)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked host memory: slabs and staging, whose slabs are there only if they could be locked."""
        slabs = [] if self.store is None else self.store.slabs.values()
        return sum(slab.pages.size for slab in slabs if slab.pages.is_pinned) + self.staging_bytes

    def drop_device(self) -> None:
        """Masters back; window, residents and staging gone, whatever fails on the way."""
        swapper, transfer = self.swapper, self.transfer
        self.swapper = self.transfer = None
        try:
            if swapper is not None:
                swapper.release()
        finally:
            if transfer is not None:
                transfer.close()

    def drop(self) -> None:
        """The same, and no slab stays locked. Copies are waited for on the host, also those that were struck amid."""
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
    holds: Holdings, enter: Callable[[], Callable[[int], None] | None], block: int
) -> Callable[[nn.Module, object], None]:
    """The hook in front of a block.

    Args:
        holds: What runs the blocks.
        enter: Gives the session's method, None once the session is gone: one that is dropped must not wait for the
            garbage collector.
        block: Index of the block.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_block(module: nn.Module, arguments: object) -> None:
        swapper = holds.swapper
        if swapper is not None and swapper.is_as_left(block):
            swapper.enter(block)
            return
        alive = enter()
        assert alive is not None, "hooks are registered only inside a session's forward"
        alive(block)

    return before_block
