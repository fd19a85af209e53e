"""`probe`: the readings of the hardware layer, and the measured link."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from enum import Enum

from ..blockswap.settings import SwapSettings
from ..hardware import format_bytes, measure_link, probe_device, read_device_memory, read_host_memory, tune
from ..hardware.units import format_speed
from .options import cache_dir, choose_device
from .output import Result, pairs

LABELS = {
    "host_memory.cgroup_limit_bytes": "host memory limit of the container",
    "host_memory.memlock_bytes": "host memory that mlock may lock",
    "link.pinned": "copies to the GPU from locked RAM",
    "link.pageable": "copies to the GPU from ordinary RAM",
    "link.host_copy": "copies into locked RAM",
    "tuning.tier": "tuning limits",
    "tuning.pin": "tuning locks RAM",
}
"""Of figures whose name in the JSON object is a developer's word."""


def probe(options: Namespace) -> Result:
    """Reads the device, the host and the link between them.

    Raises:
        HardwareUnavailableError: The device cannot be read.
        SettingsError: There is no such device.
    """
    device = choose_device(options.device)
    spec, memory, host = probe_device(device), read_device_memory(device), read_host_memory()
    link = measure_link(device, cache_dir=cache_dir(), again=options.again)
    tuning = None
    if memory is not None:
        tuning = tune(spec, host, link, vram_threshold_percent=SwapSettings().vram_threshold_percent)
    readings = {"device": spec, "device_memory": memory, "host_memory": host, "link": link, "tuning": tuning}
    data = {name: None if value is None else asdict(value, dict_factory=_plain) for name, value in readings.items()}
    rows: list[tuple[str, str]] = []
    for name, fields in data.items():
        rows += [(_label(f"{name}.{field}"), _words(field, value)) for field, value in (fields or {}).items()]
        rows += [] if fields else [(_label(name), "unknown")]
    return Result(data, pairs(rows))


def _label(name: str) -> str:
    return LABELS.get(name) or name.replace("_bytes", "").replace("_", " ").replace(".", " ")


def _plain(fields: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in fields}


def _words(field: str, value: object) -> str:
    if value is None:
        return "unknown"
    if field.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if field in ("pageable", "host_copy") and isinstance(value, float):
        return format_speed(value)
    if field == "pinned" and isinstance(value, tuple):
        return ", ".join(f"{count} streams {format_speed(speed)}" for count, speed in value) or "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items() if name != "reason")
    return "; ".join(map(str, value)) if isinstance(value, tuple) else str(value)
