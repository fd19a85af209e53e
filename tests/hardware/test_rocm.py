"""amdsmi faked by a table of answers, sysfs by a folder; nothing here needs an AMD driver."""

from __future__ import annotations

import logging
import sys

import pytest
from fake_vendors import ADDRESS, AmdSmiException, Lookup
from wanvideo_enhanced_blockswap.hardware import MIB, DeviceMemory, PcieLink, Rocm, Utilisation

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


def test_amdsmi_is_asked_about_the_card_at_the_address_not_about_the_first(install_amdsmi, tmp_path):
    install_amdsmi()
    with Rocm(sysfs_root=tmp_path) as rocm:
        assert rocm.memory(ADDRESS) == DeviceMemory(24560 * MIB, 24000 * MIB, "amdsmi")
        assert rocm.utilisation(ADDRESS) == Utilisation(64.0)


@pytest.mark.parametrize(
    "raised", ["KeyError('libamd_smi.so')", "SystemExit(1)", "OSError('undefined symbol')", "AttributeError('x')"]
)
def test_an_amdsmi_that_breaks_at_import_leaves_sysfs(monkeypatch, tmp_path, sysfs, raised):
    (tmp_path / "amdsmi.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    with Rocm(sysfs_root=sysfs()) as rocm:
        assert rocm.memory(ADDRESS) == SYSFS_MEMORY


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
def test_where_amdsmi_does_not_know_the_memory_sysfs_does(install_amdsmi, sysfs, changes):
    install_amdsmi(**changes)
    with Rocm(sysfs_root=sysfs()) as rocm:
        assert rocm.memory(ADDRESS) == SYSFS_MEMORY


@pytest.mark.parametrize("missing", [("amdsmi_init",), ("AmdSmiException",), ("amdsmi_init", "AmdSmiException")])
def test_a_module_of_the_same_name_that_is_another_leaves_sysfs(install_amdsmi, sysfs, missing):
    module = install_amdsmi(amdsmi_get_gpu_vram_usage=KeyError("vram_total"))
    for name in missing:
        delattr(module, name)
    with Rocm(sysfs_root=sysfs()) as rocm:
        assert rocm.memory(ADDRESS) == SYSFS_MEMORY


def test_an_amdsmi_query_that_fails_leaves_the_other_queries_to_amdsmi(install_amdsmi, sysfs):
    install_amdsmi(amdsmi_get_gpu_vram_usage=AmdSmiException("not supported"))
    with Rocm(sysfs_root=sysfs()) as rocm:
        assert rocm.memory(ADDRESS).source == "sysfs"
        assert rocm.utilisation(ADDRESS) == Utilisation(64.0)


def test_a_figure_that_amdsmi_lacks_is_taken_from_sysfs_alone(install_amdsmi, sysfs):
    install_amdsmi(amdsmi_get_gpu_activity={"gfx_activity": "N/A"})
    with Rocm(sysfs_root=sysfs()) as rocm:
        assert rocm.utilisation(ADDRESS) == Utilisation(17.0)


def test_amdsmi_is_shut_down_after_an_exception(install_amdsmi):
    module = install_amdsmi()
    with pytest.raises(KeyboardInterrupt), Rocm():
        raise KeyboardInterrupt
    assert module.calls[-1] == ("amdsmi_shut_down",)


@pytest.mark.usefixtures("no_amdsmi")
def test_sysfs_alone_answers_every_query(sysfs):
    with Rocm(sysfs_root=sysfs()) as rocm:
        assert rocm.memory(ADDRESS) == SYSFS_MEMORY
        assert rocm.utilisation(ADDRESS) == Utilisation(17.0)
        assert rocm.pcie(ADDRESS) == PcieLink(1, 16, 4, 16)


@pytest.mark.usefixtures("no_amdsmi")
def test_an_address_in_capitals_finds_the_card(sysfs):
    root = sysfs()
    (root / "bus/pci/devices" / ADDRESS).rename(root / "bus/pci/devices/0000:c1:00.0")
    with Rocm(sysfs_root=root) as rocm:
        assert rocm.memory("0000:C1:00.0") == SYSFS_MEMORY


@pytest.mark.usefixtures("no_amdsmi")
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
    with Rocm(sysfs_root=sysfs(**changes)) as rocm:
        assert rocm.pcie(ADDRESS) == expected


@pytest.mark.usefixtures("no_amdsmi")
@pytest.mark.parametrize("text", [None, "", "garbage"])
def test_a_memory_file_that_is_absent_or_garbled_makes_memory_unknown(sysfs, text):
    with Rocm(sysfs_root=sysfs(mem_info_vram_used=text)) as rocm:
        assert rocm.memory(ADDRESS) is None


@pytest.mark.usefixtures("no_amdsmi")
@pytest.mark.parametrize(("query", "unknown"), [("memory", None), ("pcie", None), ("utilisation", Utilisation(None))])
def test_a_reading_that_nobody_knows_warns_once_however_often_it_is_asked(tmp_path, caplog, query, unknown):
    with Rocm(sysfs_root=tmp_path) as rocm:
        assert [getattr(rocm, query)(ADDRESS) for _ in range(3)] == [unknown] * 3
    assert len(warnings_in(caplog)) == 1
    assert ADDRESS in warnings_in(caplog)[0]


def test_a_working_sysfs_behind_a_broken_amdsmi_gives_no_warning(install_amdsmi, sysfs, caplog):
    install_amdsmi(amdsmi_init=AmdSmiException("no driver"))
    with Rocm(sysfs_root=sysfs()) as rocm:
        rocm.memory(ADDRESS)
    assert not warnings_in(caplog)


@pytest.mark.parametrize(("version", "expected"), [("6.12.12\n", "6.12.12"), (None, None)])
def test_only_a_driver_installed_apart_from_the_kernel_has_a_version(tmp_path, version, expected):
    if version is not None:
        (tmp_path / "module/amdgpu").mkdir(parents=True)
        (tmp_path / "module/amdgpu/version").write_text(version)
    assert Rocm(sysfs_root=tmp_path).driver() == expected
