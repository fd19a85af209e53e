"""Start and end of a run, and what nodes share: setting one tensor, taking swap arguments, compiling."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import management as mm
from .gguf import GGUFParameter
from .linear import remove_lora_from_module


def offload_transformer(transformer: Any, remove_lora: bool = True) -> None:
    """The run is over: patched models lose their weights (they are in `sd` or the file), others go to the host."""
    for state in (transformer.teacache_state, transformer.magcache_state, transformer.easycache_state):
        state.clear_all()
    if transformer.patched_linear:
        for name, parameter in list(transformer.named_parameters()):
            if "loras" in name:
                continue
            module, leaf = _holder(transformer, name)
            if parameter.is_floating_point():
                empty = torch.empty_like(parameter.data, device="meta")
            elif isinstance(parameter.data, GGUFParameter):
                empty = torch.empty(0, dtype=parameter.dtype)
            else:
                continue
            setattr(module, leaf, nn.Parameter(empty, requires_grad=False))
        if remove_lora:
            remove_lora_from_module(transformer)
    else:
        transformer.to(mm.unet_offload_device())
    for block in transformer.blocks:
        block.kv_cache = None
        if transformer.audio_model is not None and hasattr(block, "audio_block"):
            block.audio_block = None


def init_blockswap(transformer: Any, block_swap_args: dict[str, Any] | None, model: Any) -> None:
    """The run starts: unpatched models are placed; load_weights has placed the others."""
    if transformer.patched_linear:
        return
    device = mm.get_torch_device()
    if block_swap_args is None and model["auto_cpu_offload"]:
        for name, parameter in transformer.named_parameters():
            if "modulation" in name or "patch_embedding" in name:
                parameter.data = parameter.data.to(device)
        return
    if block_swap_args is None:
        transformer.to(device)
        return
    for name, parameter in transformer.named_parameters():
        if "block" not in name or "face" in name:
            parameter.data = parameter.data.to(device)
    # Neither prefetch_blocks nor block_swap_debug is handed on, and the count is one less.
    transformer.block_swap(
        block_swap_args["blocks_to_swap"] - 1,
        block_swap_args["offload_txt_emb"],
        block_swap_args["offload_img_emb"],
        vace_blocks_to_swap=block_swap_args.get("vace_blocks_to_swap"),
    )


def take_swap_args(transformer: Any, block_swap_args: dict[str, Any] | None) -> None:
    """Without arguments, what earlier ones have set stays."""
    if block_swap_args is None:
        return
    counts = ("blocks_to_swap", "vace_blocks_to_swap", "prefetch_blocks")
    flags = ("use_non_blocking", "block_swap_debug", "offload_img_emb", "offload_txt_emb")
    for name in counts:
        setattr(transformer, name, block_swap_args.get(name, 0))
    for name in flags:
        setattr(transformer, name, block_swap_args.get(name, False))


def compile_model(transformer: Any, compile_args: dict[str, Any] | None) -> Any:
    """Wraps each block, or the whole model, again."""
    if compile_args is None:
        return transformer
    options = {key: compile_args[key] for key in ("backend", "mode")}
    if not compile_args["compile_transformer_blocks_only"]:
        return torch.compile(transformer, **options)
    for blocks in (transformer.blocks, transformer.vace_blocks if transformer.vace_layers is not None else ()):
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(getattr(block, "_orig_mod", block), **options)
    return transformer


def set_module_tensor_to_device(
    root: nn.Module, name: str, *, device: torch.device, dtype: torch.dtype, value: torch.Tensor
) -> None:
    """A new Parameter of the old one's class; it is the value itself where neither type nor device changes."""
    module, leaf = _holder(root, name)
    if value.dtype.is_floating_point:
        value = value.to(dtype)
    module._parameters[leaf] = type(module._parameters[leaf])(value.to(device), requires_grad=False)


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, leaf = name.split(".")
    for part in path:
        root = getattr(root, part)
    return root, leaf
