"""Page-locking without a GPU, page-locking that is timed, and a device that takes no time."""

from __future__ import annotations

import ctypes
import time

import torch
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.hardware.pinning import Registrar


class MlockRegistrar:
    """Locks pages with the system's own call. Not on Windows."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def register(self, pointer: int, nbytes: int) -> int:
        failed = self._libc.mlock(ctypes.c_void_p(pointer), ctypes.c_size_t(nbytes))
        return ctypes.get_errno() if failed else 0

    def unregister(self, pointer: int) -> int:
        return 0  # unmapping unlocks

    def consume_error(self) -> None:
        """None is pending."""


class NoDevice(InlineStreams):
    """Takes what is copied to it in no time: memory of the host in the device's place would be filled as a slab is."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        """Nothing."""


class TimedRegistrar:
    """Another registrar, timed."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self.seconds = 0.0

    def register(self, pointer: int, nbytes: int) -> int:
        begin = time.perf_counter()
        result = self._registrar.register(pointer, nbytes)
        self.seconds += time.perf_counter() - begin
        return result

    def unregister(self, pointer: int) -> int:
        return self._registrar.unregister(pointer)

    def consume_error(self) -> None:
        self._registrar.consume_error()
