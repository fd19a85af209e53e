"""Measured host-to-device bandwidth, by number of copy streams; kept on disk per device and driver if asked."""

from __future__ import annotations

import logging
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .link_cache import MeasurementKey, cache_name, keep_measurement, read_measurement
from .memory import is_out_of_memory
from .probe import probe_device
from .spec import LinkSpeed
from .units import MIB

logger = logging.getLogger(__name__)

_STREAM_COUNTS = (1, 2, 4, 8, 12, 16)
# 64 MiB take 3 ms over PCIe 5.0 x16 and 11 ms over 3.0 x8: long beside a launch, short beside a second.
_NBYTES = 64 * MIB
# The median of three, after one copy that is not counted: the first wakes an idle link from a lower generation.
_REPEATS = 3
# No figure takes much longer than this, so that a slow link (an external GPU) is measured in a second as well.
_SECONDS_PER_FIGURE = 0.1
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context, on CUDA and HIP alike
CONTRADICTION = 0.20
"""Share by which a speed seen in a run may differ from the measured one: beyond it, the measurement is not believed."""


def measure_link(
    device: torch.device,
    *,
    stream_counts: Sequence[int] = _STREAM_COUNTS,
    nbytes: int = _NBYTES,
    cache_dir: Path | None = None,
    again: bool = False,
) -> LinkSpeed:
    """How fast the device takes bytes from host memory, measured with copies; well under a second.

    Costs `nbytes` of device memory and, one after the other, `nbytes` of ordinary and of page-locked host memory while
    it runs. Other work on the device slows both the work and the figure. A figure that could not be taken is left out,
    with one warning.

    Args:
        device: where to. On devices other than CUDA and HIP, which have no streams here, only the pageable figure is
            taken; for the CPU that is a copy inside host memory.
        stream_counts: how many streams share a copy, each count measured on its own, from page-locked memory.
        nbytes: size of a copy in bytes.
        cache_dir: folder in which complete measurements are kept and looked up; None neither looks nor keeps.
        again: measures even if a measurement is kept, and keeps the new one in its place.

    Raises:
        HardwareUnavailableError: there is no such device.
        ValueError: a stream count or the size is below 1, or a stream has no byte to copy.
    """
    counts = tuple(sorted(set(stream_counts)))
    if not counts or counts[0] < 1 or nbytes < counts[-1]:
        raise ValueError(
            f"measure_link expects stream counts from 1 to nbytes ({nbytes}) but got {list(stream_counts)}"
        )
    spec = probe_device(device)
    device = torch.device(spec.torch_device)
    key = MeasurementKey(spec.name, spec.uuid, spec.pci_bus_id, spec.driver, torch.__version__, counts, nbytes)
    path = None if cache_dir is None else cache_dir / cache_name(key)
    cached = None if path is None or again else read_measurement(path, key)
    if cached is not None:
        return cached
    speed = _measure(device, counts, nbytes)
    if path is not None and speed.pageable is not None and (speed.pinned or device.type != "cuda"):
        keep_measurement(path, key, speed)
    return speed


def contradicts(link: LinkSpeed, *, streams: int, seen_bytes_per_second: float) -> bool:
    """Whether a speed seen in a run differs from the measured one by more than `CONTRADICTION` of it.

    Args:
        link: what was measured.
        streams: how many streams the run's copies had.
        seen_bytes_per_second: what they reached together, from page-locked memory.
    """
    if not link.pinned:
        return False
    expected = link.best(max_streams=streams)[1]
    return abs(seen_bytes_per_second - expected) > CONTRADICTION * expected


def _measure(device: torch.device, counts: tuple[int, ...], nbytes: int) -> LinkSpeed:
    try:
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        pageable = _measure_pageable(target)
        pinned, host_copy = _measure_pinned(target, counts) if device.type == "cuda" else ((), None)
    except (RuntimeError, OSError, MemoryError) as exc:
        if isinstance(exc, RuntimeError) and not is_out_of_memory(exc):
            raise
        logger.warning("the link to %s expects %d free bytes on both sides to be measured: %s", device, nbytes, exc)
        return LinkSpeed((), None)
    return LinkSpeed(pinned, pageable, host_copy)


