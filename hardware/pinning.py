"""Page-locks host memory for a device; no other file calls the driver for it."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

# Return codes of cudaHostRegister and hipHostRegister (cudaError_t).
_REGISTER_RESULTS = {
    1: "the driver cannot lock this memory",
    2: "out of memory that can be locked",
    712: "already registered",
    713: "not registered",
    801: "not supported on this platform",
}


def register_result(code: int) -> str:
    """A return code of the driver in words."""
    return f"code {code}, {_REGISTER_RESULTS.get(code, 'a driver error')}"


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside. Between a call that failed and `consume_error`, it could drop a tensor whose
    deallocation reports the pending error as its own (cudaMallocAsync).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Registrar(Protocol):
    """Page-locks host memory for a device."""

    def register(self, pointer: int, nbytes: int) -> int:
        """Locks the pages; 0, or the driver's error code."""

    def unregister(self, pointer: int) -> int:
        """Unlocks the pages; 0, or the driver's error code."""

    def consume_error(self) -> None:
        """Clears the error that a failed call leaves behind; the next kernel would report it as its own."""


class CudaRegistrar:
    """cudaHostRegister through torch, which has one binding for CUDA and ROCm builds.

    Not `pin_memory()`, whose allocator rounds each block up to a power of two: 1.53 times the bytes of Wan 14B. Both
    calls run with the device as the current one, because a registration belongs to a context.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, pointer: int, nbytes: int) -> int:
        portable = 1  # cudaHostRegisterPortable: locked for every context, on CUDA and HIP alike
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostRegister(pointer, nbytes, portable))

    def unregister(self, pointer: int) -> int:
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostUnregister(pointer))

    def consume_error(self) -> None:
        try:
            torch.zeros(1, device=self._device)
            torch.cuda.synchronize(self._device)
        except RuntimeError as pending:  # AcceleratorError since torch 2.8
            logger.debug("consumed the pending error of a failed registration: %s", pending)


@dataclass(slots=True)
class PinBudget:
    """Page-locked host memory of a process: limit and use of all its stores, which lock in different threads."""

    limit_bytes: int
    used_bytes: int = 0
    # Reentrant: a garbage collection inside may drop pages of this thread, which returns their bytes.
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.limit_bytes, int):
            raise TypeError(f"expected a number of bytes, as in PinBudget(8 << 30), got {self.limit_bytes!r}")

    def take(self, nbytes: int) -> None:
        """Counts bytes that have been locked."""
        with self._lock:
            self.used_bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """Counts bytes that have been unlocked."""
        with self._lock:
            self.used_bytes -= nbytes

    @property
    def left_bytes(self) -> int:
        """Bytes that may still be locked."""
        return max(0, self.limit_bytes - self.used_bytes)
