"""Every error the package raises on purpose.

    BlockSwapError
    |-- SettingsError           a widget or option has a value that cannot be meant
    |-- UnsupportedModelError   the module cannot be block-swapped (no blocks, meta tensors, grad enabled)
    |-- WrapperError            ComfyUI-WanVideoWrapper has changed, is too old, or is set up in a way that cannot be
    |   |                       swapped
    |   `-- WrapperMissingError it is not there
    |-- CheckpointError         a model file is truncated, unreadable or not a Wan model
    |-- PlanError               no plan fits the memory there is
    |-- HostMemoryError         host memory could not hold or page-lock what the plan needs
    |-- DeviceMemoryError       the device could not hold what the plan promised to place there
    `-- TransferError           a copy, or the order of copies, went wrong

Each message says what happened, with numbers and names, and what to do.
"""

from __future__ import annotations


class BlockSwapError(RuntimeError):
    """Base of all errors of this package; catch it to catch them all."""


class SettingsError(BlockSwapError, ValueError):
    """A setting has a value that cannot be meant."""


class UnsupportedModelError(BlockSwapError):
    """The module cannot be block-swapped."""


class WrapperError(BlockSwapError):
    """ComfyUI-WanVideoWrapper has changed, is too old, or is set up in a way that cannot be swapped."""


class WrapperMissingError(WrapperError):
    """ComfyUI-WanVideoWrapper is not there."""


class CheckpointError(BlockSwapError):
    """A model file is truncated, unreadable or not a Wan model."""


class PlanError(BlockSwapError):
    """No plan fits the memory there is."""


class HostMemoryError(BlockSwapError):
    """Host memory could not hold or page-lock what the plan needs."""


class DeviceMemoryError(BlockSwapError):
    """The device could not hold what the plan promised to place there."""


class TransferError(BlockSwapError):
    """A copy, or the order of copies, went wrong."""


SHOWN_LETTERS = 80
"""Of a name in a message."""


def printable(text: str, *, longest: int | None = None) -> str:
    """Text from a file on one line: no control characters, which a terminal would act on, and no more than `longest`
    letters; None leaves its length.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return text if text.isprintable() else ascii(text)[1:-1]
