"""Small random models of the families that only the wrapper runs, in its files; run by comfy_process.py only.

Names and shapes are those of the wrapper's own modules at a small width, built without memory, so that a file has what
the loader looks for. Where the loader renames weights, the file has the names that they have before.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from comfy_loading import DEVICE, wrapper_module
from tiny_wan import BLOCKS, CHANNELS, FFN_WIDTH, WIDTH, Weights
from torch import nn

HEADS = 12

ONE_TO_ALL_BLOCKS, REFERENCE_BLOCKS = 10, 9
"""Of the control net beside the main blocks, and of what extracts the reference."""

REFERENCE_CHANNELS = 32
"""Of a reference latent with its mask's."""


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose weights have names and shapes only."""
    with torch.device("meta"):
        return make()


def drawn(module: nn.Module, seed: int, prefix: str = "") -> Weights:
    """Random weights for each parameter of a module."""
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed))
    begin, weights = 0, {}
    for name, parameter in module.named_parameters():
        around, scale = _distribution(name, parameter)
        places = (begin + torch.arange(parameter.numel())) % pool.numel()
        weights[prefix + name] = around + pool[places].view(parameter.shape) * scale
        begin += parameter.numel() + 1  # 1: no two tensors of one shape are alike
    return weights


def _distribution(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Middle and width of a weight's numbers, such that activations neither vanish nor grow."""
    if name.endswith("modulation"):
        return 0.0, 0.2
    if "motion_encoder" in name and parameter.dim() > 1:
        return 0.0, 1.0  # its layers scale by themselves
    if parameter.dim() < 2:
        return (1.0, 0.02) if name.endswith(("weight", "gamma")) else (0.0, 0.02)
    return 0.0, (parameter.numel() / parameter.shape[0]) ** -0.5


def wan_model(**config: object) -> nn.Module:
    """The wrapper's model as the loader builds it for these settings, without memory."""
    wanted = {
        "dim": WIDTH,
        "in_features": WIDTH,
        "out_features": WIDTH,
        "ffn_dim": FFN_WIDTH,
        "ffn2_dim": FFN_WIDTH,
        "num_heads": HEADS,
        "num_layers": BLOCKS,
        "main_device": DEVICE,
        "dtype": torch.bfloat16,
    }
    model = without_memory(lambda: wrapper_module("wanvideo.modules.model").WanModel(**wanted | config))
    for block in model.blocks:
        # The wrapper builds them with one input, since it gives a flag in the place of the width, and then puts in what
        # the file has.
        for name in ("k", "v") if hasattr(block, "cross_attn") else ():
            setattr(block.cross_attn, name, without_memory(lambda: nn.Linear(WIDTH, WIDTH)))
    return model


def _in_bf16(weights: Weights) -> Weights:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def _s2v() -> Weights:
    return drawn(wan_model(model_type="s2v", cond_dim=CHANNELS, enable_adain=True, zero_timestep=True), 11)


def _one_to_all() -> Weights:
    """As apply in the loader, with the channels that the file's own convolutions have."""
    encoders, extractor = wrapper_module("onetoall.controlnet"), wrapper_module("onetoall.refextractor_2d")
    widths = {"ffn_dim": FFN_WIDTH, "ffn2_dim": FFN_WIDTH, "num_heads": HEADS}
    features = {"in_features": WIDTH, "out_features": WIDTH}

    def build() -> nn.Module:
        model = wan_model()
        small = {"norm_num_groups": 4, "layers_per_block": 1}
        model.image_to_cond = encoders.MiniEncoder2D(
            in_channels=REFERENCE_CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("DownEncoderBlockInflated",) * 3,
            block_out_channels=(16, 16, 16),
            spatial_compression_ratio=1,
            **small,
        )
        model.input_hint_block = encoders.MiniHunyuanEncoder(
            in_channels=3,
            out_channels=WIDTH,
            block_out_channels=(16, 16, 16, 16),
            spatial_compression_ratio=16,
            **small,
        )
        model.controlnet = nn.Module()
        model.controlnet.blocks = nn.ModuleList(
            extractor.WanAttentionBlock(**features, **widths) for _ in range(ONE_TO_ALL_BLOCKS)
        )
        model.controlnet_zero = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(ONE_TO_ALL_BLOCKS))
        model.refextractor = extractor.WanRefextractor(
            in_dim=REFERENCE_CHANNELS, dim=WIDTH, num_layers=REFERENCE_BLOCKS, **features, **widths
        )
        norm = wrapper_module("wanvideo.modules.model").WanRMSNorm
        for block in model.blocks:
            block.ref_attn_k_img, block.ref_attn_v_img = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            block.ref_attn_norm_k_img = norm(WIDTH)
        return model

    return drawn(without_memory(build), 12)


def _animate() -> Weights:
    weights = drawn(wan_model(model_type="i2v", in_dim=2 * CHANNELS + 4, is_wananimate=True), 13)
    return {re.sub(r"^blocks\.(\d+)\.fuser_block", _face_adapter, name): tensor for name, tensor in weights.items()}


def _face_adapter(found: re.Match[str]) -> str:
    return f"face_adapter.fuser_blocks.{int(found[1]) // 5}"


FILES: dict[str, Callable[[], Weights]] = {
    f"diffusion_models/{name}.safetensors": lambda make=make: _in_bf16(make())
    for name, make in {"s2v": _s2v, "one_to_all": _one_to_all, "animate": _animate}.items()
}
