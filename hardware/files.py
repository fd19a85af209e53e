"""Small files: text that the system may withhold, and JSON that is written whole or not at all; needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
