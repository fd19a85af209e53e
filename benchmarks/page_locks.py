"""Page-locking without a GPU, timed page-locking, and a device whose copies take no time."""

from __future__ import annotations

import ctypes
import time

import torch
from wanvideo_enhanced_blockswap.blockswap.device.streams import InlineStreams
from wanvideo_enhanced_blockswap.hardware.pinning import Registrar


class MlockRegistrar:
    """Locks pages with the system call `mlock`; not on Windows."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def register(self, pointer: int, nbytes: int) -> int:
        failed = self._libc.mlock(ctypes.c_void_p(pointer), ctypes.c_size_t(nbytes))
        return ctypes.get_errno() if failed else 0

    def unregister(self, pointer: int) -> int:
        return 0  # unmapping unlocks

    def consume_error(self) -> None:
        """No error is pending."""


class NoDevice(InlineStreams):
    """Copies nothing: host memory in the device's place would take as long to fill as a slab."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        """Nothing."""


class TimedRegistrar:
    """Measures the time of another registrar's calls."""

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
