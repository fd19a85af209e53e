"""Measured speed of reading a file, from the disk and from the system's cache; optionally kept per disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import files
from ..records import DiskSpeed
from ..units import MIB
from .mappings import read_mounts
from .reader import READERS, FileIdentity, FileReader, WeightFileError

# 64 MB take 20 ms from an NVMe disk. Reads grow up to that in all, and no other begins after one that took this long:
# a hard disk gets to 21 MB in 0.2 s, and what reads 1 MB/s takes about a second for each figure.
_PORTIONS = (1 * MIB, 4 * MIB, 16 * MIB, 43 * MIB)
_LONG_SECONDS = 0.1
_REPEATS = 3


def measure_disk(
    path: str | Path, *, cache_dir: Path | None = None, again: bool = False, root: Path = Path("/")
) -> DiskSpeed | None:
    """Speed of reading this file as `FileReader` does; None for a file that cannot be read, or is empty.

    Takes under half a second for a fast disk and about one for a slow one, and 64 MB of memory. Each figure comes from
    bytes of its own where the file is large enough. A controller, or the host of a virtual machine, may have a cache of
    its own, which nothing here can pass.

    Args:
        path: of the file, which is not changed.
        cache_dir: folder of measurements, which are looked up and kept there per disk; None for neither.
        again: measures even if a measurement is kept, and replaces it.
        root: where Linux's /proc is looked up.
    """
    try:
        identity = FileIdentity.of(os.stat(path))
    except (OSError, ValueError):
        return None
    if identity.size == 0:
        return None
    kind, source = read_mounts(root).get(identity.device, (sys.platform, ""))
    disk = [identity.device, kind, source]
    key = {"disk": disk, "readers": READERS, "portions": _PORTIONS}
    is_whole = identity.size >= sum(_PORTIONS)  # the figures of a smaller file hold for no other
    kept = cache_dir / files.measurement_name("disk", disk) if cache_dir is not None and is_whole else None
    known = None if kept is None or again else files.read_measurement(kept, key, _parse)
    if known is not None:
        return known
    try:
        speed = _measure(str(path), identity)
    except WeightFileError:
        return None
    if kept is not None:
        files.keep_measurement(kept, key, asdict(speed))
    return speed


def _parse(record: Any) -> DiskSpeed:
    cold, warm = record["cold"], record["warm"]
    files.check_speeds([warm] if cold is None else [cold, warm])
    return DiskSpeed(cold, warm)


def _measure(path: str, identity: FileIdentity) -> DiskSpeed:
    nbytes = min(sum(_PORTIONS), identity.size)
    buffer = memoryview(mmap.mmap(-1, nbytes))  # begins at a page, as reads past the cache need it
    buffer[:: mmap.PAGESIZE] = bytes(
        len(buffer[:: mmap.PAGESIZE])
    )  # so that no read waits for the system to give pages
    cold = _cold_speed(path, identity, buffer)
    with contextlib.closing(FileReader(path, identity)) as reader:
        done, _ = _read_growing(reader, 0, buffer)
        warm = statistics.median(_read(reader, 0, buffer[:done]) for _ in range(_REPEATS))
    return DiskSpeed(cold, warm)


def _cold_speed(path: str, identity: FileIdentity, buffer: memoryview) -> float | None:
    """Bytes per second past the cache, from the file's end: the other figure's bytes are at its start."""
    nbytes = buffer.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    start = (identity.size - nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        with contextlib.closing(FileReader(path, identity, past_cache=True)) as reader:
            return _read_growing(reader, start, buffer[:nbytes])[1]
    except WeightFileError:  # FUSE, older tmpfs, Windows, macOS
        return None


def _read_growing(reader: FileReader, start: int, buffer: memoryview) -> tuple[int, float | None]:
    """Reads until the buffer is full or a read takes long; the bytes read, and bytes per second of the last read."""
    done, seconds, speed = 0, 0.0, None
    for portion in _PORTIONS:
        part = buffer[done : done + portion]
        if part.nbytes == 0 or seconds >= _LONG_SECONDS:
            break
        speed = _read(reader, start + done, part)
        done, seconds = done + part.nbytes, part.nbytes / speed
    return done, speed


def _read(reader: FileReader, start: int, buffer: memoryview) -> float:
    """Bytes per second of one read, of which each thread gets a share."""
    share = -(-buffer.nbytes // READERS // mmap.PAGESIZE) * mmap.PAGESIZE
    pieces = [(start + at, buffer[at : at + share]) for at in range(0, buffer.nbytes, share)]
    begin = time.perf_counter()
    reader.read(pieces)
    return buffer.nbytes / max(time.perf_counter() - begin, time.get_clock_info("perf_counter").resolution)
