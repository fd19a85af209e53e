"""Reads a transformer's blocks into a ModelProfile and the tensors behind it; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...hardware.disk import FileRegion
from ..errors import UnsupportedModelError
from .layout import BlockProfile, ModelProfile, Placement, TensorProfile, device_bytes, small_cutoff
from .tensors import allocations, has_own_storage, inner_names, inner_tensors, stored_bytes

HOST_NAMES = frozenset({"block_id"})
"""Names of tensors that index Python lists; on the device each use would synchronise the host."""

LORA_MARK = "lora"
"""Part of the names of a LoRA's deltas and strengths: buffers, often large, that a forward never changes."""


@dataclass(eq=False, slots=True)
class TensorEntry:
    """One parameter or buffer of a block, or a tensor inside a shell, found by holder and name, since loading makes new
    Parameter objects.

    Attributes:
        holder: The dict of the module, or of the shell, that holds it.
        name: Its name there.
        path: Dotted name inside the block, without `_orig_mod.`.
        is_buffer: It is a buffer, not a parameter.
        placement: Where it lives.
        reason: Why it does not stream; empty if it does.
        leader: The first of the entries whose bytes overlap; None for that entry and for one that overlaps none.
        offset: Bytes from the leader's start to this tensor's.
        extent: Bytes that the entry spans, together with the entries that it leads; 0 for an entry with a leader.
        region: The bytes of a file that are the tensor's, as they stand; None if there are none, or they are unknown.
        in_mapping: Its bytes are in a mapping of a file, which may have been written since.
        shells: The shells around the tensor, which count in-place edits of it.
        is_tied: Its bytes overlap those of another tensor.
    """

    holder: dict[str, torch.Tensor | None]
    name: str
    path: str
    is_buffer: bool
    placement: Placement = Placement.STREAMED
    reason: str = ""
    leader: TensorEntry | None = None
    offset: int = 0
    extent: int = 0
    region: FileRegion | None = None
    in_mapping: bool = False
    shells: tuple[torch.Tensor, ...] = ()
    is_tied: bool = False

    @property
    def may_change(self) -> bool:
        """Whether a forward may edit the tensor: it is a buffer, and not a LoRA's."""
        return self.is_buffer and not self.is_lora

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA's."""
        return LORA_MARK in self.path.lower()

    @property
    def tensor(self) -> torch.Tensor:
        """The present tensor."""
        tensor = self.holder[self.name]
        assert tensor is not None, f"{self.path} was removed"
        return tensor


@dataclass(eq=False, slots=True)
class Shell:
    """A parameter that has no bytes of its own, since its class keeps them in other tensors; these are placed like any
    other, and the shell shows the device that they are on. A shell may be inside another.

    Attributes:
        holder: The dict of the module, or of the shell around it, that holds it.
        name: Its name there.
        tensor: The parameter.
        inner: Names of the attributes that hold its tensors.
        entries: The tensors in it and in the shells around it, which are on one device between forwards.
        attributes: The dict of its attributes.
    """

    holder: dict[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor
    inner: list[str]
    entries: list[TensorEntry]
    attributes: dict[str, torch.Tensor | None]

    @property
    def is_streamed(self) -> bool:
        """Whether one of these tensors streams."""
        return any(entry.placement is Placement.STREAMED for entry in self.entries)

    @property
    def is_whole(self) -> bool:
        """Whether it keeps its tensors where they were found; `Module.to` exchanges all attributes at once."""
        return vars(self.tensor) is self.attributes

    def is_unchanged(self) -> bool:
        """Whether it is still in its place and made of the same attributes, which are brought up to date."""
        if self.holder.get(self.name) is not self.tensor or not self.is_whole:
            return False
        return list(inner_tensors(self.tensor)) == self.inner


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """A profile with the tensors that it describes.

    Attributes:
        profile: Bytes and placements.
        entries: For each block, one entry per tensor, in the order of `profile.blocks[i].tensors`.
        buffers: For each block, the buffer dicts of its modules, to which a forward or a patch may add.
        shells: For each block, the parameters that are made of other tensors.
    """

    profile: ModelProfile
    entries: tuple[tuple[TensorEntry, ...], ...]
    buffers: tuple[tuple[dict[str, torch.Tensor | None], ...], ...]
    shells: tuple[tuple[Shell, ...], ...]


def blocks_of(model: nn.Module, names: Sequence[str] = ("vace_blocks", "blocks")) -> tuple[tuple[str, nn.Module], ...]:
    """Name and module of each block in the model's lists `names`, in that order; a list may be missing."""
    return tuple(
        (f"{name}.{index}", block) for name in names for index, block in enumerate(getattr(model, name, None) or ())
    )


def named_blocks(blocks: Iterable[tuple[str, nn.Module]]) -> tuple[tuple[str, nn.Module], ...]:
    """The pairs of name and module that a session or run is made of.

    Raises:
        TypeError: They are something else, such as the model or its list of blocks.
    """
    found = () if isinstance(blocks, nn.Module) else tuple(blocks)
    odd = blocks if isinstance(blocks, nn.Module) else next((one for one in found if not _is_named(one)), None)
    if odd is not None:
        raise TypeError(
            f"expected pairs of a block's name and its module, as blocks_of(model) gives them, got {type(odd).__name__}"
        )
    return found


def _is_named(one: object) -> bool:
    return isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str)  # noqa: PLR2004


