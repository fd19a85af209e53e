"""Real mappings of real files, and machines whose /proc or psutil shows something else."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from wanvideo_enhanced_blockswap.hardware.disk import FileIdentity, FileMappings, FileRegion

PAGE = mmap.PAGESIZE
PAGES = 64
CONTENT = random.Random(0).randbytes(PAGES * PAGE - 100)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the mappings are read from a Linux /proc")
RAM = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


@pytest.fixture
def path(tmp_path):
    """A file on a disk; skips where the folders of tests are in memory."""
    path = tmp_path / "two  words.safetensors"
    path.write_bytes(CONTENT)
    if sys.platform == "linux" and file_system(path)[0] in RAM:
        pytest.skip(f"{tmp_path} is in memory")
    return path


def file_system(path):
    """Kind of the file system that a file is on, and its device as it stands in /proc/self/mountinfo."""
    device = os.stat(path).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = [line[line.index("-") + 1] for line in lines if line[2] == name]
    return (kinds or ["unknown"])[0], name


class View:
    """A mapping of a file, or of memory alone, and its address."""

    def __init__(self, path=None, *, shared=False, size=None, offset=0):
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        if path is None:
            self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            with path.open("r+b") as file:
                self.map = mmap.mmap(file.fileno(), size or len(CONTENT), flags=flags, offset=offset)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def region(self, offset, nbytes, **options):
        return FileMappings.read(**options).region(self.address + offset, nbytes)


@pytest.fixture
def private(path):
    return View(path)


@pytest.fixture
def root(tmp_path):
    """A folder in which /proc shows this process, as changed by a test."""

    def build(view, *, maps=None, mounts=None, pagemap=True, smaps=True):
        folder = tmp_path / "root/proc/self"
        folder.mkdir(parents=True)
        line = next(line for line in lines_of("maps") if line.startswith(f"{view.address:x}-"))
        (folder / "maps").write_text(maps(line) + "\n" if maps else "\n".join(lines_of("maps")) + "\n")
        (folder / "mountinfo").write_text(
            "\n".join(lines_of("mountinfo")) + "\n" if mounts is None else "".join(f"{mount}\n" for mount in mounts)
        )
        if pagemap:
            (folder / "pagemap").symlink_to("/proc/self/pagemap")
        if smaps:
            (folder / "smaps").symlink_to("/proc/self/smaps")
        return tmp_path / "root"

    return build


def lines_of(name):
    return Path("/proc/self", name).read_text().split("\n")[:-1]


def mount(device, kind):
    return f"27 1 {device} / / rw,relatime shared:1 - {kind} /dev/vda rw"


@on_linux
@pytest.mark.parametrize(("offset", "nbytes"), [(0, len(CONTENT)), (1, 1), (PAGE - 1, 2), (5000, 77_777)])
def test_a_mapping_of_a_file_is_a_region_of_it(private, path, offset, nbytes):
    assert private.region(offset, nbytes) == FileRegion(str(path), offset, nbytes, FileIdentity.of(os.stat(path)))


@on_linux
def test_a_mapping_from_the_middle_of_a_file_has_the_offset_in_the_file(path):
    view = View(path, offset=16 * PAGE, size=8 * PAGE)
    assert view.region(10, 100).offset == 16 * PAGE + 10


@on_linux
@pytest.mark.parametrize("touch", ["read", "not read"])
def test_reading_a_private_mapping_leaves_it_the_files(private, touch):
    if touch == "read":
        assert private.map[:] == CONTENT
    assert private.region(0, len(CONTENT)) is not None


@on_linux
def test_a_written_page_is_no_longer_the_files_and_the_others_are(private):
    private.map[10 * PAGE + 5] = 1
    assert private.region(0, len(CONTENT)) is None
    assert private.region(10 * PAGE + 100, 1) is None  # the whole page is a copy
    assert private.region(0, 10 * PAGE) is not None
    assert private.region(11 * PAGE, 5 * PAGE) is not None
    assert private.region(9 * PAGE, PAGE + 1) is None


@on_linux
def test_a_page_that_was_written_with_the_bytes_it_had_is_a_copy_as_well(private):
    private.map[0] = CONTENT[0]
    assert private.region(0, 10) is None


@on_linux
def test_a_shared_mapping_is_the_files_even_where_it_was_written(path):
    view = View(path, shared=True)
    view.map[7] = 1
    assert view.region(0, 100) is not None


@on_linux
def test_anonymous_memory_is_no_region(path):
    view = View(size=8 * PAGE)
    view.map[:] = bytes(8 * PAGE)
    assert view.region(0, PAGE) is None


@on_linux
@pytest.mark.parametrize(("address", "nbytes"), [(0, 10), (-5, 10), (1 << 62, 10)])
def test_memory_that_is_not_mapped_is_no_region(address, nbytes):
    assert FileMappings.read().region(address, nbytes) is None


@on_linux
@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_bytes_are_no_region(private, nbytes):
    assert private.region(0, nbytes) is None


@on_linux
def test_bytes_behind_the_end_of_the_file_are_no_region(private):
    assert private.region(len(CONTENT) - 10, 11) is None
    assert private.region(PAGES * PAGE - 10, 20) is None


@on_linux
def test_a_range_may_lie_in_adjoining_mappings_of_the_file(private, path):
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel cuts a mapping where the protection changes.
    assert libc.mprotect(ctypes.c_void_p(private.address + 8 * PAGE), 8 * PAGE, mmap.PROT_READ) == 0
    assert len([line for line in lines_of("maps") if line.endswith(path.name)]) == 3
    assert private.region(4 * PAGE + 3, 20 * PAGE) == FileRegion(
        str(path), 4 * PAGE + 3, 20 * PAGE, FileIdentity.of(os.stat(path))
    )
    private.map[20 * PAGE] = 1
    assert private.region(4 * PAGE, 20 * PAGE) is None
    assert private.region(4 * PAGE, 16 * PAGE) is not None


@on_linux
@pytest.mark.parametrize("other", ["another place", "another file", "a gap"])
def test_what_adjoins_from_elsewhere_is_not_one_region(private, path, root, other):
    def cut(line):
        addresses, protection, _, device, inode, name = line.split(maxsplit=5)
        start = int(addresses.split("-")[0], 16)
        middle, end = start + 8 * PAGE, start + 16 * PAGE
        offset = 9 * PAGE if other == "another place" else 8 * PAGE
        behind = start + 9 * PAGE if other == "a gap" else middle
        second = name + "x" if other == "another file" else name
        return (
            f"{start:x}-{middle:x} {protection} 00000000 {device} {inode}  {name}\n"
            f"{behind:x}-{end:x} {protection} {offset:08x} {device} {inode}  {second}"
        )

    folder = root(private, maps=cut)
    assert private.region(0, 8 * PAGE, root=folder) is not None
    assert private.region(0, 8 * PAGE + 1, root=folder) is None


@on_linux
def test_a_deleted_file_is_no_region(private, path):
    path.unlink()
    assert private.region(0, 10) is None


@on_linux
def test_a_file_whose_path_has_another_file_now_is_no_region(private, path, tmp_path):
    (tmp_path / "other").write_bytes(CONTENT)
    os.replace(tmp_path / "other", path)
    assert private.region(0, 10) is None


@on_linux
def test_a_pipe_that_has_the_path_now_is_not_opened(private, path):
    path.unlink()
    os.mkfifo(path)  # opening it waits for a writer
    assert private.region(0, 10) is None


@on_linux
def test_a_file_that_was_deleted_and_has_its_path_again_is_a_region(private, path, tmp_path):
    os.link(path, tmp_path / "second name")
    path.unlink()
    os.link(tmp_path / "second name", path)
    assert private.region(0, 10).path == str(path)


@on_linux
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_no_longer_be_read_is_no_region(private, path):
    path.chmod(0)
    assert private.region(0, 10) is None


@on_linux
def test_a_file_in_memory_is_no_region():
    descriptor = os.memfd_create("weights")
    os.truncate(descriptor, PAGE)
    with mmap.mmap(descriptor, PAGE) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert FileMappings.read().region(address, 10) is None
    os.close(descriptor)


@on_linux
@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
def test_a_file_on_tmpfs_is_no_region():
    path = Path("/dev/shm") / f"blockswap-{os.getpid()}"
    try:
        path.write_bytes(CONTENT)
        assert View(path).region(0, 10) is None
    finally:
        path.unlink()


@on_linux
@pytest.mark.parametrize("kind", RAM)
def test_a_file_system_in_memory_is_known_by_the_table_of_mounts(private, path, root, kind):
    assert private.region(0, 10, root=root(private, mounts=[mount(file_system(path)[1], kind)])) is None


@on_linux
@pytest.mark.parametrize("mounts", [[], ["27 1 77:77 / / rw - ext4 /dev/vda rw"]])
def test_a_file_system_that_is_not_in_the_table_of_mounts_cannot_be_told(private, root, mounts):
    assert private.region(0, 10, root=root(private, mounts=mounts)) is None


@on_linux
@pytest.mark.parametrize(("kind", "found"), [("overlay", True), ("btrfs", True), ("ext4", False)])
@pytest.mark.parametrize("shown", ["the file's", "the mapping's"])
def test_only_overlay_and_btrfs_may_show_another_device_in_the_mapping(private, path, root, kind, found, shown):
    def elsewhere(line):
        return line.replace(line.split()[3], "4d:4d")

    device = file_system(path)[1] if shown == "the file's" else "77:77"
    folder = root(private, maps=elsewhere, mounts=[mount(device, kind)])
    assert (private.region(0, 10, root=folder) is not None) is found
    mappings = FileMappings.read(root=folder)
    memory = private.map[:]
    same = mappings.region(private.address, 500, lambda offset, nbytes: memory[offset : offset + nbytes])
    assert (same is not None) is found
    assert mappings.region(private.address, 500, lambda _offset, nbytes: bytes(nbytes)) is None


@on_linux
@pytest.mark.parametrize("written", [False, True])
def test_without_pagemap_the_totals_of_a_mapping_decide_for_all_of_it(private, root, written):
    if written:
        private.map[10 * PAGE] = 1
    folder = root(private, pagemap=False)
    assert (private.region(0, 10, root=folder) is None) is written


@on_linux
def test_without_either_nothing_can_be_told_of_a_private_mapping(private, root):
    assert private.region(0, 10, root=root(private, pagemap=False, smaps=False)) is None


@on_linux
def test_a_shared_mapping_needs_neither(path, root):
    view = View(path, shared=True)
    assert view.region(0, 10, root=root(view, pagemap=False, smaps=False)) is not None


@on_linux
@pytest.mark.parametrize(
    ("top", "found"),
    [
        pytest.param(0x00, True, id="not in memory"),
        pytest.param(0x80, False, id="a copy"),
        pytest.param(0xA0, True, id="the file's"),
        pytest.param(0x40, False, id="a copy swapped out"),
        pytest.param(0x60, True, id="the file's, being moved by the kernel"),
        pytest.param(0xA1, True, id="the file's, mapped once"),
        pytest.param(0x81, False, id="a copy, mapped once"),
    ],
)
@pytest.mark.parametrize("page", [0, 1, 2])
def test_every_page_of_the_range_counts(private, root, top, found, page):
    folder = root(private, pagemap=False, smaps=False)
    entries = [0xA0, 0xA0, 0xA0]
    entries[page] = top
    with (folder / "proc/self/pagemap").open("wb") as pagemap:  # sparse
        pagemap.truncate((private.address // PAGE + PAGES) * 8)
        pagemap.seek((private.address // PAGE + 4) * 8)
        pagemap.write(b"".join(b"\x11" * 7 + bytes([entry]) for entry in entries))
    assert (private.region(4 * PAGE + 10, 3 * PAGE - 20, root=folder) is not None) is found


@on_linux
def test_a_reading_without_proc_knows_nothing(private, tmp_path):
    assert private.region(0, 10, root=tmp_path / "empty") is None


@on_linux
def test_thousands_of_mappings_are_read_in_little_time(private, root):
    def many(line):
        filler = [f"{n * 0x10000:x}-{n * 0x10000 + 0x1000:x} r--p 0 fe:00 {n} /lib/{n}.so" for n in range(1, 2000)]
        return "\n".join([*filler, line])

    folder = root(private, maps=many)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        mappings = FileMappings.read(root=folder)
        best = min(best, time.perf_counter() - start)
    assert mappings.region(private.address, 10) is not None
    assert best < 0.1  # about 3 ms on an idle machine


def test_other_systems_show_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert FileMappings.read().region(0x10000, 10) is None


BASE = 0x7FF0_0000_0000


@pytest.fixture
def windows(path, monkeypatch):
    """What Windows shows of two views, of which the first begins with the file; the second, in the file's middle."""
    monkeypatch.setattr(sys, "platform", "win32")

    def read(*regions):
        shown = []
        address = BASE
        for perms, pages in regions:
            if perms is not None:
                name = str(path)
                shown.append(SimpleNamespace(addr=hex(address), perms=perms, path=name, rss=pages * PAGE))
            address += pages * PAGE
        process = SimpleNamespace(memory_maps=lambda *, grouped: shown)
        monkeypatch.setattr(psutil, "Process", lambda: process)
        return FileMappings.read()

    return read


