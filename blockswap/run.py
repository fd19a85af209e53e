"""SwapRun: plans, runs, compares what came with what was predicted, plans again where they part, and reports."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence

from torch import nn

from .backend import Backend
from .decision import SwapPlan
from .errors import PlanError
from .forwards import EVERY_FORWARD
from .machine import Machine
from .planner import Limits, Planner, Workload
from .replan import OVER_BUDGET, Observed, observe, why_replace
from .schedule import ForwardTime
from .session import SessionState, SwapSession
from .settings import SwapSettings

logger = logging.getLogger(__name__)

TIMED_FORWARDS = range(1, 3)
"""Forwards of which every block is timed: the first full step (conditional and unconditional) after one that warms up,
compiles and fills the window."""

MOST_REPLANS = 3
"""Plans that may follow the first of a run: for what the first step shows, for another shape, for memory that others
take. Beyond them, what changes all the time is better left alone until the next run."""


class SwapRun:
    """One transformer's blocks under one set of settings, run after run.

        run = SwapRun(blocks, settings, machine, backend)
        with run.forward(Workload(tokens=32_760)):
            model(...)
        run.release()

    With automatic tuning a plan is looked at again before a forward whose workload is another, when memory on the card
    has shrunk, and once the first full step has shown durations and peak; another takes its place if the present one
    does not fit any more, or is slower by more than it costs to change. By hand only changed settings count.

    Args:
        blocks: Name and module of each block, in execution order.
        settings: What the user asked for.
        machine: Where readings come from.
        backend: The device.
        root: The whole model, for the bytes outside the blocks; held weakly.
        limits: What is set from outside of the settings.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        settings: SwapSettings,
        machine: Machine,
        backend: Backend,
        *,
        root: nn.Module | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.planner = Planner(settings, machine, backend.pin_budget, limits or Limits())
        self.session = SwapSession(blocks, self.planner, backend, root=root, traced=TIMED_FORWARDS)
        self.planner.session = weakref.ref(self.session)
        self.session.log.traced = EVERY_FORWARD if settings.debug_mode else TIMED_FORWARDS
        self.replans: list[str] = []
        self.observed: Observed | None = None
        self.prediction: ForwardTime | None = None
        self.weight_bytes: int | None = None
        self._has_new_settings = False
        self._adoptions = 0

    @property
    def plan(self) -> SwapPlan | None:
        """The plan that is followed, or was last."""
        return self.session.plan

    @contextlib.contextmanager
    def forward(self, workload: Workload | None = None, blocks: Sequence[nn.Module] | None = None) -> Iterator[None]:
        """One forward of the model.

        Args:
            workload: What it does; None if that is not known.
            blocks: As for `SwapSession.forward`.

        Raises:
            PlanError: No plan fits; the forward has not begun.
        """
        self._prepare(workload)
        machine = self.planner.machine
        before, peak = machine.allocated_bytes(), machine.peak_bytes()
        with self.session.forward(blocks):
            yield
        # A peak that has not grown may be an earlier one, of something else.
        if machine.peak_bytes() > peak:
            self.planner.learn_activations(machine.peak_bytes() - before)
        self._notice_adoption()
        self._learn()

    def use(self, settings: SwapSettings) -> None:
        """The settings from the next forward on."""
        self._has_new_settings |= settings != self.planner.settings
        self.planner.settings = settings
        self.session.log.traced = EVERY_FORWARD if settings.debug_mode else TIMED_FORWARDS

    def release(self) -> None:
        """The run is over: every tensor points at its master, the device memory is free, slabs stay for the next."""
        self.session.release()
        self.planner.end_run()
        self.replans.clear()

    def close(self) -> None:
        """Releases, unlocks the slabs and ends; idempotent."""
        self.session.close()

    def _prepare(self, workload: Workload | None) -> None:
        is_new = self.planner.begin(workload)
        if self.session.state is SessionState.ADOPTED:
            if self._has_new_settings:
                self._adopt_anew("the settings have changed")
            elif self.planner.settings.auto_hardware_tuning and (is_new or self._is_over()):
                self._look_again()
        self._has_new_settings = False
        if self.session.state is SessionState.IDLE:
            self._adopt()

    def _adopt(self) -> None:
        before = self.planner.machine.allocated_bytes()
        self.session.adopt()
        self.weight_bytes = self.planner.machine.allocated_bytes() - before
        self._notice_adoption()

    def _notice_adoption(self) -> None:
        """The session has adopted, by itself too where weights were replaced: what was seen belongs to another plan."""
        if self._adoptions != self.session.adoptions:
            self._adoptions = self.session.adoptions
            assert self.session.plan is not None
            self.observed, self.prediction = None, self.session.plan.forward

    def _adopt_anew(self, why: str) -> None:
        logger.info("planning again: %s", why)
        self.replans.append(why)
        self.session.release()
        self._adopt()

    def _is_over(self) -> bool:
        """Whether the weights stand above what memory leaves for them now."""
        plan = self.session.plan
        assert plan is not None
        budget = self.planner.budget()
        return plan.device_bytes - budget.weight_bytes > OVER_BUDGET * budget.total_bytes and not plan.over_ceiling

    def _look_again(self) -> None:
        """Another plan takes the present one's place, if there is reason to."""
        present = self.session.plan
        assert present is not None
        if len(self.replans) >= MOST_REPLANS:
            return
        try:
            other = self.planner.consider()
        except PlanError as failure:
            logger.warning("the plan is kept although memory has shrunk: %s", failure)
            return
        total_bytes = self.planner.machine.memory().total_bytes
        why = why_replace(present, other, total_bytes=total_bytes, predicted=self.prediction)
        if why is not None:
            self._adopt_anew(why)

    def _learn(self) -> None:
        """Once the forwards that were timed are over on the device: what they say, and what follows from it."""
        if self.observed is not None or self.session.log.forwards < TIMED_FORWARDS.stop:
            return
        self.observed = self._observe()
        if self.observed is None:
            return
        assert self.session.plan is not None
        self.prediction = self.planner.learn(self.observed, self.session.plan)
        if self.planner.settings.auto_hardware_tuning:
            self._look_again()

    def _observe(self) -> Observed | None:
        """What the trace shows by now; None while the device is not through with the forwards that were timed."""
        trace, profile, traced = self.session.trace, self.planner.profile, self.session.log.traced
        assert trace is not None
        assert profile is not None
        assert traced is not None
        slabs = [block.slab_bytes for block in profile.blocks]
        return observe(trace.collect(), slab_bytes=slabs, timed=TIMED_FORWARDS, traced=traced)
