"""Quantised files: packed parameters that know their kind, and the reader that gives fresh copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

PLAIN_KINDS = ("F32", "F16")
BLOCK, BLOCK_BYTES = 32, 34
"""Q8_0: 32 numbers of one byte behind their scale, a half-precision float."""


class Kind(str):
    """How numbers are stored."""

    @property
    def name(self) -> str:
        return str(self)


@dataclass(frozen=True)
class ReaderTensor:
    """One tensor as the file has it: `(rows, bytes of a row)` if it is packed; `shape` counts numbers, reversed."""

    name: str
    data: np.ndarray
    tensor_type: Kind
    shape: np.ndarray

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes


class GGUFReader:
    """An open file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, packed: tuple[str, ...]) -> None:
        self.tensors = [
            ReaderTensor(name, pack(tensor), Kind("Q8_0"), _reversed(tensor))
            if any(part in name for part in packed) and name.endswith(".weight") and tensor.dim() == 2
            else ReaderTensor(name, tensor.to(torch.float32).numpy(), Kind("F32"), _reversed(tensor))
            for name, tensor in tensors.items()
        ]

    def get_field(self, name: str) -> None:
        """No field is noted in this file."""


def _reversed(tensor: torch.Tensor) -> np.ndarray:
    return np.array(list(reversed(tensor.shape)))


class GGUFParameter(nn.Parameter):
    """Packed bytes; what operators make of them keeps the kind."""

    quant_type: str

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, quant_type: str = "Q8_0") -> GGUFParameter:
        parameter = torch.Tensor._make_subclass(cls, data, requires_grad)
        parameter.quant_type = quant_type
        return parameter

    def as_tensor(self) -> torch.Tensor:
        return torch.Tensor._make_subclass(torch.Tensor, self, False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        kinds = [arg.quant_type for arg in args if isinstance(arg, GGUFParameter)]
        if isinstance(result, torch.Tensor):
            return cls(result, quant_type=kinds[0])
        return result


def pack(weight: torch.Tensor) -> np.ndarray:
    """A float matrix `(rows, columns)` as uint8 `(rows, columns / 32 * 34)`."""
    groups = weight.to(torch.float32).reshape(-1, BLOCK)
    scale = (groups.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-4).to(torch.float16)
    whole = (groups / scale.float()).round().clamp(-127, 127).to(torch.int8)
    packed = torch.cat([scale.view(torch.uint8), whole.view(torch.uint8)], dim=1)
    return packed.reshape(weight.shape[0], -1).numpy()


def unpack(weight: GGUFParameter, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that was packed, on the device of its bytes."""
    assert weight.quant_type == "Q8_0"
    groups = weight.as_tensor().reshape(-1, BLOCK_BYTES)
    scale = groups[:, :2].contiguous().view(torch.float16).to(dtype)
    whole = groups[:, 2:].contiguous().view(torch.int8).to(dtype)
    return (scale * whole).reshape(weight.shape[0], -1)


def open_gguf(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """What the loader sees of a file: kinds and shapes, no data."""
    seen = {}
    for tensor in reader.tensors:
        empty = torch.empty_like(torch.from_numpy(tensor.data), device="meta")
        seen[tensor.name] = empty if tensor.tensor_type in PLAIN_KINDS else GGUFParameter(empty)
    return seen
