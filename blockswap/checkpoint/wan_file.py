"""A model file's header -> its blocks, tensors and bytes, without loading a weight."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import CheckpointError, printable
from ..model.wan import CheckpointProfile, profile_tensors
from .gguf_header import gguf_table
from .safetensors_header import LENGTH_BYTES, safetensors_table
from .untrusted import LONGEST_HEADER, HeaderError

FORMATS = {".safetensors": ("safetensors", safetensors_table), ".gguf": ("GGUF", gguf_table)}


def read_checkpoint(path: Path) -> CheckpointProfile:
    """The profile of a Wan transformer from the header of its .safetensors or .gguf file.

    Whatever the file holds, this takes a second and 64 MB at most, opens no other file, and ends in a profile or a
    CheckpointError: [Note: Untrusted headers] in untrusted.py.

    Args:
        path: The file, in Wan's own layout or diffusers'; one file with all blocks, not a shard.

    Raises:
        CheckpointError: The file is missing, truncated, of another kind, not a Wan model or without some blocks.
    """
    source = printable(str(path))
    try:
        _refuse_what_is_no_file(path.stat().st_mode, source)
        if path.suffix.lower() not in FORMATS:
            kinds, name = " or ".join(FORMATS), printable(path.name)
            raise CheckpointError(f"expects a {kinds} file but got {name}: convert it, or name another file")
        start, size = _read_start(path, source)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise CheckpointError(f"there is no model file {source}: check the name and the folder") from exc
    except OSError as exc:
        why = printable(str(exc))
        raise CheckpointError(f"{source} cannot be read ({why}): check its permissions and its disk") from exc
    kind, table = FORMATS[path.suffix.lower()]
    try:
        stored = table(start, size)
    except HeaderError as exc:
        raise CheckpointError(f"{source}, {size:,} bytes long, is no whole {kind} file: {exc}; {exc.remedy}") from exc
    return profile_tensors(source, stored)


def _refuse_what_is_no_file(mode: int, source: str) -> None:
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"expects a model file but {source} is a folder: name the file inside it")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"expects a model file but {source} is a pipe, a socket or a device: name a file")


def _read_start(path: Path, source: str) -> tuple[bytes, int]:
    """The first bytes, of which no more than the longest header has, and the size of the whole."""

    def without_waiting(name: str, flags: int) -> int:
        # A pipe that has taken the file's place since it was looked at would let the open wait for a writer.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=without_waiting) as file:
        found = os.fstat(file.fileno())
        _refuse_what_is_no_file(found.st_mode, source)
        wanted = min(found.st_size, LENGTH_BYTES + LONGEST_HEADER)
        start = file.read(wanted)
    if len(start) < wanted:
        raise CheckpointError(
            f"{source} expects {wanted:,} bytes to be read but gave {len(start):,}: it has become shorter meanwhile; "
            "wait until its download is complete"
        )
    return start, found.st_size
