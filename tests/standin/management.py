"""What ComfyUI gives the wrapper: a device, a place to offload to, and the interrupt that a user sends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


class InterruptProcessingException(BaseException):
    """The user has stopped the run. No `Exception`, so that only `finally` and `except BaseException` meet it."""


@dataclass
class Machine:
    """The state that ComfyUI keeps for the whole process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checks_left: int | None = None


machine = Machine()


def get_torch_device() -> torch.device:
    return machine.device


def unet_offload_device() -> torch.device:
    return torch.device("cpu")


def interrupt_after(checks: int | None) -> None:
    """The user interrupts after so many checks; None: not at all."""
    machine.checks_left = checks


def throw_exception_if_processing_interrupted() -> None:
    if machine.checks_left is None:
        return
    machine.checks_left -= 1
    if machine.checks_left < 0:
        machine.checks_left = None
        raise InterruptProcessingException


def unload_all_models() -> None:
    """Models that ComfyUI itself has placed leave the device; Wan transformers are not among them."""
