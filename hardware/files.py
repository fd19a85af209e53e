"""Small files: text that the system may withhold, JSON that is written whole or not at all, kept measurements."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_Measurement = TypeVar("_Measurement")
_FORMAT = 2
# Bytes per second that a kept measurement may have: PCIe 1.0 x1 is at 2e8, NVLink of 2026 at 1e12.
_SLOWEST, _FASTEST = 1e3, 1e13


def read_text(path: Path) -> str | None:
    """Text of a small file, stripped; None if it is absent, forbidden, or fails in a driver (EIO, ENODEV in sysfs)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Replaces the file at `path` with all of `content`, or leaves it as it is; makes the folder.

    It follows no links: the draft must be a new file, and a link at `path` is replaced, not written through.

    Raises:
        OSError: the folder or the file cannot be written, usually because the disk is full or rights are missing.
        ValueError: the content has a number that JSON cannot express.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    separators = (",", ":") if indent is None else None
    try:
        with draft.open("x", encoding="utf-8") as file:
            json.dump(content, file, indent=indent, separators=separators, allow_nan=False)
        os.replace(draft, path)
    except BaseException:  # an interrupt leaves no draft either
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def measurement_name(kind: str, identity: Any) -> str:
    """A file name for the measurement of one thing; what identifies the thing may have characters of any kind."""
    return f"{kind}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"


def read_measurement(path: Path, key: Mapping[str, Any], parse: Callable[[Any], _Measurement]) -> _Measurement | None:
    """The measurement kept for this key; None without one, or, with one warning, if the file is damaged.

    Args:
        path: of the file.
        key: what the measurement depends on: if any of it has changed, there is none.
        parse: makes the measurement of the file's content, after `check_speeds`; content of any kind may come.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT or record["key"] != json.loads(json.dumps(key)):  # JSON has lists for tuples
            return None
        return parse(record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as exc:
        logger.warning("%s holds no measurement (%r): measuring again", path, exc)
        return None


def check_speeds(speeds: Sequence[float]) -> None:
    """Raises ValueError, or TypeError, if one of these cannot have been measured."""
    if not all(_SLOWEST <= speed <= _FASTEST for speed in speeds):
        raise ValueError(f"expected speeds from {_SLOWEST:g} to {_FASTEST:g} bytes per second, got {speeds}")


def keep_measurement(path: Path, key: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Keeps a measurement for a key; logs one warning if it cannot."""
    try:
        write_json(path, {"format": _FORMAT, "key": key} | dict(content), indent=1)
    except OSError as exc:
        logger.warning("%s cannot be written (%s); the measurement will be made again next time", path, exc)
