"""The interface of an engine in the comparison."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import nn

NOT_INSTALLED = "{0} is not installed: pip install -e '.[peers]'"


class NotOfferedError(Exception):
    """An engine cannot run a cell; the message is one line with the reason."""


class Engine(Protocol):
    """One way to run diffusers' WanTransformer3DModel with some of its blocks on the host.

    One engine runs one model in one process; changes to either end with the process.
    """

    packages: tuple[str, ...]
    """Distributions whose versions are reported."""

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        """Prepares `model`, which is on the host, for forwards on `device`.

        Args:
            model: Its blocks are `model.blocks`; may be changed.
            device: Where forwards run; their inputs are there.
            swapped: Number of blocks whose weights stay on the host.

        Raises:
            NotOfferedError: This engine cannot swap that number, or cannot run on that device.
        """

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """The context of one call of the model."""

    @property
    def pinned_bytes(self) -> int:
        """Host memory that the engine has page-locked without torch's allocator of such memory."""

    def close(self) -> None:
        """Ends threads and the like that would keep the process alive."""
