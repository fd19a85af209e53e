"""Reads a Wan model's blocks, tensors and bytes from the header of its file, without loading a weight."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import CheckpointError, printable
from ..model.wan import CheckpointProfile, profile_tensors
from .headers import HeaderError, read_gguf, read_safetensors

FORMATS = {".safetensors": ("safetensors", read_safetensors), ".gguf": ("GGUF", read_gguf)}


def read_checkpoint(path: Path) -> CheckpointProfile:
    """The profile of a Wan transformer from the header of its .safetensors or .gguf file.

    Args:
        path: One file with all blocks, in Wan's own layout or diffusers'.

    Raises:
        CheckpointError: The file is missing, truncated, of another format, not a Wan model or incomplete, or the
            package that reads it is missing.
    """
    source = printable(str(path))
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"{source} is a folder; name the model file inside it")
        if not stat.S_ISREG(found.st_mode):  # a read from a pipe would wait for its writer
            raise CheckpointError(f"{source} is a pipe, a socket or a device; name a model file")
        if path.suffix.lower() not in FORMATS:
            kinds = " or ".join(FORMATS)
            raise CheckpointError(f"expected a {kinds} file, got {printable(path.name)}; convert it, or name another")
        kind, read = FORMATS[path.suffix.lower()]
        stored = read(path)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise CheckpointError(f"there is no model file {source}; check the name and the folder") from exc
    except OSError as exc:
        why = printable(str(exc))
        raise CheckpointError(f"{source} cannot be read ({why}); check its permissions and its disk") from exc
    except HeaderError as exc:
        message = f"{source} ({found.st_size:,} bytes) is not a complete {kind} file: {exc}"
        raise CheckpointError(f"{message}; {exc.remedy}") from exc
    return profile_tensors(source, stored)
