"""Which memory of this process shows bytes of a file unchanged, so that they can be read from the file instead."""

from __future__ import annotations

import io
import mmap
import os
import stat
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from .reader import FileIdentity

# What the top byte of an entry of Linux's pagemap can be for a page that is the file's: bit 63 is "in memory", 62 is
# "swapped out" and 61 is "of a file". A page without the first two is read from the file when it is touched. A page
# that was written in a private mapping is a copy, which is in memory or swapped out, and not of a file.
_IN_MEMORY_OR_SWAPPED, _OF_A_FILE = 0xC0, 0x20
_FILE_PAGES = bytes(top for top in range(256) if not top & _IN_MEMORY_OR_SWAPPED or top & _OF_A_FILE)
_ENTRY_BYTES = 8
# File systems whose files are memory: reading one saves none.
_IN_RAM = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
# File systems that show another device in a mapping than in `stat`: of a layer below, or of a subvolume.
_TWO_DEVICES = {"overlay", "btrfs"}
# Windows' protection of pages that were never written, as psutil writes it: a written one changes from "wc" to "rw".
_NEVER_WRITTEN = {"r", "wc", "xr", "xwc"}
_SAMPLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class FileRegion:
    """Bytes of a file.

    Attributes:
        offset: of the first, from the start of the file.
        identity: of the file when the region was found; a `FileReader` needs it.
    """

    path: str
    offset: int
    nbytes: int
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Adjoining pages that show one file from one offset on.

    Attributes:
        offset: in the file; on Windows it is supposed, for a view that begins with the file.
        device: of the file as the mapping has it; None on Windows, which shows none.
        inode: the same.
        is_private: the pages are copied when they are written.
        is_written: some may differ from the file.
    """

    start: int
    end: int
    path: str
    offset: int
    device: int | None = None
    inode: int | None = None
    is_private: bool = False
    is_written: bool = False

    def goes_on_with(self, other: _Mapping) -> bool:
        """Whether the other one shows the bytes that follow, right behind."""
        places = (self.end, self.offset + self.end - self.start)
        same = (other.path, other.device, other.inode) == (self.path, self.device, self.inode)
        return same and (other.start, other.offset) == places


class FileMappings:
    """One reading of the mappings of this process: good for memory that was there then, for as long as it stays."""

    def __init__(self, mappings: Sequence[_Mapping], *, root: Path) -> None:
        """Takes mappings by rising address, and the folder in which /proc is looked up."""
        self._mappings, self._root = mappings, root
        self._starts = [mapping.start for mapping in mappings]
        self._identities: dict[tuple[str, int | None, int | None], tuple[FileIdentity | None, bool]] = {}

    @classmethod
    def read(cls, *, root: Path = Path("/")) -> FileMappings:
        """The mappings now, with Linux's /proc looked up below `root`; none on systems other than Linux and Windows."""
        if sys.platform == "linux":
            return cls(_linux_mappings(root), root=root)
        return cls(_windows_mappings() if sys.platform == "win32" else (), root=root)

    def region(self, address: int, nbytes: int, sample: Callable[[int, int], bytes] | None = None) -> FileRegion | None:
        """The file's bytes that this memory shows unchanged; None if it shows none, or if that cannot be told.

        Args:
            address: of the first byte in memory.
            nbytes: size of the memory.
            sample: gives bytes of this memory, from an offset in it and a size. It is used where the system does not
                show for sure which file is mapped, or from where: there the file's and the memory's bytes are compared
                in three places. Windows never shows it, and without `sample` the answer there is None; on overlay and
                btrfs of Linux, a file with the path and the inode is believed then.
        """
        parts = self._covering(address, nbytes)
        if not parts or any(part.is_written for part in parts):
            return None
        identity, is_certain = self._identify(parts[0])
        offset = parts[0].offset + address - parts[0].start
        if identity is None or offset + nbytes > identity.size:
            return None
        region = FileRegion(parts[0].path, offset, nbytes, identity)
        if sample is None:
            if parts[0].inode is None:
                return None
        elif not is_certain and not _is_equal(region, sample):
            return None
        end = address + nbytes
        private = [part for part in parts if part.is_private]
        return region if all(self._is_untouched(part, address, end) for part in private) else None

    def shows(self, address: int) -> bool:
        """Whether the byte at this address is in a mapping of a file, written or not."""
        return bool(self._covering(address, 1))

    def _covering(self, address: int, nbytes: int) -> list[_Mapping]:
        """The mappings of one file that hold all of this memory; none if there is a gap or another file in it."""
        parts: list[_Mapping] = []
        for part in self._mappings[max(0, bisect_right(self._starts, address) - 1) :]:
            if not (parts[-1].goes_on_with(part) if parts else part.start <= address < part.end):
                return []
            parts.append(part)
            if address + nbytes <= part.end:
                return parts if nbytes > 0 else []
        return []

    def _identify(self, mapping: _Mapping) -> tuple[FileIdentity | None, bool]:
        """The identity of the file at the mapping's path, None if that is another one; and if it is surely this one."""
        key = (mapping.path, mapping.device, mapping.inode)
        if key not in self._identities:
            self._identities[key] = self._open(mapping)
        return self._identities[key]

    def _open(self, mapping: _Mapping) -> tuple[FileIdentity | None, bool]:
        try:
            if not stat.S_ISREG(os.stat(mapping.path).st_mode):
                return None, False  # opening a device may do something
            with io.FileIO(mapping.path) as file:  # shows that it may be read, too
                identity = FileIdentity.of(os.fstat(file.fileno()))
        except (OSError, ValueError):
            return None, False
        if mapping.inode is None:
            return identity, False
        known = self._file_systems
        kinds = {known[device] for device in (mapping.device, identity.device) if device in known}
        is_certain = mapping.device == identity.device
        is_this = mapping.inode == identity.inode and (is_certain or bool(kinds & _TWO_DEVICES))
        return (identity if is_this and kinds and not kinds & _IN_RAM else None), is_certain

    @cached_property
    def _file_systems(self) -> dict[int, str]:
        """The kind of each mounted file system, by its device."""
        return {device: kind for device, (kind, _) in read_mounts(self._root).items()}

    def _is_untouched(self, mapping: _Mapping, begin: int, end: int) -> bool:
        """Whether no page of the mapping from one address to the other is a copy, as the kernel shows it."""
        first = max(begin, mapping.start) // mmap.PAGESIZE
        count = -(-min(end, mapping.end) // mmap.PAGESIZE) - first
        try:
            with io.FileIO(self._root / "proc/self/pagemap") as pagemap:
                pagemap.seek(first * _ENTRY_BYTES)
                entries = pagemap.read(count * _ENTRY_BYTES)
        except OSError:  # refused to a process that may not be traced; absent in some sandboxes
            return self._copied.get(mapping.start) == 0
        if len(entries) < count * _ENTRY_BYTES:
            return self._copied.get(mapping.start) == 0
        # Entries are little-endian, as every machine with a GPU is. No loop: a block of 370 MB has 90,000 pages.
        return not entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(None, _FILE_PAGES)

    @cached_property
    def _copied(self) -> dict[int, int]:
        """Kilobytes of each mapping that are no longer the file's, by its address."""
        copied: dict[int, int] = {}
        start = 0
        for line in _lines(self._root / "proc/self/smaps"):
            name, *rest = line.split()
            if not name.endswith(":"):
                start = int(name.partition("-")[0], 16)
            elif name in ("Anonymous:", "Swap:"):
                copied[start] = copied.get(start, 0) + int(rest[0])
        return copied


def read_mounts(root: Path) -> dict[int, tuple[str, str]]:
    """Kind and source of each mounted file system, such as "ext4" and "/dev/sda2", by device; none without /proc."""
    mounts = {}
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, super_block = line.partition(" - ")  # spaces inside names are escaped
        major, _, minor = mount.split()[2].partition(":")
        kind, source, *_ = super_block.split()
        mounts[os.makedev(int(major), int(minor))] = (kind, source)
    return mounts


def _lines(path: Path) -> list[str]:
    """Lines of a file in /proc; none if it cannot be read. Paths in it may have bytes of any encoding."""
    try:
        return os.fsdecode(path.read_bytes()).split("\n")[:-1]
    except OSError:
        return []


def _linux_mappings(root: Path) -> list[_Mapping]:
    mappings = []
    for line in _lines(root / "proc/self/maps"):
        # 7f0c00000000-7f0c00021000 r--p 00001000 fe:00 1234     /models/wan.safetensors
        addresses, protection, offset, device, inode, *path = line.split(maxsplit=5)
        if inode == "0" or not path:
            continue
        start, _, end = addresses.partition("-")
        major, _, minor = device.partition(":")
        mappings.append(
            _Mapping(
                int(start, 16),
                int(end, 16),
                path[0].removesuffix(" (deleted)"),  # the inode tells if another file has this path now
                int(offset, 16),
                os.makedev(int(major, 16), int(minor, 16)),
                int(inode),
                is_private=protection.endswith("p"),
            )
        )
    return mappings


def _windows_mappings() -> list[_Mapping]:
    """Windows shows the address, the file and the protection of a view's pages, not the offset of the view.

    The libraries that load models map files whole: a view is supposed to begin with the file, and the bytes are
    compared before that is believed.
    """
    mappings: list[_Mapping] = []
    try:
        pages = psutil.Process().memory_maps(grouped=False)
    except (OSError, psutil.Error):
        return mappings
    for shown in sorted(pages, key=lambda shown: int(shown.addr, 16)):
        start = int(shown.addr, 16)
        before = mappings[-1] if mappings else None
        is_next = before is not None and (before.end, before.path) == (start, shown.path)
        offset = before.offset + before.end - before.start if before is not None and is_next else 0
        is_written = shown.perms not in _NEVER_WRITTEN
        mappings.append(_Mapping(start, start + shown.rss, shown.path, offset, is_written=is_written))
    return mappings


def _is_equal(region: FileRegion, sample: Callable[[int, int], bytes]) -> bool:
    """Whether memory and file agree at the start, in the middle and at the end of the region."""
    count = min(_SAMPLE_BYTES, region.nbytes)
    try:
        with io.FileIO(region.path) as file:
            for place in (0, (region.nbytes - count) // 2, region.nbytes - count):
                file.seek(region.offset + place)
                if file.read(count) != sample(place, count):
                    return False
    except OSError:
        return False
    return True
