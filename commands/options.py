"""Parses values of the command line: sizes, counts, shapes, a device, a card's budget."""

from __future__ import annotations

from pathlib import Path

import torch

from ..blockswap.errors import SettingsError
from ..blockswap.model.layout import ModelProfile
from ..blockswap.plan.swap_plan import PlanInputs
from ..hardware import MIB, HardwareUnavailableError, HostMemory, format_bytes, parse_bytes, probe_device

_LARGEST_SIDE = 100_000  # pixels or frames, far above any video


def parse_size(option: str, text: str) -> int:
    """Bytes of memory, from `12GB`, `12 GiB`, `12G` or `12`, which are all the same.

    Raises:
        SettingsError: The text is not a size, or is far below the memory of any machine.
    """
    try:
        size = parse_bytes(text, unit="GB")
    except ValueError as cause:
        raise SettingsError(f"{option}: {cause}") from cause
    if 0 < size < MIB:
        raise SettingsError(f"{option}: expected a memory size such as 12GB, got {text!r}, which is {size} bytes")
    return size


def parse_count(text: str | None, blocks: int) -> int | None:
    """A number of blocks, from `0` to `blocks`, `half` or `all`; None means automatic and stays None."""
    if text is None:
        return None
    try:
        count = {"half": blocks // 2, "all": blocks}.get(text)
        count = int(text) if count is None else count
    except ValueError:
        count = -1
    if not 0 <= count <= blocks:
        expected = f"a whole number from 0 to {blocks} (the number of blocks), half or all"
        raise SettingsError(f"--blocks-to-swap: expected {expected}, got {text[:40]!r}")
    return count


def parse_shape(text: str) -> tuple[int, int, int]:
    """Width, height and frames, from `832x480x81`."""
    try:
        width, height, frames = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise SettingsError(
            f"--shape: expected WxHxF such as 832x480x81 (width, height, frames), got {text[:40]!r}"
        ) from None
    if max(width, height, frames) > _LARGEST_SIDE:
        raise SettingsError(f"--shape: expected at most {_LARGEST_SIDE} for each number, got {text[:40]!r}")
    return width, height, frames


def choose_device(name: str) -> torch.device:
    """The device called `name`; for `auto` the current GPU, or the CPU without a GPU.

    Raises:
        SettingsError: torch has no device of this name, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        probe_device(device)
    except RuntimeError as cause:
        why = cause if isinstance(cause, HardwareUnavailableError) else "torch knows no device of this name"
        raise SettingsError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}: {why}") from cause
    return device


def cache_dir() -> Path | None:
    """The user's cache folder for this package; None, which caches nothing, without platformdirs."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    return user_cache_path("wanvideo-enhanced-blockswap")


def card_inputs(profile: ModelProfile, vram_bytes: int, host: HostMemory) -> PlanInputs:
    """Inputs of a plan for a card that holds only the model.

    Raises:
        SettingsError: The weights outside the blocks alone are larger than the card.
    """
    if vram_bytes < profile.other_bytes:
        figures = f"{format_bytes(profile.other_bytes)} needed, {format_bytes(vram_bytes)} given"
        message = f"--vram: not enough for the weights outside the blocks: {figures}"
        raise SettingsError(f"{message}; take a larger GPU or a smaller model")
    return PlanInputs(
        device_total_bytes=vram_bytes,
        device_free_bytes=vram_bytes - profile.other_bytes,
        host_available_bytes=host.available_bytes,
        host_room_bytes=host.room_bytes,
        pin_budget_bytes=host.pin_budget_bytes,
    )
