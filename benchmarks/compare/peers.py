"""Peer engines from PyPI: how each runs diffusers' Wan transformer with blocks on the host.

Each is called as its authors document it, with the fastest setting where there is a choice. The calls were written for
diffusers 0.42.1, accelerate 1.15.0, mmgp 3.8.2 and RamTorch 1.11.0. An engine that page-locks memory does it through
torch's own allocator, and all run under `torch.inference_mode()`.
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
    """Turns a failed import in the body into an error that names `package`."""
    try:
        yield
    except ImportError as cause:
        raise NotOfferedError(NOT_INSTALLED.format(package)) from cause


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


class _Peer:
    """Defaults of all peers."""

    packages: tuple[str, ...] = ()
    pinned_bytes = 0

    def forward(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing."""


class GroupOffload(_Peer):
    """Diffusers' group offloading: every block is copied on a side stream while the one before it computes.

    The rest of the model is copied in each forward too, from memory that is not page-locked, and the host waits for it:
    diffusers cannot leave it on the device. The first forward only records the order, and prefetches nothing.

    Args:
        record_stream: The allocator tracks which stream still reads a block; otherwise the host waits for that stream
            after each block.
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
    """Accelerate's hooks: the last blocks are copied before their forward, tensor by tensor, and dropped after it; the
    host waits for each copy.

    `cpu_offload` is called for each such block: for the whole model it would take the rest of the model off the device
    too. `dispatch_model` uses the same hook for blocks that its map leaves on the CPU.
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
    """The memory manager of Wan2GP: blocks spread over the model stay, the others are fetched while one computes.

    It plans from a budget in bytes, here the one that leaves room for the wanted number of blocks; its first forward
    places them. It also streams the linear layers of the text and time embedders. In 3.8.2 each streamed block is
    copied twice, ahead of its turn and at its turn, because it is looked up under another name than it was fetched
    under.
    """

    packages: tuple[str, ...] = ("mmgp", "optimum-quanto")

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        if device.type != "cuda":
            raise NotOfferedError("mmgp is written for CUDA devices")
        with _installed("mmgp"):
            from mmgp import offload
        for module in (model, *model.children()):
            # Without this it casts float32 arguments of these modules to the weights' dtype: the timestep and the input
            # of the last norm would lose bits.
            vars(module)["_lock_dtype"] = torch.float32
        with contextlib.redirect_stdout(sys.stderr):  # it prints a banner
            manager = offload.all(
                {"transformer": model},
                pinnedMemory=True,
                quantizeTransformer=False,
                budgets={"transformer": _mmgp_budget(model, swapped) / offload.ONE_MB},
                asyncTransfers=True,
                convertWeightsFloatTo=next(_blocks(model)[0].parameters()).dtype,
                perc_reserved_mem_max=1.0,  # of the host's memory; with less than it needs, it page-locks only a part
                verboseLevel=0,
            )
        torch.set_default_device(None)  # it has set "cuda"
        known = [name for name in manager.blocks_of_modules_sizes if name.startswith("transformer/blocks.")]
        streamed = len(known) - len(manager.preloaded_blocks_per_model["transformer"])
        if streamed != swapped:
            raise NotOfferedError(f"mmgp's plan streams {streamed} blocks where {swapped} were asked for")
        if not all(parameter.is_pinned() for block in _blocks(model) for parameter in block.parameters()):
            raise NotOfferedError("mmgp could page-lock only a part of the blocks")


def _mmgp_budget(model: nn.Module, swapped: int) -> int:
    """Bytes at which `swapped` blocks do not fit: mmgp first subtracts the rest of the model and two blocks.

    0 means no limit, and so does more than the whole model; at least 2 blocks can be swapped.
    """
    if swapped == 0:
        return 0
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in _blocks(model)]
    outside = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - sum(blocks)
    return outside + (len(blocks) - swapped + 2) * max(blocks)


class RamTorch(_Peer):
    """RamTorch's OffloadModel: a thread fills a window of two blocks; evenly spaced others stay on the device.

    It needs a chain of modules in which each takes what the one before returns, and starts the chain again in each
    forward. `close` ends its threads.
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
    """A block that passes on its other arguments with its result."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.block(hidden, text, time, (cosine, sine)), text, time, cosine, sine


class _Chain(nn.Module):
    """All blocks as one module."""

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
