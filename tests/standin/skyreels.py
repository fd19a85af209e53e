"""Skyreels' sampler: it hands no options to the model, and offloads only if all goes well."""

from __future__ import annotations

from typing import Any

import torch

from . import management as mm
from .cache_state import choose_cache
from .linear import remove_lora_from_module, replace_linear, set_lora_params
from .nodes_model_loading import load_weights
from .nodes_sampler import init_blockswap, offload_transformer
from .patcher import ModelPatcher
from .request import Request, inputs, noise
from .utils import take_swap_args


class WanVideoDiffusionForcingSampler:
    """Makes latents."""

    def process(
        self,
        model: ModelPatcher,
        request: Request,
        force_offload: bool = True,
        samples: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        patcher, model = model, model.model
        transformer, dtype, reader = model.diffusion_model, model["base_dtype"], model["gguf_reader"]
        device = mm.get_torch_device()
        transformer_options = patcher.model_options["transformer_options"]
        block_swap_args = transformer_options.get("block_swap_args")
        take_swap_args(transformer, block_swap_args)

        shared = {"base_dtype": dtype, "transformer_load_device": device, "block_swap_args": block_swap_args}
        if not transformer.patched_linear and model["sd"] is not None and patcher.patches:
            transformer = replace_linear(transformer, dtype, model["sd"])
            transformer.patched_linear = True
        if model["sd"] is not None and reader is None:
            load_weights(model.diffusion_model, model["sd"], model["weight_dtype"], **shared)
        if reader is not None:
            load_weights(transformer, model["sd"], patcher=patcher, gguf=True, reader=reader, **shared)
            set_lora_params(transformer, patcher.patches)
            transformer.patched_linear = True
        elif patcher.patches:
            set_lora_params(transformer, patcher.patches)
        else:
            remove_lora_from_module(transformer)
        transformer.lora_scheduling_enabled = transformer_options.get("lora_scheduling_enabled", False)
        init_blockswap(transformer, block_swap_args, model)
        transformer.slg_blocks = request.slg_blocks
        choose_cache(transformer, request.cache)

        generator = torch.Generator().manual_seed(request.seed)
        given = inputs(request, generator, device)
        latent = noise(request, generator, device)
        mm.unload_all_models()
        for step in request.step_range:
            latent = latent + _predict(transformer, latent, step, request, given) / request.steps
        if force_offload:
            offload_transformer(transformer)
        return (latent.cpu(),)


def _predict(
    transformer: Any, latent: torch.Tensor, step: int, request: Request, given: dict[str, Any]
) -> torch.Tensor:
    t = torch.tensor([1000 * (1 - step / request.steps)], device=latent.device)
    shared = {name: value for name, value in given.items() if name not in ("positive", "negative")}
    shared |= {"current_step": step, "current_step_percentage": step / request.steps}
    conditional = transformer([latent], t=t, context=given["positive"], **shared)[0][0]
    unconditional = transformer([latent], t=t, context=given["negative"], is_uncond=True, **shared)[0][0]
    return unconditional + request.cfg * (conditional - unconditional)
