"""Readings of the GPU, its link and host memory; None means unknown."""

from .device import probe_device
from .host import read_host_memory
from .link import contradicts, measure_link
from .memory import is_driver_refusal, is_out_of_memory, read_device_memory
from .monitor import READING_FAILURES, Sampler
from .records import (
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    HardwareUnavailableError,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Samples,
    Vendor,
)
from .tiers import tier_for, tune
from .units import GIB, KIB, MIB, format_bytes, parse_bytes

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "READING_FAILURES",
    "DeviceMemory",
    "DeviceSpec",
    "DiskSpeed",
    "HardwareUnavailableError",
    "HostMemory",
    "HostPlatform",
    "LinkSpeed",
    "Sampler",
    "Samples",
    "Vendor",
    "contradicts",
    "format_bytes",
    "is_driver_refusal",
    "is_out_of_memory",
    "measure_link",
    "parse_bytes",
    "probe_device",
    "read_device_memory",
    "read_host_memory",
    "tier_for",
    "tune",
]