def memory(offset_in_file):
    """A sample of memory that shows the file from there."""
    return lambda offset, nbytes: CONTENT[offset_in_file + offset :][:nbytes]


@pytest.mark.parametrize("perms", ["r", "wc", "xr", "xwc"])
def test_on_windows_a_view_that_begins_with_the_file_is_a_region(windows, path, perms):
    mappings = windows((perms, PAGES))
    found = mappings.region(BASE + 5000, 7000, memory(5000))
    assert found == FileRegion(str(path), 5000, 7000, FileIdentity.of(os.stat(path)))


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 129])
def test_on_windows_small_ranges_are_compared_as_well(windows, nbytes):
    mappings = windows(("r", PAGES))
    assert mappings.region(BASE, nbytes, memory(0)) is not None
    assert mappings.region(BASE, nbytes, lambda _offset, size: bytes(size)) is None


@pytest.mark.parametrize("place", [0, 500, 999])
def test_on_windows_bytes_that_differ_at_the_start_in_the_middle_or_at_the_end_are_found(windows, place):
    def sample(offset, nbytes):
        changed = bytearray(CONTENT[:1000])
        changed[place] ^= 1
        return bytes(changed[offset : offset + nbytes])

    assert windows(("wc", PAGES)).region(BASE, 1000, sample) is None