RegionOf = Callable[[torch.Tensor], "FileRegion | None"]
"""Finds the bytes of a file that are a tensor's, as they stand."""


def profile_model(
    blocks: Sequence[tuple[str, nn.Module]],
    *,
    root: nn.Module | None = None,
    region_of: RegionOf | None = None,
    in_mapping: Callable[[torch.Tensor], bool] | None = None,
) -> ProfiledModel:
    """Reads blocks into a profile.

    Args:
        blocks: Name and module of each block, in execution order; names of VACE blocks start with `vace_blocks.`.
        root: The whole model, whose tensors outside the blocks are counted too; None counts none.
        region_of: Asked for each tensor that streams; None takes no tensor for part of a file.
        in_mapping: Whether a tensor is in a mapping of a file; None takes none for it.

    Raises:
        UnsupportedModelError: There are no blocks, or a tensor has no data or a layout that cannot be copied as bytes
            (sparse, conjugate, negative or quantized).
    """
    if not blocks:
        raise UnsupportedModelError(
            "the model has no list of blocks to swap; give the transformer's blocks, for example model.blocks"
        )
    shells: tuple[list[Shell], ...] = tuple([] for _ in blocks)
    # What LoRAs add comes last, so that the rest has the same place in a slab with and without it.
    entries = tuple(
        tuple(sorted(_entries(name, module, into), key=lambda entry: entry.is_lora))
        for (name, module), into in zip(blocks, shells, strict=True)
    )
    for block in entries:
        _place(block)
    every = [entry for block in entries for entry in block]
    _tie(every)
    for entry in every:
        if region_of is not None and entry.placement is Placement.STREAMED:
            entry.region = region_of(entry.tensor)
        if in_mapping is not None and entry.placement in (Placement.STREAMED, Placement.SMALL):
            entry.in_mapping = in_mapping(entry.tensor)
    inside = {id(entry.tensor) for entry in every} | {id(shell.tensor) for block in shells for shell in block}
    outside = () if root is None else (t for t in (*root.parameters(), *root.buffers()) if id(t) not in inside)
    other = sum(stored_bytes(tensor) for tensor in outside if not tensor.is_meta)
    profiles = tuple(
        BlockProfile(
            name,
            tuple(TensorProfile(e.path, e.extent, e.placement, e.reason, in_file=e.region is not None) for e in block),
        )
        for (name, _), block in zip(blocks, entries, strict=True)
    )
    buffers = tuple(tuple(m._buffers for m in block.modules()) for _, block in blocks)
    return ProfiledModel(ModelProfile(profiles, other, _files(every)), entries, buffers, tuple(map(tuple, shells)))


def _files(entries: Sequence[TensorEntry]) -> tuple[str, ...]:
    """The files that tensors are in, the one with the most bytes first."""
    nbytes: Counter[str] = Counter()
    for entry in entries:
        if entry.region is not None:
            nbytes[entry.region.path] += entry.region.nbytes
    return tuple(path for path, _ in nbytes.most_common())


def refuse_grad(blocks: Sequence[tuple[str, nn.Module]], given: object = ()) -> None:
    """Refuses what a backward would need: it runs after other weights have taken the place of a block's in its slot.

    Args:
        blocks: Name and module of each block.
        given: What one block is called with: tensors in tuples, lists and dicts.

    Raises:
        UnsupportedModelError: A parameter of `blocks` requires grad, or a tensor in `given`.
    """
    for name, module in blocks:
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise UnsupportedModelError(
                    f"an input of {name} requires grad and grad is enabled, but swapped blocks support inference only; "
                    "run under torch.inference_mode() or torch.no_grad(), or detach() the input"
                )
        for path, parameter in module.named_parameters():
            if parameter.requires_grad:
                raise UnsupportedModelError(
                    f"{name}.{path} requires grad and grad is enabled, but swapped blocks support inference only; "
                    "run under torch.inference_mode() or torch.no_grad()"
                )


def _entries(block_name: str, block: nn.Module, shells: list[Shell]) -> Iterator[TensorEntry]:
    """The block's tensors; the parameters that are made of other tensors are added to `shells`."""
    for prefix, module in block.named_modules():
        for holder, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in holder.items():
                if tensor is not None:
                    path = (f"{prefix}.{name}" if prefix else name).replace("_orig_mod.", "")
                    _refuse_unsupported(f"{block_name}.{path}", tensor, module)
                    whole = TensorEntry(holder, name, path, is_buffer)
                    if is_buffer or not _can_be_taken_apart(tensor):
                        yield whole
                    else:
                        yield from _taken_apart(whole, shells)


