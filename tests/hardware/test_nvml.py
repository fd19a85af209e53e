"""NVML faked by a table of answers; nothing here needs an NVIDIA driver."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
from fake_vendors import (
    ADDRESS,
    UUID,
    Lookup,
    NVMLError,
    NVMLError_FunctionNotFound,
    NVMLError_LibraryNotFound,
    NVMLError_NoPermission,
    NVMLError_NotSupported,
)
from wanvideo_enhanced_blockswap.hardware import DeviceMemory, HardwareUnavailableError
from wanvideo_enhanced_blockswap.hardware.nvml import Nvml
from wanvideo_enhanced_blockswap.hardware.records import PcieLink


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_every_query_answers_on_a_card_that_supports_them_all(install_nvml):
    install_nvml()
    with Nvml() as nvml:
        gpu = nvml.find(uuid=UUID, pci_bus_id=None)
        assert nvml.driver() == "580.95.05"
        assert nvml.name(gpu) == "NVIDIA GeForce RTX 4090"
        assert nvml.uuid(gpu) == f"GPU-{UUID}"
        assert nvml.memory(gpu) == DeviceMemory(1000, 700, "NVML")
        assert nvml.utilisation(gpu) == 83.0
        assert nvml.pcie(gpu) == PcieLink(1, 16, 4, 16)


@pytest.mark.parametrize(
    ("function", "query"),
    [
        ("nvmlDeviceGetMemoryInfo", "memory"),
        ("nvmlDeviceGetName", "name"),
        ("nvmlDeviceGetUUID", "uuid"),
    ],
)
@pytest.mark.parametrize("error", [NVMLError_NotSupported, NVMLError_FunctionNotFound, NVMLError_NoPermission])
def test_an_unsupported_query_gives_none(install_nvml, function, query, error):
    install_nvml(**{function: error("no")})
    with Nvml() as nvml:
        assert getattr(nvml, query)(nvml.find(uuid=UUID, pci_bus_id=None)) is None


def test_an_unsupported_query_leaves_the_others_alone(install_nvml):
    install_nvml(nvmlDeviceGetMemoryInfo=NVMLError_NotSupported("no"))
    with Nvml() as nvml:
        gpu = nvml.find(uuid=UUID, pci_bus_id=None)
        assert nvml.memory(gpu) is None
        assert nvml.utilisation(gpu) == 83.0


def test_an_unsupported_query_warns_once_however_often_it_is_asked(install_nvml, caplog):
    install_nvml(nvmlDeviceGetUtilizationRates=NVMLError_NotSupported("no"))
    with Nvml() as nvml:
        gpu = nvml.find(uuid=UUID, pci_bus_id=None)
        assert {nvml.utilisation(gpu) for _ in range(3)} == {None}
    assert len(warnings_in(caplog)) == 1
    assert "nvmlDeviceGetUtilizationRates" in warnings_in(caplog)[0]


def test_a_part_of_the_link_that_is_unknown_leaves_the_other_parts(install_nvml):
    install_nvml(nvmlDeviceGetMaxPcieLinkGeneration=NVMLError_FunctionNotFound("no"))
    with Nvml() as nvml:
        assert nvml.pcie(nvml.find(uuid=UUID, pci_bus_id=None)) == PcieLink(1, 16, None, 16)


def test_a_device_without_a_link_has_none_with_one_warning(install_nvml, caplog):
    parts = ("CurrPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkGeneration", "MaxPcieLinkWidth")
    install_nvml(**{f"nvmlDeviceGet{part}": NVMLError_NotSupported("no") for part in parts})
    with Nvml() as nvml:
        assert nvml.pcie(nvml.find(uuid=UUID, pci_bus_id=None)) is None
    assert len(warnings_in(caplog)) == 1


def test_a_function_that_the_binding_lacks_gives_none(install_nvml):
    del install_nvml().nvmlDeviceGetMemoryInfo
    with Nvml() as nvml:
        assert nvml.memory(nvml.find(uuid=UUID, pci_bus_id=None)) is None


def test_names_that_an_old_binding_gives_as_bytes_are_text(install_nvml):
    install_nvml(nvmlDeviceGetName=b"NVIDIA GeForce RTX 3090", nvmlSystemGetDriverVersion=b"470.1")
    with Nvml() as nvml:
        assert nvml.name(nvml.find(uuid=UUID, pci_bus_id=None)) == "NVIDIA GeForce RTX 3090"
        assert nvml.driver() == "470.1"


def test_a_mig_instance_is_found_by_its_own_uuid(install_nvml):
    install_nvml(nvmlDeviceGetHandleByUUID=Lookup({f"MIG-{UUID}": "instance"}))
    with Nvml() as nvml:
        assert nvml.find(uuid=UUID, pci_bus_id=ADDRESS) == "instance"


def test_a_uuid_with_its_prefix_is_looked_up_as_it_is(install_nvml):
    module = install_nvml()
    with Nvml() as nvml:
        assert nvml.find(uuid=f"GPU-{UUID}", pci_bus_id=None) == "gpu"
    assert ("nvmlDeviceGetHandleByUUID", f"GPU-{UUID}") in module.calls


def test_the_gpu_that_holds_a_mig_instance_is_not_taken_for_it(install_nvml):
    install_nvml(nvmlDeviceGetHandleByUUID=Lookup({}))
    with Nvml() as nvml:
        assert nvml.find(uuid=UUID, pci_bus_id=ADDRESS) is None


def test_without_a_uuid_the_pci_address_finds_the_device(install_nvml):
    install_nvml()
    with Nvml() as nvml:
        assert nvml.find(uuid=None, pci_bus_id=ADDRESS) == "gpu"


@pytest.mark.parametrize(("uuid", "address"), [(None, None), (None, "0000:99:00.0"), ("unknown", None)])
def test_a_device_that_nvml_does_not_show_is_none_without_a_warning(install_nvml, caplog, uuid, address):
    install_nvml()
    with Nvml() as nvml:
        assert nvml.find(uuid=uuid, pci_bus_id=address) is None
    assert not warnings_in(caplog)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", b"NVIDIA GeForce RTX 4090"])
def test_without_uuid_and_address_a_name_that_one_device_bears_finds_it(install_nvml, name):
    names = Lookup({"first": b"NVIDIA GeForce RTX 3060", "second": name})
    shown = Lookup({0: "first", 1: "second"})
    install_nvml(nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=shown, nvmlDeviceGetName=names)
    with Nvml() as nvml:
        assert nvml.find(uuid=None, pci_bus_id=None, name="NVIDIA GeForce RTX 4090") == "second"


@pytest.mark.parametrize(
    "changes",
    [
        {"nvmlDeviceGetCount": 2},
        {"nvmlDeviceGetName": "NVIDIA GeForce RTX 3060"},
        {"nvmlDeviceGetCount": NVMLError_FunctionNotFound("no")},
        {"nvmlDeviceGetHandleByIndex": NVMLError_NoPermission("no")},
    ],
)
def test_a_name_that_several_devices_or_none_bear_finds_nothing_and_warns_once(install_nvml, caplog, changes):
    install_nvml(**changes)
    with Nvml() as nvml:
        for _ in range(3):
            assert nvml.find(uuid=None, pci_bus_id=None, name="NVIDIA GeForce RTX 4090") is None
    assert len([text for text in warnings_in(caplog) if "devices named NVIDIA GeForce RTX 4090" in text]) == 1


def test_a_name_is_not_asked_for_where_there_is_a_uuid(install_nvml):
    install_nvml(nvmlDeviceGetHandleByUUID=Lookup({}))
    with Nvml() as nvml:
        assert nvml.find(uuid=UUID, pci_bus_id=None, name="NVIDIA GeForce RTX 4090") is None


def test_free_memory_beyond_the_total_is_cut_to_it(install_nvml):
    install_nvml(nvmlDeviceGetMemoryInfo=SimpleNamespace(total=1000, free=2000, used=0))
    with Nvml() as nvml:
        assert nvml.memory(nvml.find(uuid=UUID, pci_bus_id=None)) == DeviceMemory(1000, 1000, "NVML")


def test_the_library_is_shut_down_after_an_exception(install_nvml):
    module = install_nvml()
    with pytest.raises(KeyboardInterrupt), Nvml():
        raise KeyboardInterrupt
    assert module.calls[-1] == ("nvmlShutdown",)


def test_a_missing_binding_is_unavailable_with_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(HardwareUnavailableError, match="pip install nvidia-ml-py") as caught, Nvml():
        pass
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(
    "raised",
    ["SystemExit(1)", "KeyError('nvml')", "OSError('nvml.dll')", "AttributeError('x')", "NVMLError, exc"],
)
def test_a_binding_that_breaks_at_import_is_unavailable(monkeypatch, tmp_path, raised):
    (tmp_path / "pynvml.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    with pytest.raises(HardwareUnavailableError, match="importing pynvml raised"), Nvml():
        pass


@pytest.mark.parametrize(
    "error",
    [
        NVMLError("Driver Not Loaded"),
        NVMLError_LibraryNotFound("NVML Shared Library Not Found"),
        NVMLError_FunctionNotFound("Function Not Found"),
        OSError("nvml.dll"),
        AttributeError("undefined symbol: nvmlInit_v2"),
    ],
)
def test_a_missing_driver_is_unavailable_and_keeps_the_cause(install_nvml, error):
    install_nvml(nvmlInit=error)
    with pytest.raises(HardwareUnavailableError, match=str(error)) as caught, Nvml():
        pass
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("missing", [("nvmlInit",), ("NVMLError",), ("nvmlInit", "NVMLError")])
def test_a_module_of_the_same_name_that_is_another_is_unavailable_with_what_to_install(install_nvml, missing):
    module = install_nvml()
    for name in missing:
        delattr(module, name)
    with pytest.raises(HardwareUnavailableError, match=r"pynvml is not that of nvidia-ml-py.*pip install"), Nvml():
        pass


@pytest.mark.parametrize("error", [TypeError("bytes expected"), OSError("access violation"), AttributeError("_v2")])
def test_a_query_that_the_binding_cannot_make_gives_none(install_nvml, caplog, error):
    install_nvml(nvmlDeviceGetUUID=error)
    with Nvml() as nvml:
        assert nvml.uuid(nvml.find(uuid=UUID, pci_bus_id=None)) is None
    assert len(warnings_in(caplog)) == 1


def test_a_query_outside_the_with_block_says_so(install_nvml):
    install_nvml()
    with pytest.raises(RuntimeError, match="nvmlSystemGetDriverVersion was called outside"):
        Nvml().driver()
