"""Positioned reads of real files, with failures of the system put in."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from wanvideo_enhanced_blockswap.hardware.disk import READERS, FileIdentity, FileReader, WeightFileError, reader

SIZE = 1_000_003
CONTENT = random.Random(0).randbytes(SIZE)
with_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no positioned reads")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["preadv", "seek"])
def opened(path, request, monkeypatch):
    """A reader of the file in chunks of about 10 kB, with positioned reads and, as on Windows, without."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has no positioned reads")
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 10_007)
    with_reader = open_reader(path)
    yield with_reader
    with_reader.close()


def open_reader(path):
    return FileReader(str(path), FileIdentity.of(os.stat(path)))


def read(file_reader, *places):
    buffers = [bytearray(nbytes) for _, nbytes in places]
    file_reader.read([(offset, memoryview(buffer)) for (offset, _), buffer in zip(places, buffers, strict=True)])
    return [bytes(buffer) for buffer in buffers]


def whole(file_reader):
    return read(file_reader, (0, SIZE))[0]


def inject(monkeypatch, change):
    """Lets `change` stand before each positioned read; it may raise, or give the bytes to read at most."""
    real = os.preadv

    def preadv(descriptor, buffers, offset):
        most = change(offset, buffers[0].nbytes)
        return real(descriptor, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", preadv)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("blockswap-read")]


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([(0, SIZE)], id="all of it"),
        pytest.param([(1, 1), (SIZE - 1, 1)], id="single bytes"),
        pytest.param([(12_345, 40_001), (3, 7), (999, 20_014)], id="odd places in no order"),
        pytest.param([(5, 10_007), (5, 10_008), (5, 10_006)], id="about a chunk"),
        pytest.param([(7, 0), (8, 3), (SIZE, 0)], id="some without bytes"),
        pytest.param([], id="none"),
    ],
)
def test_each_buffer_gets_the_bytes_from_its_offset(opened, places):
    assert read(opened, *places) == [CONTENT[offset : offset + nbytes] for offset, nbytes in places]


def test_a_buffer_may_hold_anything_in_one_piece(opened):
    buffer = bytearray(8 * 5_000)
    opened.read([(16, memoryview(buffer).cast("d"))])
    assert buffer == CONTENT[16 : 16 + len(buffer)]


def test_a_reader_can_read_many_times(opened):
    for offset in range(0, 300_000, 50_001):
        assert read(opened, (offset, 100_000)) == [CONTENT[offset : offset + 100_000]]


@with_preadv
def test_several_threads_share_a_read(path, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 10_007)
    together, seen = threading.Barrier(READERS, timeout=60), set()

    def meet(_offset, nbytes):
        if threading.get_ident() not in seen:  # each thread waits once for all the others
            seen.add(threading.get_ident())
            together.wait()
        return nbytes

    inject(monkeypatch, meet)
    file_reader = open_reader(path)
    assert whole(file_reader) == CONTENT
    assert len(seen) == READERS
    file_reader.close()


