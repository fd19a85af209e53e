"""Device memory: readings that can be true are kept, others replaced by what says so; torch and vendors are faked."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from fake_machine import look_in, write_files
from fake_vendors import NVMLError, NVMLError_NotSupported
from wanvideo_enhanced_blockswap.hardware import (
    MIB,
    DeviceMemory,
    HardwareUnavailableError,
    is_out_of_memory,
    read_device_memory,
)

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """A Linux host of 5000 bytes, 4000 of them available, apart from what the caller changes."""

    def build(*, total=5000, available=4000, system="linux", **files):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=available))
        monkeypatch.setattr(sys, "platform", system)
        write_files(tmp_path, files)

    look_in(monkeypatch, tmp_path)
    build()
    return build


WSL2 = {"proc/sys/kernel/osrelease": "5.15.153.1-microsoft-standard-WSL2\n"}
CONTAINER = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": "900\n",
    "sys/fs/cgroup/memory.current": "300\n",
}


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def fail_to_tell(monkeypatch, error):
    def fail(_device):
        raise error

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)


def test_the_cpu_has_no_device_memory():
    assert read_device_memory(torch.device("cpu")) is None


def test_device_memory_is_what_torch_reads(install_cuda):
    install_cuda(free=700, total=1000)
    assert read_device_memory(CUDA) == DeviceMemory(1000, 700, "torch.cuda.mem_get_info")


def test_the_memory_of_other_devices_is_not_asked_for(install_cuda, monkeypatch):
    install_cuda()
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (700, 1000))
    read_device_memory(CUDA)
    assert asked == [CUDA]


@pytest.mark.parametrize(("available", "free"), [(600, 600), (5000, 1000)])
def test_an_integrated_device_has_free_what_the_host_has(install_cuda, host, available, free):
    install_cuda(is_integrated=1, free=10, total=1000)
    host(available=available)
    memory = read_device_memory(CUDA)
    assert (memory.total_bytes, memory.free_bytes, memory.is_estimate) == (1000, free, True)
    assert "integrated" in memory.source


def test_an_integrated_device_may_claim_more_free_than_it_has(install_cuda, host, caplog):
    install_cuda(hip="6.4", is_integrated=1, free=120_000, total=62_500)
    host(total=128_000, available=50_000)
    assert read_device_memory(CUDA).free_bytes == 50_000
    assert not warnings_in(caplog)


def test_an_integrated_device_in_a_container_has_no_more_than_the_container(install_cuda, host):
    install_cuda(is_integrated=1, free=10, total=1000)
    host(**CONTAINER)
    memory = read_device_memory(CUDA)
    assert (memory.total_bytes, memory.free_bytes) == (900, 600)


def test_what_the_firmware_sets_aside_for_an_integrated_device_is_free_beside_the_hosts(install_cuda, host):
    install_cuda(hip="6.4", is_integrated=1, free=9_900, total=10_000, reserved=1_000)
    host(total=6_000, available=2_000)
    memory = read_device_memory(CUDA)
    assert (memory.total_bytes, memory.free_bytes) == (10_000, 2_000 + 4_000 * 85 // 100 - 1_000)
    assert "sets aside" in memory.source


@pytest.mark.parametrize("system", ["win32", "linux"])
@pytest.mark.parametrize("free", [700, 1000, 1200])
def test_hip_that_sees_this_process_alone_has_a_share_set_aside_for_others(install_cuda, host, system, free):
    install_cuda(hip="6.4", free=free, total=1000)
    host(system=system, **WSL2)
    memory = read_device_memory(CUDA)
    assert (memory.free_bytes, memory.is_estimate) == (min(free, 1000) - 150, True)
    assert "sees this process alone" in memory.source or "may see this process alone" in memory.source


def test_zluda_on_windows_is_hip_on_windows(install_cuda, host):
    install_cuda(name="AMD Radeon RX 6800 [ZLUDA]", free=700, total=1000)
    host(system="win32")
    assert read_device_memory(CUDA).free_bytes == 550


@pytest.mark.parametrize(("hip", "system"), [("6.4", "linux"), (None, "win32")])
def test_hip_on_linux_and_cuda_on_windows_are_believed(install_cuda, host, hip, system):
    install_cuda(hip=hip, free=700, total=1000)
    host(system=system)
    assert read_device_memory(CUDA) == DeviceMemory(1000, 700, "torch.cuda.mem_get_info")


@pytest.mark.parametrize("free", [2000, -1])
def test_a_reading_that_cannot_be_is_replaced_by_the_drivers(install_cuda, install_nvml, caplog, free):
    install_cuda(free=free, total=1000)
    install_nvml()
    assert read_device_memory(CUDA) == DeviceMemory(1000, 700, "NVML")
    assert len(warnings_in(caplog)) == 1


def test_the_drivers_reading_of_an_amd_card_is_asked_by_its_address(install_cuda, install_amdsmi):
    install_cuda(hip="6.4", free=99_000 * MIB, total=24_500 * MIB)
    install_amdsmi()
    assert read_device_memory(CUDA) == DeviceMemory(24560 * MIB, 24000 * MIB, "amdsmi")


@pytest.mark.parametrize(
    "changes",
    [
        {"nvmlInit": NVMLError("Driver Not Loaded")},
        {"nvmlDeviceGetMemoryInfo": NVMLError_NotSupported("no")},
        {"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=2000, free=1000, used=1000)},  # of the GPU with this instance
    ],
)
@pytest.mark.parametrize(("reserved", "free"), [(0, 850), (200, 650), (900, 0)])
def test_without_any_reading_that_can_be_believed_free_memory_is_an_estimate(
    install_cuda, install_nvml, changes, reserved, free
):
    install_cuda(free=2000, total=1000, reserved=reserved)
    install_nvml(**changes)
    memory = read_device_memory(CUDA)
    assert (memory.total_bytes, memory.free_bytes, memory.is_estimate) == (1000, free, True)
    assert "85 % of the total less what this process has reserved" in memory.source
    assert "reports 2.0 KB free of 1000 B" in memory.source


@pytest.mark.usefixtures("no_amdsmi")
def test_where_hip_refuses_to_tell_free_memory_the_estimate_says_so(install_cuda, monkeypatch):
    install_cuda(hip="6.4", total=1000)
    fail_to_tell(monkeypatch, RuntimeError("HIP error: invalid argument"))
    memory = read_device_memory(CUDA)
    assert (memory.free_bytes, memory.is_estimate) == (850, True)
    assert "no free memory" in memory.source


def test_a_device_that_is_too_full_to_open_is_no_estimate(install_cuda, monkeypatch):
    install_cuda(hip="6.4", total=1000)
    full = RuntimeError("HIP error: out of memory")
    full.error_code = 2
    fail_to_tell(monkeypatch, full)
    with pytest.raises(HardwareUnavailableError, match="out of memory"):
        read_device_memory(CUDA)


def test_a_cuda_device_that_does_not_answer_is_unavailable(install_cuda, monkeypatch):
    install_cuda()
    fail_to_tell(monkeypatch, RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(HardwareUnavailableError, match="unspecified launch failure"):
        read_device_memory(CUDA)


def test_a_device_module_with_mem_get_info_is_asked_for_it(install_hpu):
    device = install_hpu(current_device=lambda: 0, mem_get_info=lambda _device: (30, 96))
    assert read_device_memory(device) == DeviceMemory(96, 30, "torch.hpu.mem_get_info")


def test_a_device_module_that_counts_only_its_own_says_so(install_hpu):
    device = install_hpu(
        get_device_properties=lambda _device: SimpleNamespace(total_memory=96), memory_allocated=lambda _device: 6
    )
    source = "torch.hpu, which sees this process alone"
    assert read_device_memory(device) == DeviceMemory(96, 90, source, is_estimate=True)


def test_a_device_module_without_memory_functions_is_unavailable(install_hpu):
    with pytest.raises(
        HardwareUnavailableError, match=r"memory of hpu:0 cannot be read: torch .* lacks torch\.hpu\.mem_get_info"
    ):
        read_device_memory(install_hpu())


def test_a_memory_function_that_fails_is_unavailable(install_hpu):
    def fail(_device):
        raise NotImplementedError("no such counter")

    with pytest.raises(HardwareUnavailableError, match="no such counter"):
        read_device_memory(install_hpu(mem_get_info=fail))


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GB."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("HIP error: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),  # C10_CUDA_DRIVER_CHECK, which gives no code
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("Triton Error [HIP]: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("MIOpen Error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("DataLoader worker ran out of memory"), False),
        (MemoryError("out of memory"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_a_refusal_of_device_memory_is_known_from_allocator_driver_and_libraries(failure, expected):
    assert is_out_of_memory(failure) is expected
