"""What a torch device is and how its memory stands, from torch and from the vendor's library for the same device."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from .nvml import Nvml
from .rocm import Rocm
from .spec import DeviceMemory, DeviceSpec, HardwareUnavailableError, PcieLink, Utilisation, Vendor

logger = logging.getLogger(__name__)

# On Windows, HIP reports as free what this process alone has not taken. What the desktop and others hold is unknown;
# 15 % of the device is set aside for them.
_WINDOWS_HIP_RESERVE_PERCENT = 15
# torch and the vendor differ by what the driver keeps for itself, 1 to 3 % of a device; its parts differ by much more.
_SAME_DEVICE_PERCENT = 10
# What a torch device module raises for a device that it cannot open: AssertionError where it was not compiled in,
# RuntimeError for a driver's error, AttributeError and NotImplementedError where the function is a stub.
_MODULE_FAILURES = (AssertionError, AttributeError, NotImplementedError, RuntimeError)


def probe_device(device: torch.device) -> DeviceSpec:
    """What the device is. Opens it, which for CUDA and HIP takes some hundred MiB of its memory for a context.

    Args:
        device: any torch device; without an index, the current one of its type.

    Raises:
        HardwareUnavailableError: there is no such device, usually because the index is too high, the driver is missing,
            or this torch was built without support for it.
    """
    if device.type == "cpu":
        return _probe_cpu()
    module, resolved, properties = _open(device)
    name = getattr(properties, "name", None) or _call(module, "get_device_name", resolved) or resolved.type
    vendor = _vendor(resolved, name)
    uuid, address = _identity(properties)
    driver, link = None, None
    if vendor is Vendor.NVIDIA:
        uuid, driver, link = _ask_nvml(uuid, address)
    elif vendor is Vendor.AMD and address is not None:
        with Rocm() as rocm:
            driver, link = rocm.driver(), rocm.pcie(address)
    return DeviceSpec(
        name=name,
        vendor=vendor,
        torch_device=str(resolved),
        uuid=uuid,
        pci_bus_id=address,
        compute_units=_first(properties, "multi_processor_count", "gpu_eu_count"),
        is_integrated=_is_integrated(properties),
        driver=driver if driver is not None else getattr(properties, "driver_version", None),
        total_bytes=_first(properties, "total_memory"),
        pcie=link,
    )


def read_device_memory(device: torch.device) -> DeviceMemory | None:
    """Memory of the device now; None for the CPU, which has only host memory, and where no reading can be believed.

    Two readings are corrected, and their source says so. A device that shares the host's memory has free what the host
    has available: its own figure counts page cache as used. HIP on Windows sees this process alone: 15 % of the device
    is set aside for the others.

    Args:
        device: any torch device; without an index, the current one of its type.

    Raises:
        HardwareUnavailableError: there is no such device, or its torch module tells nothing about memory.
    """
    if device.type == "cpu":
        return None
    module, resolved, properties = _open(device)
    try:
        reading = _torch_memory(module, resolved, properties)
    except _MODULE_FAILURES as exc:
        raise HardwareUnavailableError(f"memory of {resolved} cannot be read: {exc}; check the driver") from exc
    if reading is None:
        wanted = f"torch.{device.type}.mem_get_info, or its total memory and memory_allocated"
        message = f"the memory of {resolved} expects {wanted}, but torch {torch.__version__} has neither"
        raise HardwareUnavailableError(f"{message}; update torch or the vendor's plugin, or use another device")
    total, free, source = reading
    if _is_integrated(properties):
        free = min(total, psutil.virtual_memory().available)
        return DeviceMemory(total, free, f"{source}, free from host memory: integrated device")
    if not 0 <= free <= total:
        logger.warning("%s tells %d of %d bytes free, which cannot be; asking the driver", source, free, total)
        return _vendor_memory(probe_device(resolved))
    if sys.platform == "win32" and _is_hip(resolved):
        free = max(0, free - total * _WINDOWS_HIP_RESERVE_PERCENT // 100)
        source = f"{source}, less {_WINDOWS_HIP_RESERVE_PERCENT} %: HIP on Windows"
    return DeviceMemory(total, free, source)


def read_utilisation(spec: DeviceSpec, *, reader: Nvml | Rocm | None = None) -> Utilisation:
    """How busy the device was over its driver's last sampling period; None for what is unknown.

    Args:
        spec: the device, from `probe_device`.
        reader: an open vendor library to ask, for callers that sample: it warns once about what it does not know, where
            each reading without one opens the library and warns again. None opens the one of the device's vendor.
    """
    if reader is None:
        return _open_and_read_utilisation(spec)
    if isinstance(reader, Rocm):
        return Utilisation(None, None) if spec.pci_bus_id is None else reader.utilisation(spec.pci_bus_id)
    handle = reader.find(uuid=spec.uuid, pci_bus_id=spec.pci_bus_id)
    return Utilisation(None, None) if handle is None else reader.utilisation(handle)


def _open_and_read_utilisation(spec: DeviceSpec) -> Utilisation:
    if spec.vendor is Vendor.AMD:
        with Rocm() as rocm:
            return read_utilisation(spec, reader=rocm)
    if spec.vendor is Vendor.NVIDIA:
        try:
            with Nvml() as nvml:
                return read_utilisation(spec, reader=nvml)
        except HardwareUnavailableError as exc:
            logger.warning("utilisation of %s stays unknown: %s", spec.torch_device, exc)
    return Utilisation(None, None)


def _vendor_memory(spec: DeviceSpec) -> DeviceMemory | None:
    """The vendor's reading of device memory, for when torch's cannot be believed; None without one.

    A reading whose total is far from torch's is of something else: of the GPU that holds a MIG instance.
    """
    reading = None
    if spec.vendor is Vendor.AMD and spec.pci_bus_id is not None:
        with Rocm() as rocm:
            reading = rocm.memory(spec.pci_bus_id)
    elif spec.vendor is Vendor.NVIDIA:
        try:
            with Nvml() as nvml:
                handle = nvml.find(uuid=spec.uuid, pci_bus_id=spec.pci_bus_id)
                reading = None if handle is None else nvml.memory(handle)
        except HardwareUnavailableError as exc:
            logger.warning("memory of %s stays unknown: %s", spec.torch_device, exc)
    if reading is None or spec.total_bytes is None:
        return reading
    gap = abs(reading.total_bytes - spec.total_bytes)
    return reading if gap * 100 <= _SAME_DEVICE_PERCENT * spec.total_bytes else None


def _ask_nvml(uuid: str | None, address: str | None) -> tuple[str | None, str | None, PcieLink | None]:
    """(UUID, driver, link) from NVML; the UUID that was given, and None, for what it does not tell."""
    try:
        with Nvml() as nvml:
            driver = nvml.driver()
            handle = nvml.find(uuid=uuid, pci_bus_id=address)
            if handle is None:
                logger.warning("NVML shows no device with UUID %s (PCI %s); its link stays unknown", uuid, address)
                return uuid, driver, None
            return nvml.uuid(handle) or uuid, driver, nvml.pcie(handle)
    except HardwareUnavailableError as exc:
        logger.warning("driver version and link of the GPU stay unknown: %s", exc)
        return uuid, None, None


def _open(device: torch.device) -> tuple[Any, torch.device, Any]:
    """(torch module, device with its index, its properties or None) of a device that is not the CPU.

    Raises:
        HardwareUnavailableError: torch has no such module, the module no such device, or the device does not open.
    """
    try:
        module = torch.get_device_module(device)
    except RuntimeError as exc:
        message = f"{device} expects a torch with {device.type} support but torch {torch.__version__} has none"
        raise HardwareUnavailableError(f"{message}; import the vendor's plugin first, or use cpu") from exc
    if not module.is_available():
        message = f"{device} expects a {device.type} device but torch {torch.__version__} finds none, only cpu"
        raise HardwareUnavailableError(f"{message}; check the driver and that torch is built for it, or use cpu")
    count = int(module.device_count())
    if device.index is not None and device.index >= count:
        existing = ", ".join(f"{device.type}:{index}" for index in range(count))
        message = f"{device} expects {device.index + 1} {device.type} devices but torch finds {count} ({existing})"
        raise HardwareUnavailableError(f"{message}; choose one of them, or check the *_VISIBLE_DEVICES variables")
    try:
        # mps has one device and no current_device()
        index = device.index if device.index is not None else _call(module, "current_device") or 0
        resolved = torch.device(device.type, index)
        return module, resolved, _call(module, "get_device_properties", resolved)
    except _MODULE_FAILURES as exc:
        message = f"{device} is there but does not open: {exc}"
        raise HardwareUnavailableError(f"{message}; check the driver, or use another device") from exc


def _torch_memory(module: Any, device: torch.device, properties: Any) -> tuple[int, int, str] | None:
    """(total, free, source) in bytes, from whichever memory functions the device's torch module has; None without."""
    name = f"torch.{device.type}"
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        return int(total), int(free), f"{name}.mem_get_info"
    total_bytes, used = _first(properties, "total_memory"), None
    if hasattr(module, "memory_allocated"):
        used = int(module.memory_allocated(device))
    elif hasattr(module, "driver_allocated_memory"):  # mps names both figures in its own way
        total_bytes, used = int(module.recommended_max_memory()), int(module.driver_allocated_memory())
    if total_bytes is None or used is None:
        return None
    return total_bytes, max(0, total_bytes - used), f"{name}, this process alone"


