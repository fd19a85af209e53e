"""Machine: what the engine reads of the device, the host and the link, at the moment it asks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import torch

from ..hardware import (
    DeviceMemory,
    DeviceSpec,
    HardwareUnavailableError,
    HostMemory,
    LinkSpeed,
    measure_link,
    probe_device,
    read_device_memory,
    read_host_memory,
)

logger = logging.getLogger(__name__)


class Machine(Protocol):
    """Readings of one device and its host. Each is taken when it is asked for."""

    @property
    def spec(self) -> DeviceSpec:
        """What the device is."""

    def memory(self) -> DeviceMemory:
        """Its memory now, whoever uses it."""

    def unused_cache_bytes(self) -> int:
        """What torch has reserved there and does not use."""

    def allocated_bytes(self) -> int:
        """What tensors of this process take there."""

    def peak_bytes(self) -> int:
        """The most that they have taken since somebody last reset the figure."""

    def reset_peak(self) -> bool:
        """The peak counts from here; False where it cannot be reset."""

    def host(self) -> HostMemory:
        """Host memory now."""

    def link(self, *, again: bool = False) -> LinkSpeed | None:
        """The measured link; None where it cannot be measured.

        Args:
            again: Measures even if a figure is kept.
        """


class TorchMachine:
    """The machine that torch runs on.

    Args:
        device: A device with memory of its own.
        cache_dir: Where measurements of the link are kept; None keeps them nowhere.

    Raises:
        HardwareUnavailableError: There is no such device, or nothing tells its memory.
    """

    def __init__(self, device: torch.device, *, cache_dir: Path | None = None) -> None:
        self.spec = probe_device(device)
        self._device = torch.device(self.spec.torch_device)
        self._module: Any = torch.get_device_module(self._device)
        self._cache_dir = cache_dir
        self._link: LinkSpeed | None = None
        self.memory()

    def memory(self) -> DeviceMemory:
        memory = read_device_memory(self._device)
        if memory is None:
            raise HardwareUnavailableError(
                f"block swapping expects a device with memory of its own but {self._device} ({self.spec.name}) tells "
                "of none; run the model without swapping there"
            )
        return memory

    def unused_cache_bytes(self) -> int:
        if not hasattr(self._module, "memory_reserved"):
            return 0  # the tests' pretend accelerator, and vendors' modules without a caching allocator
        return max(0, int(self._module.memory_reserved(self._device)) - self.allocated_bytes())

    def allocated_bytes(self) -> int:
        return int(self._module.memory_allocated(self._device))

    def peak_bytes(self) -> int:
        return int(self._module.max_memory_allocated(self._device))

    def reset_peak(self) -> bool:
        if not hasattr(self._module, "reset_peak_memory_stats"):
            return False
        self._module.reset_peak_memory_stats(self._device)
        return True

    def host(self) -> HostMemory:
        return read_host_memory()

    def link(self, *, again: bool = False) -> LinkSpeed | None:
        if self._link is None or again:
            self._link = measure_link(self._device, cache_dir=self._cache_dir, again=again)
        return self._link
