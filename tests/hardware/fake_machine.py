"""Puts a machine of `machines.py` in place of the one the tests run on, and reads it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vendors
import psutil
import pytest
import torch
from fake_vendors import AmdSmiException, Lookup
from machines import Card, Machine
from wanvideo_enhanced_blockswap.hardware import (
    DeviceMemory,
    DeviceSpec,
    HostMemory,
    device,
    probe_device,
    read_device_memory,
    read_host_memory,
)
from wanvideo_enhanced_blockswap.hardware.host import read_platform
from wanvideo_enhanced_blockswap.hardware.rocm import Rocm

VISIBILITY = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Readings:
    """What the package reads of a machine before it plans, and the warnings it gives on the way."""

    spec: DeviceSpec
    memory: DeviceMemory | None
    host: HostMemory
    warnings: tuple[str, ...]


def read(machine: Machine) -> Readings:
    """The readings of a machine that is in place."""
    device = torch.device(machine.device)
    with _warnings() as warnings:
        spec, memory, host = probe_device(device), read_device_memory(device), read_host_memory()
    return Readings(spec, memory, host, tuple(warnings))


@contextmanager
def in_place(machine: Machine, folder: Path) -> Iterator[None]:
    """The machine, for the duration of a block.

    Args:
        machine: what to put in place.
        folder: an empty folder, which becomes the root of its file system.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install_host(monkeypatch, machine, folder)
        _install_torch(monkeypatch, machine)
        _install_module(monkeypatch, "pynvml", machine.pynvml, folder)
        _install_module(monkeypatch, "amdsmi", machine.amdsmi, folder)
        if machine.pynvml is None:
            fake_vendors.install_nvml(monkeypatch, _nvml(machine))
        if machine.amdsmi is None:
            fake_vendors.install_amdsmi(monkeypatch, _amdsmi(machine))
        yield


@contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("wanvideo_enhanced_blockswap")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _install_host(monkeypatch: pytest.MonkeyPatch, machine: Machine, folder: Path) -> None:
    host = machine.host
    memory = SimpleNamespace(total=host.ram, available=host.available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(sys, "platform", host.system)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(device, "_cpu_name", lambda: "a CPU")
    limits = SimpleNamespace(RLIMIT_MEMLOCK=8, RLIM_INFINITY=-1)
    limits.getrlimit = lambda _kind: (-1 if host.memlock is None else host.memlock, -1)
    monkeypatch.setitem(sys.modules, "resource", limits)
    files = dict(host.files)
    if host.system == "linux":
        files["proc/sys/kernel/osrelease"] = f"{host.release}\n"
        for card in machine.cards:
            files |= {f"sys/bus/pci/devices/{card.address}/{name}": text for name, text in card.sysfs.items()}
    write_files(folder, files)
    look_in(monkeypatch, folder)
    monkeypatch.setitem(Rocm.__init__.__kwdefaults__, "sysfs_root", folder / "sys")


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Text files by their paths below the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def look_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The folder is where the host's functions look by default."""
    for function in (read_host_memory, read_platform):
        monkeypatch.setitem(function.__kwdefaults__, "root", folder)


def _install_torch(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    for name in VISIBILITY:
        monkeypatch.delenv(name, raising=False)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    shown = [machine.cards[number] for number in machine.visible] if machine.cards else []

    def memory(device: torch.device) -> tuple[int, int]:
        assert device == torch.device(machine.device), f"{device} was asked, which nobody asked about"
        card = shown[device.index]
        if isinstance(card.free, Exception):
            raise card.free
        return card.free, card.total

    fake_vendors.install_cuda(
        monkeypatch,
        lambda device: _properties(shown[device.index]),
        memory,
        count=len(shown),
        hip=machine.hip,
        reserved=shown[0].reserved if shown else 0,
    )


def _properties(card: Card) -> SimpleNamespace:
    told: dict[str, Any] = {
        "name": card.name,
        "total_memory": card.total,
        "multi_processor_count": card.units,
        "is_integrated": card.is_integrated,
        "gcnArchName": card.architecture,
    }
    if card.tells_identity:
        address = {"pci_domain_id": card.domain, "pci_bus_id": card.bus, "pci_device_id": 0}
        told |= {"uuid": card.uuid} | address
    return SimpleNamespace(**{name: value for name, value in told.items() if value is not None})


def _install_module(monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, folder: Path) -> None:
    """A module of this text where importing finds it."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    if text is not None:
        place = folder / "modules"
        place.mkdir(exist_ok=True)
        (place / f"{name}.py").write_text(f"{text}\n")
        monkeypatch.syspath_prepend(place)


def _nvml(machine: Machine) -> dict[str, Any]:
    handles = {f"handle {number}": card for number, card in enumerate(machine.cards)}
    whole = [handle for handle, card in handles.items() if card.uuid_prefix == "GPU-"]
    expected: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": machine.driver,
        "nvmlDeviceGetCount": len(whole),
        "nvmlDeviceGetHandleByIndex": Lookup(enumerate(whole)),
        "nvmlDeviceGetHandleByUUID": Lookup({card.uuid_prefix + card.uuid: handle for handle, card in handles.items()}),
        "nvmlDeviceGetHandleByPciBusId": Lookup({handles[handle].address: handle for handle in whole}),
    }
    of_a_card = {handle: _nvml_of(card) | dict(card.nvml) for handle, card in handles.items()}
    for function in _nvml_of(machine.cards[0]) if machine.cards else ():
        expected[function] = Lookup({handle: answers[function] for handle, answers in of_a_card.items()})
    return expected | dict(machine.nvml)


def _nvml_of(card: Card) -> dict[str, Any]:
    generation, width, max_generation, max_width = card.link
    free = card.free if isinstance(card.free, int) and card.free <= card.total else 0
    return {
        "nvmlDeviceGetName": card.name,
        "nvmlDeviceGetUUID": card.uuid_prefix + card.uuid,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=card.total, free=free, used=card.total - free),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
        "nvmlDeviceGetCurrPcieLinkGeneration": generation,
        "nvmlDeviceGetCurrPcieLinkWidth": width,
        "nvmlDeviceGetMaxPcieLinkGeneration": max_generation,
        "nvmlDeviceGetMaxPcieLinkWidth": max_width,
    }


def _amdsmi(machine: Machine) -> dict[str, Any]:
    handles = {f"handle {number}": card for number, card in enumerate(machine.cards)}
    return {
        "AmdSmiException": AmdSmiException,
        "amdsmi_init": None,
        "amdsmi_shut_down": None,
        "amdsmi_get_processor_handles": list(handles),
        "amdsmi_get_gpu_device_bdf": Lookup({handle: card.address for handle, card in handles.items()}),
        "amdsmi_get_gpu_vram_usage": Lookup({handle: card.vram_usage for handle, card in handles.items()}),
        "amdsmi_get_gpu_activity": Lookup({handle: {"gfx_activity": 0, "umc_activity": 0} for handle in handles}),
    } | dict(machine.smi)
