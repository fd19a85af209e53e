"""The measured speed of a disk: for real on small files, and in virtual time on disks of every speed."""

from __future__ import annotations

import errno
import json
import logging
import math
import mmap
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from wanvideo_enhanced_blockswap.hardware import MIB, DiskSpeed
from wanvideo_enhanced_blockswap.hardware.disk import FileIdentity, FileReader, WeightFileError, measure_disk, speed

PAGE = mmap.PAGESIZE
SMALL_PORTIONS = (2 * PAGE, 8 * PAGE, 22 * PAGE)
WHOLE = sum(SMALL_PORTIONS)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of 64 pages and a half, of which 32 are measured."""
    monkeypatch.setattr(speed, "_PORTIONS", SMALL_PORTIONS)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(64 * PAGE + PAGE // 2))
    return path


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cached(path, cache_dir):
    """The kept measurement of the file's disk, with a conspicuous figure."""
    measure_disk(path, cache_dir=cache_dir)
    (file,) = cache_dir.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"warm": 12345.0, "cold": None}))
    return file


@pytest.fixture
def reads(monkeypatch):
    """The reads that are made: past the cache or not, offset and size of each piece."""
    made = []

    class Recorded(FileReader):
        def __init__(self, path, identity, *, past_cache=False):
            super().__init__(path, identity, past_cache=past_cache)
            self.past_cache = past_cache

        def read(self, pieces):
            made.append((self.past_cache, [(offset, view.nbytes) for offset, view in pieces]))
            super().read(pieces)

    monkeypatch.setattr(speed, "FileReader", Recorded)
    return made


def covered(pieces):
    """Start and end of pieces, each of which begins where the one before it ends."""
    ends = [offset + nbytes for offset, nbytes in pieces]
    assert [offset for offset, _ in pieces[1:]] == ends[:-1]
    return pieces[0][0], ends[-1]


def test_a_file_can_be_measured(path):
    before = path.read_bytes()
    found = measure_disk(path)
    assert found.warm > 0
    assert found.cold is None or found.cold > 0
    assert path.read_bytes() == before


def test_the_speed_of_the_cache_is_that_of_bytes_that_were_read_just_before(path, reads):
    measure_disk(path)
    warm = [covered(pieces) for past_cache, pieces in reads if not past_cache]
    ends = [2 * PAGE, 10 * PAGE, 32 * PAGE]
    assert warm == [(0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2]), *[(0, ends[2])] * 3]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no reads past its cache")
def test_reads_past_the_cache_are_of_whole_pages_at_the_end_of_the_file(path, reads):
    if measure_disk(path).cold is None:
        pytest.skip("this file system has no reads past the cache")
    cold = [pieces for past_cache, pieces in reads if past_cache]
    assert [covered(pieces) for pieces in cold] == [
        (32 * PAGE, 34 * PAGE),
        (34 * PAGE, 42 * PAGE),
        (42 * PAGE, 64 * PAGE),
    ]
    assert all(number % PAGE == 0 for pieces in cold for piece in pieces for number in piece)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 7 * PAGE + 5, WHOLE - 1])
def test_of_a_small_file_all_is_measured(path, reads, size):
    os.truncate(path, size)
    assert measure_disk(path).warm > 0
    assert covered(reads[-1][1]) == (0, size)


@pytest.mark.parametrize("kind", ["missing", "empty", "folder", "no path"])
def test_what_cannot_be_read_has_no_speed(path, tmp_path, cache_dir, kind):
    (tmp_path / "empty").touch()
    path = {"missing": tmp_path / "no", "empty": tmp_path / "empty", "folder": tmp_path, "no path": "a\0b"}[kind]
    assert measure_disk(path, cache_dir=cache_dir) is None
    assert not cache_dir.exists()


def test_a_system_without_reads_past_its_cache_has_no_cold_figure(path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    found = measure_disk(path)
    assert found.cold is None
    assert found.warm > 0


def test_a_file_system_that_refuses_them_has_none_either(path, monkeypatch):
    real = os.open

    def refuse(name, flags, *mode):
        if flags & 0x4000:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "O_DIRECT", 0x4000, raising=False)
    monkeypatch.setattr(os, "open", refuse)
    assert measure_disk(path).cold is None


def test_a_disk_that_fails_has_no_speed_and_nothing_is_kept(path, cache_dir, monkeypatch):
    def fail(_reader, _pieces):
        raise WeightFileError("reading 8 bytes from byte 0 failed")

    monkeypatch.setattr(FileReader, "read", fail)
    assert measure_disk(path, cache_dir=cache_dir) is None
    assert not cache_dir.exists()


@pytest.fixture
def simulate(monkeypatch):
    """A whole measurement over a simulated disk, whose bytes come at one speed first and at another from the cache."""

    def measure(cold, warm=10e9, latency=0.0):
        cache, sizes = set(), []
        spent = 0.0

        def read(reader, start, buffer):
            nonlocal spent
            place = range(start, start + buffer.nbytes, MIB)
            is_warm = not reader.past_cache and cache.issuperset(place)
            if not reader.past_cache:
                cache.update(place)
            seconds = buffer.nbytes / (warm if is_warm else cold) + (0 if is_warm else latency)
            spent += seconds
            sizes.append(buffer.nbytes)
            return buffer.nbytes / seconds

        monkeypatch.setattr(
            speed, "FileReader", lambda *_, past_cache=False: SimpleNamespace(past_cache=past_cache, close=lambda: None)
        )
        monkeypatch.setattr(speed, "_read", read)
        return speed._measure("weights", FileIdentity(1, 1, 1 << 34, 1)), spent, sizes

    return measure


