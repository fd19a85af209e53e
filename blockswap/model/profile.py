"""Reads a transformer's blocks into a ModelProfile and the entries behind it; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, device_bytes, small_cutoff
from .tensors import span_bytes

HOST_NAMES = frozenset({"block_id"})
"""Tensors that index Python lists: on the device each use would be a host synchronisation."""

LORA_MARK = "lora"
"""Part of the names of a LoRA's deltas and strengths, buffers that a forward never changes; deltas are large."""


@dataclass(eq=False, slots=True)
class TensorEntry:
    """One parameter or buffer of a block, by the module and name that hold it: loading makes new Parameter objects.

    Attributes:
        module: The module that holds it.
        name: Its name there.
        path: Dotted name inside the block, without `_orig_mod.`.
        is_buffer: Held among the module's buffers.
        placement: Where it lives.
        reason: Why it does not stream.
        leader: The entry whose bytes hold this one's, if it overlaps another.
        offset: Bytes from the leader's begin to this tensor's.
        extent: Bytes that the entry (with all that follow it as their leader) spans; 0 behind a leader.
    """

    module: nn.Module
    name: str
    path: str
    is_buffer: bool
    placement: Placement = Placement.STREAMED
    reason: str = ""
    leader: TensorEntry | None = None
    offset: int = 0
    extent: int = 0

    @property
    def holder(self) -> dict[str, torch.Tensor | None]:
        """The module's dict that the tensor is in."""
        return self.module._buffers if self.is_buffer else self.module._parameters  # type: ignore[return-value]

    @property
    def may_change(self) -> bool:
        """Whether a forward may edit it: a buffer, unless it belongs to a LoRA."""
        return self.is_buffer and LORA_MARK not in self.path.lower()

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it stands now."""
        tensor = self.holder[self.name]
        assert tensor is not None, f"{self.path} has gone"
        return tensor


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """What was read: the profile, and the entries of each block in the same order.

    Attributes:
        profile: Bytes and placements.
        entries: Of each block, one for each of `profile.blocks[i].tensors`.
        buffers: Of each block, the dicts of buffers of its modules; a forward or a patch may add to them.
    """

    profile: ModelProfile
    entries: tuple[tuple[TensorEntry, ...], ...]
    buffers: tuple[tuple[dict[str, torch.Tensor | None], ...], ...]


def blocks_of(model: nn.Module, names: Sequence[str] = ("vace_blocks", "blocks")) -> tuple[tuple[str, nn.Module], ...]:
    """Name and module of each block in those of the model's lists that exist, in the order of `names`."""
    return tuple(
        (f"{name}.{index}", block) for name in names for index, block in enumerate(getattr(model, name, None) or ())
    )


def profile_model(blocks: Sequence[tuple[str, nn.Module]], *, root: nn.Module | None = None) -> ProfiledModel:
    """Reads blocks into a profile.

    Args:
        blocks: Name and module of each block, in execution order; names starting with `vace_blocks.` are VACE's.
        root: The whole model; its tensors outside the blocks are counted. None leaves them out.

    Raises:
        UnsupportedModelError: No blocks; a tensor without data; or one whose bytes are not its elements in order:
            sparse, conjugate, negative or quantized.
    """
    if not blocks:
        raise UnsupportedModelError(
            "the model has no list of blocks to swap; give the transformer's blocks, for example model.blocks"
        )
    entries = tuple(tuple(_entries(name, module)) for name, module in blocks)
    for block in entries:
        _place(block)
    _tie([entry for block in entries for entry in block])
    inside = {id(entry.tensor) for block in entries for entry in block}
    other = _bytes_outside(root, inside) if root is not None else 0
    profiles = tuple(
        BlockProfile(name, tuple(TensorProfile(e.path, e.extent, e.placement, e.reason) for e in block))
        for (name, _), block in zip(blocks, entries, strict=True)
    )
    buffers = tuple(tuple(m._buffers for m in block.modules()) for _, block in blocks)
    return ProfiledModel(ModelProfile(profiles, other), entries, buffers)


