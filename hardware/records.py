"""What the hardware layer reads, as frozen records in which None means unknown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from .units import GIB

# Windows drivers refuse at about half of RAM, and faults are reported near that limit.
_WINDOWS_PIN_SHARE = 0.40
# Linux lets a process page-lock nearly all RAM, but the kernel can neither swap nor reclaim locked pages, so the rest
# of the system needs a share and an absolute floor of its own.
_LINUX_PIN_SHARE = 0.90
_LINUX_RESERVE_BYTES = 4 * GIB
_FLOOR_BYTES = 2 * GIB
# Share of the best speed within which two speeds of a link are equal: two runs of one measurement differ by about this.
_EQUAL_SPEED_SHARE = 0.02


class HardwareUnavailableError(RuntimeError):
    """A device, or the library that reads it, is not there."""


class Vendor(Enum):
    """Who made the device, which decides the library that can read it."""

    NVIDIA = "nvidia"  # a CUDA device of a torch built for CUDA; NVML reads it
    AMD = "amd"  # a torch.cuda device of a torch built for HIP; amdsmi or sysfs read it
    OTHER = "other"  # the CPU, and every device that only its torch module can read


class HostPlatform(Enum):
    """The operating system, as far as host memory behaves differently on it."""

    LINUX = "linux"
    WSL2 = "wsl2"  # a Linux kernel with the GPU driver of Windows
    WINDOWS = "windows"
    MACOS = "macos"


@dataclass(frozen=True, slots=True)
class PcieLink:
    """The PCI Express link of a device, as the device itself reports it.

    A Radeon card has a switch of its own between the slot and the GPU, and the GPU may report the link to that switch:
    only a measurement shows a slot that is narrower.

    Attributes:
        generation: in use now; idle GPUs fall back to a lower one.
        width: lanes in use now.
        max_generation: the highest that the device and its slot support.
        max_width: the most lanes that the device and its slot support.
    """

    generation: int | None = None
    width: int | None = None
    max_generation: int | None = None
    max_width: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a device is: facts that do not change while the process runs.

    Attributes:
        torch_device: the device as torch writes it, with its index, such as "cuda:0".
        uuid: the vendor's identifier; NVIDIA's with the prefix "GPU-" or "MIG-" where NVML confirmed it.
        pci_bus_id: domain:bus:device.function, such as "0000:01:00.0".
        compute_units: multiprocessors or compute units as torch counts them; logical cores for a CPU.
        is_integrated: whether the device shares the host's memory.
        driver: version of the kernel driver.
        total_bytes: memory of the device, or of the host for a CPU.
    """

    name: str
    vendor: Vendor
    torch_device: str
    uuid: str | None = None
    pci_bus_id: str | None = None
    compute_units: int | None = None
    is_integrated: bool | None = None
    driver: str | None = None
    total_bytes: int | None = None
    pcie: PcieLink | None = None


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Total and free memory of a device at one moment, counting all processes.

    Attributes:
        free_bytes: memory that no process uses, between 0 and total_bytes.
        source: who read it, and what was corrected.
        is_estimate: free_bytes is an estimate, because no reading of it was possible.
    """

    total_bytes: int
    free_bytes: int
    source: str
    is_estimate: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.free_bytes <= self.total_bytes:
            message = f"free memory: expected 0 to {self.total_bytes} bytes, got {self.free_bytes}"
            raise ValueError(f"{message} ({self.source})")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Host memory at one moment, as this process may use it.

    Attributes:
        physical_bytes: RAM of the machine.
        available_bytes: what this process can take without swapping, within the limit of its control group and what
            the system lets programs reserve.
        cgroup_limit_bytes: the tightest memory limit of the control groups above this process; None without one.
        memlock_bytes: RLIMIT_MEMLOCK; None where it is unlimited or the platform has none. GPU drivers ignore it.
    """

    physical_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    memlock_bytes: int | None
    platform: HostPlatform

    @property
    def room_bytes(self) -> int:
        """Bytes that may be added to memory which the system cannot drop: what is available above a floor.

        The floor is 2 GB or 10 % of RAM, whichever is more, for the system, other programs and the files that the
        model's weights come from; at most a quarter of RAM. RAM is the control group's limit where that is lower.
        """
        ram = min(self.physical_bytes, self.cgroup_limit_bytes or self.physical_bytes)
        floor = max(ram // 10, min(_FLOOR_BYTES, ram // 4))
        return max(0, self.available_bytes - floor)

    @property
    def pin_budget_bytes(self) -> int:
        """The most host memory to page-lock, in bytes.

        40 % of RAM on Windows; elsewhere 90 %, and always 4 GB less than all of it. RAM is the control group's limit
        where that is lower. On WSL2 the true cap belongs to the Windows driver, which does not report it, and varies
        from below 1 GB upwards: the Linux figure is tried there until the driver refuses.
        """
        ram = self.physical_bytes
        if self.cgroup_limit_bytes is not None:
            ram = min(ram, self.cgroup_limit_bytes)
        if self.platform is HostPlatform.WINDOWS:
            return int(ram * _WINDOWS_PIN_SHARE)
        return max(0, min(int(ram * _LINUX_PIN_SHARE), ram - _LINUX_RESERVE_BYTES))


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Measured host-to-device bandwidth in bytes per second.

    Attributes:
        pinned: (stream count, bytes per second) from page-locked memory, by rising stream count; empty where the device
            has no streams or the driver refused to page-lock.
        pageable: bytes per second from ordinary memory, the host waiting; None if the measurement failed.
        host_copy: bytes per second from ordinary to page-locked host memory in one thread; None if not measured.
    """

    pinned: tuple[tuple[int, float], ...]
    pageable: float | None
    host_copy: float | None = None

    def __post_init__(self) -> None:
        counts = [count for count, _ in self.pinned]
        if counts != sorted(set(counts)) or any(count < 1 for count in counts):
            raise ValueError(f"stream counts of a link: expected rising numbers from 1, got {counts}")
        others = [speed for speed in (self.pageable, self.host_copy) if speed is not None]
        speeds = [speed for _, speed in self.pinned] + others
        if not all(math.isfinite(speed) and speed > 0 for speed in speeds):
            raise ValueError(f"speeds of a link: expected positive bytes per second, got {speeds}")

    def best(self, *, max_streams: int | None = None) -> tuple[int, float]:
        """The smallest stream count whose pinned speed is within 2 % of the best, and that speed.

        Args:
            max_streams: leaves out higher counts, but never the lowest that was measured; None leaves out none.

        Raises:
            HardwareUnavailableError: `pinned` is empty.
        """
        if not self.pinned:
            message = "no speed of copies from locked RAM was measured"
            raise HardwareUnavailableError(f"{message}; use the one from ordinary RAM, {self.pageable} bytes/s")
        fewest = self.pinned[0][0]
        allowed = [pair for pair in self.pinned if max_streams is None or pair[0] <= max(max_streams, fewest)]
        floor = (1 - _EQUAL_SPEED_SHARE) * max(speed for _, speed in allowed)
        return next((count, speed) for count, speed in allowed if speed >= floor)


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Measured speed of reading a file into memory, by several threads, in bytes per second.

    Attributes:
        cold: from the disk, past the system's cache of files; None where the system or the file system allows no such
            reads.
        warm: from the cache of files; None if not measured.
    """

    cold: float | None
    warm: float | None

    def __post_init__(self) -> None:
        speeds = [speed for speed in (self.cold, self.warm) if speed is not None]
        if not all(math.isfinite(speed) and speed > 0 for speed in speeds):
            raise ValueError(f"speeds of a disk: expected positive bytes per second, got {speeds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Figures over the readings of a run; None for what no reading gave. Peaks between two readings are missed.

    Attributes:
        count: how many times everything was read.
        gpu_percent_mean: share of the time in which at least one kernel ran, 0 to 100; the mean of the readings.
        gpu_percent_max: the highest of these readings.
        vram_used_peak_bytes: device memory in use, counting all processes.
        rss_peak_bytes: host memory of this process, with the pages of files that it has mapped.
        host_available_least_bytes: available host memory, within the control group.
    """

    count: int
    gpu_percent_mean: float | None
    gpu_percent_max: float | None
    vram_used_peak_bytes: int | None
    rss_peak_bytes: int | None
    host_available_least_bytes: int | None
