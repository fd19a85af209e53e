"""What a process takes of device and host, by accounts that hold for every engine."""

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
"""Parts of the names that torch's profiler gives to copies, on CUDA and on HIP."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what runs on the device."""


class Usage:
    """Device memory by the driver's account, and the host's available memory, less what they were at the begin.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._spec = probe_device(device)
        self._device_before = self._device_used()
        self._host_before = read_host_memory().available_bytes

    def device_bytes(self) -> int | None:
        """Device memory taken since, by whomever; None where the driver does not tell."""
        now = self._device_used()
        return None if now is None or self._device_before is None else now - self._device_before

    def host_bytes(self) -> int:
        """Host memory taken since, by whomever."""
        return self._host_before - read_host_memory().available_bytes

    def _device_used(self) -> int | None:
        with open_readings(self._spec) as readings:
            used = dict(readings)[VRAM_USED_BYTES]()
        return None if used is None else int(used)


def pinned_by_torch(device: torch.device) -> int:
    """Host memory that torch's own allocator has page-locked, as it rounds it up."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


@contextlib.contextmanager
def copied_in(meter: DeviceMeter) -> Iterator[Callable[[], Moved | None]]:
    """Counts what is copied inside: on CUDA and HIP all of it, in whichever thread, as the profiler sees it on the
    device; elsewhere, and where torch was built without that, as the device or torch's dispatcher counts.
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
    """Bytes of the copies among the events of a Chrome trace, as torch's profiler writes them; None where it has seen
    nothing of the device at all.
    """
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
