"""Toy models whose weights are a mapping of their file, as ComfyUI loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from wanvideo_enhanced_blockswap.blockswap.host.slabs import RegionFinder


def stored(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Writes the model's weights to a file and points the parameters at the mapping of it, which it returns.

    Skips the test where the file's system is memory, or keeps no file at all.
    """
    save_file({name: parameter.detach().clone() for name, parameter in model.named_parameters()}, path)
    return mapped(model, path)


def mapped(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Maps the file once more and points the parameters at it."""
    state = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data = state[name]
    skip_unless_on_disk(path)
    return state


def skip_unless_on_disk(path: Path) -> None:
    """Skips the test where a mapping of this file is not known as one of a file on a disk."""
    state = load_file(path)
    if RegionFinder(()).region_of(next(iter(state.values()))) is None:
        pytest.skip(f"{path.parent} is on no disk, or the system does not show what is mapped")
