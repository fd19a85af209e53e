"""Host memory with control groups and platforms laid out in a folder."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest
from wanvideo_enhanced_blockswap.hardware import GIB, HostPlatform, read_host_memory

RAM = 64 * GIB
AVAILABLE = 50 * GIB
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the platform is read from a Linux /proc")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A file system with these files, on a machine of 64 GiB of which 50 are available."""
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
