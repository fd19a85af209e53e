"""A device's failures as errors of ours that say what was being done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ...hardware import is_out_of_memory
from ..errors import BlockSwapError, DeviceMemoryError, TransferError

P = ParamSpec("P")
R = TypeVar("R")


def translate_device_errors(what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For functions that call a device and nothing else: a driver's RuntimeError, which knows nothing of blocks, comes
    out as a TransferError, or as a DeviceMemoryError where memory was refused.

    Args:
        what: What they do, as in "while …".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def calling(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                return function(*arguments, **keywords)
            except BlockSwapError:
                raise
            except RuntimeError as failure:
                if is_out_of_memory(failure):
                    raise DeviceMemoryError(f"the device ran out of memory while {what}: {failure}") from failure
                raise TransferError(
                    f"the device failed while {what}: {failure}; if it goes on, restart ComfyUI and look at the "
                    "driver's log"
                ) from failure

        return calling

    return decorate
