"""SwapRun: plans, runs, compares what came with what was predicted, plans again where they part, and reports."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torch import nn

from ..hardware import Sampler
from .backend import Backend
from .decision import SwapPlan
from .errors import BlockSwapError, PlanError
from .forwards import EVERY_FORWARD
from .machine import Machine
from .planner import Limits, Planner, Workload
from .replan import OVER_BUDGET, Observed, observe, why_replace
from .report import RunReport
from .report_text import ModelSize, block_table, brief_lines, summary
from .run_report import Begin, Findings, make_report
from .session import SessionState, SwapSession
from .settings import SwapSettings
from .trace_file import chrome_trace, trace_name, write_trace

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
        sampler: Watches the device from the first forward of a run to its release; None watches nothing.
        trace_dir: Where debug mode writes a trace file for each run; None writes none.

    Attributes:
        last_report: Of the last run that was released.
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
        sampler: Sampler | None = None,
        trace_dir: Path | None = None,
    ) -> None:
        self.planner = Planner(settings, machine, backend.pin_budget, _within(backend, limits or Limits()))
        self.session = SwapSession(blocks, self.planner, backend, root=root, traced=TIMED_FORWARDS)
        self.planner.session = weakref.ref(self.session)
        self.last_report: RunReport | None = None
        self._found = Findings(Begin.of(self.session))
        self._sampler = sampler
        self._trace_dir = trace_dir
        self._sampling = contextlib.ExitStack()
        weakref.finalize(self, self._sampling.close)
        self._title = f"{'blocks' if root is None else type(root).__name__} on {machine.spec.name}"
        self._parameters = _count_parameters([module for _, module in blocks] if root is None else [root])
        self._has_new_settings = False
        self._adoptions = 0
        self.use(settings)

    @property
    def plan(self) -> SwapPlan | None:
        """The plan that is followed, or was last."""
        return self.session.plan

    @property
    def found(self) -> Findings:
        """What this run has found out so far."""
        return self._found

    @contextlib.contextmanager
    def forward(self, workload: Workload | None = None, blocks: Sequence[nn.Module] | None = None) -> Iterator[None]:
        """One forward of the model.

        Args:
            workload: What it does; None if that is not known.
            blocks: As for `SwapSession.forward`.

        Raises:
            PlanError: No plan fits; the forward has not begun.
        """
        self.prepare(workload)
        machine = self.planner.machine
        before, peak = machine.allocated_bytes(), machine.peak_bytes()
        with self.session.forward(blocks):
            yield
        # A peak that has not grown may be an earlier one, of something else.
        if machine.peak_bytes() > peak:
            self.planner.learn_activations(machine.peak_bytes() - before)
        self._notice_adoption()
        self._learn()

    def prepare(self, workload: Workload | None = None) -> SwapPlan:
        """What `forward` does first: a plan for this workload, in place. Returns the plan.

        Raises:
            PlanError: No plan fits.
        """
        is_new = self.planner.begin(workload)
        if self.session.state is SessionState.ADOPTED:
            if self._has_new_settings:
                self._adopt_anew("the settings have changed")
            elif self.planner.settings.auto_hardware_tuning and (is_new or self._is_over()):
                self._look_again()
        self._has_new_settings = False
        if self.session.state is SessionState.IDLE:
            self._begin_run()
        assert self.session.plan is not None
        return self.session.plan

    def use(self, settings: SwapSettings) -> None:
        """The settings from the next forward on."""
        self._has_new_settings |= settings != self.planner.settings
        self.planner.settings = settings
        self.session.log.traced = EVERY_FORWARD if settings.debug_mode else TIMED_FORWARDS

    def report(self) -> RunReport | None:
        """Of the run so far; of the last one if none has begun since; None before the first."""
        if self.session.state in (SessionState.IDLE, SessionState.CLOSED):
            return self.last_report
        samples = None if self._sampler is None else self._sampler.samples()
        return make_report(self._title, self.session, self.planner, self._found, samples=samples)

    def release(self) -> None:
        """The run is over: every tensor points at its master, the device memory is free, slabs stay for the next."""
        had_begun = self.session.state is SessionState.ADOPTED
        self._sampling.close()
        if had_begun:
            self.last_report = self.report()
        try:
            self.session.release()
        finally:
            self.planner.end_run()
            self._found = Findings(Begin.of(self.session))
        if had_begun:
            self._tell()

    def close(self) -> None:
        """Releases, unlocks the slabs and ends; idempotent."""
        self._sampling.close()
        self.session.close()

    def _begin_run(self) -> None:
        self._found = Findings(Begin.of(self.session), expected_activations=self.planner.activations)
        self._adopt()
        if self._sampler is not None:
            self._sampling.enter_context(self._sampler)

    def _adopt(self) -> None:
        before = self.planner.machine.allocated_bytes()
        plan = self.session.adopt()
        taken = self.planner.machine.allocated_bytes() - before
        self._found.weight_bytes = max(taken, self._found.weight_bytes or 0)
        self._notice_adoption()
        if self.planner.settings.debug_mode:
            self._log_in_the_briefs_words(plan)

    def _notice_adoption(self) -> None:
        """The session has adopted, by itself too where weights were replaced: what was seen belongs to another plan."""
        if self._adoptions != self.session.adoptions:
            self._adoptions = self.session.adoptions
            assert self.session.plan is not None
            self._found.observed, self._found.prediction = None, self.session.plan.forward

    def _adopt_anew(self, why: str) -> None:
        logger.info("planning again: %s", why)
        self._found.replans.append(why)
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
        if len(self._found.replans) >= MOST_REPLANS:
            return
        try:
            other = self.planner.consider()
        except PlanError as failure:
            logger.warning("the plan is kept although memory has shrunk: %s", failure)
            return
        total_bytes = self.planner.machine.memory().total_bytes
        why = why_replace(present, other, total_bytes=total_bytes, predicted=self._found.prediction)
        if why is not None:
            self._adopt_anew(why)

    def _learn(self) -> None:
        """Once the forwards that were timed are over on the device: what they say, and what follows from it."""
        found, plan = self._found, self.session.plan
        if found.observed is not None or plan is None or self.session.log.forwards < TIMED_FORWARDS.stop:
            return
        found.observed = self._observe()
        if found.observed is None:
            return
        found.prediction = self.planner.learn(found.observed, plan)
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

    def _log_in_the_briefs_words(self, plan: SwapPlan) -> None:
        planner = self.planner
        assert planner.profile is not None
        assert planner.host is not None
        nbytes = planner.profile.block_bytes + planner.profile.other_bytes
        size = ModelSize(parameters=self._parameters, nbytes=nbytes, layers=len(planner.profile.blocks))
        for line in brief_lines(plan, size, memory=planner.memory, host=planner.host, ratio=planner.ratio):
            logger.info("%s", line)

    def _tell(self) -> None:
        """The summary of the run that is over; in debug mode the table of its blocks and its trace file as well."""
        report, trace = self.last_report, self.session.trace
        if report is None or not report.measured.forwards:
            return
        if self.planner.settings.debug_mode:
            logger.info("%s", block_table(report))
            if trace is not None and self._trace_dir is not None and self.planner.profile is not None:
                names = [block.name for block in self.planner.profile.blocks]
                path = self._trace_dir / trace_name(datetime.now())
                try:
                    write_trace(path, chrome_trace(trace.spans(), names=names))
                    report = replace(report, notes=(*report.notes, f"trace: {path}"))
                except BlockSwapError as failure:
                    report = replace(report, notes=(*report.notes, str(failure)))
        self.last_report = report
        logger.info("%s", summary(report))


def _within(backend: Backend, limits: Limits) -> Limits:
    """The limits, and what the device itself cannot do."""
    return replace(
        limits,
        may_overlap=limits.may_overlap and backend.has_streams,
        may_pin=limits.may_pin and backend.registrar is not None,
    )


def _count_parameters(modules: Sequence[nn.Module]) -> int | None:
    """Parameters of the modules; None where packed bytes hide how many they stand for, as in GGUF."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if any(not parameter.is_floating_point() for parameter in parameters):
        return None
    return sum(parameter.numel() for parameter in parameters)
