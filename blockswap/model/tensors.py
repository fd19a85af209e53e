"""The bytes of a strided tensor, and views of bytes as tensors."""

from __future__ import annotations

import torch

from ...hardware.disk import FileMappings, FileRegion


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A strided tensor's memory from its first element to its last as a 1D tensor of the same dtype.

    It has no subclass (GGUF-like parameters keep packed bytes in one), and it holds each element once, also where the
    tensor's strides repeat elements.
    """
    with torch._C.DisableTorchFunctionSubclass():
        elements = span_bytes(tensor) // tensor.element_size()
        return torch.as_strided(tensor.detach(), (elements,), (1,))


def plain_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the whole tensor without its subclass, whatever is done to the tensor later."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()


def region_of(tensor: torch.Tensor, mappings: FileMappings) -> FileRegion | None:
    """The bytes of a file that a tensor is, as they stand; None if it is in other memory, or if that is unknown."""
    nbytes = span_bytes(tensor)
    if tensor.device.type != "cpu" or nbytes == 0:
        return None

    def sample(start: int, size: int) -> bytes:
        return bytes(flat(tensor).view(torch.uint8)[start : start + size].tolist())

    return mappings.region(tensor.data_ptr(), nbytes, sample)


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and strides, and are both inference tensors or both not."""
    layouts = [(tensor.dtype, tensor.shape, tensor.stride(), tensor.is_inference()) for tensor in (one, other)]
    return layouts[0] == layouts[1]


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a strided tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def version_of(*tensors: torch.Tensor) -> int | None:
    """Number of in-place edits of a tensor, and of the shells around it, since an edit of a shell is counted there and
    not in what it is made of; None if one is an inference tensor, which does not count edits.
    """
    try:
        return sum([tensor._version for tensor in tensors])
    except RuntimeError:
        return None


def has_own_storage(tensor: torch.Tensor) -> bool:
    """False for a wrapper subclass, which keeps its data in other tensors (torchao's, ComfyUI's QuantizedTensor)."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes behind a tensor, as stored; of a subclass that shows no tensors inside, those of its elements."""
    return sum(allocations(tensor))


def allocations(tensor: torch.Tensor) -> list[int]:
    """Bytes of each allocation behind a tensor: one, or several for a subclass that is made of other tensors."""
    if has_own_storage(tensor) and tensor.layout is torch.strided:
        return [span_bytes(tensor)]
    inner = inner_tensors(tensor)
    if not inner:
        return [tensor.numel() * tensor.element_size()]  # outside the blocks it may be sparse: this is an upper limit
    return [size for one in inner.values() for size in allocations(one)]


def inner_tensors(shell: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a tensor says it is made of, by attribute; none if its class does not say so, or fails to."""
    flatten = getattr(shell, "__tensor_flatten__", None)
    if flatten is None:
        return {}
    try:
        inner = {name: getattr(shell, name) for name in flatten()[0]}
    except Exception:  # noqa: BLE001 - the class is any package's
        return {}
    return inner if all(isinstance(tensor, torch.Tensor) for tensor in inner.values()) else {}


def inner_names(shell: torch.Tensor) -> list[str]:
    """The attributes that hold the tensors a wrapper subclass is made of; none if it cannot be taken apart.

    Flattening a shell may set these attributes. If that makes other tensors each time, they are copies of what the
    shell's operations use, and re-pointing them would have no effect.
    """
    if _has_bytes(shell):
        return []
    inner, again = inner_tensors(shell), inner_tensors(shell)
    is_stable = all(vars(shell).get(name) is tensor is again.get(name) for name, tensor in inner.items())
    return list(inner) if is_stable else []


def _has_bytes(shell: torch.Tensor) -> bool:
    """Whether a tensor has bytes beside those of the tensors that it is made of."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return shell.untyped_storage().data_ptr() != 0
        except RuntimeError:  # as of every storage without bytes
            return False


def shell_on(device: torch.device, like: torch.Tensor) -> torch.Tensor:
    """A shell without anything in it, with the class, dtype, shape and strides of `like`, on a device.

    To point a shell at it changes the shell's device and nothing else. It is an inference tensor exactly if `like` is
    one, as in `element_view`.
    """
    with torch.inference_mode(mode=like.is_inference()), torch._C.DisableTorchFunctionSubclass():
        shell: torch.Tensor = torch.Tensor._make_wrapper_subclass(
            type(like), like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        return shell


def element_view(memory: torch.Tensor, like: torch.Tensor, *, offset: int) -> torch.Tensor:
    """A view of `memory` (uint8, 1D) at byte `offset` with the dtype, shape and strides of `like`.

    The view is an inference tensor exactly if `like` is one: `.data =` changes a parameter to the kind of the assigned
    tensor, but does not add the version counter that a normal tensor needs, so the kind must not change.
    """
    with torch.inference_mode(mode=like.is_inference()):
        view = torch.empty(0, dtype=like.dtype, device=memory.device)
        start = (memory.storage_offset() + offset) // like.dtype.itemsize
        return view.set_(memory.untyped_storage(), start, like.shape, like.stride())


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies the bytes of a strided tensor to one of the same layout; either may be an inference tensor."""
    with torch.inference_mode():
        flat(target).copy_(flat(source))


def storage_key(tensor: torch.Tensor) -> int:
    """A key that only tensors with the same storage share; an address would be the same for all empty tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.untyped_storage()._cdata)
