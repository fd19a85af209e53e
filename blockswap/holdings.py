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

    def drop_device(self) -> None:
        """Masters back; window, residents and staging gone."""
        if self.swapper is not None:
            self.swapper.release()
            self.swapper = None
        if self.transfer is not None:
            self.transfer.close()
            self.transfer = None

    def drop(self) -> None:
        """The same, and no slab stays locked."""
        self.drop_device()
        if self.store is not None:
            self.store.release()
            self.store = None
