"""Page-locking of host memory for a device: the one place that calls the driver for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


REGISTER_RESULTS = {
    1: "the driver cannot page-lock this memory",
    2: "out of page-lockable memory",
    712: "already registered",
    713: "not registered",
    801: "not supported on this platform",
}


"""What the return codes of cudaHostRegister and hipHostRegister mean (cudaError_t)."""


def register_result(code: int) -> str:
    """A driver's error code in words."""
    return f"code {code}, {REGISTER_RESULTS.get(code, 'an error of the driver')}"


class Registrar(Protocol):
    """Page-locks host memory for a device."""

    def register(self, pointer: int, nbytes: int) -> int:
        """Locks the pages; 0, or the driver's error code."""

    def unregister(self, pointer: int) -> int:
        """Unlocks the pages; 0, or the driver's error code."""

    def consume_error(self) -> None:
        """Takes the pending error of a failed call, which the driver would else report at the next kernel."""


class CudaRegistrar:
    """cudaHostRegister through torch, one binding for CUDA and ROCm builds. Not `pin_memory()`: its allocator rounds
    each block up to a power of two, 1.53 times the bytes of Wan 14B.
    """

    PORTABLE = 1
    """cudaHostRegisterPortable: locked for every context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, pointer: int, nbytes: int) -> int:
        with torch.cuda.device(self._device):  # Rule 8
            return int(torch.cuda.cudart().cudaHostRegister(pointer, nbytes, self.PORTABLE))

    def unregister(self, pointer: int) -> int:
        with torch.cuda.device(self._device):  # Rule 8
            return int(torch.cuda.cudart().cudaHostUnregister(pointer))

    def consume_error(self) -> None:
        try:
            torch.zeros(1, device=self._device)
            torch.cuda.synchronize(self._device)
        except RuntimeError as pending:  # AcceleratorError since torch 2.8
            logger.debug("consumed the pending error of a failed registration: %s", pending)


@dataclass(slots=True)
class PinBudget:
    """Page-locked host memory that all stores of a process may take together.

    Attributes:
        limit_bytes: At most this much.
        used_bytes: Taken now.
    """

    limit_bytes: int
    used_bytes: int = 0

    @property
    def left_bytes(self) -> int:
        """What may still be taken."""
        return max(0, self.limit_bytes - self.used_bytes)
