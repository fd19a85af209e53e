"""Memory of a device: torch's reading where it is possible, else the vendor's or an estimate."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch

from .device import MODULE_FAILURES, OpenDevice, call, open_device
from .host import read_host_memory, read_platform
from .nvml import Nvml
from .records import DeviceMemory, HardwareUnavailableError, HostPlatform, Vendor
from .rocm import Rocm, amdsmi_memory
from .units import format_bytes

logger = logging.getLogger(__name__)

# Where HIP sees this process alone, the memory of the desktop and others is unknown; this much is set aside for them.
_OTHERS_PERCENT = 15
# Without any reading, the same share, and what this process holds, count as used.
_ESTIMATED_FREE_PERCENT = 100 - _OTHERS_PERCENT
# torch and the vendor differ by what the driver keeps for itself, 1 to 3 % of a device; its parts differ by much more.
_SAME_DEVICE_PERCENT = 10
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation and hipErrorOutOfMemory: the driver's own refusal
# The driver's text in torch 2.6 and 2.7, and that of its own interface without a code in all versions.
_DRIVER_REFUSAL = re.compile(r"(CUDA|HIP)( driver)? error: out of memory")
# cuBLAS, hipBLAS and cuDNN as torch reports them; Triton's CudaUtils; MIOpen.
_LIBRARY_REFUSAL = re.compile(
    r"STATUS_ALLOC_FAILED|DEVICE_ALLOCATION_FAILED|Triton Error \[\w+\]: out of memory|MIOpen Error: out of memory"
)
# AMD's documentation of hipMemGetInfo, on Windows: free "only accounts for memory allocated by this process".
# On WSL2 that depends on the library between HIP and the driver: librocdxg counts the other processes.
_WHY_NOT_BELIEVED = {
    HostPlatform.WINDOWS: "HIP on Windows sees this process alone",
    HostPlatform.WSL2: "HIP on WSL2 may see this process alone",
}


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether torch's allocator, the driver or a library refused device memory.

    The driver's refusal carries its code since torch 2.8 (AcceleratorError); before that, and from cuBLAS, cuDNN and
    Triton, it is a RuntimeError with a text.
    """
    return isinstance(failure, RuntimeError) and (
        isinstance(failure, torch.OutOfMemoryError)
        or is_driver_refusal(failure)
        or _LIBRARY_REFUSAL.search(str(failure)) is not None
    )


