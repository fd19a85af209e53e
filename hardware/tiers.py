"""GPU tiers that bound the automatic settings, and assumed figures of known GPUs for planning without one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .records import DeviceSpec, HostMemory, HostPlatform, LinkSpeed, Vendor
from .units import GIB

# From this many compute units on, an unknown GPU gets its tier from a formula instead of the lowest tier.
_FORMULA_MIN_UNITS = 100

_MEMORY_SIZE = re.compile(r"\b(\d+)\s*gb\b")
_TOKEN = re.compile(r"[a-z]+|\d+")
# Words that drivers and people add to, or leave out of, the name of the same GPU.
_NOISE = frozenset({"nvidia", "geforce", "amd", "radeon", "gpu", "graphics", "tm", "r"})
_SERIES = frozenset({"rtx", "rx"})


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


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """Figures for planning for a GPU that is not in this machine.

    Attributes:
        linear_flops: floating-point operations per second reached in bf16 linear layers.
        attention_flops: the same in bf16 attention.
    """

    name: str
    total_bytes: int
    linear_flops: float
    attention_flops: float


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

# Assumed, not measured: nominal memory, and rates that kernels typically reach at video sizes. The H200's memory is
# what CUDA shows of its 141 GB. Links are not assumed: a card has 4 to 16 lanes of whatever generation its slot has.
_KNOWN_GPUS = (
    KnownGpu("RTX 3060 12GB", 12 * GIB, 22e12, 18e12),
    KnownGpu("RTX 3090", 24 * GIB, 60e12, 50e12),
    KnownGpu("RTX 4090", 24 * GIB, 150e12, 130e12),
    KnownGpu("RTX 5090", 32 * GIB, 200e12, 170e12),
    KnownGpu("RX 7900 XTX", 24 * GIB, 75e12, 35e12),
    KnownGpu("H200", 139 * GIB, 600e12, 450e12),
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
            return GpuTier(name, streams, ratio, f"{spec.name} is in the table of tiers")
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
    limit = f"tier {tier.name}: at most {tier.max_streams} streams, {share}"
    why_not = _why_not_pinned(spec, host, link)
    if why_not is not None:
        return Tuning(tier, 1, tier.bandwidth_target, pin=False, reasons=(limit, why_not))
    if link is None or not link.pinned:
        return Tuning(tier, 1, tier.bandwidth_target, pin=True, reasons=(limit, "the link is not measured: 1 stream"))
    streams, speed = link.best(max_streams=tier.max_streams)
    most = max((count for count, _ in link.pinned if count <= tier.max_streams), default=streams)
    knee = f"link: {speed / 1e9:.1f} GB/s with {'1 stream' if streams == 1 else f'{streams} streams'}"
    knee += f", as fast as with up to {most}" if most > streams else ""
    return Tuning(tier, streams, tier.bandwidth_target, pin=True, reasons=(limit, knee))


def _why_not_pinned(spec: DeviceSpec, host: HostMemory, link: LinkSpeed | None) -> str | None:
    """Why page-locked memory is refused or does harm here; None where it works."""
    if link is not None and not link.pinned and link.pageable is not None:
        return "the driver refused to page-lock memory for the measurement: copies come from pageable memory"
    if spec.vendor is not Vendor.AMD:
        return None
    if host.platform is HostPlatform.WINDOWS:
        # RX 9070 XT: 54 s with pageable memory, stalls up to 309 s with page-locked memory (reports against ComfyUI).
        return "page-locked memory stalls AMD GPUs on Windows: copies come from pageable memory, on 1 stream"
    if link is not None and link.pinned and link.pageable is not None and link.best()[1] <= link.pageable:
        figures = f"{link.best()[1] / 1e9:.1f} against {link.pageable / 1e9:.1f} GB/s"
        return f"copies from page-locked memory are no faster than from pageable memory here ({figures})"
    return None


def find_gpu(name: str) -> KnownGpu:
    """The figures of a GPU that a person named, such as "rtx 4090", "4090" or "NVIDIA GeForce RTX 4090".

    Case, vendor, series and memory size may be left out; nothing else may, because a Ti, an XT or a laptop model is
    another GPU.

    Raises:
        ValueError: no known GPU has this name, or several do. The message lists the known names.
    """
    words, sizes = _words(name), set(_MEMORY_SIZE.findall(name.lower()))
    sized = [gpu for gpu in _KNOWN_GPUS if sizes <= {str(gpu.total_bytes // GIB)}]
    fits = [gpu for gpu in sized if words and words <= _words(gpu.name)]
    exact = [gpu for gpu in fits if _words(gpu.name) - words <= _SERIES]
    if len(exact) == 1:
        return exact[0]
    known = ", ".join(gpu.name for gpu in _KNOWN_GPUS)
    if fits:
        which = f"which could be {' or '.join(gpu.name for gpu in fits)} or a model that is not known"
        raise ValueError(f"name of a GPU: expected one model, got {name!r}, {which}; known are {known}")
    raise ValueError(f"name of a GPU: expected a known model, got {name!r}; known are {known}")


def _words(name: str) -> frozenset[str]:
    """The parts of a GPU's name that distinguish it: "NVIDIA GeForce RTX 3080Ti 12GB" gives rtx, 3080 and ti."""
    tokens = _TOKEN.findall(_MEMORY_SIZE.sub(" ", name.lower()))
    return frozenset(tokens) - _NOISE
