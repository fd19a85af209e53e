"""Small JSON files in a user's folders, written whole or not at all; needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Replaces the file at `path` by all of `content`, or leaves it as it is; makes the folder.

    Links are not followed: the draft must be a new file, and a link at `path` is replaced, not written through.

    Raises:
        OSError: the folder cannot be made or the file cannot be written, usually because the disk is full or rights are
            missing.
        ValueError: the content has a number that JSON does not know.
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
