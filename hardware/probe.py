"""What a torch device is and how busy it is, from torch and from the vendor's library for the same device."""

from __future__ import annotations

import logging
import os
import platform
import re
from pathlib import Path

import psutil
import torch

from .device import OpenDevice, open_device
from .nvml import Nvml
from .records import DeviceSpec, HardwareUnavailableError, PcieLink, Utilisation, Vendor
from .rocm import Rocm

logger = logging.getLogger(__name__)


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
    opened = open_device(device)
    uuid, driver, link = opened.uuid, None, None
    if opened.vendor is Vendor.NVIDIA:
        uuid, driver, link = _ask_nvml(opened)
    elif opened.vendor is Vendor.AMD:
        driver, link = _ask_rocm(opened)
    return DeviceSpec(
        name=opened.name,
        vendor=opened.vendor,
        torch_device=str(opened.device),
        uuid=uuid,
        pci_bus_id=opened.pci_bus_id,
        compute_units=opened.number("multi_processor_count", "gpu_eu_count"),
        is_integrated=opened.is_integrated,
        driver=driver if driver is not None else getattr(opened.properties, "driver_version", None),
        total_bytes=opened.number("total_memory"),
        pcie=link,
    )


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
    handle = reader.find(uuid=spec.uuid, pci_bus_id=spec.pci_bus_id, name=spec.name)
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


def _ask_nvml(opened: OpenDevice) -> tuple[str | None, str | None, PcieLink | None]:
    """(UUID, driver, link) from NVML; torch's UUID, and None, for what it does not tell."""
    uuid, address = opened.uuid, opened.pci_bus_id
    try:
        with Nvml() as nvml:
            driver = nvml.driver()
            handle = nvml.find(uuid=uuid, pci_bus_id=address, name=opened.name)
            if handle is None:
                if uuid is not None or address is not None:  # of a mere name, the search has said what it found
                    logger.warning("NVML shows no device with UUID %s (PCI %s); its link stays unknown", uuid, address)
                return uuid, driver, None
            return nvml.uuid(handle) or uuid, driver, nvml.pcie(handle)
    except HardwareUnavailableError as exc:
        logger.warning("driver version and link of the GPU stay unknown: %s", exc)
        return uuid, None, None


def _ask_rocm(opened: OpenDevice) -> tuple[str | None, PcieLink | None]:
    """(driver, link) of an AMD card; None for what nobody tells."""
    with Rocm() as rocm:
        if opened.pci_bus_id is None:
            logger.warning("torch tells no PCI address of %s; its link stays unknown", opened.device)
            return rocm.driver(), None
        return rocm.driver(), rocm.pcie(opened.pci_bus_id)


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
