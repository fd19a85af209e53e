"""Vendor bindings made of a table of answers, some of which are exceptions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

UUID = "11111111-2222-3333-4444-555555555555"
ADDRESS = "0000:01:00.0"


class NVMLError(Exception):
    """The base of what the binding raises."""


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818 - the binding's name
    """No such device."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818 - the binding's name
    """The device cannot answer."""


class NVMLError_FunctionNotFound(NVMLError):  # noqa: N801, N818 - the binding's name
    """The driver lacks the function."""


class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818 - the binding's name
    """The handle may not be asked, as that of a GPU in MIG mode."""


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818 - the binding's name
    """There is no driver."""


NVML_ERRORS = (
    NVMLError,
    NVMLError_NotFound,
    NVMLError_NotSupported,
    NVMLError_FunctionNotFound,
    NVMLError_NoPermission,
    NVMLError_LibraryNotFound,
)


class AmdSmiException(Exception):  # noqa: N818 - the binding's name
    """The base of what amdsmi raises."""


def fake_module(name: str, answers: dict[str, Any]) -> ModuleType:
    """A module whose functions give the answers of a table: raised, looked up by the last argument, or returned."""
    module = ModuleType(name)
    module.calls = []  # type: ignore[attr-defined]

    def answering(function: str, answer: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            module.calls.append((function, *arguments))  # type: ignore[attr-defined]
            found = answer.get(arguments[-1], NVMLError_NotFound()) if isinstance(answer, Lookup) else answer
            if isinstance(found, BaseException):
                raise found
            return found

        return call

    for function, answer in answers.items():
        setattr(module, function, answer if isinstance(answer, type) else answering(function, answer))
    return module


class Lookup(dict):  # type: ignore[type-arg]
    """Answers by the last argument of the call."""


NVML_OF_A_4090: dict[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlSystemGetDriverVersion": "580.95.05",
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": "gpu",
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
AMDSMI_OF_TWO_CARDS: dict[str, Any] = {
    "AmdSmiException": AmdSmiException,
    "amdsmi_init": None,
    "amdsmi_shut_down": None,
    "amdsmi_get_processor_handles": ["first", "second"],
    "amdsmi_get_gpu_device_bdf": Lookup({"first": "0000:09:00.0", "second": ADDRESS}),
    "amdsmi_get_gpu_vram_usage": Lookup(
        {"first": {"vram_total": 9, "vram_used": 9}, "second": {"vram_total": 24560, "vram_used": 560}}
    ),
    "amdsmi_get_gpu_activity": Lookup({"second": {"gfx_activity": 64, "umc_activity": 32, "mm_activity": "N/A"}}),
}


def install_nvml(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, Any]) -> ModuleType:
    """Put a binding with these answers in place."""
    module = fake_module("pynvml", dict(answers))
    for error in NVML_ERRORS:
        setattr(module, error.__name__, error)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def install_amdsmi(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, Any]) -> ModuleType:
    """Put an amdsmi with these answers in place."""
    module = fake_module("amdsmi", dict(answers))
    monkeypatch.setitem(sys.modules, "amdsmi", module)
    return module


def install_cuda(
    monkeypatch: pytest.MonkeyPatch,
    properties: Callable[[torch.device], Any],
    memory: Callable[[torch.device], tuple[int, int]],
    *,
    count: int,
    hip: str | None = None,
    reserved: int = 0,
) -> None:
    """Make torch.cuda show `count` cards, the last of them current."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: reserved)


def install_hpu(monkeypatch: pytest.MonkeyPatch, functions: Mapping[str, Callable[..., Any]]) -> torch.device:
    """Give torch an hpu module with one device and these functions."""
    module = ModuleType("torch.hpu")
    for name, function in ({"is_available": lambda: True, "device_count": lambda: 1} | dict(functions)).items():
        setattr(module, name, function)
    monkeypatch.setattr(torch, "hpu", module, raising=False)
    monkeypatch.setattr(torch, "get_device_module", lambda device: getattr(torch, device.type))
    return torch.device("hpu")
