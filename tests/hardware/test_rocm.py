"""amdsmi faked by a table of answers, sysfs by a folder; nothing here needs an AMD driver."""

from __future__ import annotations

import contextlib
import logging
import sys

import pytest
from fake_vendors import ADDRESS, AmdSmiException, Lookup
from wanvideo_enhanced_blockswap.hardware import MIB, DeviceMemory
from wanvideo_enhanced_blockswap.hardware.records import PcieLink
from wanvideo_enhanced_blockswap.hardware.rocm import Rocm, amdsmi_memory

FILES = {
    "mem_info_vram_total": "25753026560\n",
    "mem_info_vram_used": "1073741824\n",
    "gpu_busy_percent": "17\n",
    "current_link_speed": "2.5 GT/s PCIe\n",
    "current_link_width": "16\n",
    "max_link_speed": "16.0 GT/s PCIe\n",
    "max_link_width": "16\n",
}
SYSFS_MEMORY = DeviceMemory(25753026560, 25753026560 - 1073741824, "sysfs")


@pytest.fixture
def sysfs(tmp_path):
    """A sysfs with one card at ADDRESS; without a file for each change that is None."""

    def build(**changes):
        folder = tmp_path / "bus" / "pci" / "devices" / ADDRESS
        folder.mkdir(parents=True)
        for name, text in (FILES | changes).items():
            if text is not None:
                (folder / name).write_text(text)
        return tmp_path

    return build


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_amdsmi_is_asked_about_the_card_at_the_address_not_about_the_first(install_amdsmi):
    install_amdsmi()
    assert amdsmi_memory(ADDRESS) == DeviceMemory(24560 * MIB, 24000 * MIB, "amdsmi")


@pytest.mark.parametrize(
    "raised", ["KeyError('libamd_smi.so')", "SystemExit(1)", "OSError('undefined symbol')", "AttributeError('x')"]
)
def test_an_amdsmi_that_breaks_at_import_gives_nothing(monkeypatch, tmp_path, raised):
    (tmp_path / "amdsmi.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    assert amdsmi_memory(ADDRESS) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"amdsmi_init": AmdSmiException("no driver")},
        {"amdsmi_init": OSError("undefined symbol: amdsmi_init")},
        {"amdsmi_get_processor_handles": []},
        {"amdsmi_get_gpu_vram_usage": OSError("undefined symbol")},
        {"amdsmi_get_processor_handles": AmdSmiException("busy")},
        {"amdsmi_get_gpu_device_bdf": Lookup({"first": "0000:09:00.0", "second": "0000:0a:00.0"})},
        {"amdsmi_get_gpu_device_bdf": AttributeError("no such function")},
        {"amdsmi_get_gpu_vram_usage": AmdSmiException("not supported")},
        {"amdsmi_get_gpu_vram_usage": KeyError("vram_total")},
        {"amdsmi_get_gpu_vram_usage": {"vram_total": "N/A", "vram_used": "N/A"}},
        {"amdsmi_get_gpu_vram_usage": {"vram_total": 0, "vram_used": 5}},
        {"amdsmi_get_gpu_vram_usage": object()},
    ],
)
def test_an_amdsmi_that_does_not_know_the_memory_gives_nothing_without_a_warning(install_amdsmi, caplog, changes):
    install_amdsmi(**changes)
    assert amdsmi_memory(ADDRESS) is None
    assert not warnings_in(caplog)


@pytest.mark.parametrize("missing", [("amdsmi_init",), ("AmdSmiException",), ("amdsmi_init", "AmdSmiException")])
def test_a_module_of_the_same_name_that_is_another_gives_nothing(install_amdsmi, missing):
    module = install_amdsmi(amdsmi_get_gpu_vram_usage=KeyError("vram_total"))
    for name in missing:
        delattr(module, name)
    assert amdsmi_memory(ADDRESS) is None


@pytest.mark.parametrize("raised", [KeyboardInterrupt, KeyError])
def test_amdsmi_is_shut_down_after_an_exception(install_amdsmi, raised):
    module = install_amdsmi(amdsmi_get_gpu_vram_usage=raised())
    with contextlib.suppress(KeyboardInterrupt):
        amdsmi_memory(ADDRESS)
    assert module.calls[-1] == ("amdsmi_shut_down",)


def test_sysfs_answers_every_query(sysfs):
    rocm = Rocm(sysfs_root=sysfs())
    assert rocm.memory(ADDRESS) == SYSFS_MEMORY
    assert rocm.utilisation(ADDRESS) == 17
    assert rocm.pcie(ADDRESS) == PcieLink(1, 16, 4, 16)


def test_an_address_in_capitals_finds_the_card(sysfs):
    root = sysfs()
    (root / "bus/pci/devices" / ADDRESS).rename(root / "bus/pci/devices/0000:c1:00.0")
    rocm = Rocm(sysfs_root=root)
    assert rocm.memory("0000:C1:00.0") == SYSFS_MEMORY


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_link_speed": "32 GT/s"}, PcieLink(1, 16, 5, 16)),
        ({"current_link_speed": "Unknown"}, PcieLink(None, 16, 4, 16)),
        ({"current_link_width": "0"}, PcieLink(1, None, 4, 16)),
        ({"max_link_width": "255"}, PcieLink(1, 16, 4, None)),
        ({"max_link_speed": ""}, PcieLink(1, 16, None, 16)),
    ],
)
def test_a_part_of_the_link_that_sysfs_cannot_tell_is_unknown(sysfs, changes, expected):
    rocm = Rocm(sysfs_root=sysfs(**changes))
    assert rocm.pcie(ADDRESS) == expected


@pytest.mark.parametrize("text", [None, "", "garbage"])
def test_a_memory_file_that_is_absent_or_garbled_makes_memory_unknown(sysfs, text):
    rocm = Rocm(sysfs_root=sysfs(mem_info_vram_used=text))
    assert rocm.memory(ADDRESS) is None


@pytest.mark.parametrize("query", ["memory", "pcie", "utilisation"])
def test_a_reading_that_nobody_knows_warns_once_however_often_it_is_asked(tmp_path, caplog, query):
    rocm = Rocm(sysfs_root=tmp_path)
    assert [getattr(rocm, query)(ADDRESS) for _ in range(3)] == [None] * 3
    assert len(warnings_in(caplog)) == 1
    assert ADDRESS in warnings_in(caplog)[0]


@pytest.mark.parametrize(("version", "expected"), [("6.12.12\n", "6.12.12"), (None, None)])
def test_only_a_driver_installed_apart_from_the_kernel_has_a_version(tmp_path, version, expected):
    if version is not None:
        (tmp_path / "module/amdgpu").mkdir(parents=True)
        (tmp_path / "module/amdgpu/version").write_text(version)
    assert Rocm(sysfs_root=tmp_path).driver() == expected
