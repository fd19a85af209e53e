"""Teller: tells whoever watches a run what it is doing, as Progress."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ...hardware.units import format_count
from ..engine.session import SwapSession
from ..errors import BlockSwapError
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan
from .planner import Planner
from .progress import AdoptFigures, MemoryUse, Phase, PlanFigures, Progress, RunFigures, figures_of, stopped
from .report import RunReport
from .run_report import RunStats

Tell = Callable[[Progress], None]
"""Who watches. Called in the thread that runs the model, amid adopts and after each forward: it must be quick."""


class Teller:
    """Makes Progress of what one run does. Nobody watches until `tell` is set.

    Args:
        session: Its session; held weakly, through the planner.
        planner: Its planner.

    Attributes:
        tell: Who watches; None for nobody.
    """

    def __init__(self, session: SwapSession, planner: Planner) -> None:
        self.tell: Tell | None = None
        self._planner = planner
        self._placed_bytes: list[int] = []
        session.listeners.on_placed = self._placed

    def ran(self, plan: SwapPlan, found: RunStats) -> None:
        """A forward is over on the host."""
        session = self._planner.followed_by
        if self.tell is None or session is None:
            return
        seen, begin = found.observed, found.begin
        run = RunFigures(
            forwards=session.log.all_forwards - begin.forwards,
            streamed=session.counters.onloaded_bytes - begin.counters.onloaded_bytes,
            forward_ms=None if seen is None else seen.forward_ms,
            stall_ms=None if seen is None else seen.stall_ms,
            copy_bytes_per_s=None if seen is None else seen.copied_bytes_per_s,
        )
        forward = found.prediction or plan.predicted
        self.tell(Progress(phase=Phase.SAMPLING, memory=self._memory(plan), plan=_figures(plan, forward), run=run))

    def over(self, report: RunReport | None, failure: BaseException | None = None) -> None:
        """The run is over.

        Args:
            report: What came of it; None if there is none.
            failure: What has ended it; None if it has ended well.
        """
        if self.tell is None:
            return
        if isinstance(failure, BlockSwapError):
            self.tell(stopped(str(failure)))
            return
        if report is None or not report.measured.forwards:
            self.tell(stopped())
            return
        if failure is not None:
            self.tell(stopped(f"the run was stopped after {format_count(report.measured.forwards, 'forward')}"))
            return
        plan, measured = report.plan, report.measured
        run = RunFigures(
            forwards=measured.forwards,
            streamed=measured.onloaded_bytes,
            forward_ms=measured.forward_ms,
            stall_ms=measured.stall_ms,
            copy_bytes_per_s=measured.copy_bytes_per_s,
        )
        figures = _figures(plan, report.prediction or plan.predicted)
        memory = self._memory(plan, measured.activation_bytes)
        self.tell(Progress(phase=Phase.DONE, memory=memory, plan=figures, run=run))

    def _placed(self, plan: SwapPlan, count: int) -> None:
        profile, session = self._planner.profile, self._planner.followed_by
        if self.tell is None or profile is None or session is None:
            return
        if count == 0:
            self._placed_bytes = [0, *itertools.accumulate(block.nbytes for block in profile.blocks)]
        adopt = AdoptFigures(placed=self._placed_bytes[count], all=self._placed_bytes[-1], pinned=session.pinned_bytes)
        figures = _figures(plan, plan.predicted)
        self.tell(Progress(phase=Phase.ADOPTING, memory=self._memory(plan), plan=figures, adopt=adopt))

    def _memory(self, plan: SwapPlan, activation_bytes: int | None = None) -> MemoryUse | None:
        planner = self._planner
        if planner.memory is None:
            return None
        if activation_bytes is None and planner.activations is not None:
            activation_bytes = planner.activations.nbytes
        total = planner.memory.total_bytes
        percent = 0.0 if planner.machine.spec.is_integrated else planner.settings.vram_threshold_percent
        return MemoryUse(
            total=total,
            other=total - plan.limit_bytes,
            residents=plan.resident_bytes,
            window=plan.window_bytes,
            ceiling=int(percent / 100 * total),
            activations=plan.activation_bytes if activation_bytes is None else activation_bytes,
        )


def _figures(plan: SwapPlan, forward: ForwardTime | None) -> PlanFigures:
    stall_ms, forward_ms = (None, None) if forward is None else (forward.stall, forward.elapsed)
    return figures_of(plan, stall_ms=stall_ms, forward_ms=forward_ms)
