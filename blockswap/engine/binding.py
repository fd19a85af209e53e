"""A block's tensors, and the bytes that each points at."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch

from ..model.profile import HOST_NAMES, Shell, TensorEntry
from ..model.tensors import copy_bytes, storage_key, version_of


def bind(tensors: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Points each tensor at the bytes of its target; a shell takes the device of its target.

    Torch functions of subclasses are off meanwhile: 25 assignments to GGUF-like tensors take 7 instead of 72
    microseconds (torch 2.13, one CPU core at 2 GHz). So are their dispatchers, which would unpack a shell to compare it
    with its target.
    """
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        for tensor, target in zip(tensors, targets, strict=True):
            tensor.data = target


@dataclass(slots=True)
class TensorBinding:
    """A tensor as it was at adopt, and its copy on the device.

    Attributes:
        entry: The module and name that hold it.
        tensor: The Parameter or buffer object.
        master: Its bytes on the host (or on the device, if they were there at adopt).
        copy: Its bytes on the device while the swapper lives; None for a streamed tensor of a swapped block.
        version: In-place edits counted when it was bound; None if the tensor does not count them.
    """

    entry: TensorEntry
    tensor: torch.Tensor
    master: torch.Tensor
    copy: torch.Tensor | None
    version: int | None

    def write_back(self) -> int:
        """Copies the device's bytes to the master if a forward wrote them, or may have; returns the bytes copied."""
        version = version_of(self.tensor, *self.entry.shells)
        uncounted = version is None and self.entry.may_change
        if self.copy is None or (version == self.version and not uncounted):
            return 0
        copy_bytes(self.master, self.copy)
        return self.master.nbytes

    def restore_master(self, inside: Container[int]) -> int:
        """Points the tensor at its master again, after `write_back`; returns the bytes copied. A buffer that a forward
        has replaced moves to the device of its master.

        Args:
            inside: Keys of the storage that is about to be given up; a tensor that points elsewhere stays as it is.
        """
        edited = 0
        with torch.no_grad():
            if storage_key(self.tensor) in inside:
                try:
                    edited = self.write_back()
                finally:
                    bind((self.tensor,), (self.master,))
            now = self.entry.holder.get(self.entry.name)
            if self.entry.is_buffer and now is not None and now is not self.tensor:
                self.entry.holder[self.entry.name] = now.to(self.master.device)
        return edited


def bring_back(entry: TensorEntry, original: torch.Tensor, moved: torch.Tensor) -> None:
    """Puts the original of a moved tensor back in its place, unless the moved one was replaced since."""
    if entry.holder.get(entry.name) is moved:
        entry.holder[entry.name] = original


@dataclass(slots=True)
class BlockBinding:
    """One block's tensors in lists for the hot path; `watched` and `streamed` begin lists of equal length.

    Attributes:
        watched: Tensors that a forward must find as they were placed. Small buffers are not among them, since a forward
            may replace them.
        holders: The dict that holds each watched tensor.
        names: Its name in that dict.
        addresses: The address of its bytes between forwards.
        moved: Tensors that cannot be re-pointed: the dict and name that hold the moved copy, and the copy.
        buffers: Each module's dict of buffers, the names in it, and those of them that stream.
        bare: Dicts without buffers, which must stay empty.
        device: Where all buffers must be that do not stream, and all moved tensors.
        shells: The parameters that are made of other tensors.
        counting: The streamed tensors and shells of a swapped block that count in-place edits.
        versions: Their counts at the last look.
        streamed: The tensors that a swapped block re-points, then the shells around them; empty for a resident block.
        masters: The bytes that each points at between forwards.
        slots: For each slot, the bytes that each points at while the block runs from it.
        slot_addresses: For each slot, the addresses of these bytes, of the tensors alone.
    """

    watched: list[torch.Tensor]
    holders: list[dict[str, torch.Tensor | None]]
    names: list[str]
    addresses: list[int]
    moved: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]
    buffers: list[tuple[dict[str, torch.Tensor | None], set[str], set[str]]]
    bare: list[dict[str, torch.Tensor | None]]
    device: torch.device
    shells: Sequence[Shell] = ()
    counting: list[torch.Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    streamed: list[torch.Tensor] = field(default_factory=list)
    masters: list[torch.Tensor] = field(default_factory=list)
    slots: list[list[torch.Tensor]] = field(default_factory=list)
    slot_addresses: list[list[int]] = field(default_factory=list)

    def is_unchanged(self) -> bool:
        """Whether the block still has the tensors that were placed, at the addresses where they were placed."""
        with torch._C.DisableTorchFunctionSubclass():
            if list(map(torch.Tensor.data_ptr, self.watched)) != self.addresses:
                return False
        for shell in self.shells:  # first: it brings up to date what the next line looks at
            if not shell.is_unchanged():
                return False
        if any(self.bare) or not all(map(operator.is_, map(dict.get, self.holders, self.names), self.watched)):
            return False
        for holder, name, moved in self.moved:
            if holder.get(name) is not moved or moved.device != self.device:
                return False
        for holder, names, streamed in self.buffers:
            for name, tensor in holder.items():
                if tensor is None or name in HOST_NAMES or name in streamed:
                    continue
                if name not in names or tensor.device != self.device:
                    return False
        return True

    def outdate(self) -> None:
        """From now on nothing is unchanged."""
        self.addresses = [0] * len(self.addresses)

    def was_edited(self) -> bool:
        """Whether a tensor of the block was edited in place since the last call."""
        with torch._C.DisableTorchFunctionSubclass():
            versions = list(map(operator.attrgetter("_version"), self.counting))  # without a Python call for each
        edited, self.versions = versions != self.versions, versions
        return edited
