"""The wrapper's other way to save memory: with vram_management_args each layer goes to the device as it computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class Managed(nn.Module):
    """A layer whose weights stay on the host.

    Its weights are moved when it is made, so they must be there: on meta that fails, as in the wrapper.
    """

    def __init__(self, module: nn.Module, device: torch.device, offload_device: torch.device) -> None:
        super().__init__()
        self.module = module.to(offload_device)
        self.computation_device = device

    def forward(self, *arguments: Any) -> Any:
        return copy.deepcopy(self.module).to(self.computation_device)(*arguments)


def enable_vram_management(transformer: Any, kinds: tuple[type, ...], offload_device: torch.device) -> None:
    """Puts each layer of these kinds into a Managed one, and leaves a mark on the transformer."""
    _enable(transformer, kinds, transformer.main_device, offload_device)
    transformer.vram_management_enabled = True


def _enable(parent: nn.Module, kinds: tuple[type, ...], device: torch.device, offload_device: torch.device) -> None:
    for name, module in parent.named_children():
        if not isinstance(module, kinds):
            _enable(module, kinds, device, offload_device)
        elif "patch_embedding" not in name:
            setattr(parent, name, Managed(module, device, offload_device))
