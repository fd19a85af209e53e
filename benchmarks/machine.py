"""The machine of a benchmark, for its heading."""

from __future__ import annotations

import datetime
import os

import torch
from wanvideo_enhanced_blockswap.hardware import probe_device


def host() -> str:
    """The host without its devices."""
    return f"{os.cpu_count()} cores of {probe_device(torch.device('cpu')).name}"


def machine(device: torch.device) -> str:
    """The device and its host; the CPU stands for a simulated device."""
    return f"simulated device, {host()}" if device.type == "cpu" else f"{probe_device(device).name}, {host()}"


def origin(device: torch.device) -> str:
    """The machine, the version of torch and today's date."""
    return dated(machine(device))


def dated(ran_on: str) -> str:
    """A machine, the version of torch and today's date."""
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    return f"{ran_on}, torch {torch.__version__}, {today}"
