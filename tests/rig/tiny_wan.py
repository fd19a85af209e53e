"""Small random Wan models in the files that WanVideoModelLoader reads; run by comfy_process.py only.

The loader knows depth and heads by the width: whatever is none of the real widths has 30 blocks of 12 heads, and 15
VACE blocks. Matrices of a block are those of the one before, shifted: no two are alike, and they cost little to make.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

WIDTH = int(os.environ.get("RIG_WIDTH", "384"))
"""A benchmark takes a larger one; a multiple of 24."""
FFN_WIDTH, BLOCKS, VACE_BLOCKS = WIDTH * 8 // 3, 30, 15
TEXT_WIDTH, FREQUENCIES, CHANNELS, VACE_CHANNELS, PATCH = 4096, 256, 16, 96, (1, 2, 2)
RANK, LARGE_RANK = 8, 128
"""Of a LoRA whose tensors are small, and of one whose tensors are matrices like a block's."""
LORA_LAYERS = {"self_attn.q": (WIDTH, WIDTH), "cross_attn.v": (WIDTH, WIDTH), "ffn.0": (FFN_WIDTH, WIDTH)}
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max

Weights = dict[str, torch.Tensor]


class _Random:
    """Makes weights from one stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, scale: float, around: float = 0.0) -> torch.Tensor:
        return around + torch.randn(shape, generator=self._generator) * scale

    def linear(self, name: str, rows: int, columns: int) -> Weights:
        weight, bias = self.tensor(rows, columns, scale=columns**-0.5), self.tensor(rows, scale=0.02)
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    def convolution(self, name: str, channels: int) -> Weights:
        weight = self.tensor(WIDTH, channels, *PATCH, scale=(4 * channels) ** -0.5)
        return {f"{name}.weight": weight, f"{name}.bias": self.tensor(WIDTH, scale=0.02)}

    def block(self) -> Weights:
        weights: Weights = {}
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                weights |= self.linear(f"{attention}.{layer}", WIDTH, WIDTH)
            for layer in ("norm_q", "norm_k"):
                weights[f"{attention}.{layer}.weight"] = self.tensor(WIDTH, scale=0.02, around=1.0)
        weights |= self.linear("ffn.0", FFN_WIDTH, WIDTH) | self.linear("ffn.2", WIDTH, FFN_WIDTH)
        weights["norm3.weight"] = self.tensor(WIDTH, scale=0.02, around=1.0)
        weights["norm3.bias"] = self.tensor(WIDTH, scale=0.02)
        weights["modulation"] = self.tensor(1, 6, WIDTH, scale=0.2)
        return weights


def _repeated(prefix: str, first: Weights, count: int) -> Weights:
    """`count` blocks like `first`, each shifted by some places."""
    return {
        f"{prefix}.{index}.{name}": tensor.roll(7 * index, dims=-1)
        for index in range(count)
        for name, tensor in first.items()
    }


def _base(seed: int) -> Weights:
    made = _Random(seed)
    return (
        made.convolution("patch_embedding", CHANNELS)
        | made.linear("text_embedding.0", WIDTH, TEXT_WIDTH)
        | made.linear("text_embedding.2", WIDTH, WIDTH)
        | made.linear("time_embedding.0", WIDTH, FREQUENCIES)
        | made.linear("time_embedding.2", WIDTH, WIDTH)
        | made.linear("time_projection.1", 6 * WIDTH, WIDTH)
        | made.linear("head.head", CHANNELS * 4, WIDTH)
        | {"head.modulation": made.tensor(1, 2, WIDTH, scale=0.2)}
        | _repeated("blocks", made.block(), BLOCKS)
    )


def _vace() -> Weights:
    made = _Random(2)
    after = made.linear("after_proj", WIDTH, WIDTH)
    return (
        made.convolution("vace_patch_embedding", VACE_CHANNELS)
        | made.linear("vace_blocks.0.before_proj", WIDTH, WIDTH)
        | _repeated("vace_blocks", made.block() | after, VACE_BLOCKS)
    )


def _lora(rank: int) -> Weights:
    made, first = _Random(3), {}
    for layer, (rows, columns) in LORA_LAYERS.items():
        first[f"{layer}.lora_A.weight"] = made.tensor(rank, columns, scale=0.05)
        first[f"{layer}.lora_B.weight"] = made.tensor(rows, rank, scale=0.05)
    return _repeated("diffusion_model.blocks", first, BLOCKS)


def _lora_with_alpha(seed: int, rank: int) -> Weights:
    """With the other names that factors have."""
    made, first = _Random(seed), {}
    for layer, (rows, columns) in LORA_LAYERS.items():
        first[f"{layer}.lora_down.weight"] = made.tensor(rank, columns, scale=0.1)
        first[f"{layer}.lora_up.weight"] = made.tensor(rows, rank, scale=0.1)
        first[f"{layer}.alpha"] = torch.tensor([rank / 2])
    return _repeated("diffusion_model.blocks", first, BLOCKS)


def _vace_lora(rank: int) -> Weights:
    """For every layer of the VACE blocks that has one in the blocks, and for the one behind each block."""
    made, first = _Random(6), {}
    for layer, (rows, columns) in {**LORA_LAYERS, "after_proj": (WIDTH, WIDTH)}.items():
        first[f"{layer}.lora_A.weight"] = made.tensor(rank, columns, scale=0.05)
        first[f"{layer}.lora_B.weight"] = made.tensor(rows, rank, scale=0.05)
    return _repeated("diffusion_model.vace_blocks", first, VACE_BLOCKS)


def _control_lora(rank: int) -> Weights:
    """With channels of a control video beside those of the latents."""
    made, kernel = _Random(8), 2 * CHANNELS * math.prod(PATCH)
    layer = "diffusion_model.patch_embedding"
    return _lora(rank) | {
        f"{layer}.lora_A.weight": made.tensor(rank, kernel, scale=0.1),
        f"{layer}.lora_B.weight": made.tensor(WIDTH, rank, scale=0.1),
    }


def _differences() -> Weights:
    """What some files have beside factors: whole differences of a matrix and of a bias."""
    made = _Random(7)
    first = {
        "cross_attn.o.diff": made.tensor(WIDTH, WIDTH, scale=0.02),
        "ffn.0.diff_b": made.tensor(FFN_WIDTH, scale=1),
    }
    return _repeated("diffusion_model.blocks", first, BLOCKS)


def _is_matrix_of_a_block(name: str, tensor: torch.Tensor) -> bool:
    return "blocks." in name and name.endswith(".weight") and tensor.dim() == 2


def _in_bf16(weights: Weights) -> Weights:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def _in_fp16(weights: Weights) -> Weights:
    return {name: tensor.half() for name, tensor in weights.items()}


def _in_fp8(weights: Weights) -> Weights:
    return {
        name: tensor.to(torch.float8_e4m3fn if _is_matrix_of_a_block(name, tensor) else torch.bfloat16)
        for name, tensor in weights.items()
    }


def _in_scaled_fp8(weights: Weights) -> Weights:
    stored: Weights = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights.items():
        if not _is_matrix_of_a_block(name, tensor):
            stored[name] = tensor.bfloat16()
            continue
        scale = tensor.abs().max() / LARGEST_FP8
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + "scale_weight"] = scale
    return stored


def _write_safetensors(path: Path, weights: Weights) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


def _write_gguf(path: Path, weights: Weights) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, arch="wan")
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        if _is_matrix_of_a_block(name, tensor):
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILES: dict[str, Callable[[], Weights]] = {
    "diffusion_models/bf16.safetensors": lambda: _in_bf16(_base(1)),
    "diffusion_models/low_noise.safetensors": lambda: _in_bf16(_base(4)),
    "diffusion_models/fp8.safetensors": lambda: _in_fp8(_base(1)),
    "diffusion_models/fp8_scaled.safetensors": lambda: _in_scaled_fp8(_base(1)),
    "diffusion_models/low_noise_fp8_scaled.safetensors": lambda: _in_scaled_fp8(_base(4)),
    "diffusion_models/q8_0.gguf": lambda: _base(1),
    "diffusion_models/vace.safetensors": lambda: _in_bf16(_base(1) | _vace()),
    "diffusion_models/vace_fp8_scaled.safetensors": lambda: _in_scaled_fp8(_base(1) | _vace()),
    "diffusion_models/vace_module.safetensors": lambda: _in_bf16(_vace()),
    "diffusion_models/vace_q8_0.gguf": lambda: _base(1) | _vace(),
    "loras/lora.safetensors": lambda: _in_bf16(_lora(RANK)),
    "loras/large_lora.safetensors": lambda: _in_bf16(_lora(LARGE_RANK)),
    "loras/fp16_lora.safetensors": lambda: _in_fp16(_lora_with_alpha(4, RANK)),
    "loras/large_fp32_lora.safetensors": lambda: _lora_with_alpha(5, LARGE_RANK) | _differences(),
    "loras/control_lora.safetensors": lambda: _in_bf16(_control_lora(RANK)),
    "loras/vace_lora.safetensors": lambda: _in_bf16(_vace_lora(RANK)),
    "loras/large_vace_lora.safetensors": lambda: _in_bf16(_vace_lora(LARGE_RANK)),
}


def make(models: Path, name: str, files: Mapping[str, Callable[[], Weights]] = FILES) -> None:
    """Writes files[name] below `models`, unless it is there already."""
    path = models / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write = _write_gguf if path.suffix == ".gguf" else _write_safetensors
        write(path, files[name]())
