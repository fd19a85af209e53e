"""Control models that the sampler runs by themselves, before each forward of the transformer: TheDenk's controlnets."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..engine.session import SwapSession
from ..run.run import SwapRun
from .parts import moves_disabled
from .patch import Forward

MODULE, CLASS = "controlnet.wan_controlnet", "WanControlnet"
"""Where the wrapper has the class of these models. It loads the module with the first of them."""


class ControlModels:
    """Swaps all blocks of each control model that is used during one run of a transformer.

    In every step, the sampler moves the model to the device, calls it, and leaves it there. Our method `to`, on its
    class for as long as the run lasts, sees it before it is moved. From then on, its blocks stream through slots of a
    session of their own, and moves of it leave them alone.

    Args:
        packages: The wrapper's, and those of its copies.
        run: The transformer's run, which has the machine and its limits.
        host: The device that blocks are put on which are not there.
    """

    def __init__(self, packages: Sequence[str], run: SwapRun, host: torch.device) -> None:
        self._run, self._host = run, host
        self._used = contextlib.ExitStack()
        modules = [sys.modules.get(f"{package}.{MODULE}") for package in packages]
        for kind in [getattr(module, CLASS) for module in modules if hasattr(module, CLASS)]:
            # Weak, so that the class keeps nothing of a transformer that goes in the middle of its run.
            self._used.enter_context(_seen_before_moves(kind, weakref.WeakMethod(self._take)))

    def end(self) -> None:
        """Leaves all as it was. The blocks' weights are in ordinary host memory."""
        self._used.close()

    def _take(self, model: Any) -> None:
        found = getattr(model, "blocks", None)
        if not found or isinstance(vars(model).get("forward"), Forward):
            return  # there is nothing to swap, or it is swapped by us or in another transformer's run
        blocks: Mapping[str, nn.Module] = {f"control.{number}": block for number, block in enumerate(found)}
        for block in blocks.values():
            block.to(self._host)
        session = SwapSession(list(blocks.items()), self._run.planner.everything_swapped, self._run.session.backend)

        def in_session(_: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
            with session.forward():
                return original(*arguments, **keywords)

        self._used.callback(session.close)
        self._used.enter_context(moves_disabled(blocks.values()))
        self._used.callback(Forward.on(model, in_session).disarm)


class _WatchedTo:
    """A class's `to` that calls every notice before a module is moved, the latest first. Runs share it, since they need
    not end in the order in which they have started.

    Args:
        kind: The class.
        own: The `to` in the class itself; None if it inherits one.
    """

    def __init__(self, kind: type[nn.Module], own: Any) -> None:
        self.own = own
        self.notices: list[weakref.WeakMethod[Callable[[Any], None]]] = []
        self._kind: Any = kind

    def __get__(self, model: Any, kind: type | None = None) -> Any:
        return self if model is None else functools.partial(self, model)

    def __call__(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        for notice in self.notices[::-1]:
            alive = notice()
            if alive is not None:
                alive(model)
        inherited: Any = super(self._kind, model)
        original = inherited.to if self.own is None else functools.partial(self.own, model)
        return original(*arguments, **keywords)


@contextlib.contextmanager
def _seen_before_moves(kind: type[nn.Module], notice: weakref.WeakMethod[Callable[[Any], None]]) -> Iterator[None]:
    """A context in which `notice()` is called with each module of a class before its `to`."""
    found = vars(kind).get("to")
    to = found if isinstance(found, _WatchedTo) else _WatchedTo(kind, found)
    to.notices.append(notice)
    try:
        setattr(kind, "to", to)  # noqa: B010 - for the types, it has another signature
        yield
    finally:
        to.notices = [one for one in to.notices if one is not notice]
        if not to.notices and vars(kind).get("to") is to:
            if to.own is None:
                del kind.to
            else:
                setattr(kind, "to", to.own)  # noqa: B010