def test_on_windows_without_a_sample_nothing_can_be_told(windows):
    assert windows(("r", PAGES)).region(BASE, 100) is None


@pytest.mark.parametrize("perms", ["rw", "xrw", "", "?"])
def test_on_windows_written_pages_are_not_the_files_and_those_behind_them_are(windows, perms):
    mappings = windows(("wc", 8), (perms, 2), ("wc", PAGES - 10))
    assert mappings.region(BASE + 7 * PAGE, 2 * PAGE, memory(7 * PAGE)) is None
    assert mappings.region(BASE + 8 * PAGE, 10, memory(8 * PAGE)) is None
    assert mappings.region(BASE + 10 * PAGE, 10, memory(10 * PAGE)).offset == 10 * PAGE


def test_on_windows_a_range_may_lie_in_regions_of_one_view(windows):
    mappings = windows(("wc", 8), ("r", 8))
    assert mappings.region(BASE + 7 * PAGE, 2 * PAGE, memory(7 * PAGE)).offset == 7 * PAGE


def test_on_windows_a_view_that_begins_elsewhere_in_the_file_is_no_region(windows):
    mappings = windows(("r", 8), (None, 8), ("r", 8))
    assert mappings.region(BASE + 16 * PAGE, 1000, memory(8 * PAGE)) is None
    assert mappings.region(BASE + 16 * PAGE, 1000, memory(0)).offset == 0


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), OSError("query failed")])
def test_on_windows_a_refused_query_shows_nothing(monkeypatch, error):
    def refuse(*, grouped):
        raise error

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_maps=refuse))
    assert FileMappings.read().region(BASE, 10, memory(0)) is None