@with_preadv
def test_a_read_that_gives_less_goes_on_from_there(path, monkeypatch):
    chance = random.Random(1)
    inject(monkeypatch, lambda _offset, nbytes: chance.randint(1, max(1, nbytes // 2)))
    file_reader = open_reader(path)
    assert whole(file_reader) == CONTENT
    file_reader.close()


@with_preadv
def test_a_failing_disk_is_reported_with_file_offset_and_reason(opened, path, monkeypatch):
    if not hasattr(os, "preadv"):
        pytest.skip("positioned reads are taken away")

    def fail(offset, nbytes):
        if offset >= 500_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return nbytes

    inject(monkeypatch, fail)
    with pytest.raises(WeightFileError, match=r"reading \d+ bytes from byte \d+ of .*weights") as failure:
        whole(opened)
    assert os.strerror(errno.EIO) in str(failure.value)
    assert read(opened, (0, 1000)) == [CONTENT[:1000]]  # the reader goes on where the disk does


@with_preadv
def test_a_failed_read_ends_when_no_thread_writes_to_a_buffer_any_more(path, monkeypatch):
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 10_007)
    is_inside, may_leave, failures = threading.Event(), threading.Event(), []

    def fail_beside_a_slow_one(offset, nbytes):
        if offset == 0:
            assert is_inside.wait(timeout=60)
            raise OSError(errno.EIO, "failed")
        is_inside.set()
        assert may_leave.wait(timeout=60)
        return nbytes

    def fail():
        try:
            whole(file_reader)
        except WeightFileError as failure:
            failures.append(failure)

    inject(monkeypatch, fail_beside_a_slow_one)
    file_reader = open_reader(path)
    caller = threading.Thread(target=fail)
    caller.start()
    assert is_inside.wait(timeout=60)
    caller.join(timeout=0.2)
    assert caller.is_alive()
    may_leave.set()
    caller.join(timeout=60)
    assert "failed" in str(failures[0])
    file_reader.close()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no reads past its cache")
def test_reads_past_the_cache_give_the_same_bytes(path):
    try:
        file_reader = FileReader(str(path), FileIdentity.of(os.stat(path)), past_cache=True)
    except WeightFileError:
        pytest.skip("this file system has no reads past the cache")
    buffer = memoryview(mmap.mmap(-1, 16 * mmap.PAGESIZE))
    file_reader.read([(4 * mmap.PAGESIZE, buffer)])
    assert buffer == CONTENT[4 * mmap.PAGESIZE : 20 * mmap.PAGESIZE]
    file_reader.close()


def test_a_system_without_reads_past_its_cache_refuses_them(path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with pytest.raises(WeightFileError, match="this system has no reads past its cache"):
        FileReader(str(path), FileIdentity.of(os.stat(path)), past_cache=True)


def test_a_file_that_is_gone_is_not_opened(path):
    identity = FileIdentity.of(os.stat(path))
    path.unlink()
    with pytest.raises(WeightFileError, match=r"weights.safetensors cannot be opened \(.+\); leave the file in place"):
        FileReader(str(path), identity)


def test_another_file_in_its_place_is_not_opened(path, tmp_path):
    identity = FileIdentity.of(os.stat(path))
    (tmp_path / "other").write_bytes(CONTENT)
    os.replace(tmp_path / "other", path)
    with pytest.raises(WeightFileError, match=r"has changed since the model was loaded \(.*inode was \d+, is \d+"):
        FileReader(str(path), identity)


def test_a_file_that_was_cut_is_not_read(opened, path):
    os.truncate(path, 1000)
    with pytest.raises(WeightFileError, match="size was 1000003, is 1000"):
        read(opened, (0, 10))


def test_a_file_that_was_written_in_place_is_not_read(opened, path):
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(0, 12345))  # a file system's clock may be too coarse for a test
    with pytest.raises(WeightFileError, match=r"modified_ns was .*, is 12345"):
        read(opened, (500_000, 10))


@with_preadv
@pytest.mark.parametrize("change", ["write", "cut"])
def test_a_change_during_the_read_is_noticed(path, monkeypatch, change):
    def edit(_offset, nbytes):
        if change == "cut":
            os.truncate(path, 1000)
        else:
            os.utime(path, ns=(0, 12345))
        return nbytes

    file_reader = open_reader(path)
    inject(monkeypatch, edit)
    with pytest.raises(WeightFileError, match="has changed since the model was loaded"):
        whole(file_reader)
    file_reader.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows neither deletes nor replaces an open file")
@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_deleted_or_replaced_by_a_rename_is_read_as_it_was(opened, path, tmp_path, replaced):
    if replaced:
        (tmp_path / "new").write_bytes(bytes(SIZE))
        os.replace(tmp_path / "new", path)
    else:
        path.unlink()
    assert whole(opened) == CONTENT


def test_bytes_beyond_the_end_are_an_error_with_both_numbers(opened):
    with pytest.raises(WeightFileError, match=rf"ends at byte {SIZE} but bytes {SIZE - 10} to {SIZE + 10} are needed"):
        read(opened, (SIZE - 10, 20))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(WeightFileError, match="cannot be opened"):
        FileReader(str(tmp_path), FileIdentity.of(os.stat(tmp_path)))


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_the_system_refuses_are_done_without_until_it_allows_them(opened, monkeypatch, started):
    start, calls = ThreadPoolExecutor._adjust_thread_count, []

    def refuse(pool):
        calls.append(pool)
        if len(calls) > started:
            raise RuntimeError("can't start new thread")
        start(pool)

    with monkeypatch.context() as refused:
        refused.setattr(ThreadPoolExecutor, "_adjust_thread_count", refuse)
        assert whole(opened) == CONTENT
    assert calls
    assert whole(opened) == CONTENT


def test_work_that_a_refused_thread_leaves_to_another_is_waited_for_and_its_failure_raised(opened, monkeypatch):
    if not hasattr(os, "preadv"):
        pytest.skip("positioned reads are taken away")
    start, preadv, is_refused = ThreadPoolExecutor._adjust_thread_count, os.preadv, threading.Event()

    def refuse(pool):
        if pool._threads:
            is_refused.set()
            raise RuntimeError("can't start new thread")
        start(pool)

    def fail_in_helper(*arguments):
        if threading.current_thread().name.startswith("blockswap-read"):
            is_refused.wait(60)
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "_adjust_thread_count", refuse)
    monkeypatch.setattr(os, "preadv", fail_in_helper)
    with pytest.raises(WeightFileError, match="Input/output error"):
        whole(opened)


def test_closing_twice_is_harmless_and_ends_the_threads(opened):
    whole(opened)
    threads = reading_threads()
    opened.close()
    opened.close()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_forgotten_reader_leaves_neither_thread_nor_open_file(path):
    file_reader = open_reader(path)
    whole(file_reader)
    file = file_reader._files[0]
    threads = reading_threads()
    del file_reader
    gc.collect()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert file.closed


def test_reading_ahead_changes_no_byte_and_never_raises(opened, monkeypatch):
    opened.read_ahead(0, SIZE)
    opened.read_ahead(SIZE, 10 * SIZE)
    opened.read_ahead(0, 0)
    opened.read_ahead(-5, 3)
    assert whole(opened) == CONTENT
    opened.close()
    opened.read_ahead(0, SIZE)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be advised")
def test_all_of_a_range_is_advised_in_calls_that_the_system_does_not_cut(path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, *call: calls.append(call))
    file_reader = open_reader(path)
    file_reader.read_ahead(5, 3 * reader._AHEAD_BYTES + 1)
    file_reader.close()
    assert [advice for *_, advice in calls] == [os.POSIX_FADV_WILLNEED] * 4
    assert max(nbytes for _, nbytes, _ in calls) == reader._AHEAD_BYTES
    ends = [offset + nbytes for offset, nbytes, _ in calls]
    assert [offset for offset, *_ in calls] == [5, *ends[:-1]]
    assert ends[-1] == 5 + 3 * reader._AHEAD_BYTES + 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be advised")
def test_a_system_that_takes_no_advice_is_left_alone(opened, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "a FUSE mount")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    opened.read_ahead(0, SIZE)
    monkeypatch.delattr(os, "posix_fadvise")
    opened.read_ahead(0, SIZE)
