"""InfiniteTalk: clip after clip; between them the transformer makes room for the VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .nodes_model_loading import load_weights
from .patcher import ModelPatcher
from .request import Request, noise
from .utils import init_blockswap, offload_transformer


def multitalk_loop(
    sampler: object,
    *,
    transformer: Any,
    patcher: ModelPatcher,
    model: Any,
    block_swap_args: dict[str, Any] | None,
    request: Request,
    generator: torch.Generator,
    predict: Callable[..., torch.Tensor],
    device: torch.device,
    force_offload: bool,
    **others: Any,
) -> tuple[torch.Tensor]:
    """The clips one after the other; each starts with the last frame of the one before."""
    clips: list[torch.Tensor] = []
    offloaded = False
    for _ in range(request.clips):
        latent = noise(request, generator, device)
        if clips:
            latent[:, :1] = clips[-1][:, -1:].to(device)
        if offloaded:
            shared = {
                "base_dtype": model["base_dtype"], "transformer_load_device": device,
                "block_swap_args": block_swap_args,
            }  # fmt: skip
            reader = model["gguf_reader"]
            if transformer.patched_linear and reader is None:
                load_weights(patcher.model.diffusion_model, model["sd"], model["weight_dtype"], **shared)
            elif reader is not None:
                load_weights(transformer, model["sd"], patcher=patcher, gguf=True, reader=reader, **shared)
            init_blockswap(transformer, block_swap_args, model)
        for step in request.step_range:
            latent = latent + predict(latent, step) / request.steps
        if request.offload_between:
            offload_transformer(transformer, remove_lora=False)
            offloaded = True
        clips.append(latent.cpu())
    if force_offload:
        offload_transformer(transformer)
    return (torch.cat(clips, dim=1),)
