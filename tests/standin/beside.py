"""What models have beside their blocks, and how the wrapper runs it: S2V's injectors, One-to-All's control blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .linear import Linear

INJECTED = (0, 3)
"""Blocks after which an injector runs; the second one's real place is another."""


class Reference(nn.Module):
    """One-to-All's reference blocks, with a layer before them and one after each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch_embedding = Linear(dim, dim)
        self.blocks = nn.ModuleList(Linear(dim, dim) for _ in range(2))
        self.ref_blocks = nn.ModuleList(Linear(dim, dim) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, kept = self.patch_embedding(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return sum(layer(one) for layer, one in zip(self.ref_blocks, kept, strict=True))


def attach(transformer: Any, dim: int) -> None:
    """Gives a transformer all of it."""
    transformer.audio_injector = nn.Module()
    transformer.audio_injector.injector = nn.ModuleList(Linear(dim, dim) for _ in INJECTED)
    transformer.audio_injector.injector_adain_layers = nn.ModuleList(Linear(dim, dim) for _ in INJECTED)
    transformer.controlnet = nn.Module()
    transformer.controlnet.blocks = nn.ModuleList(Linear(dim, dim) for _ in range(2))
    transformer.controlnet_zero = nn.ModuleList(Linear(dim, dim) for _ in range(2))
    transformer.refextractor = Reference(dim)


def before_blocks(transformer: Any, x: torch.Tensor) -> torch.Tensor:
    """Adds the reference, whose modules the wrapper moves to the device and back."""
    if getattr(transformer, "refextractor", None) is None:
        return x
    transformer.refextractor.to(transformer.main_device)
    reference = transformer.refextractor(x)
    transformer.refextractor.to(transformer.offload_device)
    return x + 0.1 * reference


def after_block(transformer: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    """Adds what the injector of block `number` gives, and the control block before it, which the wrapper moves."""
    if getattr(transformer, "refextractor", None) is None:
        return x
    if number in INJECTED:
        index = INJECTED.index(number)
        adapted = transformer.audio_injector.injector_adain_layers[index](x)
        x = x + 0.1 * transformer.audio_injector.injector[index](adapted)
    if 0 < number <= len(transformer.controlnet.blocks):
        block = transformer.controlnet.blocks[number - 1]
        block.to(transformer.main_device)
        control = block(x)
        block.to(transformer.offload_device, non_blocking=transformer.use_non_blocking)
        x = x + 0.1 * transformer.controlnet_zero[number - 1](control)
    return x
