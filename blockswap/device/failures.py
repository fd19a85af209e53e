"""Translates the errors of a device into this package's errors; no other file does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from ...hardware import is_out_of_memory
from ..errors import BlockSwapError, DeviceMemoryError, TransferError

P = ParamSpec("P")
R = TypeVar("R")

STAYS = (700, 702, 710, 714, 715, 716, 717, 718, 719)
"""Codes of cudaError_t and hipError_t after which, as CUDA documents, every further call of the process fails: an
illegal access, a kernel that was ended, an assertion in one, and the like."""


def translate_device_errors(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates functions that call only the device: a RuntimeError of the driver becomes a TransferError, or a
    DeviceMemoryError if the device ran out of memory.

    Args:
        what: What the function does, as a clause after "while".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def translated(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                return function(*arguments, **keywords)
            except BlockSwapError:
                raise
            except RuntimeError as failure:
                raise device_error(failure, what) from failure

        return translated

    return decorate


def device_error(failure: RuntimeError, what: str) -> BlockSwapError:
    """This package's error for one that the driver or torch's allocator raised; `what` as for the decorator."""
    if is_out_of_memory(failure):
        return DeviceMemoryError(f"the device ran out of memory while {what}: {failure}")
    if _stays(failure):
        return TransferError(
            f"the device failed while {what}, and will until this process ends: {failure}; restart ComfyUI"
        )
    return TransferError(
        f"the device failed while {what}: {failure}; if it fails again, restart ComfyUI and read the driver's log"
    )


def _stays(failure: BaseException) -> bool:
    return getattr(failure, "error_code", None) in STAYS  # of torch's AcceleratorError, since 2.8


def staged_failure(failure: BaseException) -> BlockSwapError:
    """The error that the host thread raises for a failure in the worker that is not this package's own."""
    if isinstance(failure, RuntimeError) and (is_out_of_memory(failure) or _stays(failure)):
        return device_error(failure, "the worker was copying weights")
    return TransferError(f"a copy to the device failed in the worker: {failure}")


@contextlib.contextmanager
def translate_out_of_memory(device: torch.device, nbytes: int) -> Iterator[None]:
    """Wraps an allocation of known size: the error names the device and the bytes if the device has too little left."""
    try:
        yield
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        raise DeviceMemoryError(
            f"not enough VRAM on {device} for {nbytes:,} bytes of block weights; "
            "lower vram_threshold_percent, swap more blocks, or close other programs on the GPU"
        ) from failure
