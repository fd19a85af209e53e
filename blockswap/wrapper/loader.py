"""The state dict that the wrapper's loader keeps beside the transformer: the same weights, not loaded yet."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...hardware.disk import FileMappings
from ..engine.binding import bind
from ..model.recognise import TensorInfo
from ..model.tensors import has_own_storage, inner_tensors, region_of
from .parts import parts_of
from .wanvideo import entry

logger = logging.getLogger(__name__)


def stored_tensors(model: Any, patches: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors that a model's transformer will have on the host once a run has loaded its weights.

    Args:
        model: The wrapper's model.
        patches: Unmerged LoRA weights by the name of the weight that they change.
    """
    readers, stored = entry(model, "gguf_reader"), entry(model, "sd")
    found: dict[str, TensorInfo] = {}
    if readers is not None:
        for reader in readers if isinstance(readers, (list, tuple)) else [readers]:
            found |= _tensors_of_gguf(reader)
    weights = stored if isinstance(stored, dict) else dict(model.diffusion_model.named_parameters())
    dtype, mappings = entry(model, "weight_dtype"), FileMappings.read()
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor) and not (tensor.is_meta and readers is not None):
            loaded = _as_loaded(name.replace("_orig_mod.", ""), tensor, dtype, weights, mappings)
            found |= {own: info for own, info in loaded.items() if own not in found}
    for name, deltas in patches.items():
        found[f"{name.removeprefix('diffusion_model.')}.lora_diff"] = TensorInfo((1,), "LORA", _bytes_in(deltas))
    return found


def copied_bytes(readers: Any) -> int:
    """Bytes of the wrapper's GGUF readers: what it copies when it loads them."""
    readers = readers if isinstance(readers, (list, tuple)) else [readers]
    return sum(int(tensor.n_bytes) for reader in readers for tensor in getattr(reader, "tensors", ()))


def _tensors_of_gguf(reader: Any) -> dict[str, TensorInfo]:
    """The tensor table of a GGUFReader of the wrapper."""
    tensors = {}
    for tensor in reader.tensors:
        # ComfyUI's converters flatten tensors that GGML cannot quantise, and write their shape to this field.
        noted = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = noted.contents() if noted else reversed(tensor.shape.tolist())
        tensors[tensor.name] = TensorInfo(tuple(map(int, shape)), tensor.tensor_type.name, int(tensor.n_bytes))
    return tensors


def _as_loaded(
    name: str, tensor: torch.Tensor, dtype: Any, weights: Mapping[str, Any], mappings: FileMappings
) -> dict[str, TensorInfo]:
    """A tensor as the wrapper will load it: a block's matrix without a scale gets the model's weight type. If that is
    another type than it is stored in, the loaded tensor is a copy. What a tensor is made of keeps its types; the first
    of these has the tensor's own name and shape.
    """
    inner = [] if has_own_storage(tensor) else list(inner_tensors(tensor).items())
    if inner:
        parts = [_as_loaded(f"{name}.{own}", one, None, {}, mappings) for own, one in inner]
        (_, first), *others = (pair for part in parts for pair in part.items())
        return {name: replace(first, shape=tuple(tensor.shape)), **dict(others)}
    is_matrix = "blocks." in name and name.endswith(".weight") and tensor.dim() > 1
    has_scale = name.replace(".weight", ".scale_weight") in weights
    kind = dtype if is_matrix and not has_scale and isinstance(dtype, torch.dtype) else tensor.dtype
    is_as_stored = has_own_storage(tensor) and kind == tensor.dtype
    return {
        name: TensorInfo(
            tuple(tensor.shape),
            str(kind).removeprefix("torch."),
            tensor.numel() * kind.itemsize,
            in_file=is_as_stored and region_of(tensor, mappings) is not None,
        )
    }


def _bytes_in(value: Any) -> int:
    """Bytes of the tensors in nested lists and tuples, and in objects with an attribute `weights`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_in, value))
    return _bytes_in(getattr(value, "weights", ()))


def offload_state_dict(transformer: nn.Module, model: Any) -> None:
    """Replaces the blocks' entries that are on the GPU by the copies that the wrapper has just made on the host.

    With load_device=main_device the loader keeps its state dict on the GPU: swapping would free no memory.
    """
    stored = entry(model, "sd")
    if not isinstance(stored, dict):
        return
    moved = 0
    for part in parts_of(transformer):
        for path, tensor in part.weights.named_parameters():
            name = f"{part.name}.{path}".replace("_orig_mod.", "")
            held = stored.get(name)
            if not isinstance(held, torch.Tensor) or held.device.type in ("cpu", "meta") or tensor.device.type != "cpu":
                continue
            is_same = (held.dtype, held.shape) == (tensor.dtype, tensor.shape)
            stored[name] = tensor.detach() if is_same else held.to("cpu")
            moved += held.nbytes
    if moved:
        logger.info("moved %d bytes of weights to the host that load_device=main_device kept on the GPU", moved)


def replace_in(model: Any) -> Callable[[str, int, torch.Tensor], None] | None:
    """Makes a function that puts masters into the loader's state dict in place of the tensors they were copied from.

    The host then holds each weight once, and the next run finds it in its slab. None for GGUF: its file is read again.
    """
    if entry(model, "gguf_reader") is not None or not isinstance(entry(model, "sd"), dict):
        return None
    reference = weakref.ref(model)
    names: dict[int, str] = {}

    def put(name: str, address: int, master: torch.Tensor) -> None:
        alive = reference()
        stored: dict[str, Any] = (None if alive is None else alive["sd"]) or {}
        if name not in stored:  # it is in a parameter made of several tensors, of which each may be an entry
            names.update(() if names else _names_by_address(stored))
            name = names.get(address, name)
        held = stored.get(name)
        if not isinstance(held, torch.Tensor) or held.device.type != "cpu":
            return
        for inner in _plain_tensors(held):
            layout = (inner.data_ptr(), inner.nbytes, inner.shape, inner.stride())
            if layout != (address, master.nbytes, master.shape, master.stride()):
                continue
            # A new tensor over the slab, so that its storage counts one more owner.
            over_slab = master.detach().view(inner.dtype)
            if inner is held:
                stored[name] = over_slab
            else:
                bind((inner,), (over_slab,))

    return put


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor, or those with bytes of their own that it is made of."""
    if has_own_storage(tensor):
        return [tensor]
    return [plain for inner in inner_tensors(tensor).values() for plain in _plain_tensors(inner)]


def _names_by_address(stored: Mapping[str, Any]) -> dict[int, str]:
    """The entries of a state dict by the addresses of their bytes on the host."""
    entries = [(name, held) for name, held in list(stored.items()) if isinstance(held, torch.Tensor)]
    on_host = [(name, held) for name, held in entries if held.device.type == "cpu"]
    return {plain.data_ptr(): name for name, held in on_host for plain in _plain_tensors(held)}
