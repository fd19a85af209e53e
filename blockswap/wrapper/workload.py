"""The workload of a forward of the wrapper's model, with the memory that its arguments make it take."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..model.activations import Attention, ForwardOptions, Rope, activation_bytes, weight_copies
from ..model.wan import WanArchitecture
from ..run.history import Workload
from ..run.report import Step
from .parts import unwrapped
from .wanvideo import vace_blocks_of

logger = logging.getLogger(__name__)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors where a transformer lacks what the wrapper's has, as in an older one: then its memory is measured only."""


def workload_of(
    transformer: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], *, hints_to_host: bool
) -> Workload | None:
    """The workload of a forward; None if the latents are not of the shape that the wrapper passes.

    Args:
        transformer: The model.
        arguments: Of the forward. The first is the latents: a list of `(channels, frames, rows, columns)`, or one
            tensor with a batch dimension before these. The second is the timesteps.
        keywords: Of the forward; the latents may be `x` and the timesteps `t`.
        hints_to_host: VACE hints take no device memory.
    """
    latents = arguments[0] if arguments else keywords.get("x")
    patch = getattr(transformer, "patch_size", None)
    items = latents if isinstance(latents, (Sequence, torch.Tensor)) else ()
    shapes = [tuple(one.shape[-3:]) for one in items if isinstance(one, torch.Tensor) and one.dim() > 3]  # noqa: PLR2004
    if not shapes or not isinstance(patch, Sequence) or len(patch) != 3:  # noqa: PLR2004
        return None
    tokens = sum(f // patch[0] * (h // patch[1]) * (w // patch[2]) for f, h, w in shapes)
    frames = max(f for f, _, _ in shapes)
    timesteps = arguments[1] if len(arguments) > 1 else keywords.get("t")
    try:
        architecture = _architecture(transformer, patch)
        options = _options(transformer, timesteps, keywords, sequences=len(shapes), frames=frames)
        options = replace(options, vace_hints=not hints_to_host)
        expected = activation_bytes(architecture, tokens, options)
    except ODD as failure:
        logger.debug("the memory of a forward of %s is not expected: %r", type(transformer).__name__, failure)
        expected = None
    return Workload(tokens=tokens, expected_activation_bytes=expected, latent_frames=frames)


def step_of(keywords: Mapping[str, Any]) -> Step | None:
    """The sampler's step that a forward belongs to; None if the wrapper does not say."""
    index, share = keywords.get("current_step"), keywords.get("current_step_percentage")
    if not isinstance(index, int):
        return None
    if keywords.get("last_step"):
        return Step(index + 1, index + 1)
    return Step(index + 1, round(index / share) if index and share else None)


def _architecture(transformer: Any, patch: Sequence[int]) -> WanArchitecture:
    return WanArchitecture(
        width=int(transformer.dim),
        ffn_width=int(transformer.ffn_dim),
        heads=int(transformer.num_heads),
        blocks=len(transformer.blocks),
        vace_blocks=len(vace_blocks_of(transformer)),
        patch=(patch[0], patch[1], patch[2]),
        in_channels=int(transformer.in_dim),
    )


def _options(
    transformer: Any, timesteps: Any, keywords: Mapping[str, Any], *, sequences: int, frames: int
) -> ForwardOptions:
    block = unwrapped(transformer.blocks[0])
    is_autocast = torch.is_autocast_enabled(torch.device(transformer.main_device).type)
    return ForwardOptions(
        attention=_attention(str(getattr(transformer, "attention_mode", ""))),
        rope=_rope(str(getattr(block, "rope_func", ""))),
        sequences=sequences,
        per_token=isinstance(timesteps, torch.Tensor) and timesteps.dim() > 1,
        wide=is_autocast or getattr(getattr(block, "modulation", None), "dtype", None) is torch.float32,
        weight_copies=1 if is_autocast else _weight_copies(block),
        vace_inputs=_vace_inputs(keywords.get("vace_data")),
        speakers=1 if keywords.get("ref_target_masks") is None or keywords.get("multitalk_audio") is None else 2,
        frames=frames,
        speech=getattr(transformer, "model_type", None) == "s2v",
    )


def _attention(mode: str) -> Attention:
    if "sage" in mode:
        return Attention.SAGE
    return Attention.FLASH if "flash" in mode else Attention.SDPA


def _rope(function: str) -> Rope:
    """The wrapper takes any name without "comfy" for its own functions with complex numbers."""
    if function == Rope.CHUNKED.value:
        return Rope.CHUNKED
    if "comfy" not in function:
        return Rope.DEFAULT
    is_available = getattr(getattr(sys.modules.get("comfy_kitchen"), "registry", None), "is_available", None)
    return Rope.FUSED if is_available is not None and is_available("cuda") else Rope.COMFY


def _vace_inputs(data: Any) -> int:
    """The wrapper's list has an entry for each control, or is the frames of one. A forward without any, which comes
    between others, counts as theirs: it is no workload of its own.
    """
    return len(data) if isinstance(data, Sequence) and data and isinstance(data[0], Mapping) else 1


def _weight_copies(block: Any) -> int:
    layers = [layer for layer in block.modules() if hasattr(layer, "lora_diffs")]
    weights = [getattr(layer, "weight", None) for layer in layers]
    return weight_copies(
        dequantised=any(layer.is_gguf or layer.scale_weight is not None for layer in layers),
        fp8=any(isinstance(weight, torch.Tensor) and weight.dtype in FP8 for weight in weights),
        lora=any(layer.lora_diffs for layer in layers),
    )
