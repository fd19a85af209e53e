"""A machine whose readings follow a simulated device and what a test says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from toys import Simulation
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
)

CARD = DeviceSpec("RTX 4090", Vendor.NVIDIA, "cuda:0", None, None, 128, False, None, None, None)


@dataclass
class SimulatedMachine:
    """The card of a simulation.

    Attributes:
        simulation: Its device says what our weights take.
        total_bytes: Memory of the card.
        others_bytes: What other programs take of it.
        activation_bytes: What the next forward takes above the weights at its peak.
        link_speed: What a measurement of the link finds, bytes per second.
        measured: How often it was measured.
        disks: Files whose speed was measured.
        can_reset: The peak can be reset.
    """

    simulation: Simulation
    total_bytes: int
    others_bytes: int = 0
    activation_bytes: int = 0
    link_speed: float = 25e9
    host_available_bytes: int = 64 * GIB
    spec: DeviceSpec = CARD
    measured: int = 0
    disks: list[str] = field(default_factory=list)
    cache_bytes: int = 0
    can_reset: bool = True
    _peak: int = 0

    def memory(self) -> DeviceMemory:
        free = self.total_bytes - self.others_bytes - self.cache_bytes - self.simulation.streams.allocated_bytes
        return DeviceMemory(self.total_bytes, max(0, free), "simulated")

    def unused_cache_bytes(self) -> int:
        return self.cache_bytes

    def allocated_bytes(self) -> int:
        return self.simulation.streams.allocated_bytes

    def peak_bytes(self) -> int:
        return self._peak

    def reset_peak(self) -> bool:
        if self.can_reset:
            self._peak = self.simulation.streams.allocated_bytes
        return self.can_reset

    def run_peak(self) -> None:
        """A forward has reached its peak."""
        self._peak = max(self._peak, self.simulation.streams.allocated_bytes + self.activation_bytes)

    def host(self) -> HostMemory:
        return HostMemory(
            physical_bytes=2 * self.host_available_bytes,
            available_bytes=self.host_available_bytes,
            cgroup_limit_bytes=None,
            memlock_bytes=None,
            platform=HostPlatform.LINUX,
        )

    def link(self, *, again: bool = False) -> LinkSpeed:
        self.measured += 1
        return LinkSpeed(((1, self.link_speed),), self.link_speed / 2, self.link_speed / 2)

    def disk(self, path: str) -> DiskSpeed:
        self.disks.append(path)
        return DiskSpeed(self.link_speed / 4, self.link_speed / 2)
