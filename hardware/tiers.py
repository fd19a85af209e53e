"""GPU tiers that bound the automatic settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .records import DeviceSpec, HostMemory, HostPlatform, LinkSpeed, Vendor
from .units import format_speed

# From this many compute units on, an unknown GPU gets its tier from a formula instead of the lowest tier.
_FORMULA_MIN_UNITS = 100

_MEMORY_SIZE = re.compile(r"\b(\d+)\s*gb\b")
_TOKEN = re.compile(r"[a-z]+|\d+")
# Words that drivers and people add to, or leave out of, the name of the same GPU.
_NOISE = frozenset({"nvidia", "geforce", "amd", "radeon", "gpu", "graphics", "tm", "r"})


@dataclass(frozen=True, slots=True)
class GpuTier:
    """Upper limits for the automatic settings on one class of GPU.

    Attributes:
        max_streams: the most copy streams; a measurement of the link picks the count up to it.
        bandwidth_target: share of the available device memory that block weights and window may fill, 0 to 1.
        reason: why the GPU is in this class.
    """

    name: str
    max_streams: int
    bandwidth_target: float
    reason: str


@dataclass(frozen=True, slots=True)
class Tuning:
    """The automatic settings for one device, from its tier and the measured link.

    Attributes:
        streams: copy streams: the smallest number that is as fast as any within the tier's limit.
        bandwidth_target: that of the tier.
        pin: whether to page-lock host memory.
        reasons: sentences for the report.
    """

    tier: GpuTier
    streams: int
    bandwidth_target: float
    pin: bool
    reasons: tuple[str, ...]


# Class, exact models, max_streams, bandwidth_target. Streams and ratios are the product's published table. It names the
# first models of each row; the rest of the row are models of the same chip family, link and about the same memory: the
# Ti models of the 30 series, and the D models of the Chinese market. Laptop GPUs have the name of a bigger desktop GPU
# but a smaller chip and less memory, so they are in no row, nor is the RX 7900 GRE.
_TIERS = (
    ("RTX 5090/4090", ("RTX 5090", "RTX 4090", "RTX 5090 D", "RTX 4090 D"), 16, 0.90),
    ("RTX 3090/3080", ("RTX 3090", "RTX 3080", "RTX 3090 Ti", "RTX 3080 Ti"), 12, 0.80),
    ("RX 7900 XTX", ("RX 7900 XTX",), 12, 0.80),
    ("RX 7900 XT", ("RX 7900 XT",), 10, 0.80),
)


def tier_for(spec: DeviceSpec, *, vram_threshold_percent: float) -> GpuTier:
    """The class of a GPU, by its exact model, then by its compute units.

    The formula for large unknown GPUs lowers the ratio as the ceiling on device memory rises, 0 to 100 percent.

    Raises:
        ValueError: the threshold is outside 0 to 100 or not a number.
    """
    if not 0 <= vram_threshold_percent <= 100:  # noqa: PLR2004 - percent
        raise ValueError(f"vram_threshold_percent: expected 0 to 100, got {vram_threshold_percent}")
    words = _words(spec.name)
    for name, models, streams, ratio in _TIERS:
        if any(words == _words(model) for model in models):
            return GpuTier(name, streams, ratio, f"{spec.name} is in the table of GPUs")
    units = spec.compute_units
    if units is not None and units >= _FORMULA_MIN_UNITS:
        streams = min(16, max(8, units // 10))
        ratio = min(0.9, max(0.7, (100 - vram_threshold_percent) / 100))
        reason = f"{spec.name} is not in the table: limits follow from its {units} compute units"
        return GpuTier(f"{units} compute units", streams, ratio, reason)
    counted = "an unknown number of" if units is None else str(units)
    reason = f"{spec.name} is not in the table and has {counted} compute units, {_FORMULA_MIN_UNITS} are needed"
    return GpuTier("other GPUs", 8, 0.70, reason)


def tune(spec: DeviceSpec, host: HostMemory, link: LinkSpeed | None, *, vram_threshold_percent: float) -> Tuning:
    """The automatic settings: the tier is the upper limit, and the measured link, if any, chooses up to it.

    Raises:
        ValueError: the threshold is outside 0 to 100 or not a number.
    """
    tier = tier_for(spec, vram_threshold_percent=vram_threshold_percent)
    share = f"{tier.bandwidth_target:.0%} of what is available, since {tier.reason}"
    limit = f"limits of {tier.name}: at most {tier.max_streams} streams, {share}"
    why_not = _why_not_pinned(spec, host, link)
    if why_not is not None:
        return Tuning(tier, 1, tier.bandwidth_target, pin=False, reasons=(limit, why_not))
    if link is None or not link.pinned:
        return Tuning(tier, 1, tier.bandwidth_target, pin=True, reasons=(limit, "the link is not measured: 1 stream"))
    streams, speed = link.best(max_streams=tier.max_streams)
    most = max((count for count, _ in link.pinned if count <= tier.max_streams), default=streams)
    knee = f"link: {format_speed(speed)} with {'1 stream' if streams == 1 else f'{streams} streams'}"
    knee += f", as fast as with up to {most}" if most > streams else ""
    return Tuning(tier, streams, tier.bandwidth_target, pin=True, reasons=(limit, knee))


def _why_not_pinned(spec: DeviceSpec, host: HostMemory, link: LinkSpeed | None) -> str | None:
    """Why page-locked memory is refused or does harm here; None where it works."""
    if link is not None and not link.pinned and link.pageable is not None:
        return "the driver refused to lock RAM for the measurement: copies come from ordinary RAM"
    if spec.vendor is not Vendor.AMD:
        return None
    if host.platform is HostPlatform.WINDOWS:
        # RX 9070 XT: 54 s with pageable memory, stalls up to 309 s with page-locked memory (reports against ComfyUI).
        return "AMD GPUs on Windows wait for copies from locked RAM: copies come from ordinary RAM, on 1 stream"
    if link is not None and link.pinned and link.pageable is not None and link.best()[1] <= link.pageable:
        figures = f"{format_speed(link.best()[1])} against {format_speed(link.pageable)}"
        return f"copies from locked RAM are no faster than from ordinary RAM here ({figures})"
    return None


def _words(name: str) -> frozenset[str]:
    """The parts of a GPU's name that distinguish it: "NVIDIA GeForce RTX 3080Ti 12GB" gives rtx, 3080 and ti."""
    tokens = _TOKEN.findall(_MEMORY_SIZE.sub(" ", name.lower()))
    return frozenset(tokens) - _NOISE
