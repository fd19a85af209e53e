"""AMD's readings by PCI address: from Linux sysfs, and memory from amdsmi where its Python package works."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .files import read_text
from .records import DeviceMemory, PcieLink
from .units import MIB

logger = logging.getLogger(__name__)

# What importing amdsmi is known to raise: KeyError("libamd_smi.so") without the library, AttributeError or OSError for
# a package newer than the library, SystemExit from wrappers that give up.
_IMPORT_FAILURES = (ImportError, OSError, KeyError, AttributeError, SystemExit)
# What an amdsmi query raises besides AmdSmiException: functions and keys come and go between releases, the library may
# lack what the package asks of it, and it writes "N/A" where it knows no number. Stand-ins for the package, which some
# ROCm images carry, return objects where the package returns a dict.
_SHAPE_FAILURES = (AttributeError, KeyError, TypeError, OSError)
# Transfer rate of one lane, as sysfs writes it in GT/s, by PCI Express generation.
_GENERATIONS = {"2.5": 1, "5": 2, "8": 3, "16": 4, "32": 5, "64": 6}
# The kernel writes width 0 or 255 where a link is down or its width is unknown.
_MAX_WIDTH = 32


class Rocm:
    """AMD GPUs by PCI address (domain:bus:device.function in hexadecimal, such as "0000:03:00.0"), from sysfs.

    Ordinals are not used: HIP, amdsmi and rocm-smi number the same cards differently. Every query fails alone, and
    gives None with one warning per query and object, as on Windows, which has no sysfs. An APU's VRAM is the part that
    the firmware sets aside, not all that the APU can use.
    """

    def __init__(self, *, sysfs_root: Path = Path("/sys")) -> None:
        self._root = sysfs_root
        self._warned: set[str] = set()

    def memory(self, pci_bus_id: str) -> DeviceMemory | None:
        """VRAM of the device, counting all processes."""
        total = self._read_int(pci_bus_id, "mem_info_vram_total")
        used = self._read_int(pci_bus_id, "mem_info_vram_used")
        if total is None or used is None:
            self._warn("memory", pci_bus_id)
            return None
        return DeviceMemory(total, max(0, total - used), "sysfs")

    def utilisation(self, pci_bus_id: str) -> float | None:
        """Percentage of the driver's last sampling period in which at least one kernel ran."""
        percent = self._read_int(pci_bus_id, "gpu_busy_percent")
        if percent is None:
            self._warn("utilisation", pci_bus_id)
        return percent

    def pcie(self, pci_bus_id: str) -> PcieLink | None:
        """The link of the device; not from amdsmi, whose unit of link speed differs between its releases."""
        link = PcieLink(
            generation=self._read_generation(pci_bus_id, "current_link_speed"),
            width=self._read_width(pci_bus_id, "current_link_width"),
            max_generation=self._read_generation(pci_bus_id, "max_link_speed"),
            max_width=self._read_width(pci_bus_id, "max_link_width"),
        )
        if link == PcieLink():
            self._warn("PCIe link", pci_bus_id)
            return None
        return link

    def driver(self) -> str | None:
        """Version of the amdgpu driver; None for the one that comes with the kernel, which has none of its own."""
        return read_text(self._root / "module" / "amdgpu" / "version")

    def _read(self, pci_bus_id: str, name: str) -> str:
        return read_text(self._root / "bus" / "pci" / "devices" / pci_bus_id.lower() / name) or ""

    def _read_int(self, pci_bus_id: str, name: str) -> int | None:
        text = self._read(pci_bus_id, name)
        return int(text) if text.isdecimal() else None

    def _read_width(self, pci_bus_id: str, name: str) -> int | None:
        width = self._read_int(pci_bus_id, name)
        return width if width is not None and 0 < width <= _MAX_WIDTH else None

    def _read_generation(self, pci_bus_id: str, name: str) -> int | None:
        """PCI Express generation of a speed as sysfs writes it: "16.0 GT/s PCIe", "16 GT/s" or "Unknown"."""
        return _GENERATIONS.get(self._read(pci_bus_id, name).partition(" ")[0].removesuffix(".0"))

    def _warn(self, query: str, pci_bus_id: str) -> None:
        if query not in self._warned:
            self._warned.add(query)
            logger.warning("sysfs has no %s of %s; this reading stays unknown", query, pci_bus_id)


def amdsmi_memory(pci_bus_id: str) -> DeviceMemory | None:
    """VRAM of a device from amdsmi, counting all processes; None where amdsmi fails or does not show the device.

    Not for a thread beside others: amdsmi does not count its users, and one that shuts it down frees what a query in
    another thread is reading (AMDSmiSystem::cleanup in ROCm's amd_smi_system.cc).

    Args:
        pci_bus_id: domain:bus:device.function in hexadecimal, such as "0000:03:00.0".
    """
    try:
        import amdsmi  # type: ignore[import-not-found, unused-ignore]
    except _IMPORT_FAILURES as exc:
        logger.debug("amdsmi cannot be imported: %r", exc)
        return None
    # A module of that name that is another has no AmdSmiException.
    failures = (getattr(amdsmi, "AmdSmiException", TypeError), *_SHAPE_FAILURES)
    try:
        amdsmi.amdsmi_init()
        try:
            return _amdsmi_memory(amdsmi, pci_bus_id)
        finally:
            amdsmi.amdsmi_shut_down()
    except failures as exc:
        logger.debug("amdsmi cannot read the memory of %s: %r", pci_bus_id, exc)
        return None


def _amdsmi_memory(amdsmi: Any, pci_bus_id: str) -> DeviceMemory | None:
    # amdsmi shows no devices at all where the older rocm_smi library was loaded into the process before it.
    for gpu in amdsmi.amdsmi_get_processor_handles():
        if str(amdsmi.amdsmi_get_gpu_device_bdf(gpu)).lower() == pci_bus_id.lower():
            usage = amdsmi.amdsmi_get_gpu_vram_usage(gpu)
            total, used = usage["vram_total"], usage["vram_used"]
            return DeviceMemory(total * MIB, (total - used) * MIB, "amdsmi") if 0 <= used <= total else None
    return None
