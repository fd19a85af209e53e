"""Others that move or replace weights while the model runs: what they did, who they are, how to go on without us."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...hardware.units import format_count
from ..device.failures import device_error
from ..errors import BlockSwapError
from ..model.tensors import has_own_storage, plain_view, version_of
from .binding import bind
from .trace import Trace

logger = logging.getLogger(__name__)

MOST_ADOPTIONS = 3
"""Adoptions in a row that others may undo."""

FORWARDS_OF_A_STEP = 4
"""At most so many forwards make a step of the sampler; what returns within them is in a row."""

MOST_NAMES = 3

UNKNOWN = "another node"

CURE = "remove or bypass what moves or patches the model"


@dataclass(slots=True)
class Others:
    """What others did to the weights during one run.

    Attributes:
        moved: How often each weight was found moved or replaced, by its full name.
        who: Those that could be identified.
        placed_again: How often all blocks were placed again for it.
        gave_up: Whether the run goes on with blocks that are moved one at a time.
        has_retried: Whether the run has gone back to streaming once, after others had stopped.
    """

    moved: Counter[str] = field(default_factory=Counter)
    who: list[str] = field(default_factory=list)
    placed_again: int = 0
    gave_up: bool = False
    has_retried: bool = False
    _in_a_row: int = 0
    _quiet: int = 0  # forwards since the last placing again
    _silent: int = 0  # forwards since anything was found

    def found(self, name: str, places: Sequence[Sequence[nn.Module]]) -> None:
        """Counts a weight that is not where it was put, and warns of the first.

        Args:
            name: The weight's full name.
            places: Modules where others may have left hooks; those of the first place that has any are named.
        """
        with contextlib.suppress(Exception):  # a hook can be any object, and a name is not worth the forward
            names = next(filter(None, map(names_of_others, places)), [])
            self.who += [one for one in names if one not in self.who]
        self._silent = 0
        self.moved[name] += 1
        if sum(self.moved.values()) == 1:
            logger.warning(
                "%s was moved, replaced or edited by %s while the model runs; %s: each time may cost seconds, and "
                "after %d in a row blocks are moved one at a time instead of streamed, which is slow",
                *(name, self.names, CURE, MOST_ADOPTIONS),
            )

    def undid(self, name: str, places: Sequence[Sequence[nn.Module]]) -> None:
        """As `found`, of a weight without which its block cannot run: all are placed again, or `gave_up` is true."""
        self.found(name, places)
        self._in_a_row, self._quiet = self._in_a_row + 1, 0
        self.gave_up = self._in_a_row >= MOST_ADOPTIONS
        self.placed_again += not self.gave_up
        if self.gave_up:
            logger.info("%s was moved, replaced or edited again: from here on blocks are moved one at a time", name)

    def ended_forward(self) -> None:
        """A forward has ended well."""
        self._quiet, self._silent = self._quiet + 1, self._silent + 1
        if self._quiet > FORWARDS_OF_A_STEP:
            self._in_a_row = 0

    def have_stopped(self) -> bool:
        """Whether streaming is worth another try, which is true once in a run."""
        if not self.gave_up or self.has_retried or self._silent <= FORWARDS_OF_A_STEP:
            return False
        self.has_retried, self._in_a_row = True, 0
        return True

    @property
    def names(self) -> str:
        """Who they are."""
        return " and ".join(self.who) or UNKNOWN

    @property
    def text(self) -> str:
        """What they did, in a sentence; empty if nothing."""
        if not self.moved:
            return ""
        named = [f"{name} ({format_count(times, 'time')})" for name, times in self.moved.most_common(MOST_NAMES)]
        more = len(self.moved) - len(named)
        named += [f"{more} more"] if more else []
        again = [f"all blocks were placed again {format_count(self.placed_again, 'time')}"] if self.placed_again else []
        again += ["blocks are moved one at a time from then on, which is slow"] if self.gave_up else []
        cost = f": {', and '.join(again)}" if again else ""
        return f"{self.names} moved, replaced or edited {', '.join(named)} while the model ran{cost}; {CURE}"


def names_of_others(modules: Sequence[nn.Module]) -> list[str]:
    """The libraries and packs whose hooks or `forward` are on modules of the model: they may be what moves weights."""
    found = dict.fromkeys(one for module in modules for one in _on(module))
    known = {_pack(__name__), "torch", *sys.stdlib_module_names, *(_pack(type(one).__module__) for one in modules)}
    return [name for name in found if name not in known]


def _on(module: nn.Module) -> Iterator[str]:
    here = vars(module)
    if "_hf_hook" in here:
        yield f"accelerate ({type(here['_hf_hook']).__name__})"
    hooks = getattr(here.get("_diffusers_hook"), "hooks", None)
    if isinstance(hooks, dict):
        yield f"diffusers ({', '.join(hooks)})"
    if "_hf_hook" not in here and hooks is None and "forward" in here:
        yield from _packs_of(here["forward"])
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        yield from _packs_of(hook)


def _packs_of(function: Any) -> Iterator[str]:
    """Where a function is defined, and what it says of that: it may pass for the one that it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    yield _pack(getattr(function, "__module__", None) or type(function).__module__)
    with contextlib.suppress(TypeError):  # it has no source, as a builtin
        _, folder, inside = inspect.getfile(function).replace("\\", "/").rpartition("custom_nodes/")
        if folder:
            yield inside.partition("/")[0]


