"""Host memory with control groups and platforms laid out in a folder."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.hardware import GIB, KIB, HostMemory, HostPlatform, read_host_memory

RAM = 64 * GIB
AVAILABLE = 50 * GIB
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the platform is read from a Linux /proc")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A file system with these files, on a machine of 64 GB of which 50 are available."""
    memory = SimpleNamespace(total=RAM, available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def files(**contents):
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read_host_memory(root=tmp_path)

    return files


def version2(folder, *, limit, usage, cache=0):
    return {
        f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{folder}/memory.current": f"{usage}\n",
        f"sys/fs/cgroup{folder}/memory.stat": f"anon 1\nfile 2\ninactive_file {cache}\n",
    }


def test_without_control_groups_the_machine_is_the_limit(build):
    memory = build()
    assert (memory.physical_bytes, memory.available_bytes, memory.cgroup_limit_bytes) == (RAM, AVAILABLE, None)


def test_a_version_2_limit_leaves_what_its_group_has_not_used(build):
    memory = build(**{"proc/self/cgroup": "0::/job\n"}, **version2("/job", limit=16 * GIB, usage=6 * GIB))
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (10 * GIB, 16 * GIB)


def test_page_cache_of_the_group_counts_as_available(build):
    group = version2("/job", limit=16 * GIB, usage=15 * GIB, cache=12 * GIB)
    assert build(**{"proc/self/cgroup": "0::/job\n"}, **group).available_bytes == 13 * GIB


def test_the_tightest_ancestor_limits(build):
    inner = version2("/a/b", limit="max", usage=1 * GIB)
    outer = version2("/a", limit=8 * GIB, usage=5 * GIB)
    memory = build(**{"proc/self/cgroup": "0::/a/b\n"}, **inner, **outer)
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (3 * GIB, 8 * GIB)


def test_in_a_container_that_sees_the_path_of_its_host_the_mounted_group_counts(build):
    memory = build(**{"proc/self/cgroup": "0::/docker/abc\n"}, **version2("", limit=4 * GIB, usage=1 * GIB))
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (3 * GIB, 4 * GIB)


def test_a_version_1_limit_counts(build):
    folder = "sys/fs/cgroup/memory/job"
    memory = build(
        **{
            "proc/self/cgroup": "12:cpu,cpuacct:/job\n5:memory:/job\n0::/\n",
            f"{folder}/memory.limit_in_bytes": str(16 * GIB),
            f"{folder}/memory.usage_in_bytes": str(10 * GIB),
            f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {4 * GIB}\n",
        }
    )
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (10 * GIB, 16 * GIB)


def test_the_version_1_figure_for_no_limit_is_none(build):
    memory = build(
        **{
            "proc/self/cgroup": "5:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n",
        }
    )
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (AVAILABLE, None)


def test_a_limit_above_the_ram_is_none(build):
    memory = build(**{"proc/self/cgroup": "0::/job\n"}, **version2("/job", limit=2 * RAM, usage=0))
    assert (memory.available_bytes, memory.cgroup_limit_bytes) == (AVAILABLE, None)


def test_a_group_over_its_limit_leaves_nothing_rather_than_less(build):
    group = version2("/job", limit=4 * GIB, usage=5 * GIB)
    assert build(**{"proc/self/cgroup": "0::/job\n"}, **group).available_bytes == 0


def test_a_limit_whose_use_is_not_readable_is_reported_and_warned_about(build, caplog):
    memory = build(**{"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": str(16 * GIB)})
    assert memory.cgroup_limit_bytes == 16 * GIB
    assert "its use is not readable" in caplog.text


@on_linux
@pytest.mark.parametrize(
    ("release", "platform"),
    [
        ("5.15.153.1-microsoft-standard-WSL2\n", HostPlatform.WSL2),
        ("4.4.0-19041-Microsoft\n", HostPlatform.WSL2),
        ("6.8.0-45-generic\n", HostPlatform.LINUX),
    ],
)
def test_wsl_is_told_by_the_release_of_its_kernel(build, release, platform):
    assert build(**{"proc/sys/kernel/osrelease": release}).platform is platform


@pytest.mark.parametrize(("system", "platform"), [("win32", HostPlatform.WINDOWS), ("darwin", HostPlatform.MACOS)])
def test_other_systems_are_told_by_python(build, monkeypatch, system, platform):
    monkeypatch.setattr(sys, "platform", system)
    assert build().platform is platform


def test_windows_has_no_limit_on_locked_memory(build, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert build().memlock_bytes is None


@on_linux
@pytest.mark.parametrize(("soft", "expected"), [(8 << 20, 8 << 20), (-1, None)])
def test_the_limit_on_locked_memory_is_the_soft_one_and_none_without_limit(build, monkeypatch, soft, expected):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, -1))
    assert build().memlock_bytes == expected


def test_this_machine_can_be_read():
    memory = read_host_memory()
    assert 0 < memory.available_bytes <= memory.physical_bytes == psutil.virtual_memory().total


