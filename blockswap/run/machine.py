"""Machine: readings of the device, the host and the link; the last known ones where a reading fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ...hardware import (
    READING_FAILURES,
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    HardwareUnavailableError,
    HostMemory,
    LinkSpeed,
    measure_link,
    probe_device,
    read_device_memory,
    read_host_memory,
)
from ...hardware.disk import measure_disk
from ..errors import PlanError
from ..plan.make_plan import Readings

logger = logging.getLogger(__name__)


class Machine(Protocol):
    """Readings of one device and its host, each taken when its method is called."""

    @property
    def spec(self) -> DeviceSpec:
        """The device's fixed properties."""

    def memory(self) -> DeviceMemory:
        """Total and free memory now, counting all processes."""

    def unused_cache_bytes(self) -> int:
        """Device memory that torch has reserved and does not use."""

    def allocated_bytes(self) -> int:
        """Device memory of this process's tensors."""

    def peak_bytes(self) -> int:
        """The highest `allocated_bytes` since the last reset of the peak, also by others."""

    def reset_peak(self) -> bool:
        """Resets the peak; False where it cannot be reset."""

    def host(self) -> HostMemory:
        """Host memory now."""

    def link(self) -> LinkSpeed | None:
        """The link's measured speed; None where it cannot be measured."""

    def disk(self, path: str) -> DiskSpeed | None:
        """Measured speed of reading this file; None where it cannot be measured."""


class TorchMachine:
    """The machine that torch runs on.

    Args:
        device: A device with memory of its own.
        cache_dir: Folder that keeps measurements of link and disks; None keeps none.

    Raises:
        HardwareUnavailableError: There is no such device, or its memory cannot be read.
    """

    def __init__(self, device: torch.device | str, *, cache_dir: Path | None = None) -> None:
        self.spec = probe_device(torch.device(device))
        self._device = torch.device(self.spec.torch_device)
        self._module: Any = torch.get_device_module(self._device)
        self._cache_dir = cache_dir
        self._link: LinkSpeed | None = None
        self.memory()

    def memory(self) -> DeviceMemory:
        memory = read_device_memory(self._device)
        if memory is None:
            raise HardwareUnavailableError(
                f"{self._device} ({self.spec.name}) has no memory of its own: swapping frees nothing there; run the "
                "model without it"
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

    def link(self) -> LinkSpeed | None:
        if self._link is None:
            self._link = measure_link(self._device, cache_dir=self._cache_dir)
        return self._link

    def disk(self, path: str) -> DiskSpeed | None:
        return measure_disk(path, cache_dir=self._cache_dir)


T = TypeVar("T")


class LastKnownReadings:
    """A machine for a run in progress: a reading that fails is replaced by the last one, or by None, with one warning
    per kind. Planning fails only if memory has never been read.

    Args:
        inner: Takes the readings.
    """

    def __init__(self, inner: Machine) -> None:
        self._inner = inner
        self._memory: DeviceMemory | None = None
        self._host: HostMemory | None = None
        self._warned: set[str] = set()

    @property
    def spec(self) -> DeviceSpec:
        """The device's fixed properties."""
        return self._inner.spec

    def memory(self) -> DeviceMemory:
        """As read now, or last.

        Raises:
            PlanError: It has never been read.
        """
        self._memory = self._known("device memory", self._inner.memory, self._memory)
        return self._memory

    def host(self) -> HostMemory:
        """As read now, or last.

        Raises:
            PlanError: It has never been read.
        """
        self._host = self._known("host memory", self._inner.host, self._host)
        return self._host

    def unused_cache_bytes(self) -> int:
        """Memory that torch has reserved and does not use; 0 if it cannot be read, so that less counts as free."""
        return self._ask("torch's cache", self._inner.unused_cache_bytes) or 0

    def allocated_bytes(self) -> int | None:
        """Device memory of this process's tensors; None if it cannot be read."""
        return self._ask("allocated device memory", self._inner.allocated_bytes)

    def peak_bytes(self) -> int | None:
        """The highest `allocated_bytes`; None if it cannot be read."""
        return self._ask("the peak of device memory", self._inner.peak_bytes)

    def reset_peak(self) -> bool:
        """Resets the peak. Returns whether that worked."""
        return bool(self._ask("the peak of device memory", self._inner.reset_peak))

    def link(self) -> LinkSpeed | None:
        """The link's measured speed; None where it cannot be measured."""
        return self._ask("the speed of the link", self._inner.link)

    def disk(self, path: str) -> DiskSpeed | None:
        """Measured speed of reading this file; None where it cannot be measured."""
        return self._ask("the speed of the disk", lambda: self._inner.disk(path))

    def read(self) -> Readings:
        """All readings that a plan needs, now or last, without measured speeds.

        Raises:
            PlanError: Device or host memory has never been read.
        """
        return Readings(
            spec=self.spec,
            memory=self.memory(),
            host=self.host(),
            unused_cache_bytes=self.unused_cache_bytes(),
        )

    def _known(self, what: str, read: Callable[[], T], before: T | None) -> T:
        found = self._ask(what, read)
        if found is not None:
            return found
        if before is not None:
            return before
        raise PlanError(f"{what} could not be read, so that nothing can be planned; the warning above says why")

    def _ask(self, what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except READING_FAILURES as failure:
            if what not in self._warned:
                self._warned.add(what)
                logger.warning("%s cannot be read: %s; the last known value is used", what, failure)
            return None


class PeakMeter:
    """Measures the device memory that a forward takes above what was allocated before it.

    Args:
        machine: Takes the readings.
    """

    def __init__(self, machine: LastKnownReadings) -> None:
        self._machine = machine
        self._was_reset = False
        self._before: int | None = None
        self._peak: int | None = None

    def start(self, *, anew: bool) -> None:
        """A forward starts.

        Args:
            anew: Reset the peak first, where the device can.
        """
        self._was_reset = anew and self._machine.reset_peak()
        self._before, self._peak = self._machine.allocated_bytes(), self._machine.peak_bytes()

    def held_bytes(self) -> int | None:
        """Device memory that the forward holds now; None if unknown."""
        now = self._machine.allocated_bytes()
        return None if now is None or self._before is None else now - self._before

    def gave_back(self, nbytes: int) -> None:
        """So much of what was allocated before the forward has been freed meanwhile."""
        if self._before is not None:
            self._before -= nbytes

    def taken_bytes(self) -> int | None:
        """Device memory that the forward took, at its end; None if unknown: a peak that was not reset and has not
        grown may be older than the forward.
        """
        now = self._machine.peak_bytes()
        if now is None or self._before is None or self._peak is None or not (self._was_reset or now > self._peak):
            return None
        return now - self._before
