"""Devices and vendor libraries that answer from a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vendors import ADDRESS, NVML_ERRORS, UUID, AmdSmiException, Lookup, fake_module


@pytest.fixture
def install_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Put a binding in place in which one RTX 4090 answers everything, apart from what the caller changes."""

    def install(**changes: Any) -> ModuleType:
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": "580.95.05",
            "nvmlDeviceGetHandleByUUID": Lookup({f"GPU-{UUID}": "gpu"}),
            "nvmlDeviceGetHandleByPciBusId": Lookup({ADDRESS: "gpu"}),
            "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
            "nvmlDeviceGetUUID": f"GPU-{UUID}",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=1000, free=700, used=300),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=83, memory=41),
            "nvmlDeviceGetCurrPcieLinkGeneration": 1,
            "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
        }
        module = fake_module("pynvml", answers | changes)
        for error in NVML_ERRORS:
            setattr(module, error.__name__, error)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


@pytest.fixture
def install_amdsmi(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Put an amdsmi in place in which the second of two cards is the one at ADDRESS, apart from what is changed."""

    def install(**changes: Any) -> ModuleType:
        answers: dict[str, Any] = {
            "AmdSmiException": AmdSmiException,
            "amdsmi_init": None,
            "amdsmi_shut_down": None,
            "amdsmi_get_processor_handles": ["first", "second"],
            "amdsmi_get_gpu_device_bdf": Lookup({"first": "0000:09:00.0", "second": ADDRESS}),
            "amdsmi_get_gpu_vram_usage": Lookup(
                {"first": {"vram_total": 9, "vram_used": 9}, "second": {"vram_total": 24560, "vram_used": 560}}
            ),
            "amdsmi_get_gpu_activity": Lookup(
                {"second": {"gfx_activity": 64, "umc_activity": 32, "mm_activity": "N/A"}}
            ),
        }
        module = fake_module("amdsmi", answers | changes)
        monkeypatch.setitem(sys.modules, "amdsmi", module)
        return module

    return install


@pytest.fixture
def no_amdsmi(monkeypatch: pytest.MonkeyPatch) -> None:
    """No amdsmi installed, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "amdsmi", None)


@pytest.fixture
def install_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make torch.cuda show two equal cards with these properties, apart from what the caller changes."""

    def install(*, hip: str | None = None, free: int = 700, total: int = 1000, **changes: Any) -> None:
        properties = {
            "name": "NVIDIA GeForce RTX 4090",
            "uuid": UUID,
            "pci_domain_id": 0,
            "pci_bus_id": 1,
            "pci_device_id": 0,
            "multi_processor_count": 128,
            "is_integrated": 0,
            "total_memory": total,
        }
        known = SimpleNamespace(**{key: value for key, value in (properties | changes).items() if value is not None})
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: known)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, total))

    return install