@pytest.mark.parametrize("version", [1, 2])
def test_active_file_pages_can_be_dropped_as_well(build, version):
    folder, prefix = ("sys/fs/cgroup/memory/job", "total_") if version == 1 else ("sys/fs/cgroup/job", "")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    memory = build(
        **{
            "proc/self/cgroup": "5:memory:/job\n" if version == 1 else "0::/job\n",
            f"{folder}/{names[0]}": str(16 * GIB),
            f"{folder}/{names[1]}": str(15 * GIB),
            f"{folder}/memory.stat": f"{prefix}inactive_file {4 * GIB}\n{prefix}active_file {2 * GIB}\nactive_anon 1\n",
        }
    )
    assert memory.available_bytes == 7 * GIB


def commit(mode, *, limit, reserved):
    text = f"MemTotal:       1 kB\nCommitLimit:    {limit // KIB} kB\nCommitted_AS:   {reserved // KIB} kB\n"
    return {"proc/sys/vm/overcommit_memory": f"{mode}\n", "proc/meminfo": text}


@on_linux
def test_linux_that_never_overcommits_gives_no_more_than_may_still_be_reserved(build):
    assert build(**commit(2, limit=40 * GIB, reserved=33 * GIB)).available_bytes == 7 * GIB


@on_linux
def test_a_commit_limit_above_what_is_available_changes_nothing(build):
    assert build(**commit(2, limit=90 * GIB, reserved=3 * GIB)).available_bytes == AVAILABLE


@on_linux
def test_more_reserved_than_the_limit_leaves_nothing_rather_than_less(build):
    assert build(**commit(2, limit=40 * GIB, reserved=41 * GIB)).available_bytes == 0


@on_linux
@pytest.mark.parametrize("mode", [0, 1])
def test_linux_that_overcommits_has_no_commit_limit(build, mode):
    assert build(**commit(mode, limit=40 * GIB, reserved=39 * GIB)).available_bytes == AVAILABLE


@on_linux
@pytest.mark.parametrize("lost", ["CommitLimit", "Committed_AS", "everything"])
def test_a_commit_limit_that_the_kernel_does_not_show_changes_nothing(build, lost):
    files = commit(2, limit=40 * GIB, reserved=39 * GIB)
    files["proc/meminfo"] = "" if lost == "everything" else files["proc/meminfo"].replace(lost, "Other")
    assert build(**files).available_bytes == AVAILABLE


@on_linux
def test_the_tightest_of_all_limits_counts(build):
    group = version2("/job", limit=16 * GIB, usage=6 * GIB)
    files = {"proc/self/cgroup": "0::/job\n"} | group
    assert build(**files, **commit(2, limit=40 * GIB, reserved=33 * GIB)).available_bytes == 7 * GIB
    assert build(**files, **commit(2, limit=40 * GIB, reserved=3 * GIB)).available_bytes == 10 * GIB


@pytest.fixture
def windows(build, monkeypatch):
    """Available memory on Windows, where psutil's own reading gives these figures."""

    def available(*figures):
        system = SimpleNamespace(cext=SimpleNamespace(virtual_mem=lambda: figures))
        monkeypatch.setattr(psutil, "_psplatform", system)
        monkeypatch.setattr(sys, "platform", "win32")
        return build().available_bytes

    return available


def test_windows_gives_no_more_than_may_still_be_committed(windows):
    assert windows(RAM, AVAILABLE, 70 * GIB, 5 * GIB) == 5 * GIB


def test_a_large_page_file_of_windows_adds_no_memory(windows):
    assert windows(RAM, AVAILABLE, 200 * GIB, 150 * GIB) == AVAILABLE


@pytest.mark.parametrize(
    "figures", [(), (1, 2, 3), (1, 2, 3, 4, 5, 6), (1, 2, 3, None), (1, 2, 3, "4")], ids=lambda figures: repr(figures)
)
def test_another_reading_of_a_psutil_than_those_four_figures_is_not_used(windows, figures):
    assert windows(*figures) == AVAILABLE


@pytest.mark.parametrize("there", [None, SimpleNamespace(), SimpleNamespace(cext=SimpleNamespace())])
def test_a_psutil_without_that_reading_changes_nothing(build, monkeypatch, there):
    monkeypatch.setattr(psutil, "_psplatform", there)
    monkeypatch.setattr(sys, "platform", "win32")
    assert build().available_bytes == AVAILABLE


sizes = st.integers(0, 1 << 43)


@given(physical=st.integers(1, 1 << 43), available=sizes, limit=st.none() | st.integers(1, 1 << 43), more=sizes)
def test_the_room_leaves_a_floor_of_what_is_available(physical, available, limit, more):
    def room(bytes_available):
        return HostMemory(physical, bytes_available, limit, None, HostPlatform.LINUX).room_bytes

    ram = physical if limit is None else min(physical, limit)
    floor = max(ram // 10, min(2 * GIB, ram // 4))
    assert 0 <= room(available) <= available
    assert room(available) == 0 or available - room(available) >= floor
    assert room(available) <= room(available + more) <= room(available) + more
    assert available <= floor or room(available) == available - floor
