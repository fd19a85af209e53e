"""Measured host-to-device bandwidth, by number of copy streams; optionally kept on disk per device and driver."""

from __future__ import annotations

import logging
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import files
from .device import probe_device
from .memory import is_out_of_memory
from .pinning import CudaRegistrar, register_result
from .records import LinkSpeed
from .units import MIB, format_bytes

logger = logging.getLogger(__name__)

_STREAM_COUNTS = (1, 2, 4, 8, 12, 16)
# 64 MB take 3 ms over PCIe 5.0 x16 and 11 ms over 3.0 x8: long beside a launch, short beside a second.
_NBYTES = 64 * MIB
# The median of three, after one copy that does not count: the first wakes an idle link from a lower generation.
_REPEATS = 3
# About what 64 MB take over PCIe 3.0 x8. Over a slower link (an external GPU: 0.5 to 3 GB/s) copies are cut to this
# time: still long beside a launch, and the 28 of a measurement, two of them whole, stay below 0.6 s at 0.5 GB/s.
_SECONDS_PER_COPY = 0.010
# A figure takes fewer copies where even small ones take longer.
_SECONDS_PER_FIGURE = 0.1
CONTRADICTION = 0.20
"""Share by which a run's speed may differ from the measured one before the link is measured again."""


def measure_link(
    device: torch.device,
    *,
    stream_counts: Sequence[int] = _STREAM_COUNTS,
    nbytes: int = _NBYTES,
    cache_dir: Path | None = None,
    again: bool = False,
) -> LinkSpeed:
    """Bandwidth from host memory to the device, measured with copies in well under a second.

    Costs `nbytes` of device memory and, one after the other, `nbytes` of ordinary and of page-locked host memory while
    it runs. Other work on the device slows both the work and the figure. A figure that cannot be measured is left out,
    with one warning.

    Args:
        device: where to copy. Devices other than CUDA and HIP have no streams here and get only the pageable figure;
            for the CPU that is a copy inside host memory.
        stream_counts: how many streams share a copy, each count measured on its own, from page-locked memory.
        nbytes: size of a copy in bytes; over a slow link only the first copies have it.
        cache_dir: folder of complete measurements, which are looked up and kept there; None for neither.
        again: measures even if a measurement is kept, and replaces it.

    Raises:
        HardwareUnavailableError: there is no such device.
        ValueError: a stream count or the size is below 1, or a stream has no byte to copy.
    """
    counts = tuple(sorted(set(stream_counts)))
    if not counts or counts[0] < 1 or nbytes < counts[-1]:
        raise ValueError(f"stream_counts: expected numbers from 1 to nbytes ({nbytes}), got {list(stream_counts)}")
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
    """Whether a run's speed over so many streams, from page-locked memory, differs from the measured one by more than
    `CONTRADICTION` of it.
    """
    if not link.pinned:
        return False
    expected = link.best(max_streams=streams)[1]
    return abs(seen_bytes_per_second - expected) > CONTRADICTION * expected


def _measure(device: torch.device, counts: tuple[int, ...], nbytes: int) -> LinkSpeed:
    try:
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        pageable = _measure_copy(_host_buffer(nbytes), target)
        pinned, host_copy = _measure_pinned(target, counts) if device.type == "cuda" else ((), None)
    except (RuntimeError, OSError, MemoryError) as exc:
        if isinstance(exc, RuntimeError) and not is_out_of_memory(exc):
            raise
        size = format_bytes(nbytes)
        logger.warning("measuring the link to %s needs %s of free RAM and of VRAM: %s", device, size, exc)
        return LinkSpeed((), None)
    return LinkSpeed(pinned, pageable, host_copy)


def _host_buffer(nbytes: int) -> torch.Tensor:
    """Ordinary memory `(nbytes,)`, written, since untouched pages all map to one page of zeros.

    An anonymous mapping is page-locked at its exact size, whereas torch's pin_memory rounds up to a power of two.
    """
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(1)


def _measure_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second from ordinary memory, by the host's clock, because the host takes part in every such copy."""
    module = torch.get_device_module(target.device)

    def copy(nbytes: int) -> float:
        start = time.perf_counter()
        target[:nbytes].copy_(source[:nbytes])
        module.synchronize()
        return time.perf_counter() - start

    return _Pace(target.nbytes).typical_speed(copy)


