"""AMD's readings by PCI address: from amdsmi where its Python package works, otherwise from Linux sysfs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from .records import DeviceMemory, PcieLink, Utilisation
from .units import MIB

logger = logging.getLogger(__name__)

# What importing amdsmi is known to raise: KeyError("libamd_smi.so") without the library, AttributeError or OSError for
# a package newer than the library, SystemExit from wrappers that give up.
_IMPORT_FAILURES = (ImportError, OSError, KeyError, AttributeError, SystemExit)
# What an amdsmi query raises besides AmdSmiException: functions and keys come and go between releases, and the library
# may lack what the package asks of it.
_SHAPE_FAILURES = (AttributeError, KeyError, TypeError, OSError)
# Transfer rate of one lane, as sysfs writes it in GT/s, by PCI Express generation.
_GENERATIONS = {"2.5": 1, "5": 2, "8": 3, "16": 4, "32": 5, "64": 6}
# The kernel writes width 0 or 255 where a link is down or its width is unknown.
_MAX_WIDTH = 32


class Rocm:
    """AMD GPUs by PCI address while the `with` block lasts; amdsmi is used if it works and never required.

    Ordinals are not used: HIP, amdsmi and rocm-smi number the same cards differently. Every query fails alone, falls
    back from amdsmi to sysfs, and gives None with one warning per query and `with` block if neither answers, as on
    Windows, which has neither. An APU's VRAM is the part that the firmware sets aside, not all it can use.
    """

    def __init__(self, *, sysfs_root: Path = Path("/sys")) -> None:
        """Args: sysfs_root: where sysfs is mounted."""
        self._root = sysfs_root
        self._library: ModuleType | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Rocm:
        try:
            import amdsmi  # type: ignore[import-not-found, unused-ignore]
        except _IMPORT_FAILURES as exc:
            logger.debug("amdsmi cannot be imported (%r); reading sysfs", exc)
            return self
        try:
            amdsmi.amdsmi_init()
        except _failures(amdsmi) as exc:
            logger.debug("amdsmi cannot be initialised (%r); reading sysfs", exc)
            return self
        self._library = amdsmi
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ask(lambda library: library.amdsmi_shut_down())
        self._library = None

    def memory(self, pci_bus_id: str) -> DeviceMemory | None:
        """VRAM of the device, counting all processes.

        Args:
            pci_bus_id: domain:bus:device.function in hexadecimal, such as "0000:03:00.0".
        """
        usage = self._ask_device(pci_bus_id, lambda library, gpu: library.amdsmi_get_gpu_vram_usage(gpu))
        total, used = _number(usage, "vram_total"), _number(usage, "vram_used")
        if total is not None and used is not None and 0 <= used <= total:
            return DeviceMemory(int(total) * MIB, int(total - used) * MIB, "amdsmi")  # amdsmi counts in MiB
        total_bytes = self._read_int(pci_bus_id, "mem_info_vram_total")
        used_bytes = self._read_int(pci_bus_id, "mem_info_vram_used")
        if total_bytes is None or used_bytes is None:
            self._warn("memory", pci_bus_id)
            return None
        return DeviceMemory(total_bytes, max(0, total_bytes - used_bytes), "sysfs")

    def utilisation(self, pci_bus_id: str) -> Utilisation:
        """How busy the device was.

        Args:
            pci_bus_id: domain:bus:device.function in hexadecimal.
        """
        activity = self._ask_device(pci_bus_id, lambda library, gpu: library.amdsmi_get_gpu_activity(gpu))
        percent = _number(activity, "gfx_activity")
        if percent is None:
            percent = self._read_int(pci_bus_id, "gpu_busy_percent")
        if percent is None:
            self._warn("utilisation", pci_bus_id)
            return Utilisation(None)
        return Utilisation(float(percent))

    def pcie(self, pci_bus_id: str) -> PcieLink | None:
        """The link of the device, from sysfs alone: amdsmi's unit of link speed differs between its releases.

        Args:
            pci_bus_id: domain:bus:device.function in hexadecimal.
        """
        link = PcieLink(
            generation=_generation(self._read(pci_bus_id, "current_link_speed")),
            width=self._read_width(pci_bus_id, "current_link_width"),
            max_generation=_generation(self._read(pci_bus_id, "max_link_speed")),
            max_width=self._read_width(pci_bus_id, "max_link_width"),
        )
        if link == PcieLink(None, None, None, None):
            self._warn("pcie", pci_bus_id)
            return None
        return link

    def driver(self) -> str | None:
        """Version of the amdgpu driver; None for the one that comes with the kernel, which has none of its own."""
        return _read_text(self._root / "module" / "amdgpu" / "version")

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer of amdsmi, or None if it is not there or cannot answer."""
        library: Any = self._library
        if library is None:
            return None
        try:
            return question(library)
        except _failures(library) as exc:
            logger.debug("amdsmi cannot answer (%r)", exc)
            return None

    def _ask_device(self, pci_bus_id: str, question: Callable[[Any, Any], Any]) -> Any:
        """The answer of amdsmi about one device, or None.

        amdsmi shows no devices at all where the older rocm_smi library was loaded into the process before it.
        """

        def is_asked_for(library: Any, handle: Any) -> bool:
            address = library.amdsmi_get_gpu_device_bdf(handle)
            return isinstance(address, str) and address.lower() == pci_bus_id.lower()

        handles = self._ask(lambda library: library.amdsmi_get_processor_handles()) or ()
        handle = next((found for found in handles if self._ask(partial(is_asked_for, handle=found))), None)
        return None if handle is None else self._ask(lambda library: question(library, handle))

    def _read(self, pci_bus_id: str, name: str) -> str | None:
        return _read_text(self._root / "bus" / "pci" / "devices" / pci_bus_id.lower() / name)

    def _read_int(self, pci_bus_id: str, name: str) -> int | None:
        text = self._read(pci_bus_id, name)
        return int(text) if text is not None and text.isdecimal() else None

    def _read_width(self, pci_bus_id: str, name: str) -> int | None:
        width = self._read_int(pci_bus_id, name)
        return width if width is not None and 0 < width <= _MAX_WIDTH else None

    def _warn(self, query: str, pci_bus_id: str) -> None:
        if query not in self._warned:
            self._warned.add(query)
            logger.warning("neither amdsmi nor sysfs has the %s of %s; this reading stays unknown", query, pci_bus_id)


def _failures(library: Any) -> tuple[type[BaseException], ...]:
    """What the functions of an amdsmi raise; a module of that name that is another has no AmdSmiException."""
    own = getattr(library, "AmdSmiException", None)
    return _SHAPE_FAILURES if own is None else (own, *_SHAPE_FAILURES)


def _read_text(path: Path) -> str | None:
    """Text of a small file, or None: a file of sysfs may be absent, forbidden, or fail in the driver (EIO, ENODEV)."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(answer: Any, key: str) -> int | float | None:
    """A number out of a dict of amdsmi, which writes "N/A" where it knows none.

    Stand-ins for the package, which some ROCm images carry, give objects instead; those count as unknown.
    """
    value = answer.get(key) if isinstance(answer, dict) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _generation(speed: str | None) -> int | None:
    """PCI Express generation of a speed as sysfs writes it: "16.0 GT/s PCIe", "16 GT/s" or "Unknown"."""
    if not speed:
        return None
    return _GENERATIONS.get(speed.split()[0].removesuffix(".0"))
