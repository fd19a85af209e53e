"""Foresight: before a new workload's first block runs, its peak on fake tensors corrects a plan that is too large."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..engine.session import SwapSession
from ..errors import PlanError
from ..model.fake_run import peak_bytes
from ..model.groups import is_beside
from .history import Workload
from .machine import PeakMeter
from .planner import Planner

logger = logging.getLogger(__name__)

TIGHT = 0.5
"""Share of the expected activations that a plan must leave free beside them, else the block is run on fake tensors
first. A forward of an architecture that `activation_bytes` does not know may need half as much again."""


class Foresight:
    """Finds the peak of a workload that has not run yet, from its first block and that block's arguments.

    Args:
        session: Runs the blocks.
        planner: Made the plan.
        meter: Knows what the forward has allocated.
        device: The device.
    """

    def __init__(self, session: SwapSession, planner: Planner, meter: PeakMeter, device: torch.device) -> None:
        self._session = session
        self._planner = planner
        self._meter = meter
        self._device = device
        self._tried: set[Workload | None] = set()

    @contextlib.contextmanager
    def watch(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, the first block that is called is run on fake tensors first, if the plan is tight and its workload
        has not been measured. Modules beside the blocks, which need less memory, do not count.

        Args:
            blocks: The modules that will be called, in the order of the session's.
        """
        plan = self._session.plan
        workload = self._planner.workload
        if plan is None or workload in self._tried or not self._planner.is_tight(plan, TIGHT):
            yield
            return

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before_first(block: nn.Module, arguments: Any, keywords: Any) -> None:
            stack.close()
            self._tried.add(workload)
            self._correct(block, arguments, keywords)

        with contextlib.ExitStack() as stack:
            for block, name in zip(blocks, self._session.names, strict=True):
                if is_beside(name):
                    continue
                handle = block.register_forward_pre_hook(before_first, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _correct(self, block: nn.Module, arguments: Any, keywords: Any) -> None:
        peak, held = peak_bytes(block, arguments, keywords, self._device), self._meter.held_bytes()
        present = self._session.plan
        if peak is None or held is None or present is None or self._session.others.gave_up:
            return
        try:
            other = self._planner.foresee(present, held + peak)
        except PlanError as failure:
            logger.warning("the first step will probably run out of VRAM: %s", failure)
            return
        if other is None:
            return
        self._planner.next_plan = other
        try:
            self._session.adopt_again("a step needs more VRAM than expected")
        finally:
            self._planner.next_plan = None
        self._meter.gave_back(present.device_bytes - other.device_bytes)
