"""Peer engines from PyPI: what each asks of diffusers' Wan transformer to run it with blocks on the host.

Each is called as its authors document it, with the setting that is fastest where there is a choice. Versions that these
calls were written against: diffusers 0.42.1, accelerate 1.15.0, mmgp 3.8.2, RamTorch 1.11.0. All page-lock memory
through torch's own allocator, if at all, and all run under `torch.inference_mode()`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .engine import NOT_INSTALLED, NotOfferedError
from .ours import rest_of


@contextlib.contextmanager
def _installed(package: str) -> Iterator[None]:
    """Imports inside say that `package` is missing where they fail."""
    try:
        yield
    except ImportError as cause:
        raise NotOfferedError(NOT_INSTALLED.format(package)) from cause


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


class _Peer:
    """What the peers have in common."""

    packages: tuple[str, ...] = ()
    pinned_bytes = 0

    def forward(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing."""


class GroupOffload(_Peer):
    """Diffusers' group offloading: every block comes on a side stream while the one before it computes.

    What is outside the blocks comes and goes in each forward as well, waited for and not page-locked: diffusers has no
    way to leave it on the device. The first forward only traces the order, and prefetches nothing.

    Args:
        record_stream: Whether the allocator is told which stream still reads a block, or the host waits for that
            stream after each.
    """

    packages: tuple[str, ...] = ("diffusers",)

    def __init__(self, *, record_stream: bool) -> None:
        self._record_stream = record_stream

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        count = len(_blocks(model))
        if swapped != count:
            raise NotOfferedError(f"group offloading streams every block: it cannot swap {swapped} of {count}")
        with _installed("accelerate"):  # diffusers' hooks take a function from it, and fail in the forward without
            import accelerate  # noqa: F401
            from diffusers.hooks import apply_group_offloading
        try:
            apply_group_offloading(
                model,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,
                record_stream=self._record_stream,
                low_cpu_mem_usage=False,
            )
        except ValueError as cause:  # a device without streams
            raise NotOfferedError(str(cause)) from cause


class Accelerate(_Peer):
    """Accelerate's hooks: the last blocks come before their forward, tensor by tensor and waited for, and go after it.

    `cpu_offload` for each such block: for the whole model it would take what is outside the blocks off the device too,
    and `dispatch_model` puts this same hook on a block that its map leaves on the CPU.
    """

    packages: tuple[str, ...] = ("accelerate",)

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        with _installed("accelerate"):
            from accelerate import cpu_offload
        blocks = _blocks(model)
        resident = len(blocks) - swapped
        for module in (*rest_of(model), *blocks[:resident]):
            module.to(device)
        for block in blocks[resident:]:
            cpu_offload(block, device, preload_module_classes=[type(block).__name__])


class Mmgp(_Peer):
    """The memory manager of Wan2GP: blocks spread over the model stay, each other one is fetched while one computes.

    It plans from a budget in bytes, here the one that leaves room for the wanted number of blocks; its first forward
    places them. It streams the linear layers of the text and time embedders too, by their names. In 3.8.2 each streamed
    block is copied twice, ahead and when its turn comes: it is looked for under another name than it was fetched under.
    """

    packages: tuple[str, ...] = ("mmgp", "optimum-quanto")

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        if device.type != "cuda":
            raise NotOfferedError("mmgp is written for CUDA devices")
        with _installed("mmgp"):
            from mmgp import offload
        for module in (model, *model.children()):
            # It casts float32 arguments of these modules to the weights' dtype unless they say otherwise: the timestep,
            # and what goes into the last norm, would lose bits.
            vars(module)["_lock_dtype"] = torch.float32
        with contextlib.redirect_stdout(sys.stderr):  # it prints a banner
            manager = offload.all(
                {"transformer": model},
                pinnedMemory=True,
                quantizeTransformer=False,
                budgets={"transformer": _mmgp_budget(model, swapped) / offload.ONE_MB},
                asyncTransfers=True,
                convertWeightsFloatTo=next(_blocks(model)[0].parameters()).dtype,
                perc_reserved_mem_max=1.0,  # of the host's memory; page-locks only a part if this is less than it needs
                verboseLevel=0,
            )
        torch.set_default_device(None)  # it leaves "cuda" there
        known = [name for name in manager.blocks_of_modules_sizes if name.startswith("transformer/blocks.")]
        streamed = len(known) - len(manager.preloaded_blocks_per_model["transformer"])
        if streamed != swapped:
            raise NotOfferedError(f"mmgp's plan streams {streamed} blocks where {swapped} were asked for")
        if not all(parameter.is_pinned() for block in _blocks(model) for parameter in block.parameters()):
            raise NotOfferedError("mmgp could page-lock only a part of the blocks")


def _mmgp_budget(model: nn.Module, swapped: int) -> int:
    """Bytes at which `swapped` blocks do not fit: mmgp takes what is outside the blocks and two of them off first.

    0 is no limit. More than the whole model is none either, so that the least that can be swapped is 2.
    """
    if swapped == 0:
        return 0
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in _blocks(model)]
    outside = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - sum(blocks)
    return outside + (len(blocks) - swapped + 2) * max(blocks)


class RamTorch(_Peer):
    """RamTorch's OffloadModel: a thread fills a window of two blocks; others, evenly spaced, stay.

    It wants a chain of modules in which each takes what the one before returns, and starts it anew in each forward.
    Its threads must be ended with `close`.
    """

    packages: tuple[str, ...] = ("ramtorch",)

    def __init__(self) -> None:
        self._model: Any = None

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        if device.type not in ("cuda", "cpu"):
            raise NotOfferedError("RamTorch is written for CUDA devices")
        with _installed("ramtorch"):
            from ramtorch import OffloadModel
        for module in rest_of(model):
            module.to(device)
        links = [_Link(block) for block in _blocks(model)]
        self._model = OffloadModel(links, device=device, window=2, pin=len(links) - swapped)
        model.blocks = nn.ModuleList([_Chain(self._model)])

    def close(self) -> None:
        if self._model is not None:
            self._model.close()


class _Link(nn.Module):
    """A block that hands on what the next one takes beside its result."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.block(hidden, text, time, (cosine, sine)), text, time, cosine, sine


class _Chain(nn.Module):
    """All blocks in the shape of one."""

    def __init__(self, links: nn.Module) -> None:
        super().__init__()
        self.links = links

    def forward(
        self,
        hidden: torch.Tensor,
        text: torch.Tensor,
        time: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        return self.links((hidden, text, time, *rotary))[0]
