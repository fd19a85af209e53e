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

from ...hardware import Sampler
from ...hardware.records import Samples
from ..device.backend import Backend
from ..engine.session import EVERY_FORWARD, SessionState, SwapSession
from ..engine.swapper import Listeners
from ..errors import BlockSwapError, DeviceMemoryError, HostMemoryError, PlanError
from ..plan.make_plan import Limits
from ..plan.swap_plan import HostTier, SwapPlan
from ..settings import SwapSettings
from .history import Workload
from .machine import LastKnownReadings, Machine, PeakMeter
from .planner import Planner
from .progress import ProgressFeed, Watcher
from .replan import (
    MOST_REPLANS,
    SLOW,
    kept_over_budget,
    slow_link,
    spill,
    usual_ms,
    why_replace,
)
from .report import RunReport, RunStats
from .text import ModelSize, block_table, brief_lines, oom_message, summary
from .trace_file import chrome_trace, trace_name, write_trace

logger = logging.getLogger(__name__)

TIMED_FORWARDS = range(1, 3)
"""Forwards of which every block is timed: the first full step after one that warms up, compiles, fills the window."""


class SwapRun:
    """One transformer's blocks under one set of settings, run after run.

        run = SwapRun(blocks, settings, machine, backend)
        with run.forward(Workload(tokens=32_760)):
            model(...)
        run.release()

    With automatic tuning a plan is looked at again before a forward whose workload is new to the run, when memory on
    the card has shrunk, and once the first full step has shown durations and peak; another takes its place if the
    present one does not fit any more, or if it saves more than it costs. By hand, settings and refused memory count.

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
        planner: Makes its plans.
        session: Runs its blocks.
        watcher: Gets the run's progress; None for nobody. May be set between runs.
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
        self._machine = LastKnownReadings(machine)
        self._peak = PeakMeter(self._machine)
        self.planner = Planner(settings, self._machine, backend.pin_budget, limits_within(limits or Limits(), backend))
        self._feed = ProgressFeed(self.planner)
        listeners = Listeners(on_placed=self._feed.placed)
        self.session = SwapSession(blocks, self.planner, backend, root=root, traced=TIMED_FORWARDS, listeners=listeners)
        self.last_report: RunReport | None = None
        self._title = f"{'blocks' if root is None else type(root).__name__} on {machine.spec.name}"
        self._stats = RunStats(self._title, self.session, self.planner)
        self._in_run = False
        self._timed = TIMED_FORWARDS
        self._workload: Workload | None = None
        self._prepared = False
        self._adoptions = 0
        self._adopted_settings = settings
        self._has_other_settings = False
        self._wants_look = False
        self._sampler = sampler
        self._trace_dir = trace_dir
        self._sampling = contextlib.ExitStack()
        weakref.finalize(self, self._sampling.close)
        self._parameters = count_parameters([module for _, module in blocks] if root is None else [root])

    @property
    def plan(self) -> SwapPlan | None:
        """The plan that is followed, or was last."""
        return self.session.plan

    @property
    def watcher(self) -> Watcher | None:
        """Gets the run's progress; None for nobody."""
        return self._feed.watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        self._feed.watcher = watcher

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
        self._prepared = False
        self._peak.start(anew=not self.planner.is_peak_known)
        with self.session.forward(blocks):
            yield
        self._learn()
        if self._feed.watcher is not None:
            self._feed.ran(self._present, self._stats)

    def prepare(self, workload: Workload | None = None) -> SwapPlan:
        """What `forward` does first, once: a plan for this workload, in place. Returns the plan.

        Raises:
            PlanError: No plan fits.
        """
        state, plan = self.session.state, self.session.plan
        if plan is not None and self._prepared and workload == self._workload and state is SessionState.ADOPTED:
            return plan
        if state not in (SessionState.IDLE, SessionState.ADOPTED):
            raise BlockSwapError(
                f"a forward can start only between two others, but the session is {state.value}; end the forward that "
                "is under way, or make a new run"
            )
        is_new, is_other = self.planner.start(workload), workload != self._workload
        self._workload = workload
        if state is SessionState.ADOPTED:
            if is_other:
                self._time_again()
            self._plan_again_if_needed(is_new=is_new)
        else:
            self._start_run()
        self._prepared = True
        return self._present

    def withdraw(self, workload: Workload | None) -> None:
        """The forward that was prepared for this workload does another: its memory does not count."""
        self.planner.withdraw(workload)
        self._prepared = False

    def use(self, settings: SwapSettings) -> None:
        """The settings from the next forward on."""
        self.planner.use(settings)
        self._has_other_settings = settings.of_the_plan != self._adopted_settings.of_the_plan
        self._prepared = False
        self._trace_what_is_asked()

    def shrink(self, said: str) -> None:
        """Device memory ran out, in `prepare` or in a forward: ours is given back, and the next plan is smaller.

        Args:
            said: The device's own message.

        Raises:
            DeviceMemoryError: There is no smaller plan; the message says what would fit.
        """
        if self.session.state is SessionState.ADOPTED:
            self.session.release()
        if not self.planner.shrink():
            assert self.planner.made is not None
            raise DeviceMemoryError(oom_message(self._workload, self.planner.made, said=said))
        self._stats.replans.append("the device ran out of memory")

    def report(self) -> RunReport | None:
        """Of the run so far; of the last one if none has begun since; None before the first."""
        if not self._in_run:
            return self.last_report
        self._stats.observe(self._timed)
        return self._stats.report(self._samples)

    def release(self, failure: BaseException | None = None) -> None:
        """The run is over: every tensor points at its master, the device memory is free, slabs stay for the next.

        Args:
            failure: What has ended it; None if it has ended well.
        """
        was_in_run, report = self._in_run, self._report_or_none() if self._in_run else None
        try:
            self.session.release()
        finally:
            self._end_run()
        if report and report.measured.forwards:
            report = replace(report, measured=replace(report.measured, samples=self._samples))
            self.last_report = self._log(report)
        if was_in_run or failure is not None:
            self._feed.over(report, failure)

    def close(self) -> None:
        """Releases, unlocks the slabs and ends; idempotent."""
        try:
            if self.session.state is SessionState.ADOPTED:
                self.release()
        finally:
            self.session.close()
            self._end_run()

    @property
    def _samples(self) -> Samples | None:
        return None if self._sampler is None else self._sampler.samples()

    @property
    def _present(self) -> SwapPlan:
        assert self.session.plan is not None, "nothing has been adopted"
        return self.session.plan

    # ------------------------------------------------------------------------------------------------------- planning

    def _start_run(self) -> None:
        if not self._in_run:
            self._stats = RunStats(self._title, self.session, self.planner)
        self._sampling.close()
        if self._sampler is not None:
            self._sampling.enter_context(self._sampler)
        try:
            self._adopt()
        except BaseException as failure:
            self._sampling.close()
            self._feed.over(None, failure)
            raise
        self._in_run = True

    def _end_run(self) -> None:
        self._in_run = self._wants_look = self._prepared = False
        self.planner.history.end_run()
        self._sampling.close()

    def _plan_again_if_needed(self, *, is_new: bool) -> None:
        if self._has_other_settings:
            self._stats.replans.append("the settings have changed")
            self.session.release()
            self._adopt()
        elif self.planner.settings.auto_hardware_tuning and (
            is_new
            or self._wants_look
            or self.planner.is_over_budget(self._present, own_bytes=self.session.device_bytes)
        ):
            self._look_again()

    def _look_again(self) -> None:
        """Another plan takes the present one's place, if there is reason to."""
        self._wants_look = False
        why = self._why_change(self._present)
        if why is not None:
            self._stats.looks += 1
            self._adopt_anew(why, self._present)

    def _why_change(self, present: SwapPlan) -> str | None:
        """Why another plan should take `present`'s place; None to go on, with a note where that hurts."""
        stats = self._stats
        if stats.looks >= MOST_REPLANS:
            stats.note(f"the plan has been changed {MOST_REPLANS} times in this run and is kept now")
            return None
        try:
            other = self.planner.consider(self.session.held)
        except PlanError as failure:
            stats.note(f"the plan is kept although memory has shrunk: {failure}")
            return None
        assert self.planner.readings is not None, "a plan has been made"
        total = self.planner.readings.memory.total_bytes
        why = why_replace(present, other, total_bytes=total, predicted=self.planner.predict(present))
        if why is None:
            stats.note(kept_over_budget(present, other, total_bytes=total))
        return why

    def _adopt(self) -> None:
        before = self._machine.allocated_bytes()
        plan = self.session.adopt()
        after = self._machine.allocated_bytes()
        self._stats.weight_bytes = None if before is None or after is None else after - before
        self._adopted_settings, self._has_other_settings = self.planner.settings, False
        self._notice_adoption()
        self._feed.ran(plan, self._stats)
        if self.planner.settings.debug_mode:
            self._log_configuration(plan)

    def _adopt_anew(self, why: str, present: SwapPlan) -> None:
        logger.info("planning again: %s", why)
        self.session.release()
        try:
            self._adopt()
        except (PlanError, DeviceMemoryError, HostMemoryError) as failure:
            self._stats.note(f"planning again failed, so that the plan before goes on: {failure}")
            self.planner.once = present
            try:
                self._adopt()
            finally:
                self.planner.once = None
            return
        self._stats.replans.append(why)

    # ------------------------------------------------------------------------------------------------------- learning

    def _learn(self) -> None:
        """A forward has ended well: what it has shown. What follows is done before the next forward, which may fail."""
        self._stats.count()
        taken = self._peak.taken_bytes()
        if taken is not None:
            self.planner.learn_activations(taken)
        if self._adoptions != self.session.adoptions:
            self._notice_adoption()
        if not self._stats.is_timed and self.session.log.forwards >= self._timed.stop:
            self._wants_look |= self._learn_times()
        self._notice_slowness()

    def _learn_times(self) -> bool:
        """Once the device is through with the forwards that were timed; whether it is, and they have shown times."""
        stats, plan = self._stats, self._present
        stats.observe(self._timed)
        if stats.observation is None or not stats.is_timed:
            return False
        tiers = self.session.tiers.values()  # a refusal may have made them other than planned
        is_pinned = bool(tiers) and all(tier is HostTier.PINNED for tier in tiers)
        if is_pinned:
            speed = stats.observation.copied_bytes_per_s
            stats.note(slow_link(self.planner.link, streams=plan.streams, seen_bytes_per_s=speed))
        self.planner.learn(stats.observation, plan, is_pinned=is_pinned)
        stats.prediction = self.planner.predict(plan)
        return True

    def _notice_slowness(self) -> None:
        """Once in a run: a forward that takes several times what is usual is timed anew."""
        trace = self.session.log.trace
        if trace is None or self._stats.is_slow:
            return
        durations = trace.forward_ms[self._timed.start :]
        if not durations or durations[-1] < SLOW * min(durations):
            return
        usual = usual_ms(durations)
        if usual is None:
            return
        self._stats.is_slow = True
        self._stats.note(spill(self._present, self._machine.memory(), took_ms=durations[-1], usual=usual))
        self._time_again(keep=True)

    def _notice_adoption(self) -> None:
        """The session has adopted, by itself too where weights were replaced: what was seen belongs to another plan."""
        self._adoptions = self.session.adoptions
        self._time_again()

    def _time_again(self, *, keep: bool = False) -> None:
        """Durations are taken anew, after one forward that warms up; those of the same plan and video are kept."""
        start = self.session.log.forwards + TIMED_FORWARDS.start
        self._timed = range(start, start + len(TIMED_FORWARDS))
        self._trace_what_is_asked()
        self._stats.is_timed = False
        if not keep:
            self._stats.observation, self._stats.prediction = None, self.planner.predict(self._present)

    def _trace_what_is_asked(self) -> None:
        self.session.checks = self.planner.settings.debug_mode
        self.session.log.traced = EVERY_FORWARD if self.planner.settings.debug_mode else self._timed

    # ------------------------------------------------------------------------------------------------------ reporting

    def _report_or_none(self) -> RunReport | None:
        try:
            return self.report()
        except Exception:  # whatever it stumbles over, the run's memory must go
            logger.exception("the run has no report; please report this")
            return None

    def _log_configuration(self, plan: SwapPlan) -> None:
        """Debug mode's lines when a plan has been made, in the brief's words."""
        profile, readings = self.planner.profile, self.planner.readings
        assert profile is not None
        assert readings is not None
        size = ModelSize(parameters=self._parameters, nbytes=profile.nbytes, layers=len(profile.blocks))
        for line in brief_lines(plan, size, memory=readings.memory, host=readings.host, ratio=self.planner.ratio):
            logger.info("%s", line)

    def _log(self, report: RunReport) -> RunReport:
        """Logs the summary of a run that is over; in debug mode a table of its blocks and a trace file as well.

        Returns:
            The report, with notes on the trace.
        """
        try:
            if self.planner.settings.debug_mode:
                logger.info("%s", block_table(report))
                report = replace(report, notes=(*report.notes, *self._write_trace()))
            logger.info("%s", summary(report))
        except Exception:  # whatever it stumbles over, the run itself has succeeded
            logger.exception("the run's report could not be written; please report this")
        return report

    def _write_trace(self) -> tuple[str, ...]:
        trace, profile = self.session.trace, self.planner.profile
        if trace is None or self._trace_dir is None or profile is None:
            return ()
        path = self._trace_dir / trace_name(datetime.now())
        try:
            write_trace(path, chrome_trace(trace.spans(), names=[block.name for block in profile.blocks]))
        except BlockSwapError as failure:
            return (str(failure),)
        cut = f", without the last {trace.dropped:,} spans" if trace.dropped else ""
        return (f"trace: {path}{cut}",)


def limits_within(limits: Limits, backend: Backend) -> Limits:
    """The limits, and what the device itself cannot do."""
    return replace(
        limits,
        overlap=limits.overlap and backend.overlap,
        pin=limits.pin and backend.registrar is not None,
    )


def count_parameters(modules: Sequence[nn.Module]) -> int | None:
    """Parameters of the modules; None where packed bytes hide how many they stand for, as in GGUF."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if any(not parameter.is_floating_point() for parameter in parameters):
        return None
    return sum(parameter.numel() for parameter in parameters)
