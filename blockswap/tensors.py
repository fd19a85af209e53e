"""What a strided tensor's bytes are, and views of bytes as tensors."""

from __future__ import annotations

import torch


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements from a strided tensor's first to its last, in memory order, 1D, without the behaviour of a subclass
    (GGUF-like parameters keep packed bytes under one). Unlike the tensor, it never names an element twice.
    """
    with torch._C.DisableTorchFunctionSubclass():
        elements = span_bytes(tensor) // tensor.element_size()
        return torch.as_strided(tensor.detach(), (elements,), (1,))


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and strides."""
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a strided tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor was edited in place; None for inference tensors, which do not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def element_view(memory: torch.Tensor, like: torch.Tensor, *, offset: int) -> torch.Tensor:
    """A view of `memory` (uint8, 1D) at byte `offset` with the dtype, shape and strides of `like`; never an inference
    tensor, so that compiled code and worker threads may use it.
    """
    with torch.inference_mode(mode=False):
        view = torch.empty(0, dtype=like.dtype, device=memory.device)
        start = (memory.storage_offset() + offset) // like.dtype.itemsize
        return view.set_(memory.untyped_storage(), start, like.shape, like.stride())
