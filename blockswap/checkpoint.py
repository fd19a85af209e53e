"""A model file's header → its blocks, tensors and bytes, without loading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .stored import CheckpointProfile, StoredTensor, profile_tensors

LONGEST_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the safetensors format refuses longer ones, so a larger number is some other file's first bytes."""


def read_checkpoint(path: Path) -> CheckpointProfile:
    """The profile of a Wan transformer from the header of its .safetensors or .gguf file.

    Args:
        path: The file, in Wan's own layout or diffusers'; one file with all blocks, not a shard.

    Raises:
        CheckpointError: The file is missing, truncated, of another kind, not a Wan model or without some blocks; or
            the library that reads it is not installed.
    """
    readers = {".safetensors": _read_safetensors, ".gguf": _read_gguf}
    reader = readers.get(path.suffix.lower())
    if path.is_dir():
        raise CheckpointError(f"expects a model file but {path} is a folder: name the file inside it")
    if not path.is_file():
        raise CheckpointError(f"there is no model file {path}: check the name and the folder")
    if reader is None:
        kinds = " or ".join(readers)
        raise CheckpointError(f"expects a {kinds} file but got {path.name}: convert it, or name another file")
    try:
        stored = reader(path)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc}): check its permissions and its disk") from exc
    return profile_tensors(str(path), stored)


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as exc:
        raise CheckpointError(f"reading {path.name} needs the safetensors package: pip install safetensors") from exc
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # a file, not a mapping
                entry = file.get_slice(name)
                tensors[name] = _safetensors_entry(tuple(entry.get_shape()), entry.get_dtype())
    except SafetensorError as exc:
        raise CheckpointError(f"{path} is no whole safetensors file ({exc}): {_what_is_missing(path)}") from exc
    return tensors


def _safetensors_entry(shape: tuple[int, ...], dtype: str) -> StoredTensor:
    bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, U8, F4: the first number; BOOL alone has none
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(shape, dtype, count * (int(bits.group()) if bits else 8) // 8)


def _what_is_missing(path: Path) -> str:
    """Which bytes a safetensors file that its library refuses lacks, and what to do."""
    size, again = path.stat().st_size, "download it again"
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if size < len(start) + 1 or header_bytes > LONGEST_SAFETENSORS_HEADER:
            return f"expects the length of a header but its {size:,} bytes begin with {start!r}; {again}"
        if size < 8 + header_bytes:
            return f"expects a header of {header_bytes:,} bytes but the whole file has {size:,}; {again}"
        try:
            entries = json.loads(file.read(header_bytes))
            end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"its header cannot be parsed; {again}"
    return f"expects {8 + header_bytes + end:,} bytes by its header but has {size:,}; {again}"


def _read_gguf(path: Path) -> dict[str, StoredTensor]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
    except ImportError as exc:
        raise CheckpointError(f"reading {path.name} needs the gguf package: pip install gguf") from exc

    class SizeCheckingReader(GGUFReader):  # type: ignore[misc]  # gguf has no types
        """Tells a file that is cut short by its tensor table, before the reader maps tensors that are not there."""

        def _build_tensors(self, start_offs: int, fields: Sequence[Any]) -> None:
            end = 0
            for *_, shape, dtype, offset in (field.parts for field in fields):
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(dtype[0])]
                end = max(end, start_offs + int(offset[0]) + int(shape.prod()) // block * block_bytes)
            if end > self.data.nbytes:
                raise CheckpointError(
                    f"{path} is cut short: expects {end:,} bytes by its header but has {self.data.nbytes:,}; "
                    "download it again"
                )
            super()._build_tensors(start_offs, fields)

    try:
        reader = SizeCheckingReader(path)
    except (ValueError, IndexError, KeyError) as exc:  # what it raises for a header that is cut, or another file's
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is no whole GGUF file: expects a header and a tensor table but its {size:,} bytes end or differ "
            f"before that ({exc}); download it again"
        ) from exc
    return tensors_of_gguf(reader)


def tensors_of_gguf(reader: Any) -> dict[str, StoredTensor]:
    """The tensor table of an open GGUFReader."""
    tensors = {}
    for tensor in reader.tensors:
        # ComfyUI's converters flatten tensors that GGML's quantisation cannot hold and note their shape here.
        noted = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = noted.contents() if noted else reversed(tensor.shape.tolist())
        tensors[tensor.name] = StoredTensor(tuple(map(int, shape)), tensor.tensor_type.name, int(tensor.n_bytes))
    return tensors
