"""The tensors in the header of a .safetensors or .gguf file, with their shapes, stored types and bytes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import SHOWN_LETTERS, CheckpointError, printable
from ..model.recognise import TensorInfo

LONGEST_HEADER = 8 << 20
"""Bytes of a .safetensors header. Wan 14B in fp8 with scales has 0.2 MB for its 1,500 tensors, and an embedded workflow
adds some tenths. Parsed JSON takes many times its length in memory."""

LENGTH_BYTES = 8

MOST_DIMENSIONS = 8
"""Dimensions of a tensor; Wan has up to 5."""

MOST_READS = 1 << 18
"""Reads of a .gguf header, each of which takes some hundred bytes of memory; Wan 14B needs 8,000."""

LARGEST_NUMBER = (1 << 63) - 1

LEAST_BITS = 4
"""Size of the smallest element of any stored type."""

DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,31}")

UNREADABLE = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)
"""Errors of GGUFReader for a file that is truncated or of another format, found by fuzzing (tests/fuzz)."""


class HeaderError(ValueError):
    """A header does not describe the tensors of its file.

    Attributes:
        remedy: What to do.
    """

    def __init__(self, message: str, *, remedy: str = "download it again") -> None:
        super().__init__(message)
        self.remedy = remedy


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors by name.

    Raises:
        HeaderError: The file is truncated or of another format.
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if LENGTH_BYTES + length > size:
            raise HeaderError(f"expected a header of {length:,} bytes, got a file of {size:,}")
        if length > LONGEST_HEADER:
            remedy = "save the model again without its metadata"
            raise HeaderError(f"expected a header of at most {LONGEST_HEADER:,} bytes, got {length:,}", remedy=remedy)
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise HeaderError(f"its header is not JSON ({printable(str(exc), longest=SHOWN_LETTERS)})") from exc
    if not isinstance(header, dict):
        raise HeaderError("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    places: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        tensors[name], begin = _tensor(name, fields)
        places.append((begin, begin + tensors[name].nbytes, name))
    end = 0
    for begin, after, name in sorted(places):
        if begin != end:
            raise HeaderError(
                f"expected {_shown(name)} at byte {end:,}, where the tensor before it ends, got {begin:,}"
            )
        end = after
    if LENGTH_BYTES + length + end != size:
        raise HeaderError(f"expected {LENGTH_BYTES + length + end:,} bytes according to its header, got {size:,}")
    return tensors


def _tensor(name: str, fields: object) -> tuple[TensorInfo, int]:
    """A tensor, and the offset of its bytes. Their number comes from the offsets, so that unknown types can be read."""
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = (*shape, begin, end)
            if (
                DTYPE.fullmatch(dtype)
                and len(shape) <= MOST_DIMENSIONS
                and all(type(number) is int and 0 <= number <= LARGEST_NUMBER for number in numbers)
                and math.prod(shape) * LEAST_BITS <= (end - begin) * 8
            ):
                return TensorInfo(tuple(shape), dtype, end - begin, in_file=True), begin
    raise HeaderError(f"{_shown(name)} has no valid dtype, shape and data_offsets")


def read_gguf(path: Path) -> dict[str, TensorInfo]:
    """The tensors by name, with shapes in torch's order. The gguf package maps the whole file. No tensor counts as in
    the file: the wrapper copies every one into memory.

    Raises:
        CheckpointError: The gguf package is not installed.
        HeaderError: The file is truncated or of another format.
        OSError: The file cannot be read.
    """
    try:
        import numpy as np
        from gguf import GGUFReader
    except ImportError as exc:
        needs = f"{printable(str(path))} needs the Python package gguf, which cannot be imported"
        raise CheckpointError(f"{needs}: {exc}; pip install gguf") from exc

    class Reader(GGUFReader):  # type: ignore[misc]
        """Stops at the file's end. The package itself would read empty arrays there, and with a wrong count (2^60
        numbers in a list) it would fill memory.
        """

        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.reads += 1
            end, size = int(offset) + int(count) * np.dtype(dtype).itemsize, len(self.data)
            if end > size:
                raise HeaderError(f"expected {end:,} bytes or more according to its header, got {size:,}")
            if self.reads > MOST_READS:
                raise HeaderError("its header has too many entries", remedy="convert the model again without metadata")
            return super()._get(offset, dtype, count, override_order)

    try:
        with np.errstate(over="raise"):  # sizes beyond 64 bits
            reader = Reader(path)
            return {tensor.name: _gguf_tensor(reader, tensor) for tensor in reader.tensors}
    except HeaderError:
        raise
    except UNREADABLE as exc:
        why = printable(f"{type(exc).__name__}: {exc}", longest=SHOWN_LETTERS)
        raise HeaderError(f"the gguf package cannot read it ({why})") from exc


def _gguf_tensor(reader: Any, tensor: Any) -> TensorInfo:
    # ComfyUI's converters flatten tensors that GGML's quantisation cannot hold, and store their shape here.
    noted = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    shape = tuple(map(int, noted.contents() if noted else reversed(tensor.shape.tolist())))
    count = int(tensor.n_elements)  # modulo 2^64, unlike the product of the shape
    if min(shape, default=0) < 0 or math.prod(shape) != count or len(shape) > MOST_DIMENSIONS:
        raise HeaderError(f"the shape of {_shown(tensor.name)} does not have its {count:,} elements")
    return TensorInfo(shape, tensor.tensor_type.name, int(tensor.n_bytes))


def _shown(name: str) -> str:
    return printable(name, longest=SHOWN_LETTERS)
