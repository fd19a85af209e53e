"""Writes model files in the layouts that Wan checkpoints have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
Header = dict[str, tuple[str, tuple[int, ...]]]
"""Stored type and shape of each tensor."""

ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}


def block_shapes(width: int, ffn: int) -> Shapes:
    """One block of Wan 2.1 and 2.2 in Wan's own names; 351,394,304 elements for 14B."""
    shapes: Shapes = {"modulation": (1, 6, width), "norm3.weight": (width,), "norm3.bias": (width,)}
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            shapes |= {f"{attention}.{name}.weight": (width, width), f"{attention}.{name}.bias": (width,)}
        shapes |= {f"{attention}.norm_q.weight": (width,), f"{attention}.norm_k.weight": (width,)}
    shapes |= {"ffn.0.weight": (ffn, width), "ffn.0.bias": (ffn,), "ffn.2.weight": (width, ffn), "ffn.2.bias": (width,)}
    return shapes


def wan_shapes(
    width: int = 128, ffn: int = 256, blocks: int = 2, vace: int = 0, *, channels: int = 16, latents: int = 16
) -> Shapes:
    """A whole transformer; `channels` go in, `latents` come out."""
    shapes: Shapes = {"patch_embedding.weight": (width, channels, 1, 2, 2), "patch_embedding.bias": (width,)}
    # Names come in the order of text, as some files have them: 10 before 2.
    for number in sorted(range(blocks), key=str):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block_shapes(width, ffn).items()}
    for number in sorted(range(vace), key=str):
        shapes |= {f"vace_blocks.{number}.{name}": shape for name, shape in block_shapes(width, ffn).items()}
        shapes[f"vace_blocks.{number}.after_proj.weight"] = (width, width)
    return shapes | {"head.head.weight": (latents * 4, width), "head.modulation": (1, 2, width)}


def wan_tensors(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in (shapes or wan_shapes()).items()}


def fp8_scaled(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The blocks' matrices in fp8, each with its scale next to it."""
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        scaled[name] = tensor
        if "blocks." in name and tensor.dim() == 2:
            scaled[name] = tensor.to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = torch.ones(())
    return scaled


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return path


def write_gguf(path: Path, shapes: Shapes | None = None, kind: str = "Q8_0", *, flatten: bool = False) -> Path:
    """Matrices of the blocks quantised; with `flatten`, tensors of more than 4 dimensions as converters store them."""
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch="wan")
    for name, shape in (shapes or wan_shapes()).items():
        values = np.zeros(shape, np.float32)
        if flatten and values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
            values = values.reshape(-1)
        if "blocks." in name and len(shape) == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def embedding_shapes(width: int) -> Shapes:
    """Parts of a transformer outside its blocks, other than the patch embedding and the head: text and time."""
    shapes: Shapes = {}
    for name, outputs, inputs in (
        ("text_embedding.0", width, 4096),
        ("text_embedding.2", width, width),
        ("time_embedding.0", width, 256),
        ("time_embedding.2", width, width),
        ("time_projection.1", 6 * width, width),
    ):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return shapes


def write_header(path: Path, header: Header) -> Path:
    """A file of full size, of which only the header takes room on the disk."""
    fields, end = {}, 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + ELEMENT_BYTES[dtype] * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def write_sparse_safetensors(path: Path, shapes: Shapes, kind: str = "BF16") -> Path:
    """A file of full size, of which only the header takes room on the disk; the blocks' matrices are of `kind`."""
    is_matrix = {name: "blocks." in name and len(shape) == 2 for name, shape in shapes.items()}
    return write_header(path, {name: (kind if is_matrix[name] else "BF16", shape) for name, shape in shapes.items()})


def write_sparse_gguf(path: Path, shapes: Shapes, kind: str) -> Path:
    """A quantised file of full size, of which only the header takes room on the disk."""
    writer, end = gguf.GGUFWriter(path, arch="wan"), 0
    for name, shape in shapes.items():
        dtype = gguf.GGMLQuantizationType[kind if "blocks." in name and len(shape) == 2 else "F32"]
        block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
        nbytes = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=dtype)
        end += nbytes + (-nbytes % writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + writer.data_alignment + end)
    return path
