"""Devices and vendor libraries that answer from a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_vendors
import pytest
from fake_vendors import AMDSMI_OF_TWO_CARDS, NVML_OF_A_4090, UUID


@pytest.fixture
def install_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Put a binding in place in which one RTX 4090 answers everything, apart from what the caller changes."""
    return lambda **changes: fake_vendors.install_nvml(monkeypatch, NVML_OF_A_4090 | changes)


@pytest.fixture
def install_amdsmi(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Put an amdsmi in place in which the second of two cards is the one at ADDRESS, apart from what is changed."""
    return lambda **changes: fake_vendors.install_amdsmi(monkeypatch, AMDSMI_OF_TWO_CARDS | changes)


@pytest.fixture
def no_amdsmi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides an installed amdsmi."""
    monkeypatch.setitem(sys.modules, "amdsmi", None)


@pytest.fixture
def install_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make torch.cuda show two equal cards with these properties, apart from what the caller changes."""

    def install(
        *, hip: str | None = None, free: int = 700, total: int = 1000, reserved: int = 0, **changes: Any
    ) -> None:
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
        fake_vendors.install_cuda(
            monkeypatch, lambda _device: known, lambda _device: (free, total), count=2, hip=hip, reserved=reserved
        )

    return install


@pytest.fixture
def install_hpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Give torch an hpu module with these functions."""
    return lambda **functions: fake_vendors.install_hpu(monkeypatch, functions)
