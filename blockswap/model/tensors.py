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
    """Whether two tensors have one dtype, shape and strides, and are both inference tensors or both not."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.is_inference() == other.is_inference()
    )


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
    """A view of `memory` (uint8, 1D) at byte `offset` with the dtype, shape and strides of `like`.

    It is an inference tensor exactly if `like` is one: `.data =` gives a parameter the kind of the tensor it is pointed
    at, but not the version counter that a normal tensor needs, so the kind must not change.
    """
    with torch.inference_mode(mode=like.is_inference()):
        view = torch.empty(0, dtype=like.dtype, device=memory.device)
        start = (memory.storage_offset() + offset) // like.dtype.itemsize
        return view.set_(memory.untyped_storage(), start, like.shape, like.stride())


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies the bytes of a strided tensor to another of the same layout, whichever of them are inference tensors."""
    with torch.inference_mode():
        flat(target).copy_(flat(source))


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share storage have in common; unlike an address, it differs between empty tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.untyped_storage()._cdata)
