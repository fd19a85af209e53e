"""A measurement of the link on disk: kept per device and driver, and believed only if it could have been measured."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import read_json, write_json
from .spec import LinkSpeed

logger = logging.getLogger(__name__)

FORMAT = 2
MOST_BYTES = 64 * 1024
"""A record has half a KiB."""

SLOWEST, FASTEST = 1e3, 1e13
"""Bytes per second: PCIe 1.0 x1 is at 2e8, NVLink of 2026 at 1e12. What is beyond was never measured, and a plan's
arithmetic would lose its digits."""


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What a measurement belongs to; a change in any of it asks for a new one."""

    name: str
    uuid: str | None
    pci_bus_id: str | None
    driver: str | None
    torch_version: str
    stream_counts: tuple[int, ...]
    nbytes: int


def cache_name(key: MeasurementKey) -> str:
    """A file name for the device, of letters and digits alone whatever its driver calls it."""
    identity = json.dumps([key.name, key.uuid, key.pci_bus_id])
    return f"link-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def read_measurement(path: Path, key: MeasurementKey) -> LinkSpeed | None:
    """The measurement kept for this key; None if there is none, or the file cannot be believed, with one warning."""
    try:
        record = read_json(path, most_bytes=MOST_BYTES)
        if not isinstance(record, dict):
            raise TypeError(f"expects an object but got a {type(record).__name__}")
        if record["format"] != FORMAT or record["key"] != _as_json(key):
            return None
        return _measurement(record, key.stream_counts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
        logger.warning("%s is not a measurement of a link (%.200r); it is measured again", path, exc)
        return None


def _measurement(record: dict[str, Any], counts: tuple[int, ...]) -> LinkSpeed:
    pinned, host_copy = record["pinned"], record["host_copy"]
    if not isinstance(pinned, list) or not all(isinstance(pair, list) and len(pair) == len("cs") for pair in pinned):
        raise TypeError("expects a list of (stream count, speed)")
    found = tuple(count for count, _ in pinned)
    if pinned and (found != counts or not all(type(count) is int for count in found)):
        raise ValueError(f"expects figures for {list(counts)} streams")
    return LinkSpeed(
        tuple((count, _speed(speed)) for count, speed in pinned),
        _speed(record["pageable"]),
        None if host_copy is None else _speed(host_copy),
    )


def _speed(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not SLOWEST <= value <= FASTEST:
        raise ValueError(f"expects a speed from {SLOWEST:g} to {FASTEST:g} bytes per second")
    return float(value)


def keep_measurement(path: Path, key: MeasurementKey, speed: LinkSpeed) -> None:
    """Keeps a measurement; one warning if it cannot be written."""
    try:
        write_json(path, {"format": FORMAT, "key": _as_json(key)} | asdict(speed), indent=1)
    except OSError as exc:
        logger.warning("%s cannot be written (%s); the link will be measured again next time", path, exc)


def _as_json(key: MeasurementKey) -> Any:
    """The key as reading its JSON gives it: lists for tuples."""
    return json.loads(json.dumps(asdict(key)))