def _measure_pinned(
    target: torch.Tensor, counts: tuple[int, ...]
) -> tuple[tuple[tuple[int, float], ...], float | None]:
    """(stream count, bytes per second) from page-locked memory, and bytes per second from ordinary memory into it.

    Empty and None if the driver refuses to page-lock.
    """
    source = _host_buffer(target.nbytes)
    cuda: Any = torch.cuda  # untyped, as are streams and events below
    registrar = CudaRegistrar(target.device)
    with cuda.device(target.device):
        code = registrar.register(source.data_ptr(), source.nbytes)
        if code != 0:
            registrar.consume_error()
            why = register_result(code)
            size = format_bytes(source.nbytes)
            logger.warning("locking %s of RAM failed (%s): the speed of copies from locked RAM is unknown", size, why)
            return (), None
        try:
            host_copy = _measure_copy(_host_buffer(source.nbytes), source)  # in one thread, as the staging worker does
            pace = _Pace(target.nbytes, least_bytes=max(counts))
            return tuple((count, _measure_streams(source, target, count, pace)) for count in counts), host_copy
        finally:
            cuda.synchronize()  # the device may still read the pages if a copy raised
            code = registrar.unregister(source.data_ptr())
            if code != 0:
                registrar.consume_error()
                size = format_bytes(source.nbytes)
                logger.warning("unlocking %s of RAM failed (%s)", size, register_result(code))


def _measure_streams(source: torch.Tensor, target: torch.Tensor, count: int, pace: _Pace) -> float:
    """Bytes per second of a copy cut into one chunk per stream, from the first start to the last end."""
    cuda: Any = torch.cuda
    main = cuda.current_stream()
    streams = [cuda.Stream() for _ in range(count)]  # one chunk each, so that chunks overlap one another

    def copy(nbytes: int) -> float:
        chunks = list(zip(streams, target[:nbytes].chunk(count), source[:nbytes].chunk(count), strict=False))
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

    return pace.typical_speed(copy)


@dataclass(slots=True)
class _Pace:
    """Sizes of the copies over one link: the first of `most_bytes`, then none much longer than `_SECONDS_PER_COPY`.

    Attributes:
        most_bytes: the largest size.
        least_bytes: the smallest size.
        fastest: bytes per second of the fastest copy, so that a delayed one does not shrink those after it; 0 before
            the first.
    """

    most_bytes: int
    least_bytes: int = 1
    fastest: float = 0.0

    def typical_speed(self, copy: Callable[[int], float]) -> float:
        """Median bytes per second; `copy` copies a number of bytes and gives the seconds, the first time uncounted."""
        self._speed(copy)
        speeds: list[float] = []
        spent = 0.0
        while len(speeds) < _REPEATS and spent < _SECONDS_PER_FIGURE:
            nbytes = self.nbytes
            speeds.append(self._speed(copy))
            spent += nbytes / speeds[-1]
        return statistics.median(speeds)

    @property
    def nbytes(self) -> int:
        """Size of the next copy."""
        if not self.fastest:
            return self.most_bytes
        return min(self.most_bytes, max(self.least_bytes, int(self.fastest * _SECONDS_PER_COPY)))

    def _speed(self, copy: Callable[[int], float]) -> float:
        nbytes = self.nbytes
        # The clock may be too coarse for a copy of a few bytes: count one tick.
        speed = nbytes / max(copy(nbytes), time.get_clock_info("perf_counter").resolution)
        self.fastest = max(self.fastest, speed)
        return speed


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What a measurement depends on: if any of it changes, the link is measured again."""

    name: str
    uuid: str | None
    pci_bus_id: str | None
    driver: str | None
    torch_version: str
    stream_counts: tuple[int, ...]
    nbytes: int


def cache_name(key: MeasurementKey) -> str:
    """A file name for the device; its name may have characters that a file name may not."""
    return files.measurement_name("link", [key.name, key.uuid, key.pci_bus_id])


def read_measurement(path: Path, key: MeasurementKey) -> LinkSpeed | None:
    """The measurement kept for this key; None without one, or, with one warning, if the file is damaged."""
    return files.read_measurement(path, asdict(key), _parse)


def _parse(record: Any) -> LinkSpeed:
    pinned, pageable, host_copy = record["pinned"], record["pageable"], record["host_copy"]
    files.check_speeds([speed for _, speed in pinned] + [pageable] + ([] if host_copy is None else [host_copy]))
    return LinkSpeed(tuple((count, speed) for count, speed in pinned), pageable, host_copy)


def keep_measurement(path: Path, key: MeasurementKey, speed: LinkSpeed) -> None:
    """Keeps a measurement; logs one warning if it cannot."""
    files.keep_measurement(path, asdict(key), asdict(speed))
