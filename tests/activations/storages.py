"""The peak memory of code that runs on fake tensors: which storages it makes on a device, and when each is freed.

Nothing is computed: with `FakeTensorMode`, a forward of a 14B model over 100,000 tokens takes seconds and a few
megabytes. What is counted is what torch's caching allocator gives out: each storage in whole 512 bytes, from the
operator that returns it until its last reference is gone; views share their storage.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GRAIN = 512
"""The caching allocator's unit (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp)."""

FEW = 64
"""Elements up to which a tensor's values are known, if they follow from those of tensors on the CPU: grid sizes are
read back by the model's code."""


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at::detail { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
"""


def let_fakes_be_on_cuda() -> None:
    """Lets fake tensors be on a CUDA device in a torch without CUDA: indexing wants a guard of the device, which may do
    nothing.
    """
    if torch.version.cuda is None:
        from torch.utils.cpp_extension import load_inline

        load_inline("activations_guard", GUARD, is_python_module=False)


class Storages(TorchDispatchMode):
    """Counts the storages on `device` that operators make while the mode is active.

    Attributes:
        live: Bytes of the storages that exist now.
        peak: The highest value of `live`.
        at_peak: Bytes by operator and shape of what existed at the peak.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._sizes: dict[int, tuple[int, str]] = {}
        self._values: dict[int, torch.Tensor] = {}
        self.at_peak: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        values = self._computed(func, given, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and values is not None:
            return values
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self._follow(tensor.untyped_storage(), f"{func} {tuple(tensor.shape)} {tensor.dtype}")
        for tensor, known in zip(tree_leaves(result), tree_leaves(values), strict=False):
            if isinstance(tensor, torch.Tensor) and isinstance(known, torch.Tensor) and known.numel() <= FEW:
                self._remember(tensor, known)
        return result

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Takes these for weights or inputs: they are not counted."""
        for tensor in tensors:
            self._sizes.setdefault(tensor.untyped_storage()._cdata, (0, "input"))
            self._watch(tensor.untyped_storage())

    def _follow(self, storage: torch.UntypedStorage, name: str) -> None:
        if storage._cdata in self._sizes:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self._sizes[storage._cdata] = (size, name)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = Counter()
            for nbytes, made in self._sizes.values():
                self.at_peak[made] += nbytes
        self._watch(storage)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        weakref.finalize(storage, self._freed, storage._cdata).atexit = False

    def _freed(self, key: int) -> None:
        size, _ = self._sizes.pop(key, (0, ""))
        self.live -= size

    def _computed(self, func: Any, given: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator gives for tensors of known values; None if one is unknown."""
        if not given or any(id(tensor) not in self._values and not _is_real(tensor) for tensor in given):
            return None
        if max(tensor.numel() for tensor in given) > FEW:
            return None
        known = tree_map(
            lambda leaf: self._values.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, args
        )
        options = {name: value for name, value in kwargs.items() if name not in {"device", "pin_memory"}}
        with _disable_current_modes():
            return func(*known, **options)

    def _remember(self, tensor: torch.Tensor, values: Any) -> None:
        self._values[id(tensor)] = values
        weakref.finalize(tensor, self._values.pop, id(tensor), None).atexit = False


def _is_real(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu"


def flash_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
    """Takes the place of scaled_dot_product_attention: what CUDA's flash kernel allocates, the output in the layout of
    the queries and a logsumexp in float32 (_scaled_dot_product_flash_attention_cuda in
    aten/src/ATen/native/transformers/cuda/attention.cu). On fake tensors it may be the whole matrix.
    """
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (one.to(torch.get_autocast_dtype("cuda")) for one in (query, key, value))
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    del lse
    return out
