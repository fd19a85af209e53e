"""Samples: what a sampler has seen of a device and its host while a run lasted; pure, no torch."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Figures over the readings of a run; None for what no reading told. What happens between two readings is not seen.

    Attributes:
        count: how many times everything was read.
        gpu_percent_mean: share of the time in which at least one kernel ran, 0 to 100; the mean of the readings.
        gpu_percent_max: the highest of them.
        vram_used_peak_bytes: device memory in use at most, whoever used it.
        rss_peak_bytes: host memory of this process at most, pages of files that it has mapped included.
        host_available_least_bytes: host memory that was available at least, within the control group.
    """

    count: int
    gpu_percent_mean: float | None
    gpu_percent_max: float | None
    vram_used_peak_bytes: int | None
    rss_peak_bytes: int | None
    host_available_least_bytes: int | None


@dataclass(slots=True)
class _Figure:
    """One figure over many readings."""

    count: int = 0
    total: float = 0.0
    least: float | None = None
    most: float | None = None

    def add(self, value: float | None) -> None:
        if value is None:
            return
        self.count += 1
        self.total += value
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


class Tally:
    """What one thread has read so far, and when somebody last told it to go on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the block may ask while the thread adds
        self._count = 0
        self._touched_s = time.monotonic()
        self._gpu, self._vram, self._rss, self._host = _Figure(), _Figure(), _Figure(), _Figure()

    def add(self, gpu: float | None, vram: float | None, rss: float | None, host: float | None) -> None:
        """One reading of each figure; None where it could not be had."""
        with self._lock:
            self._count += 1
            self._gpu.add(gpu)
            self._vram.add(vram)
            self._rss.add(rss)
            self._host.add(host)

    def touch(self) -> None:
        """What is watched goes on."""
        self._touched_s = time.monotonic()

    def is_idle(self, limit_s: float | None) -> bool:
        """Whether nobody has touched it for so many seconds; never for None."""
        return limit_s is not None and time.monotonic() - self._touched_s > limit_s

    def samples(self) -> Samples:
        """What was read, at any time."""
        with self._lock:
            return Samples(
                count=self._count,
                gpu_percent_mean=self._gpu.mean,
                gpu_percent_max=self._gpu.most,
                vram_used_peak_bytes=_whole(self._vram.most),
                rss_peak_bytes=_whole(self._rss.most),
                host_available_least_bytes=_whole(self._host.least),
            )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
