"""Samples: what a sampler has seen of a device and its host while a run lasted; pure, no torch."""

from __future__ import annotations

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
