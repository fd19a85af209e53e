"""Device and host memory of a process, counted in the same way for every engine."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from wanvideo_enhanced_blockswap.commands.demo import DeviceMeter, Moved
from wanvideo_enhanced_blockswap.hardware import probe_device, read_host_memory
from wanvideo_enhanced_blockswap.hardware.monitor import VRAM_USED_BYTES, open_readings

TO_DEVICE = ("HtoD", "HostToDevice")
TO_HOST = ("DtoH", "DeviceToHost")
"""Parts of the names of copies in torch's profiler, on CUDA and on HIP."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events on the device."""


class Usage:
    """Changes of device memory, by the driver's count, and of the host's available memory since this was made.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._spec = probe_device(device)
        self._device_before = self._device_used()
        self._host_before = read_host_memory().available_bytes

    def device_bytes(self) -> int | None:
        """Device memory taken since, counting all processes; None if the driver does not report it."""
        now = self._device_used()
        return None if now is None or self._device_before is None else now - self._device_before

    def host_bytes(self) -> int:
        """Host memory taken since, counting all processes."""
        return self._host_before - read_host_memory().available_bytes

    def _device_used(self) -> int | None:
        with open_readings(self._spec) as readings:
            used = dict(readings)[VRAM_USED_BYTES]()
        return None if used is None else int(used)


def pinned_by_torch(device: torch.device) -> int:
    """Host memory that torch's own allocator has page-locked, as rounded up by it."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


@contextlib.contextmanager
def copied_in(meter: DeviceMeter) -> Iterator[Callable[[], Moved | None]]:
    """Counts the bytes copied in the body: on CUDA and HIP all copies of all threads, by torch's profiler; elsewhere,
    or if torch was built without it, by the device or torch's dispatcher.
    """
    activity = torch.profiler.ProfilerActivity.CUDA
    if meter.device.type != "cuda" or activity not in torch.profiler.supported_activities():
        with meter.count_copies() as moved:
            yield moved
        return
    found: list[Moved | None] = []
    with torch.profiler.profile(activities=[activity]) as profiler:
        yield lambda: found[0]
        torch.cuda.synchronize(meter.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found.append(copies(json.loads(path.read_bytes())["traceEvents"]))


def copies(events: Sequence[dict[str, Any]]) -> Moved | None:
    """Bytes of the copies in a Chrome trace of torch's profiler; None if it has no event of the device."""
    if not any(event.get("cat") in ON_DEVICE for event in events):
        return None
    moved = Moved()
    for event in events:
        name, nbytes = event.get("name", ""), event.get("args", {}).get("bytes", 0)
        if any(part in name for part in TO_DEVICE):
            moved.to_device += nbytes
        elif any(part in name for part in TO_HOST):
            moved.to_host += nbytes
    return moved
