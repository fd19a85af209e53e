"""The device memory of a block's forward, found by running it on fake tensors: nothing is computed or allocated."""

from __future__ import annotations

import copy
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layout import device_bytes

logger = logging.getLogger(__name__)


def peak_bytes(
    block: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], device: torch.device
) -> int | None:
    """Device memory that a forward of the block takes above its weights and arguments; None if it cannot be found.

    It cannot where the block calls a kernel that torch knows no shapes of, reads values of a tensor, has tensors of a
    class of its own, is compiled, or has had its forward replaced by a function. Random numbers are not drawn, hooks
    are not called, and the block is not changed.

    Args:
        block: Runs on `device`, wherever its weights are now.
        arguments: Of the forward.
        keywords: Of the forward.
        device: The device.
    """
    if _REFUSE_POINTER is None or any(map(_is_changed, block.modules())):
        return None
    weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    if any(type(weight) not in _PLAIN for weight in weights.values()):
        return None
    # Blocks of VACE models take their hint from a list by a buffer's value, which a constant keeps.
    numbers = {name: int(weight) for name, weight in weights.items() if _is_number(weight)}
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            twin, passed = _copied(block, (tuple(arguments), dict(keywords)), fake)
            tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
            placed = {name: torch.empty_like(one, device=device) for name, one in tensors.items()}
            placed |= {name: torch.tensor(number, device=device) for name, number in numbers.items()}
            with _Storages(device) as storages, _Attention():
                storages.ignore((placed, passed))
                torch.func.functional_call(twin, placed, *passed)
    except Exception as failure:  # noqa: BLE001 - a block is any code, written for real tensors
        logger.debug("%s does not run on fake tensors: %s", type(block).__name__, failure)
        return None
    return storages.peak_bytes


# A kernel that torch does not know would get the address 0 from a fake tensor, and a warning, and break the device.
_REFUSE_POINTER = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (torch.Tensor, nn.Parameter)


def _is_changed(module: nn.Module) -> bool:
    """Whether torch.compile fuses what is counted here, or a pack's function may keep tensors out of a copy's reach."""
    is_compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return is_compiled or isinstance(vars(module).get("forward"), FunctionType)


def _is_number(leaf: torch.Tensor) -> bool:
    return leaf.dim() == 0 and leaf.device.type == "cpu" and leaf.dtype is torch.int64


def _copied(block: nn.Module, passed: Any, mode: FakeTensorMode) -> Any:
    """The block without its hooks, and its arguments, with fake tensors: what the forward keeps, it keeps in these. A
    fake tensor in the block itself would break the real forward.
    """
    without_hooks: dict[int, Any] = {
        id(hooks): OrderedDict() for module in block.modules() for hooks in _hooks_of(module)
    }
    with FakeCopyMode(mode):
        return copy.deepcopy((block, passed), without_hooks)


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    return (value for name, value in vars(module).items() if name.endswith(("_hooks", "_hooks_with_kwargs")))


class _Storages(TorchDispatchMode):
    """Counts the storages on a device, from the operator that returns one until its last reference is gone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._device = device.type
        self._sizes: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() if tensor.device.type == self._device else 0
                self._follow(tensor, device_bytes(size))
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        return result

    def ignore(self, tensors: Any) -> None:
        """These are weights or arguments."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                self._freed(key)
                self._follow(tensor, 0)

    def _follow(self, tensor: torch.Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            assert _REFUSE_POINTER is not None
            _REFUSE_POINTER(tensor)
            self._sizes[key] = nbytes
            self._bytes += nbytes
            weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self._bytes -= self._sizes.pop(key, 0)


class _Attention(TorchFunctionMode):
    """Takes the place of attention's kernels, which on fake tensors may be those that make the whole matrix: the output
    and a logsumexp, as of CUDA's flash kernel.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query = args[0] if args else (kwargs or {})["query"]
        logsumexp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        output = torch.empty_like(query)
        del logsumexp
        return output