def _measure_pageable(target: torch.Tensor) -> float:
    """Bytes per second from ordinary memory, by the host's clock, because the host takes part in every such copy."""
    # Written: untouched pages all map to one page of zeros.
    source = torch.frombuffer(mmap.mmap(-1, target.nbytes), dtype=torch.uint8).fill_(1)
    module = torch.get_device_module(target.device)

    def copy() -> float:
        start = time.perf_counter()
        target.copy_(source)
        module.synchronize()
        return time.perf_counter() - start

    return target.nbytes / _typical_seconds(copy)


def _measure_pinned(
    target: torch.Tensor, counts: tuple[int, ...]
) -> tuple[tuple[tuple[int, float], ...], float | None]:
    """(stream count, bytes per second) from page-locked memory, and bytes per second from ordinary memory into it.

    Empty and None if the driver refuses to page-lock.
    """
    # An anonymous mapping is page-locked at its exact size, whereas torch's pin_memory rounds up to a power of two.
    source = torch.frombuffer(mmap.mmap(-1, target.nbytes), dtype=torch.uint8).fill_(1)
    cuda: Any = torch.cuda  # untyped, as are streams and events below
    runtime = cuda.cudart()
    with cuda.device(target.device):
        code = int(runtime.cudaHostRegister(source.data_ptr(), source.nbytes, _PORTABLE))
        if code != 0:
            logger.warning("the driver refused to page-lock %d bytes (error %d); no pinned figure", source.nbytes, code)
            _consume_error(target)
            return (), None
        try:
            host_copy = _measure_host_copy(source)
            return tuple((count, _measure_streams(source, target, count)) for count in counts), host_copy
        finally:
            cuda.synchronize()  # the device may still read the pages if a copy raised
            code = int(runtime.cudaHostUnregister(source.data_ptr()))
            if code != 0:
                logger.warning("the driver failed to unlock %d bytes (error %d)", source.nbytes, code)
                _consume_error(target)


def _measure_host_copy(locked: torch.Tensor) -> float:
    """Bytes per second from ordinary memory to page-locked memory in one thread, as the staging worker copies."""
    ordinary = torch.zeros_like(locked).fill_(1)

    def copy() -> float:
        start = time.perf_counter()
        locked.copy_(ordinary)
        return time.perf_counter() - start

    return locked.nbytes / _typical_seconds(copy)


def _measure_streams(source: torch.Tensor, target: torch.Tensor, count: int) -> float:
    """Bytes per second of a copy cut into one chunk per stream, from the first start to the last end."""
    cuda: Any = torch.cuda
    main = cuda.current_stream()
    streams = [cuda.Stream() for _ in range(count)]  # one chunk each, so that chunks overlap one another
    chunks = list(zip(streams, target.chunk(count), source.chunk(count), strict=False))

    def copy() -> float:
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record(main)
        for stream, to, of in chunks:
            stream.wait_event(start)
            with cuda.stream(stream):
                to.copy_(of, non_blocking=True)
            main.wait_stream(stream)
        end.record(main)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3  # from milliseconds

    return target.nbytes / _typical_seconds(copy)


def _typical_seconds(copy: Callable[[], float]) -> float:
    """Median duration of a copy after one that is not counted, within the time set aside for one figure."""
    spent = copy()
    samples: list[float] = []
    while len(samples) < _REPEATS and (not samples or spent < _SECONDS_PER_FIGURE):
        samples.append(copy())
        spent += samples[-1]
    # A clock may be too coarse for a copy of a few bytes; one tick of it is then the best that is known.
    return max(statistics.median(samples), time.get_clock_info("perf_counter").resolution)


def _consume_error(target: torch.Tensor) -> None:
    """Take a failed call's error out of the runtime, or the next kernel that is launched would report it as its own."""
    try:
        target[:1].fill_(0)
        torch.cuda.synchronize()
    except RuntimeError as exc:
        logger.debug("pending error consumed: %s", exc)
