"""What a torch device is, from torch and from the vendor's library for the same device."""

from __future__ import annotations

import logging
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from .files import read_text
from .nvml import Nvml
from .records import DeviceSpec, HardwareUnavailableError, PcieLink, Vendor
from .rocm import Rocm

logger = logging.getLogger(__name__)

# What a torch device module raises for a device that it cannot open: AssertionError where it was not compiled in,
# RuntimeError for a driver's error, AttributeError and NotImplementedError where the function is a stub.
MODULE_FAILURES = (AssertionError, AttributeError, NotImplementedError, RuntimeError)

# Grace superchips: the GPU has HBM of its own, though it may also reach the host's memory coherently.
_DISCRETE = re.compile(r"\bG[HB][23]00\b")
# Systems on one chip, as CUDA and HIP name them: "NVIDIA GB10", "Orin", "NVIDIA Thor", "AMD Radeon 8060S Graphics",
# "AMD Radeon 890M Graphics". A discrete mobile Radeon has "RX" before its number.
_INTEGRATED = re.compile(
    r"\b(GB10|Orin|Thor|Xavier|Tegra|MI300A)\b|\bRadeon(\(TM\))? (\d{3,4}[MS]\b|Vega \d+ Graphics)"
)
# The name of older APUs, and what ROCm calls every GPU that its own table lacks, new discrete cards among them.
_NAMELESS = re.compile(r"\bRadeon(\(TM\))? Graphics")
# Instruction sets of AMD's APUs, in the order of their years: Raven, Renoir, Van Gogh, Rembrandt, Raphael, Mendocino,
# Phoenix, Strix Point, Strix Halo, Krackan.
_APU_ARCHITECTURES = frozenset(
    {"gfx902", "gfx909", "gfx90c", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1103"}
    | {"gfx1150", "gfx1151", "gfx1152", "gfx1153"}
)


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A device other than the CPU that exists.

    Attributes:
        module: torch's module for its type, such as torch.cuda.
        device: the device, with its index.
        properties: what the module reports of the device; None where the module has no such function.
    """

    module: Any
    device: torch.device
    properties: Any

    @property
    def name(self) -> str:
        """The name that its driver gives, or else its type."""
        name = getattr(self.properties, "name", None) or call(self.module, "get_device_name", self.device)
        return str(name or self.device.type)

    @property
    def vendor(self) -> Vendor:
        """The vendor, whose library reads the device."""
        if self.device.type != "cuda":
            return Vendor.OTHER
        return Vendor.AMD if self.runs_on_hip else Vendor.NVIDIA

    @property
    def runs_on_hip(self) -> bool:
        """Whether AMD's runtime is below: in a torch built for HIP, and behind ZLUDA.

        ZLUDA makes an AMD card a CUDA device of a torch built for CUDA; it puts its own name into the card's.
        """
        return self.device.type == "cuda" and (torch.version.hip is not None or "zluda" in self.name.lower())

    @property
    def is_integrated(self) -> bool | None:
        """Whether it shares the host's memory: as torch reports it, or by its name where this torch does not."""
        reported = self.number("is_integrated")
        if self.device.type == "cuda" and _DISCRETE.search(self.name):
            return False
        if reported is not None or self.device.type != "cuda":
            return None if reported is None else bool(reported)
        architecture = getattr(self.properties, "gcnArchName", "").split(":")[0]  # only a torch built for HIP has it
        if _INTEGRATED.search(self.name) or architecture in _APU_ARCHITECTURES:
            return True
        return not architecture and _NAMELESS.search(self.name) is not None

    @property
    def uuid(self) -> str | None:
        """The vendor's identifier, without a prefix; None where this torch has none (before 2.4 or so)."""
        uuid = getattr(self.properties, "uuid", None)
        return None if uuid is None else str(uuid)

    @property
    def pci_bus_id(self) -> str | None:
        """domain:bus:device.function; None where this torch has none (before 2.8 or so)."""
        domain, bus, slot = (self.number(name) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
        return None if domain is None or bus is None or slot is None else f"{domain:04x}:{bus:02x}:{slot:02x}.0"

    def number(self, name: str) -> int | None:
        """A number of the properties; None where the properties lack it."""
        value = getattr(self.properties, name, None)
        return None if value is None else int(value)


def open_device(device: torch.device) -> OpenDevice:
    """The device, opened; one without an index is the current one of its type.

    Raises:
        HardwareUnavailableError: torch has no such module, the module no such device, or the device does not open.
    """
    try:
        module = torch.get_device_module(device)
    except RuntimeError as exc:
        message = f"{device} cannot be used: torch {torch.__version__} has no support for {device.type}"
        raise HardwareUnavailableError(f"{message}; import the vendor's plugin first, or use cpu") from exc
    if not module.is_available():
        message = f"{device} cannot be used: torch {torch.__version__} finds no {device.type} device"
        raise HardwareUnavailableError(f"{message}; check the driver and that torch is built for it, or use cpu")
    count = int(module.device_count())
    if device.index is not None and device.index >= count:
        existing = ", ".join(f"{device.type}:{index}" for index in range(count))
        message = f"{device} does not exist: torch finds {count} {device.type} devices ({existing})"
        raise HardwareUnavailableError(f"{message}; choose one of them, or check the *_VISIBLE_DEVICES variables")
    try:
        # the module of another vendor may lack current_device()
        index = device.index if device.index is not None else call(module, "current_device") or 0
        resolved = torch.device(device.type, index)
        return OpenDevice(module, resolved, call(module, "get_device_properties", resolved))
    except MODULE_FAILURES as exc:
        raise HardwareUnavailableError(
            f"{device} exists but does not open: {exc}; check the driver, or use another device"
        ) from exc


def call(module: Any, function: str, *arguments: object) -> Any:
    """The result of a device module's function; None if the module lacks it, as modules of other vendors do."""
    found = getattr(module, function, None)
    return None if found is None else found(*arguments)


def probe_device(device: torch.device) -> DeviceSpec:
    """What the device is. Opens it, which for CUDA and HIP takes some hundred MB of its memory for a context.

    Args:
        device: any torch device; without an index, the current one of its type.

    Raises:
        HardwareUnavailableError: there is no such device, usually because the index is too high, the driver is missing,
            or this torch was built without support for it.
    """
    if device.type == "cpu":
        return DeviceSpec(
            name=_cpu_name(),
            vendor=Vendor.OTHER,
            torch_device="cpu",
            compute_units=os.cpu_count(),
            total_bytes=psutil.virtual_memory().total,
        )
    opened = open_device(device)
    uuid, driver, link = opened.uuid, None, None
    if opened.vendor is Vendor.NVIDIA:
        uuid, driver, link = _ask_nvml(opened)
    elif opened.vendor is Vendor.AMD:
        driver = Rocm().driver()
        if opened.pci_bus_id is None:
            logger.warning("torch reports no PCI address of %s; its link stays unknown", opened.device)
        else:
            link = Rocm().pcie(opened.pci_bus_id)
    return DeviceSpec(
        name=opened.name,
        vendor=opened.vendor,
        torch_device=str(opened.device),
        uuid=uuid,
        pci_bus_id=opened.pci_bus_id,
        compute_units=opened.number("multi_processor_count"),
        is_integrated=opened.is_integrated,
        driver=driver if driver is not None else getattr(opened.properties, "driver_version", None),
        total_bytes=opened.number("total_memory"),
        pcie=link,
    )


def _ask_nvml(opened: OpenDevice) -> tuple[str | None, str | None, PcieLink | None]:
    """(UUID, driver, link) from NVML; torch's UUID, and None, for what NVML does not report."""
    uuid, address = opened.uuid, opened.pci_bus_id
    try:
        with Nvml() as nvml:
            driver = nvml.driver()
            handle = nvml.find(uuid=uuid, pci_bus_id=address, name=opened.name)
            if handle is None:
                if uuid is not None or address is not None:  # a search by name has logged its own warning
                    logger.warning("NVML shows no device with UUID %s (PCI %s); its link stays unknown", uuid, address)
                return uuid, driver, None
            return nvml.uuid(handle) or uuid, driver, nvml.pcie(handle)
    except HardwareUnavailableError as exc:
        logger.warning("driver version and link of the GPU stay unknown: %s", exc)
        return uuid, None, None


def _cpu_name() -> str:
    """Model of the CPU where Linux reports it, otherwise the architecture."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()
