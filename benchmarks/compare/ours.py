"""The whole model on the device, the wrapper's plain swap, and our engine with its ablations."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import nn
from wanvideo_enhanced_blockswap.blockswap import blocks_of
from wanvideo_enhanced_blockswap.blockswap.engine.session import SwapSession
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier, SwapPlan, Timing
from wanvideo_enhanced_blockswap.commands.options import card_inputs
from wanvideo_enhanced_blockswap.hardware import read_host_memory

from .engine import NotOfferedError
from .testbed import Testbed

NO_LIMIT = 1 << 50
"""Memory of a card that holds everything, because the number of blocks is given."""


def rest_of(model: nn.Module) -> list[nn.Module]:
    """The model outside its blocks: modules, and the model's own parameters as one."""
    own = nn.ParameterList(model.parameters(recurse=False))
    return [*(module for module in model.children() if module is not model.blocks), own]


class Resident:
    """No block swapped: the time and the output that the others are compared with."""

    packages: tuple[str, ...] = ()
    pinned_bytes = 0

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        if swapped:
            raise NotOfferedError("the whole model is on the device")
        self._testbed.place(model)
        self._testbed.time_blocks([block for _, block in blocks_of(model)])

    def forward(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing."""


class PlainSwap:
    """What WanVideoWrapper does by default: `.to(device)` moves the last blocks to the device before their forward, and
    `.to("cpu")` moves them back after it; the host waits for both.
    """

    packages: tuple[str, ...] = ()
    pinned_bytes = 0

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        blocks = [block for _, block in blocks_of(model)]
        for module in (*rest_of(model), *blocks[: len(blocks) - swapped]):
            self._testbed.place(module)
        self._testbed.time_blocks(blocks)
        for block in blocks[len(blocks) - swapped :]:
            block.register_forward_pre_hook(lambda module, _: self._testbed.place(module))
            block.register_forward_hook(lambda module, *_: self._testbed.bring_back(module))

    def forward(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing."""


class Ours:
    """A session of ours.

    Args:
        testbed: Where it runs.
        streams: Copy streams.
        slots: Slots of the window.
        tail: Swap the last blocks, as other engines do, instead of spread ones.
        overlap: Copies have their own streams; otherwise they run on the compute stream.
        tier: Kind of host memory.
    """

    packages: tuple[str, ...] = ()

    def __init__(
        self,
        testbed: Testbed,
        *,
        streams: int,
        slots: int = 2,
        tail: bool = False,
        overlap: bool = True,
        tier: HostTier = HostTier.PINNED,
    ) -> None:
        self._testbed = testbed
        self._streams = streams
        self._slots = slots
        self._tail = tail
        self._overlap = overlap
        self._tier = tier
        self._session: SwapSession | None = None

    def place(self, model: nn.Module, device: torch.device, *, swapped: int) -> None:
        backend = self._testbed.backend(overlap=self._overlap)
        if self._overlap and not backend.overlap:
            raise NotOfferedError(f"{device} has no streams: copies cannot overlap compute there")
        for module in rest_of(model):
            self._testbed.place(module)
        self._session = SwapSession(blocks_of(model), lambda profile, held: self._plan(profile, swapped), backend)
        self._session.adopt()
        if self._session.refusals:
            raise NotOfferedError(f"page-locked memory was refused: {self._session.refusals[0]}")

    def forward(self) -> contextlib.AbstractContextManager[object]:
        assert self._session is not None, "`place` comes before a forward"
        return self._session.forward()

    @property
    def pinned_bytes(self) -> int:
        return 0 if self._session is None else self._session.pinned_bytes

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _plan(self, profile: ModelProfile, swapped: int) -> SwapPlan:
        inputs = card_inputs(profile, NO_LIMIT, read_host_memory())
        timing = Timing(streams=self._streams)
        plan = make_plan(profile, replace(inputs, blocks_to_swap=swapped, slots=self._slots, timing=timing))
        chosen = _tail(len(plan.swapped), swapped) if self._tail else plan.swapped
        return replace(
            plan,
            swapped=chosen,
            overlap=self._overlap,
            tiers=tuple(self._tier if is_swapped else None for is_swapped in chosen),
        )


def _tail(count: int, swapped: int) -> tuple[bool, ...]:
    return (False,) * (count - swapped) + (True,) * swapped
