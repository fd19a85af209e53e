"""Small JSON files of ours in a user's folders: written whole or not at all, and read without trust; needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FOLDER_MODE = 0o755  # whatever the umask leaves open: nobody else puts files there
_FILE_MODE = 0o644


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Writes all of `content` in place of what is there, or nothing; makes the folder.

    What other users planted is not followed: the draft's name cannot be known beforehand and must be free, and a link
    that has taken the file's own name is replaced, not written through.

    Raises:
        OSError: The folder cannot be made or the file not be written, usually for a full disk or missing rights.
    """
    path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    separators = (",", ":") if indent is None else None
    try:
        with open(draft, "x", encoding="utf-8", opener=_create) as file:
            json.dump(content, file, indent=indent, separators=separators, allow_nan=False)
        os.replace(draft, path)
    except BaseException:  # an interrupt as well leaves no draft
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def _create(name: str, flags: int) -> int:
    return os.open(name, flags, _FILE_MODE)


def read_json(path: Path, *, most_bytes: int) -> Any:
    """What a JSON file says; nothing of it has been checked.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
        ValueError: It is no JSON, has more than `most_bytes`, or is a link, a pipe or a device.
        RecursionError: It nests deeper than Python can follow.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        content = file.read(min(found.st_size, most_bytes) + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return json.loads(content)


def _open_without_waiting(name: str, flags: int) -> int:
    """Where a pipe stands instead, opening it would wait for a writer; Windows has neither flag, nor such pipes."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
