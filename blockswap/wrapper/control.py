"""A control model that the sampler runs by itself, before each forward of the transformer: TheDenk's controlnets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..engine.session import SessionState, SwapSession
from ..model.layout import ModelProfile
from ..plan.make_plan import make_plan, plan_inputs
from ..plan.swap_plan import HeldMemory, SwapPlan
from ..run.planner import Planner
from ..run.run import SwapRun
from .parts import moves_disabled
from .patch import Forward

logger = logging.getLogger(__name__)


def control_model(keywords: Mapping[str, Any]) -> nn.Module | None:
    """The control model that has made the `controlnet` argument of a forward; None without one that has blocks."""
    given = keywords.get("controlnet")
    model = given.get("controlnet") if isinstance(given, Mapping) else None
    return model if isinstance(model, nn.Module) and isinstance(getattr(model, "blocks", None), nn.ModuleList) else None


class ControlModel:
    """Swaps all blocks of a control model, with a session of its own.

    The sampler moves the model to the device in every step and leaves it there. From its second step on, its blocks
    stream through slots instead; the sampler's moves leave them alone.

    Args:
        model: The control model.
        run: The transformer's run, which has the machine and its limits.
        host: The device that the blocks are put on.

    Attributes:
        model: The control model.
        was_used: Whether it has run since the last `start`, or is about to.
    """

    def __init__(self, model: nn.Module, run: SwapRun, host: torch.device) -> None:
        self.model = model
        self.was_used = True
        self._blocks = list(model.blocks)  # type: ignore[arg-type]
        for block in self._blocks:
            block.to(host)
        named = [(f"control.{number}", block) for number, block in enumerate(self._blocks)]
        self._session = SwapSession(named, _everything_swapped(run.planner), run.session.backend)
        self._armed = contextlib.ExitStack()

    def start(self) -> None:
        """Switches the sampler's moves of the blocks off, and puts our `forward` in place."""
        self.was_used = False
        self._armed.enter_context(moves_disabled(self._blocks))
        self._armed.callback(Forward.on(self.model, self._forward).disarm)

    def end(self) -> None:
        """Puts both back and frees the device memory; the weights are on the host."""
        self._armed.close()
        if self._session.state is SessionState.ADOPTED:
            self._session.release()

    def close(self) -> None:
        """Ends it for good; the weights stay in ordinary host memory."""
        self._armed.close()
        self._session.close()

    def _forward(self, model: Any, original: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        self.was_used = True
        with self._session.forward():
            return original(*arguments, **keywords)


def _everything_swapped(planner: Planner) -> Callable[[ModelProfile, HeldMemory], SwapPlan]:
    def plan(profile: ModelProfile, held: HeldMemory) -> SwapPlan:
        settings = replace(planner.settings, auto_hardware_tuning=False, blocks_to_swap=len(profile.blocks))
        readings = planner.machine.read()
        inputs = plan_inputs(profile, settings, readings, planner.limits, own_host_bytes=held.added_bytes)
        left = min(inputs.pin_budget_bytes, planner.pins.left_bytes + held.pinned_bytes)
        return make_plan(profile, replace(inputs, own_bytes=held.device_bytes, pin_budget_bytes=max(0, left)))

    return plan