def _can_be_taken_apart(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a shell around tensors, or around shells around tensors, that can be copied as bytes."""
    inner: list[torch.Tensor] = [] if has_own_storage(tensor) else [vars(tensor)[name] for name in inner_names(tensor)]
    return bool(inner) and all(
        not one.is_meta and _oddity(one) is None if has_own_storage(one) else _can_be_taken_apart(one) for one in inner
    )


def _taken_apart(whole: TensorEntry, shells: list[Shell], around: list[TensorEntry] | None = None) -> list[TensorEntry]:
    """The tensors in a shell, which is added to `shells`.

    Args:
        whole: The shell's place.
        shells: Receives the shell and those in it.
        around: Receives the tensors of a shell in another one, with the other's.
    """
    tensor, entries = whole.tensor, [] if around is None else around
    shell = Shell(whole.holder, whole.name, tensor, inner_names(tensor), entries, vars(tensor))
    shells.append(shell)
    for name in shell.inner:
        within = (*whole.shells, tensor)
        inner = TensorEntry(shell.attributes, name, f"{whole.path}.{name}", is_buffer=False, shells=within)
        if has_own_storage(inner.tensor):
            entries.append(inner)
        else:
            _taken_apart(inner, shells, entries)
    return entries


def _refuse_unsupported(name: str, tensor: torch.Tensor, module: nn.Module) -> None:
    if tensor.is_meta and hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(
            f"{name} is on the meta device, since accelerate holds the weights and moves them; take that off with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) before the blocks are swapped"
        )
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) or tensor.is_meta:
        raise UnsupportedModelError(
            f"{name} has no data (it is on the meta device or not initialised); load the weights before the blocks are "
            "swapped"
        )
    odd = _oddity(tensor) if has_own_storage(tensor) else None
    if odd is not None:
        kind, cure = odd
        raise UnsupportedModelError(
            f"{name} is {kind}, which cannot be swapped; replace it by its {cure} after loading, or take another "
            "checkpoint of the model"
        )


def _oddity(tensor: torch.Tensor) -> tuple[str, str] | None:
    """Why a tensor's bytes are not its elements in order, and what makes them so; None if they are."""
    for is_so, kind, cure in (
        (tensor.is_quantized, "quantized (a torch.quantize_* tensor)", "dequantize()"),
        (tensor.layout is not torch.strided, f"stored as {tensor.layout}", "to_dense()"),
        (tensor.is_conj(), "a conjugate view", "resolve_conj()"),
        (tensor.is_neg(), "a negative view", "resolve_neg()"),
    ):
        if is_so:
            return kind, cure
    return None


def _place(block: Sequence[TensorEntry]) -> None:
    """Sets the placement and extent of each entry of a block."""
    for entry in block:
        entry.extent = stored_bytes(entry.tensor)
    cutoff = small_cutoff(sum(entry.extent for entry in block))
    for entry in block:
        entry.placement, entry.reason = _placement(entry, cutoff)
        if entry.placement is Placement.FIXED:
            entry.extent = sum(map(device_bytes, allocations(entry.tensor)))


def _placement(entry: TensorEntry, cutoff: int) -> tuple[Placement, str]:
    tensor = entry.tensor
    if entry.name in HOST_NAMES:
        return Placement.HOST, "Python reads it"
    if not has_own_storage(tensor):
        kind = type(tensor).__name__
        return Placement.FIXED, f"a buffer of type {kind}" if entry.is_buffer else f"{kind} cannot be taken apart"
    if ".parametrizations." in f".{entry.path}":
        return Placement.SMALL, "a parametrization computes a weight from it, at times that the block does not control"
    if entry.may_change:
        return Placement.SMALL, "a buffer, which a forward may change"
    if entry.extent < max(cutoff, 1):
        return Placement.SMALL, "under the cut-off"
    return Placement.STREAMED, ""


def _tie(entries: Sequence[TensorEntry]) -> None:
    """Keeps tensors whose bytes overlap on the device together; copied apart, they would share bytes no more."""
    placed = [e for e in entries if e.placement in (Placement.STREAMED, Placement.SMALL) and e.extent]
    placed.sort(key=lambda e: (str(e.tensor.device), e.tensor.data_ptr()))
    leader: TensorEntry | None = None
    for entry in placed:
        distance = entry.tensor.data_ptr() - leader.tensor.data_ptr() if leader else 0
        if leader is None or leader.tensor.device != entry.tensor.device or distance >= leader.extent:
            leader = entry
            continue
        if distance % entry.tensor.element_size():
            raise UnsupportedModelError(
                f"{entry.path} ({entry.tensor.dtype}) shares bytes with {leader.path} but starts {distance} bytes "
                "after it, which is not a whole number of elements; clone one of them"
            )
        for tied in (leader, entry):
            tied.placement, tied.reason, tied.is_tied = Placement.SMALL, "its bytes overlap another tensor's", True
        leader.extent = max(leader.extent, distance + entry.extent)
        entry.leader, entry.offset, entry.extent = leader, distance, 0


def count_parameters(modules: Sequence[nn.Module]) -> int | None:
    """Parameters of the modules; None where packed bytes hide how many they stand for, as in GGUF."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if any(not parameter.is_floating_point() for parameter in parameters):
        return None
    return sum(parameter.numel() for parameter in parameters)
