"""NVIDIA's management library: the only file that knows pynvml."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, NewType

from .records import DeviceMemory, HardwareUnavailableError, PcieLink

logger = logging.getLogger(__name__)

NvmlHandle = NewType("NvmlHandle", object)

# What importing pynvml is known to raise. Three packages on PyPI install a module of this name, and they overwrite each
# other's files; what is left may fail in any of these ways. The oldest is written for Python 2.
_IMPORT_FAILURES = (ImportError, OSError, KeyError, AttributeError, SyntaxError, SystemExit)
# What a query raises besides NVMLError: AttributeError where the binding lacks the function, TypeError where it takes
# bytes for text, OSError where it does not check that the driver's library has the function.
_SHAPE_FAILURES = (AttributeError, TypeError, OSError)
_UUID_PREFIXES = ("GPU-", "MIG-")


class Nvml:
    """The library, initialised while the `with` block lasts.

    Devices are found by UUID, PCI address or unique name, never by ordinal: NVML ignores CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER. Every query fails alone: one that the device, the driver or the binding does not support gives
    None, with one warning per reading and `with` block.
    """

    def __init__(self) -> None:
        self._library: ModuleType | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Nvml:
        """Loads and initialises the library.

        Raises:
            HardwareUnavailableError: nvidia-ml-py is missing, broken or replaced by another package of the same module
                name, or there is no NVIDIA driver.
        """
        try:
            import pynvml  # type: ignore[import-untyped, unused-ignore]
        except _IMPORT_FAILURES as exc:
            message = f"NVML cannot be used: importing pynvml raised {exc!r}"
            raise HardwareUnavailableError(f"{message}; pip install nvidia-ml-py") from exc
        if not hasattr(pynvml, "nvmlInit") or not hasattr(pynvml, "NVMLError"):
            where = getattr(pynvml, "__file__", "a module without a file")
            message = f"NVML cannot be used: pynvml is not that of nvidia-ml-py but another package's ({where})"
            raise HardwareUnavailableError(f"{message}; remove that, then pip install --force-reinstall nvidia-ml-py")
        try:
            pynvml.nvmlInit()
        except (pynvml.NVMLError, *_SHAPE_FAILURES) as exc:
            message = f"NVML cannot be used, usually because the NVIDIA driver is missing: nvmlInit failed: {exc}"
            raise HardwareUnavailableError(f"{message}; check that nvidia-smi runs") from exc
        self._library = pynvml
        return self

    def __exit__(self, *_: object) -> None:
        self._query("nvmlShutdown")
        self._library = None

    def find(self, *, uuid: str | None, pci_bus_id: str | None, name: str | None = None) -> NvmlHandle | None:
        """The device with this identity, or None if NVML does not show it.

        Args:
            uuid: with or without its prefix "GPU-" or "MIG-"; torch gives it without.
            pci_bus_id: domain:bus:device.function in hexadecimal. Used only without a UUID: a MIG instance has the
                address of the GPU that holds it, whose readings are not its own and may be forbidden.
            name: as the driver gives it. Used only without UUID and address, which an old torch lacks, and only if one
                device alone has the name.
        """
        found: NvmlHandle | None = None
        if uuid is not None:
            for prefix in ("",) if uuid.startswith(_UUID_PREFIXES) else _UUID_PREFIXES:
                found = found or self._query("nvmlDeviceGetHandleByUUID", prefix + uuid)
        elif pci_bus_id is not None:
            found = self._query("nvmlDeviceGetHandleByPciBusId", pci_bus_id)
        elif name is not None:
            found = self._find_by_name(name)
        return found

    def _find_by_name(self, name: str) -> NvmlHandle | None:
        """The device of this name; None for several, which nothing distinguishes."""
        count = self._query("nvmlDeviceGetCount") or 0
        shown = [self._query("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
        bearers: list[NvmlHandle] = [handle for handle in shown if handle is not None and self.name(handle) == name]
        if len(bearers) == 1:
            return bearers[0]
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("NVML shows %d devices named %s, and torch gives only the name", len(bearers), name)
        return None

    def driver(self) -> str | None:
        """Version of the driver, such as "580.95.05"."""
        return _text(self._query("nvmlSystemGetDriverVersion"))

    def name(self, handle: NvmlHandle) -> str | None:
        return _text(self._query("nvmlDeviceGetName", handle))

    def uuid(self, handle: NvmlHandle) -> str | None:
        """UUID of the device, with its prefix."""
        return _text(self._query("nvmlDeviceGetUUID", handle))

    def memory(self, handle: NvmlHandle) -> DeviceMemory | None:
        """Memory of the device; None where the device shares the host's memory, for which NVML has no such query."""
        info = self._query("nvmlDeviceGetMemoryInfo", handle)
        if info is None:
            return None
        return DeviceMemory(int(info.total), min(int(info.free), int(info.total)), "NVML")

    def utilisation(self, handle: NvmlHandle) -> float | None:
        """Percentage of the driver's last sampling period in which at least one kernel ran.

        None for MIG instances and Tegra, which do not count it.
        """
        rates = self._query("nvmlDeviceGetUtilizationRates", handle)
        return None if rates is None else float(rates.gpu)

    def pcie(self, handle: NvmlHandle) -> PcieLink | None:
        """The link of the device; None if no part of it is known, as on devices without one."""
        parts = ("CurrPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkGeneration", "MaxPcieLinkWidth")
        link = PcieLink(*(self._query(f"nvmlDeviceGet{part}", handle, reading="PCIe link") for part in parts))
        return None if link == PcieLink() else link

    def _query(self, function: str, *arguments: object, reading: str = "") -> Any:
        """The answer of one function of the library, or None.

        Args:
            function: its name; older bindings lack newer functions, older drivers answer them with FunctionNotFound.
            arguments: the function's arguments.
            reading: the figure of which the function answers a part; the parts share one warning.

        Raises:
            RuntimeError: called outside the `with` block.
        """
        library = self._library
        if library is None:
            raise RuntimeError(f"{function} was called outside the with block of Nvml; call it inside")
        try:
            return getattr(library, function)(*arguments)
        except (library.NVMLError, *_SHAPE_FAILURES) as exc:
            is_answer = type(exc).__name__ == "NVMLError_NotFound"  # there is no such device
            if not is_answer and (reading or function) not in self._warned:
                self._warned.add(reading or function)
                figure = f"its part of the {reading}" if reading else "this reading"
                logger.warning("NVML cannot answer %s (%s); %s stays unknown", function, exc, figure)
            return None


def _text(value: str | bytes | None) -> str | None:
    """Old bindings give bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