@pytest.mark.parametrize("megabytes", [10, 30, 100, 150, 250, 550, 1000, 3500, 7000, 14000])
def test_no_disk_of_10_mb_per_second_or_more_is_measured_for_much_more_than_a_second(simulate, megabytes):
    found, spent, _ = simulate(megabytes * 1e6)
    assert spent <= 1.2
    assert (found.cold, found.warm) == (pytest.approx(megabytes * 1e6), pytest.approx(10e9))


@pytest.mark.parametrize("megabytes", [550, 3500, 7000])
def test_a_fast_disk_is_measured_with_all_bytes_and_in_less_than_half_a_second(simulate, megabytes):
    _, spent, sizes = simulate(megabytes * 1e6)
    assert spent <= 0.5
    assert sum(sizes) == (2 + speed._REPEATS) * 64 * MIB


def test_a_slow_start_of_a_disk_hardly_shows(simulate):
    found, _, _ = simulate(150e6, latency=0.010)
    assert found.cold == pytest.approx(150e6, rel=0.10)


def test_a_measurement_is_kept_for_the_disk(cached, path, cache_dir, tmp_path):
    other = tmp_path / "another file of the disk"
    other.write_bytes(path.read_bytes())
    assert measure_disk(path, cache_dir=cache_dir) == DiskSpeed(None, 12345.0)
    assert measure_disk(str(other), cache_dir=cache_dir) == DiskSpeed(None, 12345.0)


def test_a_kept_measurement_is_made_again_where_that_is_asked_and_replaced(cached, path, cache_dir):
    found = measure_disk(path, cache_dir=cache_dir, again=True)
    assert found.warm != 12345.0
    assert measure_disk(path, cache_dir=cache_dir) == found


def test_the_figures_of_a_small_file_are_neither_kept_nor_taken_from_a_larger_one(cached, path, cache_dir):
    os.truncate(path, WHOLE - 1)
    before = cached.read_text()
    assert measure_disk(path, cache_dir=cache_dir).warm != 12345.0
    assert cached.read_text() == before


@pytest.mark.parametrize("change", ["another device", "another source"])
@pytest.mark.skipif(not hasattr(os, "major"), reason="needs the numbers of devices")
def test_each_disk_has_a_measurement_of_its_own(path, cache_dir, tmp_path, monkeypatch, change):
    device = os.stat(path).st_dev
    mounts = tmp_path / "root/proc/self/mountinfo"
    mounts.parent.mkdir(parents=True)

    def measure(source):
        mounts.write_text(f"27 1 {os.major(device)}:{os.minor(device)} / / rw shared:1 - ext4 {source} rw\n")
        measure_disk(path, cache_dir=cache_dir, root=tmp_path / "root")

    measure("/dev/sda1")
    if change == "another source":
        measure("/dev/sdb1")
    else:
        real = FileIdentity.of
        monkeypatch.setattr(FileIdentity, "of", lambda stat: replace(real(stat), device=12345))
        measure("/dev/sda1")
    assert len(list(cache_dir.iterdir())) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}", '{"format": 2}', "\x00\xff"),
        *(
            f'{{"format": 2, "key": KEY, "cold": {cold}, "warm": {warm}}}'
            for cold, warm in [
                ("1e9", "null"),
                ("NaN", "1e9"),
                ("1e9", "-1"),
                ('"fast"', "1e9"),
                ("0", "1e9"),
                ("[]", 1),
            ]
        ),
        f'{{"format": 2, "key": KEY, "cold": null, "warm": 1{"0" * 400}}}',
        '{"format": 2, "key": KEY, "warm": 1e9}',
    ],
)
def test_a_damaged_file_is_measured_anew_with_one_warning_and_replaced(cached, path, cache_dir, caplog, text):
    key = json.dumps(json.loads(cached.read_text())["key"])
    cached.write_bytes(text.replace("KEY", key).encode("latin-1"))
    found = measure_disk(path, cache_dir=cache_dir)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "measuring again" in message
    assert json.loads(cached.read_text())["warm"] == found.warm
    assert measure_disk(path, cache_dir=cache_dir) == found


@pytest.mark.parametrize("change", [{"key": {}}, {"format": 1}])
def test_a_record_of_something_else_is_measured_again_without_a_warning(cached, path, cache_dir, caplog, change):
    cached.write_text(json.dumps(json.loads(cached.read_text()) | change))
    assert measure_disk(path, cache_dir=cache_dir).warm != 12345.0
    assert not caplog.records


def test_a_folder_that_cannot_be_made_costs_a_warning_and_not_the_measurement(path, caplog):
    assert measure_disk(path, cache_dir=path / "cache").warm > 0
    assert caplog.records


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_speed_is_a_positive_number(wrong):
    for figures in ((wrong, 1e9), (1e9, wrong)):
        with pytest.raises(ValueError, match="speeds of a disk: expected positive"):
            DiskSpeed(*figures)
