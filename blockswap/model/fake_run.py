"""The device memory of a block's forward, found by running it on fake tensors: nothing is computed or allocated."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .layout import device_bytes
from .restored import restored

logger = logging.getLogger(__name__)


def peak_bytes(
    block: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], device: torch.device
) -> int | None:
    """Device memory that a forward of the block takes above its weights and arguments; None if it cannot be found.

    It cannot where the block calls a kernel that torch knows no shapes of, reads values of a tensor, has tensors of a
    class of its own, or is compiled. Random numbers are not drawn, hooks are not called, and what the forward keeps in
    the block or in its arguments is taken out again: a fake tensor there would break the real forward.

    Args:
        block: Runs on `device`, wherever its weights are now.
        arguments: Of the forward.
        keywords: Of the forward.
        device: The device.
    """
    if _REFUSE_POINTER is None or any(map(_is_compiled, block.modules())):
        return None
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        # Blocks of VACE models take their hint from a list by a buffer's value, which a constant keeps.
        numbers = {name: int(leaf) for name, leaf in weights.items() if _is_number(leaf)}
        with restored(block, arguments, keywords), torch.no_grad(), mode as fake, _Storages(device) as storages:
            given = [tree_map(fake.from_tensor, leaf) for leaf in weights.values() if type(leaf) in _PLAIN]
            if len(given) < len(weights):
                return None
            placed = {name: torch.empty_like(one, device=device) for name, one in zip(weights, given, strict=True)}
            placed |= {name: torch.tensor(number, device=device) for name, number in numbers.items()}
            passed = tree_map(lambda leaf: _fake(fake, leaf), (tuple(arguments), dict(keywords)))
            storages.ignore((placed, passed))
            with _Attention():
                torch.func.functional_call(block, placed, *passed)
    except Exception as failure:  # noqa: BLE001 - a block is any code, written for real tensors
        logger.debug("%s does not run on fake tensors: %s", type(block).__name__, failure)
        return None
    return storages.peak_bytes


# A kernel that torch does not know would get the address 0 from a fake tensor, and a warning, and break the device.
_REFUSE_POINTER = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (torch.Tensor, nn.Parameter)


def _is_compiled(module: nn.Module) -> bool:
    """torch.compile fuses what is counted here."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_number(leaf: torch.Tensor) -> bool:
    return leaf.dim() == 0 and leaf.device.type == "cpu" and leaf.dtype is torch.int64


def _fake(mode: FakeTensorMode, leaf: Any) -> Any:
    return mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf


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
        self.peak_bytes = self._bytes

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
