"""The loader node, and `load_weights`, which fills the transformer at the start of every run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import management as mm
from .blocks import RMSNorm
from .gguf import PLAIN_KINDS, GGUFParameter, GGUFReader, open_gguf
from .linear import replace_linear
from .model import WanModel
from .patcher import ModelPatcher, WanVideoModel
from .utils import set_module_tensor_to_device
from .vram_management import enable_vram_management

if TYPE_CHECKING:
    from .checkpoints import Checkpoint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOTH = "Can't use both block_swap_args and vram_management_args at the same time"
MANAGED = (nn.Linear, nn.Conv3d, nn.LayerNorm, RMSNorm)
"""Layers that vram_management_args put on the host."""
KEPT = ("time_", "modulation", "patch_embedding", "text_embedding", "face_encoder", "fuser_block")
"""Parts of the names of weights that quantising at load leaves in the base type."""


def load_weights(
    transformer: Any,
    sd: dict[str, torch.Tensor] | None = None,
    weight_dtype: torch.dtype | None = None,
    base_dtype: torch.dtype | None = None,
    transformer_load_device: torch.device | None = None,
    block_swap_args: dict[str, Any] | None = None,
    gguf: bool = False,
    reader: Sequence[GGUFReader] | None = None,
    patcher: ModelPatcher | None = None,
    compile_args: dict[str, Any] | None = None,
) -> None:
    """Gives every parameter a new tensor: of a block that is to be swapped on the host, of all else on the device."""
    if gguf:
        sd = _read_gguf(transformer, sd, reader, block_swap_args)
        if not getattr(transformer, "gguf_patched", False):
            replace_linear(transformer, base_dtype, sd)
            transformer.gguf_patched = True
    for name, parameter in list(transformer.named_parameters()):
        if "loras" in name:
            continue  # placed once, when they were added
        if gguf and isinstance(parameter, GGUFParameter):
            continue  # still there from the run before
        key = name.replace("_orig_mod.", "")
        block, vace_block = _index("blocks", key), _index("vace_blocks", key)
        device = transformer_load_device
        if block_swap_args is not None:
            device = _place(transformer, block_swap_args, block, vace_block)
        dtype = _gguf_dtype(key, base_dtype) if gguf else _dtype(key, sd, weight_dtype, base_dtype)
        set_module_tensor_to_device(transformer, name, device=device, dtype=dtype, value=sd[key])


def _index(blocks: str, name: str) -> int | None:
    found = re.match(rf"{blocks}\.(\d+)\.", name)
    return int(found[1]) if found and "face" not in name else None


def _place(
    transformer: Any, block_swap_args: Mapping[str, Any], block: int | None, vace_block: int | None
) -> torch.device:
    if block is not None:
        is_swapped = block >= len(transformer.blocks) - block_swap_args.get("blocks_to_swap", 0)
    elif vace_block is not None:
        is_swapped = vace_block >= len(transformer.vace_blocks) - block_swap_args.get("vace_blocks_to_swap", 0)
    else:
        is_swapped = False
    return mm.unet_offload_device() if is_swapped else mm.get_torch_device()


def _read_gguf(
    transformer: Any,
    sd: Mapping[str, torch.Tensor],
    readers: Sequence[GGUFReader],
    block_swap_args: Mapping[str, Any] | None,
) -> dict[str, torch.Tensor]:
    """Fresh copies of what the files hold. The block's number is kept too long: what follows a block goes where it
    has gone, VACE's tensors included.
    """
    fresh: dict[str, torch.Tensor] = {}
    block = vace_block = None
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        if "vace_blocks." in tensor.name:
            vace_block = _index("vace_blocks", tensor.name)
        elif "blocks." in tensor.name and "face" not in tensor.name:
            block = _index("blocks", tensor.name)
        device = mm.get_torch_device()
        if block_swap_args is not None:
            device = _place(transformer, block_swap_args, block, vace_block)
        value = torch.from_numpy(tensor.data.copy()).to(device)
        is_plain = tensor.tensor_type in PLAIN_KINDS
        fresh[tensor.name] = value if is_plain else GGUFParameter(value, quant_type=tensor.tensor_type)
    return fresh | {name: value for name, value in sd.items() if not value.is_meta}


def _gguf_dtype(name: str, base_dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if "patch_embedding" in name else base_dtype


def _dtype(
    name: str, sd: Mapping[str, torch.Tensor], weight_dtype: torch.dtype, base_dtype: torch.dtype
) -> torch.dtype:
    stored = sd[name].dtype
    if "modulation" in name or "norm" in name:
        return torch.float32 if stored is torch.float32 else base_dtype
    if "patch_embedding" in name:
        return torch.float32
    if "bias" in name or "img_emb" in name:
        return base_dtype
    if stored is weight_dtype or name.replace(".weight", ".scale_weight") in sd:
        return stored
    return base_dtype if any(part in name for part in KEPT) else weight_dtype


class WanVideoModelLoader:
    """Reads a file and builds its transformer on meta; weights come with the first run."""

    def loadmodel(
        self,
        model: Checkpoint,
        base_precision: str,
        load_device: str,
        quantization: str,
        compile_args: dict[str, Any] | None = None,
        block_swap_args: dict[str, Any] | None = None,
        lora: Sequence[dict[str, Any]] | None = None,
        merge_loras: bool = False,
        extra_model: Checkpoint | None = None,
        vram_management_args: dict[str, Any] | None = None,
    ) -> tuple[ModelPatcher]:
        assert vram_management_args is None or block_swap_args is None, BOTH
        device, base_dtype = mm.get_torch_device(), PRECISIONS[base_precision]
        load_to = device if load_device == "main_device" else mm.unet_offload_device()
        files = [file for file in (model, extra_model) if file is not None]
        readers = [file.reader for file in files if file.reader is not None] or None
        sd: dict[str, torch.Tensor] | None = {}
        for file in files:
            sd |= file.read(load_to) if file.reader is None else open_gguf(file.reader)
        if quantization == "disabled" and any(value.dtype is torch.float8_e4m3fn for value in sd.values()):
            quantization = "fp8_e4m3fn_scaled" if "scaled_fp8" in sd else "fp8_e4m3fn"
        weight_dtype = torch.float8_e4m3fn if quantization == "fp8_e4m3fn" else base_dtype
        scales = {key: value.to(device, base_dtype) for key, value in sd.items() if key.endswith(".scale_weight")}

        transformer = _build(sd, device, base_dtype)
        patcher = ModelPatcher(WanVideoModel(transformer))
        for one in lora or ():
            patcher.add_lora(one)
        if lora and merge_loras:
            load_weights(transformer, sd, weight_dtype, base_dtype, load_to)
            _merge(transformer, patcher, load_to)
            if load_device != "main_device":
                transformer.to(mm.unet_offload_device())
            sd = None
        elif readers is None and (lora or "scaled" in quantization):
            replace_linear(transformer, base_dtype, sd, scale_weights=scales)
            transformer.patched_linear = True
        if vram_management_args is not None:
            enable_vram_management(transformer, MANAGED, mm.unet_offload_device())

        entries = {
            "base_dtype": base_dtype, "weight_dtype": weight_dtype, "quantization": quantization,
            "auto_cpu_offload": vram_management_args is not None, "control_lora": False,
            "compile_args": compile_args, "gguf_reader": readers,
            "fp8_matmul": False, "scale_weights": scales, "sd": sd, "lora": lora,
        }  # fmt: skip
        for key, value in entries.items():
            patcher.model[key] = value
        patcher.model_options["transformer_options"]["block_swap_args"] = block_swap_args
        patcher.model_options["transformer_options"]["merge_loras"] = merge_loras
        return (patcher,)


def _build(sd: Mapping[str, torch.Tensor], device: torch.device, base_dtype: torch.dtype) -> WanModel:
    """The architecture that follows from names and shapes; parameters on meta, buffers not."""

    def numbers(pattern: str) -> list[int]:
        return sorted({int(found[1]) for found in (re.match(pattern, name) for name in sd) if found})

    layers = numbers(r"blocks\.(\d+)\.")
    hints = numbers(r"vace_blocks\.(\d+)\.")
    sizes = {"num_layers": len(layers), "main_device": device, "dtype": base_dtype}
    with torch.device("meta"):
        transformer = WanModel(
            **sizes,
            # A hint for every second block.
            vace_layers=[2 * hint for hint in hints] or None,
            face_layers=numbers(r"blocks\.(\d+)\.fuser_block\."),
            control_layers=numbers(r"blocks\.(\d+)\.control_blocks_dense\."),
            has_image="img_emb.weight" in sd,
            has_beside="refextractor.patch_embedding.weight" in sd,
        )
        if "audio_model.head.modulation" in sd:
            transformer.audio_model = WanModel(**sizes)
    return transformer.eval().requires_grad_(False)


def _merge(transformer: nn.Module, patcher: ModelPatcher, load_to: torch.device) -> None:
    """Adds each LoRA to its weight, on the device; the only place where the result exists is the transformer."""
    device = mm.get_torch_device()
    for key, patches in patcher.patches.items():
        name = key.removeprefix("diffusion_model.")
        weight = transformer.get_parameter(name)
        merged = weight.to(device, torch.float32)
        for strength, adapter in patches:
            up, down, alpha = adapter.weights
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            merged = merged + up.to(device) @ down.to(device) * scale
        set_module_tensor_to_device(transformer, name, device=load_to, dtype=weight.dtype, value=merged)
    patcher.patches.clear()


class WanVideoSetBlockSwap:
    """Swap arguments for a model that is loaded already."""

    def loadmodel(self, model: ModelPatcher, block_swap_args: dict[str, Any] | None = None) -> tuple[ModelPatcher]:
        if block_swap_args is None:
            return (model,)
        patcher = model.clone()
        patcher.model_options["transformer_options"]["block_swap_args"] = block_swap_args
        return (patcher,)


class WanVideoSetLoRAs:
    """Adds LoRAs to a model that is loaded already."""

    def setlora(self, model: ModelPatcher, lora: Sequence[dict[str, Any]]) -> tuple[ModelPatcher]:
        patcher = model.clone()
        options = patcher.model_options["transformer_options"]
        options["lora_scheduling_enabled"] = any(isinstance(one["strength"], list) for one in lora)
        for one in lora:
            patcher.add_lora(one)
        return (patcher,)
