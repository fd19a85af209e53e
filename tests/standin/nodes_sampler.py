"""The sampler node: one run from loading to offloading."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch

from . import management as mm
from .cache_state import choose_cache
from .controlnet.wan_controlnet import controlled
from .linear import remove_lora_from_module, replace_linear, set_lora_params
from .multitalk_loop import multitalk_loop
from .nodes_model_loading import load_weights
from .patcher import ModelPatcher
from .request import Request, inputs, noise
from .utils import compile_model, init_blockswap, offload_transformer, take_swap_args

log = logging.getLogger(__name__)


class WanVideoSampler:
    """Makes latents."""

    def process(
        self,
        model: ModelPatcher,
        request: Request,
        force_offload: bool = True,
        samples: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        patcher, model = model, model.model
        transformer = model.diffusion_model
        device = mm.get_torch_device()
        transformer_options = copy.deepcopy(patcher.model_options["transformer_options"])
        block_swap_args = transformer_options.get("block_swap_args")
        take_swap_args(transformer, block_swap_args)
        if transformer.audio_model is not None:
            for block in transformer.blocks:
                block.audio_block = None

        self._load(patcher, block_swap_args)
        transformer.lora_scheduling_enabled = transformer_options.get("lora_scheduling_enabled", False)
        if not model["auto_cpu_offload"]:
            transformer = compile_model(transformer, model["compile_args"])
        if transformer.audio_model is not None:
            for block, audio_block in zip(transformer.blocks, transformer.audio_model.blocks, strict=True):
                block.audio_block = audio_block

        mm.unload_all_models()
        init_blockswap(transformer, block_swap_args, model)

        choose_cache(transformer, request.cache)
        transformer.slg_blocks = request.slg_blocks
        transformer.rope_func = "comfy"
        for block in [*transformer.blocks, *(transformer.vace_blocks if transformer.vace_layers is not None else ())]:
            block.rope_func = "comfy"
        generator = torch.Generator().manual_seed(request.seed)
        given = inputs(request, generator, device)
        if request.has_reference:
            given["lynx_embeds"] = _gather_reference(transformer, given, noise(request, generator, device))

        predict = _predictor(transformer, request, given, transformer_options, force_offload=force_offload)
        try:
            if request.loop == "multitalk":
                return multitalk_loop(self, **locals())
            if request.loop == "animate":
                return _animate_loop(self, **locals())
            latent = noise(request, generator, device) if samples is None else samples.to(device)
            for step in request.step_range:
                latent = latent + _windowed(predict, latent, step, request) / request.steps
        except Exception:
            log.debug("sampling failed", exc_info=True)
            raise
        finally:
            if force_offload and not model["auto_cpu_offload"]:
                offload_transformer(transformer)
        return (latent.cpu(),)

    def _load(self, patcher: ModelPatcher, block_swap_args: dict[str, Any] | None) -> None:
        model = patcher.model
        transformer, dtype, reader = model.diffusion_model, model["base_dtype"], model["gguf_reader"]
        shared = {
            "base_dtype": dtype, "transformer_load_device": mm.get_torch_device(),
            "block_swap_args": block_swap_args, "compile_args": model["compile_args"],
        }  # fmt: skip
        if not transformer.patched_linear and model["sd"] is not None and patcher.patches and reader is None:
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


def _animate_loop(
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
    """WanAnimate: the transformer makes room for the VAE before a clip and after it."""
    clips: list[torch.Tensor] = []
    offloaded = False
    for _ in range(request.clips):
        if request.offload_between:
            offload_transformer(transformer, remove_lora=False)
            offloaded = True
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


def _predictor(
    transformer: Any,
    request: Request,
    given: dict[str, Any],
    transformer_options: dict[str, Any],
    *,
    force_offload: bool,
) -> Callable[..., torch.Tensor]:
    """Guided prediction for a latent at a step; window `key` has its own cache entries."""
    positive, negative = given.pop("positive"), given.pop("negative")
    cache: dict[tuple[Any, bool], int | None] = {}

    def forward(latent: torch.Tensor, step: int, key: Any, *, is_uncond: bool) -> torch.Tensor:
        video, _, cache[key, is_uncond] = transformer(
            x=[controlled(transformer_options, latent)],
            t=torch.tensor([1000 * (1 - step / request.steps)], device=latent.device),
            context=negative if is_uncond else positive,
            is_uncond=is_uncond,
            current_step=step,
            current_step_percentage=step / request.steps,
            pred_id=cache.get((key, is_uncond)),
            transformer_options=transformer_options,
            **given,
        )
        return video[0]

    def predict(latent: torch.Tensor, step: int, key: Any = None) -> torch.Tensor:
        try:
            conditional = forward(latent, step, key, is_uncond=False)
            if request.cfg == 1.0:
                return conditional
            unconditional = forward(latent, step, key, is_uncond=True)
        except Exception:
            log.debug("a prediction failed", exc_info=True)
            if force_offload:
                offload_transformer(transformer)
            raise
        return unconditional + request.cfg * (conditional - unconditional)

    return predict


def _windowed(predict: Callable[..., torch.Tensor], latent: torch.Tensor, step: int, request: Request) -> torch.Tensor:
    """The prediction, as the mean of overlapping windows if there are any."""
    if request.context_frames is None:
        return predict(latent, step)
    total, times = torch.zeros_like(latent), torch.zeros_like(latent)
    for begin in range(request.frames - request.context_frames + 1):
        window = slice(begin, begin + request.context_frames)
        total[:, window] += predict(latent[:, window], step, begin)
        times[:, window] += 1
    return total / times


def _gather_reference(transformer: Any, given: dict[str, Any], reference: torch.Tensor) -> dict[str, Any]:
    """Lynx: a forward for each prompt, before the steps, without options; what the blocks give is kept."""
    t = torch.tensor([0], device=reference.device)
    gathering = {"ref_feature_extractor": True}
    buffers = {
        name: transformer([reference], t, given[prompt], seq_len=given["seq_len"], lynx_embeds=gathering, **uncond)
        for name, prompt, uncond in (
            ("ref_buffer", "positive", {}),
            ("ref_buffer_uncond", "negative", {"is_uncond": True}),
        )
    }
    return {"ref_feature_extractor": False, **buffers}