def refuse_grad(blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises UnsupportedModelError if a parameter of `blocks` requires grad."""
    for name, module in blocks:
        for path, parameter in module.named_parameters():
            if parameter.requires_grad:
                raise UnsupportedModelError(
                    f"swapped blocks expect inference but {name}.{path} requires grad and grad is enabled; "
                    "run under torch.inference_mode() or torch.no_grad()"
                )


def _entries(block_name: str, block: nn.Module) -> Iterator[TensorEntry]:
    for prefix, module in block.named_modules():
        for holder, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                path = f"{prefix}.{name}" if prefix else name
                path = path.replace("_orig_mod.", "")
                if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) or tensor.is_meta:
                    raise UnsupportedModelError(
                        f"block swapping expects weights with data but {block_name}.{path} is on the meta device or "
                        "not initialised; load the weights first"
                    )
                _refuse_other_layouts(f"{block_name}.{path}", tensor)
                yield TensorEntry(module, name, path, is_buffer)


def _refuse_other_layouts(name: str, tensor: torch.Tensor) -> None:
    if not _has_own_storage(tensor):
        return
    if tensor.is_quantized:
        kind, cure = "quantized (a torch.quantize_* tensor)", "dequantize()"
    elif tensor.layout is not torch.strided:
        kind, cure = f"stored as {tensor.layout}", "to_dense()"
    elif tensor.is_conj():
        kind, cure = "a conjugate view", "resolve_conj()"
    elif tensor.is_neg():
        kind, cure = "a negative view", "resolve_neg()"
    else:
        return
    raise UnsupportedModelError(
        f"{name} is {kind}, which cannot be swapped; replace it by its {cure} after loading, or take another "
        "checkpoint of the model"
    )


def _place(block: Sequence[TensorEntry]) -> None:
    """Sets each entry's placement from the tensor itself."""
    for entry in block:
        entry.extent = _bytes(entry.tensor)
    cutoff = small_cutoff(sum(entry.extent for entry in block))
    for entry in block:
        entry.placement, entry.reason = _placement(entry, cutoff)
        if entry.placement is Placement.FIXED:
            entry.extent = sum(map(device_bytes, _parts(entry.tensor)))


def _bytes(tensor: torch.Tensor) -> int:
    """Memory of a tensor, of all its parts."""
    return sum(_parts(tensor))


def _parts(tensor: torch.Tensor) -> list[int]:
    """Bytes of each piece of memory a tensor is made of: one, unless it is made of other tensors."""
    if _has_own_storage(tensor) and tensor.layout is torch.strided:
        return [span_bytes(tensor)]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.numel() * tensor.element_size()]  # outside of the blocks it may be sparse: this is the most
    return [size for name in tensor.__tensor_flatten__()[0] for size in _parts(getattr(tensor, name))]


def _placement(entry: TensorEntry, cutoff: int) -> tuple[Placement, str]:
    tensor = entry.tensor
    if entry.name in HOST_NAMES:
        return Placement.HOST, "Python reads it"
    if not _has_own_storage(tensor):
        return Placement.FIXED, "a wrapper subclass: re-pointing moves only its shell"
    if ".parametrizations." in f".{entry.path}":
        return Placement.SMALL, "a computed weight is made from it outside the block's control"
    if entry.may_change:
        return Placement.SMALL, "a buffer, which a forward may change"
    if entry.extent < max(cutoff, 1):
        return Placement.SMALL, "under the cut-off"
    return Placement.STREAMED, ""


def _has_own_storage(tensor: torch.Tensor) -> bool:
    """False for wrapper subclasses, which keep their data in other tensors (torchao's, ComfyUI's QuantizedTensor)."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _tie(entries: Sequence[TensorEntry]) -> None:
    """Tensors whose bytes overlap stay on the device together: streamed apart they would part for ever."""
    placed = [e for e in entries if e.placement in (Placement.STREAMED, Placement.SMALL) and e.extent]
    placed.sort(key=lambda e: (str(e.tensor.device), e.tensor.data_ptr()))
    leader: TensorEntry | None = None
    for entry in placed:
        begin = entry.tensor.data_ptr()
        if leader is None or leader.tensor.device != entry.tensor.device:
            leader = entry
            continue
        distance = begin - leader.tensor.data_ptr()
        if distance >= leader.extent:
            leader = entry
            continue
        if distance % entry.tensor.element_size():
            raise UnsupportedModelError(
                f"tensors that share bytes expect whole elements between them but {entry.path} ({entry.tensor.dtype}) "
                f"begins {distance} bytes behind {leader.path}; clone one of them"
            )
        for tied in (leader, entry):
            tied.placement, tied.reason = Placement.SMALL, "its bytes overlap another tensor's"
        leader.extent = max(leader.extent, distance + entry.extent)
        entry.leader, entry.offset, entry.extent = leader, distance, 0


def _bytes_outside(root: nn.Module, inside: set[int]) -> int:
    tensors = [*root.parameters(), *root.buffers()]
    return sum(_bytes(tensor) for tensor in tensors if id(tensor) not in inside and not tensor.is_meta)