def is_driver_refusal(failure: BaseException) -> bool:
    """Whether the driver refused device memory, and not torch's allocator or a library, in the failure's first cause.
    Windows' driver refuses ordinary copies as well where nearly all memory that may be page-locked is locked.
    """
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return (
        isinstance(failure, RuntimeError)
        and not isinstance(failure, torch.OutOfMemoryError)
        and (getattr(failure, "error_code", None) == _OUT_OF_MEMORY or _DRIVER_REFUSAL.search(str(failure)) is not None)
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """What torch reports, possible or not; `free_bytes` is None where torch does not report it."""

    total_bytes: int
    free_bytes: int | None
    source: str
    sees_others: bool = True


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Memory of the device now; None for the CPU, which has only host memory.

    An estimate, whose source says why, replaces a free figure that is impossible or leaves out other processes: a plan
    can be made for every GPU.

    Args:
        device: any torch device; without an index, the current one of its type.

    Raises:
        HardwareUnavailableError: there is no such device, or its torch module reports no memory.
    """
    if device.type == "cpu":
        return None
    opened = open_device(device)
    reading = _ask_torch(opened)
    total, free, source = reading.total_bytes, reading.free_bytes, reading.source
    if opened.is_integrated:
        return _shared_memory(opened, total)
    why_not = _WHY_NOT_BELIEVED.get(read_platform()) if opened.runs_on_hip else None
    if why_not is not None and free is not None and free >= 0:
        free = max(0, min(free, total) - total * _OTHERS_PERCENT // 100)
        source += f" less {_OTHERS_PERCENT} % of the total: {why_not}"
        return DeviceMemory(total, free, source, is_estimate=True)
    if free is not None and 0 <= free <= total:
        return DeviceMemory(total, free, source, is_estimate=not reading.sees_others)
    figure = "no free memory" if free is None else f"{format_bytes(free)} free"
    why = f"{source} reports {figure} of {format_bytes(total)}"
    logger.warning("%s: %s, which is impossible; asking the driver", opened.device, why)
    read = _ask_vendor(opened, total)
    if read is not None:
        return read
    source = f"{_ESTIMATED_FREE_PERCENT} % of the total less what this process has reserved: {why}"
    return DeviceMemory(total, _estimated_free(opened, total), source, is_estimate=True)


def _ask_torch(opened: OpenDevice) -> _Reading:
    """What the device's torch module reports, through the memory functions that it has.

    Raises:
        HardwareUnavailableError: it reports no total.
    """
    module, name = opened.module, f"torch.{opened.device.type}"
    total, source = opened.number("total_memory"), f"{name}.mem_get_info"
    try:
        if hasattr(module, "mem_get_info"):
            free, read_total = module.mem_get_info(opened.device)
            return _Reading(int(read_total) or total or 0, int(free), source)
        used = call(module, "memory_allocated", opened.device)
    except MODULE_FAILURES as exc:
        # HIP answers "invalid argument" where the kernel driver hides the figure, as in some containers.
        if total is not None and opened.runs_on_hip and getattr(exc, "error_code", None) != _OUT_OF_MEMORY:
            logger.debug("%s of %s failed: %s", source, opened.device, exc)
            return _Reading(total, None, source)
        raise HardwareUnavailableError(f"memory of {opened.device} cannot be read: {exc}; check the driver") from exc
    if total is None or used is None:
        wanted = f"{source}, or its total memory and memory_allocated"
        message = f"the memory of {opened.device} cannot be read: torch {torch.__version__} lacks {wanted}"
        raise HardwareUnavailableError(f"{message}; update torch or the vendor's plugin, or use another device")
    return _Reading(total, max(0, total - int(used)), f"{name}, which sees this process alone", sees_others=False)


def _shared_memory(opened: OpenDevice, total_bytes: int) -> DeviceMemory:
    """Memory of a device that shares the host's: the available host memory.

    The device's own figure counts page cache as used (CUDA), or more as free than there is (HIP). The firmware has set
    aside for the device the part beyond all of the host's RAM; the use of that part by others is unknown.
    """
    host = read_host_memory()
    own = max(0, total_bytes - host.physical_bytes)
    shared = total_bytes - own
    if host.cgroup_limit_bytes is not None:
        shared = min(shared, host.cgroup_limit_bytes)
    free = min(shared, host.available_bytes) + _estimated_free(opened, own)
    source = "available host memory, which an integrated device shares"
    if own:
        source += f", and {format_bytes(own)} that the firmware sets aside for it"
    return DeviceMemory(shared + own, free, source, is_estimate=True)


def _ask_vendor(opened: OpenDevice, total_bytes: int) -> DeviceMemory | None:
    """The vendor's reading, for when torch's is impossible; None without one.

    A reading with a total far from torch's is of something else: of the GPU that holds a MIG instance.
    """
    reading = None
    if opened.vendor is Vendor.AMD and opened.pci_bus_id is not None:
        reading = amdsmi_memory(opened.pci_bus_id) or Rocm().memory(opened.pci_bus_id)
    elif opened.vendor is Vendor.NVIDIA:
        try:
            with Nvml() as nvml:
                handle = nvml.find(uuid=opened.uuid, pci_bus_id=opened.pci_bus_id, name=opened.name)
                reading = None if handle is None else nvml.memory(handle)
        except HardwareUnavailableError as exc:
            logger.warning("NVML cannot read the memory of %s: %s", opened.device, exc)
    return reading if reading is not None and is_of_device(reading, total_bytes) else None


def is_of_device(reading: DeviceMemory, total_bytes: int) -> bool:
    """Whether a vendor's reading is of the device whose total torch reports."""
    return abs(reading.total_bytes - total_bytes) * 100 <= _SAME_DEVICE_PERCENT * total_bytes


def _estimated_free(opened: OpenDevice, nbytes: int) -> int:
    """What is free of so many bytes, less what torch's allocator holds in this process, if the module reports that."""
    reserved = int(call(opened.module, "memory_reserved", opened.device) or 0)
    return max(0, nbytes * _ESTIMATED_FREE_PERCENT // 100 - reserved)
