"""Host memory as this process may use it: RAM, control group, limits and platform."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

from .files import read_text
from .records import HostMemory, HostPlatform
from .units import KIB

logger = logging.getLogger(__name__)


def read_host_memory(*, root: Path = Path("/")) -> HostMemory:
    """Host memory now, with /proc and /sys looked up below `root`.

    Page cache counts as available, both for the machine and in the control group: reading a checkpoint fills it, and
    the kernel drops it when memory is needed. What the system still lets its programs reserve is a limit of its own:
    memory may be refused where that is used up, however much RAM is free.
    """
    memory = psutil.virtual_memory()
    limit, headroom = _read_cgroup(root)
    if limit is not None and limit >= memory.total:
        limit = None  # it limits nothing; version 1 writes "no limit" as almost 2^63 bytes
    limits = (memory.available, headroom, _read_commit(root))
    return HostMemory(
        physical_bytes=memory.total,
        available_bytes=max(0, min(left for left in limits if left is not None)),
        cgroup_limit_bytes=limit,
        memlock_bytes=_read_memlock(),
        platform=read_platform(root=root),
    )


def read_platform(*, root: Path = Path("/")) -> HostPlatform:
    """The operating system, with /proc looked up below `root`."""
    if sys.platform == "win32":
        return HostPlatform.WINDOWS
    if sys.platform == "darwin":
        return HostPlatform.MACOS
    release = read_text(root / "proc/sys/kernel/osrelease") or ""
    # WSL1 has Microsoft in its name too, but shows no GPU at all.
    return HostPlatform.WSL2 if "microsoft" in release.lower() else HostPlatform.LINUX


def _read_commit(root: Path) -> int | None:
    """Bytes that may be reserved within the system's commit limit; None where it has none or does not report it.

    Windows always has one: RAM and its page files. Linux has one only with vm.overcommit_memory=2.
    """
    if sys.platform == "win32":
        # psutil reads it, but its public functions give only other figures: total and available RAM, then these two.
        read = getattr(getattr(getattr(psutil, "_psplatform", None), "cext", None), "virtual_mem", None)
        match () if read is None else read():
            case (int(), int(), int(), int(left)):
                return left
        return None
    if read_text(root / "proc/sys/vm/overcommit_memory") != "2":
        return None
    figures = dict(line.partition(":")[::2] for line in (read_text(root / "proc/meminfo") or "").splitlines())
    limit, reserved = figures.get("CommitLimit"), figures.get("Committed_AS")
    if limit is None or reserved is None:
        return None
    return (int(limit.removesuffix("kB")) - int(reserved.removesuffix("kB"))) * KIB


def _read_memlock() -> int | None:
    """RLIMIT_MEMLOCK of this process in bytes; None where it is unlimited or the platform has none (Windows)."""
    if sys.platform == "win32":
        return None
    import resource  # exists on POSIX alone

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _read_cgroup(root: Path) -> tuple[int | None, int | None]:
    """The tightest limit of the control groups above this process, and what is left under all of them, in bytes.

    Both are None without a limit. Every ancestor counts, because each may have a limit, and used memory, of its own.
    """
    limits: list[int] = []
    headrooms: list[int] = []
    for folder, (limit_name, usage_name, prefix) in _memory_groups(root):
        limit, usage = _read_count(folder / limit_name), _read_count(folder / usage_name)
        if limit is None:
            continue
        limits.append(limit)
        if usage is None:
            _warn_once(folder, limit)
            continue
        stat = dict(line.partition(" ")[::2] for line in (read_text(folder / "memory.stat") or "").splitlines())
        # Both lists of file pages can be dropped; without them, less memory counts as available.
        cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        headrooms.append(max(0, limit - max(0, usage - cache)))
    return min(limits, default=None), min(headrooms, default=None)


@functools.cache  # host memory is read at every forward, but these files do not change
def _warn_once(folder: Path, limit: int) -> None:
    logger.warning("%s limits memory to %d bytes but its use is not readable", folder, limit)


def _memory_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of this process's memory control groups, innermost first.

    With each come the names of its limit and its usage, and what precedes the names of its own totals in memory.stat.
    """
    version1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    version2 = ("memory.max", "memory.current", "")
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", version1
        elif hierarchy == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", version2
        else:
            continue
        # A container often sees the host's path of its group but only its own group, mounted at the root: ancestors
        # that are not visible are skipped, and the root itself is always tried.
        path = PurePosixPath(group)
        for ancestor in (path, *path.parents):
            folder = mount / str(ancestor).lstrip("/")
            if folder.is_dir():
                yield folder, names


def _read_count(path: Path) -> int | None:
    """A byte count from a file; None without a file, or for the word "max"."""
    text = read_text(path) or ""
    return int(text) if text.isdecimal() else None