def _pack(module: str) -> str:
    """The folder of a pack, or a library's name. ComfyUI names a pack's modules by its path, without dots."""
    path = module.replace("\\", "/")
    return path.rpartition("custom_nodes/")[2].partition(".")[0].replace("_x_", ".")


class OneAtATime:
    """Takes the place of the swapper where others keep moving weights: moves each block to the device before it runs,
    and those that it has moved back after it, as the wrapper's own swapping does.

    Args:
        blocks: Name and module of each block.
        device: The device.

    Attributes:
        entered: Number of blocks entered in this forward.
        trace: Is not used.
        moved: Blocks that others have moved since they ran last, and the full name of a tensor.
    """

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
        self._blocks = blocks
        self._device = device
        self._running: int | None = None
        self._moved: nn.Module | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor, int, int | None]] = []
        self.entered = 0
        self.trace: Trace | None = None
        self.moved: list[tuple[int, str]] = []
        self._left: dict[int, dict[str, int]] = {}

    def begin(self, *, checks: bool) -> None:
        """Starts a forward. There are no slots, and so nothing to check."""
        del checks
        self.entered, self.moved = 0, []

    def enter(self, block: int) -> bool:
        """Moves block `block` to the device, and the one before back to the host."""
        self.leave()
        name, module = self._blocks[block]
        found, left = _addresses(module), self._left.get(block)
        if left is not None and found != left:
            self.moved.append((block, f"{name}.{next(path for path in left if found.get(path) != left[path])}"))
        self._running = block
        if any(tensor.device != self._device for tensor in (*module.parameters(), *module.buffers())):
            self._moved = module
            kept = [(p, plain_view(p)) for p in module.parameters() if has_own_storage(p) and p.device.type == "cpu"]
            try:
                _apply(module, lambda tensor: tensor.to(self._device))
                self._kept = [(p, host, p.data_ptr(), version_of(p)) for p, host in kept]
            except RuntimeError as failure:
                if isinstance(failure, BlockSwapError):
                    raise
                raise device_error(failure, "a block was being moved") from failure
        self.entered += 1
        return True

    def leave(self) -> None:
        """Moves the last block back to the host: parameters to the bytes that they came from, unless they are edited or
        elsewhere now. A copy would take the memory of the whole model where files or a state dict hold the bytes too.
        """
        for parameter, host, at, version in self._kept:
            if parameter.data_ptr() == at and version_of(parameter) == version:
                bind((parameter,), (host,))
        self._kept = []
        if self._moved is not None:
            _apply(self._moved, lambda tensor: tensor.to("cpu"))
            self._moved = None  # only now: an interrupt may have left some of it on the device
        if self._running is not None:
            self._left[self._running], self._running = _addresses(self._blocks[self._running][1]), None

    abort = release = leave

    def replaced(self, block: int) -> str:
        """Is not called: `enter` always succeeds."""
        raise NotImplementedError(f"block {block} is wherever others have put it")


def _addresses(module: nn.Module) -> dict[str, int]:
    return {path: tensor.data_ptr() for path, tensor in module.named_parameters() if has_own_storage(tensor)}


def _apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As `Module.to` does, whatever has been put in the place of that method."""
    with torch.no_grad():
        type(module)._apply(module, function)
