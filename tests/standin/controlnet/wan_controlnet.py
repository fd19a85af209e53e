"""TheDenk's control model: the sampler moves it to the device in every step, calls it, and leaves it there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 64
BLOCKS = 4


class WanControlnet(nn.Module):
    """Blocks between two layers of the latents' channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.proj_out = nn.Linear(WIDTH, channels)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Of a latent (channels, frames, height, width), one of the same shape."""
        x = self.proj_in(latent.movedim(0, -1))
        for block in self.blocks:
            x = block(x).tanh()
        return self.proj_out(x).movedim(-1, 0)


def make(channels: int, *, seed: int = 11) -> dict[str, Any]:
    """What the node gives to the sampler among the model's options."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"controlnet": WanControlnet(channels).requires_grad_(False)}


def controlled(options: dict[str, Any], latent: torch.Tensor) -> torch.Tensor:
    """The latent with what the control model, if there is one, makes of it."""
    controlnet = options.get("controlnet")
    if controlnet is None:
        return latent
    controlnet["controlnet"].to(latent.device)
    return latent + 0.1 * controlnet["controlnet"](latent)