def _identity(properties: Any) -> tuple[str | None, str | None]:
    """(UUID, PCI address) out of torch's device properties; None where this torch (before 2.8 or so) has none."""
    uuid = getattr(properties, "uuid", None)
    known = None if uuid is None else str(uuid)
    domain, bus, slot = (_first(properties, name) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
    if domain is None or bus is None or slot is None:
        return known, None
    return known, f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def _is_hip(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is not None


def _vendor(device: torch.device, name: str) -> Vendor:
    if device.type != "cuda":
        return Vendor.OTHER
    # ZLUDA makes an AMD card a CUDA device of a torch built for CUDA; it puts its own name into the card's.
    return Vendor.AMD if _is_hip(device) or "zluda" in name.lower() else Vendor.NVIDIA


def _is_integrated(properties: Any) -> bool | None:
    value = _first(properties, "is_integrated", "is_integrated_gpu")  # the second is torch.xpu's
    return None if value is None else bool(value)


def _first(properties: Any, *names: str) -> int | None:
    """The first of these numbers that the properties have."""
    values = (getattr(properties, name, None) for name in names)
    return next((int(value) for value in values if value is not None), None)


def _call(module: Any, function: str, *arguments: object) -> Any:
    """What a device module's function gives; None if the module lacks it, as modules of other vendors do."""
    found = getattr(module, function, None)
    return None if found is None else found(*arguments)


def _probe_cpu() -> DeviceSpec:
    return DeviceSpec(
        name=_cpu_name(),
        vendor=Vendor.OTHER,
        torch_device="cpu",
        uuid=None,
        pci_bus_id=None,
        compute_units=os.cpu_count(),
        is_integrated=None,
        driver=None,
        total_bytes=psutil.virtual_memory().total,
        pcie=None,
    )


def _cpu_name() -> str:
    """Model of the CPU where Linux tells it, otherwise the architecture."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.machine()
