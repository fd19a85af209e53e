"""Every error that the package raises on purpose. Messages say what happened, with numbers, and what to do."""

from __future__ import annotations


class BlockSwapError(RuntimeError):
    """Base of all errors of this package."""


class SettingsError(BlockSwapError, ValueError):
    """A widget or an option has an invalid value."""


class UnsupportedModelError(BlockSwapError):
    """The module cannot be block-swapped: it has no blocks, a tensor without data, or grad enabled."""


class WrapperError(BlockSwapError):
    """ComfyUI-WanVideoWrapper has changed, is too old, or is set up in a way that prevents swapping."""


class WrapperMissingError(WrapperError):
    """ComfyUI-WanVideoWrapper is not installed."""


class CheckpointError(BlockSwapError):
    """A model file is truncated, unreadable or not a Wan model."""


class PlanError(BlockSwapError):
    """No plan fits the available memory."""


class HostMemoryError(BlockSwapError):
    """The host could not allocate or page-lock the memory of a plan."""


class WeightFileError(BlockSwapError):
    """A model's file has changed, is gone, or could not be read while its weights are used from it."""


class DeviceMemoryError(BlockSwapError):
    """The device could not allocate the memory of a plan, or of a forward under the smallest one."""


class TransferError(BlockSwapError):
    """A copy failed, or copies and kernels were out of order."""


SHOWN_LETTERS = 80
"""Longest name in a message."""


def printable(text: str, *, longest: int | None = None) -> str:
    """Text from a file on one line, without control characters, which a terminal would act on.

    Args:
        text: Any text.
        longest: Number of characters after which the text is cut; None cuts nothing.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return text if text.isprintable() else ascii(text)[1:-1]
