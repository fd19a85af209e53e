"""What a session holds on the device and in page-locked memory, and how it is given up."""

from __future__ import annotations

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
    def pinned_bytes(self) -> int:
        """Page-locked host memory: slabs and staging."""
        store, transfer = self.store, self.transfer
        pages = [] if store is None else [slab.pages for slab in store.slabs.values()]
        pages += [] if transfer is None or transfer.staging is None else transfer.staging.slabs
        return sum(page.size for page in pages if page.is_pinned)

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
