"""Files with random weights, in each of the ways that weights are stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from .gguf import GGUFReader
from .model import WanModel
from .patcher import LoRAAdapter

LAYERS = 4
VACE_LAYERS = (0, 2)
RANK = 2


@dataclass(frozen=True)
class Checkpoint:
    """A file: tensors by name, or the reader of a packed one."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    reader: GGUFReader | None = None

    def read(self, device: torch.device) -> dict[str, torch.Tensor]:
        """New tensors at every call."""
        return {name: tensor.clone().to(device) for name, tensor in self.tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds, and how.

    Attributes:
        storage: `fp32`, `bf16`, `fp16`, `fp8`, `fp8_scaled` or `gguf`.
    """

    storage: str = "fp32"
    vace: bool = False
    face: bool = False
    control: bool = False
    image: bool = False
    audio: bool = False
    beside: bool = False
    seed: int = 0


def make_checkpoint(contents: Contents, *, part: str | None = None) -> Checkpoint:
    """The file.

    Args:
        part: `base` or `module` for a VACE model in two files; None for all of it in one.
    """
    tensors = _weights(replace(contents, storage="fp32"))
    if part is not None:
        tensors = {name: value for name, value in tensors.items() if name.startswith("vace_") == (part == "module")}
    if contents.storage == "gguf":
        return Checkpoint(reader=GGUFReader(tensors, packed=("attn", "ffn", "after_proj")))
    return Checkpoint(_stored(tensors, contents.storage))


def make_lora(
    strength: float | list[float], *, seed: int = 5, rank: int = RANK, vace: bool = False
) -> dict[str, object]:
    """A LoRA for two weights of each of two blocks, for one outside the blocks, and for VACE blocks if asked."""
    generator = torch.Generator().manual_seed(seed)
    dim, ffn_dim = 32, 64
    shapes = {f"blocks.{i}.self_attn.q": (dim, dim) for i in (1, LAYERS - 1)}
    shapes |= {f"blocks.{i}.ffn.0": (ffn_dim, dim) for i in (1, LAYERS - 1)} | {"text_embedding.2": (dim, dim)}
    if vace:
        shapes |= {f"vace_blocks.{i}.{layer}": (dim, dim) for i in range(2) for layer in ("self_attn.q", "after_proj")}
    weights = {}
    for path, (rows, columns) in shapes.items():
        up, down = (torch.randn(size, generator=generator) * 0.3 for size in ((rows, rank), (rank, columns)))
        weights[path] = LoRAAdapter(up, down, alpha=1.0)
    return {"weights": weights, "strength": strength}


@functools.cache
def _weights(contents: Contents) -> Mapping[str, torch.Tensor]:
    model = WanModel(
        num_layers=LAYERS,
        vace_layers=VACE_LAYERS if contents.vace else None,
        face_layers=(0, 3) if contents.face else (),
        control_layers=(0, 1) if contents.control else (),
        has_image=contents.image,
        has_beside=contents.beside,
    )
    if contents.audio:
        model.audio_model = WanModel(num_layers=LAYERS)
    generator = torch.Generator().manual_seed(contents.seed)
    drawn = {}
    for name, parameter in model.named_parameters():
        size = 0.1 if parameter.dim() < 2 or "modulation" in name else 1 / math.sqrt(parameter[0].numel())
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        drawn[name] = torch.randn(parameter.shape, generator=generator) * size + mean
    return drawn


def _stored(tensors: Mapping[str, torch.Tensor], storage: str) -> dict[str, torch.Tensor]:
    plain = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(storage)
    if plain is not None:
        return {name: value if "modulation" in name else value.to(plain) for name, value in tensors.items()}
    stored: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if "blocks." not in name or value.dim() != 2:
            stored[name] = value
        elif storage == "fp8":
            stored[name] = value.to(torch.float8_e4m3fn)
        else:
            scale = value.abs().amax() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
    return stored | ({"scaled_fp8": torch.empty(0)} if storage == "fp8_scaled" else {})
