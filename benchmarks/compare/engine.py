"""What the comparison asks of an engine."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import nn

NOT_INSTALLED = "{0} is not installed: pip install -e '.[peers]'"


class NotOfferedError(Exception):
    """An engine cannot do what a cell asks for; says why, in one line."""


class Engine(Protocol):
    """One way to run diffusers' WanTransformer3DModel with some of its blocks on the host.

    One engine serves one model in one process: whatever it does to either ends with the process.
    """

    packages: tuple[str, ...]
    """Distributions whose versions tell what was measured."""

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        """Readies `model`, which is on the host, for forwards on `device`.

        Args:
            model: Its blocks are `model.blocks`; may be changed.
            device: Where forwards run; their inputs are there.
            swapped: Number of blocks whose weights stay on the host.

        Raises:
            NotOfferedError: This engine cannot swap that number, or cannot run on that device.
        """

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """What one call of the model is wrapped in."""

    @property
    def pinned_bytes(self) -> int:
        """Host memory that the engine has page-locked by itself, beside torch's own allocator of such memory."""

    def close(self) -> None:
        """Gives back what would keep the process from ending."""
