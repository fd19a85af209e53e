"""From the name that a person gives to a torch device that exists."""

from __future__ import annotations

import torch

from ..blockswap.errors import SettingsError
from ..hardware import HardwareUnavailableError, probe_device


def choose_device(name: str) -> torch.device:
    """The device called `name`; for `auto` the GPU if there is one, else the CPU.

    Raises:
        SettingsError: This is no name of a device, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    expected = "--device expects auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
        probe_device(device)
    except HardwareUnavailableError as cause:
        raise SettingsError(f"{expected} but got {name!r}: {cause}") from cause
    except RuntimeError as cause:
        raise SettingsError(f"{expected} but got {name!r}, which names no device") from cause
    return device
