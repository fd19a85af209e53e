"""The way from a torch device to its vendor's readings, with torch.cuda and the vendors faked; the CPU is real."""

from __future__ import annotations

import logging
import sys

import psutil
import pytest
import torch
from fake_vendors import ADDRESS, UUID, Lookup
from wanvideo_enhanced_blockswap.hardware import (
    DeviceSpec,
    HardwareUnavailableError,
    Vendor,
    probe_device,
    read_device_memory,
)
from wanvideo_enhanced_blockswap.hardware.records import PcieLink

CUDA = torch.device("cuda:0")
NO_IDENTITY = {"uuid": None, "pci_domain_id": None, "pci_bus_id": None, "pci_device_id": None}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_cpu_is_described_as_it_is():
    found = probe_device(torch.device("cpu"))
    assert found.name
    assert (found.vendor, found.torch_device, found.pcie) == (Vendor.OTHER, "cpu", None)
    assert found.total_bytes == psutil.virtual_memory().total


@no_gpu
@pytest.mark.parametrize("read", [probe_device, read_device_memory])
@pytest.mark.parametrize("name", ["cuda", "cuda:99", "xpu", "mps", "hpu", "meta"])
def test_a_device_that_is_not_there_is_refused_with_its_name_and_a_way_out(read, name):
    if name == "hpu" and hasattr(torch, "hpu"):
        pytest.skip("the pretend accelerator has been installed in this process: the device is there")
    with pytest.raises(HardwareUnavailableError, match=rf"^{name} (cannot be used|does not exist): .*use cpu"):
        read(torch.device(name))


@pytest.mark.parametrize("read", [probe_device, read_device_memory])
def test_an_index_beyond_the_last_device_is_refused_with_those_that_exist(install_cuda, read):
    install_cuda()
    with pytest.raises(
        HardwareUnavailableError,
        match=r"cuda:99 does not exist: torch finds 2 cuda devices \(cuda:0, cuda:1\); choose one",
    ):
        read(torch.device("cuda:99"))


def test_a_device_that_does_not_open_is_unavailable_and_keeps_the_cause(install_cuda, monkeypatch):
    install_cuda()
    error = RuntimeError("CUDA driver version is insufficient")

    def fail(_device):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    with pytest.raises(HardwareUnavailableError, match="driver version is insufficient") as caught:
        probe_device(CUDA)
    assert caught.value.__cause__ is error


def test_an_nvidia_card_is_described_by_torch_and_nvml_together(install_cuda, install_nvml):
    install_cuda()
    install_nvml()
    assert probe_device(CUDA) == DeviceSpec(
        name="NVIDIA GeForce RTX 4090",
        vendor=Vendor.NVIDIA,
        torch_device="cuda:0",
        uuid=f"GPU-{UUID}",
        pci_bus_id=ADDRESS,
        compute_units=128,
        is_integrated=False,
        driver="580.95.05",
        total_bytes=1000,
        pcie=PcieLink(1, 16, 4, 16),
    )


def test_a_device_without_an_index_is_the_current_one(install_cuda, install_nvml):
    install_cuda()
    install_nvml()
    assert probe_device(torch.device("cuda")).torch_device == "cuda:1"


def test_without_nvml_the_card_is_described_by_torch_with_one_warning(install_cuda, monkeypatch, caplog):
    install_cuda()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = probe_device(CUDA)
    assert (found.uuid, found.driver, found.pcie, found.compute_units) == (UUID, None, None, 128)
    assert len(warnings_in(caplog)) == 1


def test_a_card_that_nvml_does_not_show_keeps_what_torch_and_the_driver_say(install_cuda, install_nvml, caplog):
    install_cuda()
    install_nvml(nvmlDeviceGetHandleByUUID=Lookup({}))
    found = probe_device(CUDA)
    assert (found.uuid, found.driver, found.pcie) == (UUID, "580.95.05", None)
    assert len(warnings_in(caplog)) == 1


def test_a_torch_too_old_to_tell_uuid_and_address_finds_the_one_card_of_its_name(install_cuda, install_nvml, caplog):
    install_cuda(**NO_IDENTITY)
    install_nvml()
    found = probe_device(CUDA)
    assert (found.uuid, found.pci_bus_id, found.pcie) == (f"GPU-{UUID}", None, PcieLink(1, 16, 4, 16))
    assert not warnings_in(caplog)


def test_which_of_two_cards_of_one_name_is_meant_stays_unknown_with_one_warning(install_cuda, install_nvml, caplog):
    install_cuda(**NO_IDENTITY)
    install_nvml(nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=Lookup({0: "first", 1: "second"}))
    found = probe_device(CUDA)
    assert (found.uuid, found.pcie, found.driver) == (None, None, "580.95.05")
    assert len(warnings_in(caplog)) == 1
    assert "2 devices named NVIDIA GeForce RTX 4090" in warnings_in(caplog)[0]


def test_an_amd_card_without_an_address_has_an_unknown_link_with_one_warning(install_cuda, caplog):
    install_cuda(hip="6.0", name="AMD Radeon RX 6800", **NO_IDENTITY)
    assert probe_device(CUDA).pcie is None
    assert len(warnings_in(caplog)) == 1
    assert "no PCI address of cuda:0" in warnings_in(caplog)[0]


def test_an_address_is_written_in_hexadecimal(install_cuda, install_nvml):
    install_cuda(pci_domain_id=1, pci_bus_id=0xC1, pci_device_id=31)
    install_nvml()
    assert probe_device(CUDA).pci_bus_id == "0001:c1:1f.0"


def test_a_torch_built_for_hip_makes_the_card_an_amd_one(install_cuda):
    install_cuda(hip="6.4", name="AMD Radeon RX 7900 XTX")
    assert probe_device(CUDA).vendor is Vendor.AMD


def test_an_amd_card_behind_zluda_is_not_taken_for_an_nvidia_one(install_cuda):
    install_cuda(name="AMD Radeon RX 6800 [ZLUDA]")
    assert probe_device(CUDA).vendor is Vendor.AMD


def test_a_device_of_another_vendor_is_described_by_what_its_module_has(install_hpu):
    found = probe_device(install_hpu(get_device_name=lambda _device: "GAUDI3"))
    assert (found.name, found.vendor, found.torch_device) == ("GAUDI3", Vendor.OTHER, "hpu:0")
    assert (found.total_bytes, found.compute_units, found.is_integrated) == (None, None, None)
