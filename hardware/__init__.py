"""Readings of the GPU, its link and host memory; None means unknown."""

from .device import probe_device, read_utilisation
from .host import read_host_memory
from .link import contradicts, measure_link
from .memory import is_out_of_memory, read_device_memory
from .monitor import READING_FAILURES, Sampler
from .nvml import Nvml
from .records import (
    DeviceMemory,
    DeviceSpec,
    HardwareUnavailableError,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    PcieLink,
    Samples,
    Utilisation,
    Vendor,
)
from .rocm import Rocm
from .tiers import GpuTier, KnownGpu, Tuning, find_gpu, tier_for, tune
from .units import GIB, KIB, MIB, format_bytes, parse_bytes

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "READING_FAILURES",
    "DeviceMemory",
    "DeviceSpec",
    "GpuTier",
    "HardwareUnavailableError",
    "HostMemory",
    "HostPlatform",
    "KnownGpu",
    "LinkSpeed",
    "Nvml",
    "PcieLink",
    "Rocm",
    "Sampler",
    "Samples",
    "Tuning",
    "Utilisation",
    "Vendor",
    "contradicts",
    "find_gpu",
    "format_bytes",
    "is_out_of_memory",
    "measure_link",
    "parse_bytes",
    "probe_device",
    "read_device_memory",
    "read_host_memory",
    "read_utilisation",
    "tier_for",
    "tune",
]
