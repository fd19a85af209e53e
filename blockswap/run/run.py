"""SwapRun: plans a transformer's runs, measures them, plans again where prediction and measurement differ, reports."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ...hardware import Sampler
from ...hardware.records import Samples
from ..device.backend import Backend
from ..engine.others import Others
from ..engine.placer import Listeners
from ..engine.session import SessionState, SwapSession
from ..engine.trace import EVERY_FORWARD
from ..errors import BlockSwapError, DeviceMemoryError, HostMemoryError, PlanError
from ..model.profile import count_parameters
from ..plan.make_plan import Limits
from ..plan.swap_plan import HostTier, SwapPlan, blocks_in_words
from ..settings import SwapSettings
from .foresight import Foresight
from .history import Workload
from .machine import LastKnownReadings, Machine, PeakMeter
from .planner import Planner, limits_within
from .progress import ProgressFeed, Watcher
from .replan import MOST_REPLANS, SLOW, kept_over_budget, slow_link, spill, usual_ms, why_replace
from .report import RunReport, RunStats, Step
from .text import ModelSize, block_table, configuration_lines, oom_message, plan_lines, summary
from .trace_file import write_run_trace

logger = logging.getLogger(__name__)

TIMED_FORWARDS = range(1, 3)
"""Forwards of which every block is timed. The first forward is left out: it warms up, compiles and fills the window."""


class OutOfVramError(DeviceMemoryError, torch.OutOfMemoryError):
    """Ends a run. ComfyUI knows torch's error: it unloads its models and says that VRAM ran out."""


class SwapRun:
    """One transformer's blocks under one set of settings, run after run.

        run = SwapRun(blocks, settings, machine, backend)
        with run.forward(Workload(tokens=32_760)):
            model(...)
        run.release()

    With automatic tuning the plan is reviewed before a forward whose workload is new to the run, when free memory on
    the card has shrunk, and once the first full step has shown durations and peak. A new plan replaces it if it no
    longer fits, or if the new plan saves more than the change costs. Without automatic tuning only new settings and a
    refusal of memory change the plan.

    Args:
        blocks: Name and module of each block, in execution order.
        settings: The user's settings.
        machine: Reads the device and the host.
        backend: The device.
        root: The whole model, for the bytes outside the blocks; held weakly.
        limits: Limits from outside the settings, such as ComfyUI's flags.
        sampler: Samples the device from the first forward of a run to its release; None for no samples.
        trace_dir: Folder where debug mode writes a trace file for each run; None for no files.

    Attributes:
        planner: Makes the plans.
        session: Runs the blocks.
        watcher: Receives the run's progress; None for nobody. May be set between runs.
        last_report: The report of the last run that was released.
        model: What the model is called in reports. May be set between runs.
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
        placed = weakref.WeakMethod(self._placed)  # weak: a run that is dropped goes at once
        listeners = Listeners(on_placed=lambda *of: None if (report := placed()) is None else report(*of))
        self.session = SwapSession(blocks, self.planner, backend, root=root, traced=TIMED_FORWARDS, listeners=listeners)
        self._blocks = [module for _, module in blocks]
        self._foresight = Foresight(self.session, self.planner, self._peak, backend.device)
        self.last_report: RunReport | None = None
        self.model = "blocks" if root is None else type(root).__name__
        self._stats = RunStats(self.session, self.planner)
        self._in_run = False
        self._timed = TIMED_FORWARDS
        self._workload: Workload | None = None
        self._prepared = self._is_new = False  # new: the coming forward is the run's first of its workload
        self._adoptions = 0
        self._adopted_settings = settings
        self._has_other_settings = False
        self._review_due = False
        self._sampler = sampler
        self._trace_dir = trace_dir
        self._sampling = contextlib.ExitStack()
        weakref.finalize(self, self._sampling.close)
        self._parameters = count_parameters(self._blocks if root is None else [root])

    @property
    def plan(self) -> SwapPlan | None:
        """The present plan, or the last one; None before the first."""
        return self.session.plan

    @property
    def watcher(self) -> Watcher | None:
        """Receives the run's progress; None for nobody."""
        return self._feed.watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        self._feed.watcher = watcher

    @contextlib.contextmanager
    def forward(
        self,
        workload: Workload | None = None,
        blocks: Sequence[nn.Module] | None = None,
        *,
        step: Step | None = None,
    ) -> Iterator[None]:
        """One forward of the model.

        Args:
            workload: What determines its memory and time; None if unknown.
            blocks: As for `SwapSession.forward`.
            step: The sampler's step that it belongs to; None if unknown.

        Raises:
            PlanError: No plan fits; the forward has not started.
        """
        self.prepare(workload)
        self._prepared = False
        self._peak.start(anew=not self.planner.is_peak_known)
        with self.session.forward(blocks):
            if self._is_new:
                with self._foresight.watch(self._blocks if blocks is None else blocks):
                    yield
            else:
                yield
        self._stats.count(step)
        self._learn()
        if self._feed.watcher is not None:
            self._feed.ran(self._present, self._stats)

    def prepare(self, workload: Workload | None = None) -> SwapPlan:
        """Makes and applies a plan for this workload, once per forward; `forward` calls it first. Returns the plan.

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
        self._is_new, is_other = self.planner.start(workload), workload != self._workload
        self._workload = workload
        if state is SessionState.ADOPTED:
            if is_other:
                self._time_again()
            self._plan_again_if_needed(is_new=self._is_new)
        else:
            self._start_run()
        self._prepared = True
        return self._present

    def withdraw(self, workload: Workload | None) -> None:
        """Forgets the workload of the last `prepare`: the forward will have another one."""
        self.planner.withdraw(workload)
        self._prepared = False

    def use(self, settings: SwapSettings) -> None:
        """Sets the settings for the coming forwards."""
        self.planner.use(settings)
        self._has_other_settings = settings.of_the_plan != self._adopted_settings.of_the_plan
        self._prepared = False
        self._trace_what_is_asked()

    def shrink(self, reported: str, *, by_driver: bool = False) -> None:
        """Frees our device memory after it ran out, in `prepare` or in a forward, and makes the next plan smaller.

        Args:
            reported: The device's own message.
            by_driver: The driver refused, not torch's allocator. Then less host memory is page-locked first.

        Raises:
            DeviceMemoryError: There is no smaller plan; the message says what would fit.
        """
        if self.session.state is SessionState.ADOPTED:
            self.session.release()
        if by_driver and self.planner.lock_less():
            self.session.unlock()
            self._stats.replans.append("the driver refused memory: less RAM is locked")
            return
        made = self.planner.made
        if not self.planner.shrink():
            raise OutOfVramError(oom_message(self._workload, made, reported=reported))
        self._stats.replans.append("VRAM ran out")
        if made is not None and self._stats.ran_out_with is None:
            self._stats.ran_out_with = made.staying_count

    def report(self) -> RunReport | None:
        """The report of the run so far, or of the last run if none has started since; None before the first."""
        if not self._in_run:
            return self.last_report
        self._stats.observe(self._timed)
        return self._stats.report(f"{self.model} on {self._machine.spec.name}", self._samples)

    def release(self, failure: BaseException | None = None) -> None:
        """Ends the run: every tensor points at its master, the device memory is free, slabs stay for the next run.

        Args:
            failure: What ended the run; None if it ended well.
        """
        if self.session.state is SessionState.RUNNING:
            raise BlockSwapError("a run cannot be released inside one of its forwards; end the forward first")
        was_in_run, report = self._in_run, self._report_or_none() if self._in_run else None
        try:
            self.session.release()
        except BaseException as raised:
            failure = failure or raised
            raise
        finally:
            self._end_run()
            if report and (report.measured.forwards or failure is not None):
                self.last_report = report = self._log(report.at_end(self._samples, failure))
            if was_in_run or failure is not None:
                self._feed.over(report, failure)

    def close(self) -> None:
        """Releases, unlocks the slabs and ends the session; idempotent."""
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
        self._sampling.close()
        if self._sampler is not None:
            self._sampling.enter_context(self._sampler)
        try:
            self._adopt()
        except BaseException:  # what follows is a smaller plan, or `release`, which reports the failure
            self._sampling.close()
            raise
        self._in_run = True

    def _end_run(self) -> None:
        was_in_run, self._in_run = self._in_run, False
        self._review_due = self._prepared = False
        self.planner.history.end_run()
        self.session.others = Others()
        self._stats = RunStats(self.session, self.planner, number=self._stats.number + was_in_run)
        self._sampling.close()

    def _plan_again_if_needed(self, *, is_new: bool) -> None:
        if self._has_other_settings:
            self.session.release()
            self._adopt()
            self._note_change("the settings have changed")
        elif self.planner.settings.auto_hardware_tuning and (
            is_new
            or self._review_due
            or self.planner.is_over_budget(self._present, own_bytes=self.session.device_bytes)
        ):
            self._review_due = False
            why = self._why_change(self._present)
            if why is not None:
                self._stats.changes += 1
                self._adopt_anew(why, self._present)

    def _why_change(self, present: SwapPlan) -> str | None:
        """Why another plan should replace `present`; None to keep it, with a note where keeping it has a cost."""
        stats = self._stats
        if self.session.others.gave_up:
            return None
        if stats.changes >= MOST_REPLANS:
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
        plan = self.session.adopt(wait=False)
        after = self._machine.allocated_bytes()
        self._stats.weight_bytes = None if before is None or after is None else after - before
        self._adopted_settings, self._has_other_settings = self.planner.settings, False
        self._notice_adoption()
        if not self._stats.has_plan:
            self._stats.has_plan = True
            logger.info("%s", plan_lines(plan, card=self._machine.spec.name))
        if self.planner.settings.debug_mode:
            logger.info("%s", "; ".join(plan.reasons))
            self._log_configuration(plan)

    def _note_change(self, why: str) -> None:
        self._stats.replans.append(why)
        logger.info("\nanother plan: %s; %s", blocks_in_words(self._present), why)

    def _placed(self, plan: SwapPlan, count: int, pinned_bytes: int) -> None:
        self._feed.placed(plan, count, pinned_bytes, self._stats)

    def _adopt_anew(self, why: str, present: SwapPlan) -> None:
        self.session.release()
        try:
            self._adopt()
        except (PlanError, DeviceMemoryError, HostMemoryError) as failure:
            self._stats.note(f"planning again failed, so that the plan before goes on: {failure}")
        else:
            self._note_change(why)
            return
        # Outside the handler, since the failure's traceback holds device memory of the plan that failed.
        self.planner.next_plan = present
        try:
            self._adopt()
        finally:
            self.planner.next_plan = None

    # ------------------------------------------------------------------------------------------------------- learning

    def _learn(self) -> None:
        """Learns from a forward that ended well. A change of plan waits for the next forward's start."""
        if self.session.others.gave_up:
            return  # what is measured now says nothing about the plan
        taken = self._peak.taken_bytes()
        if taken is not None:
            self.planner.learn_activations(taken)
        if self._adoptions != self.session.adoptions:
            self._notice_adoption()
        if not self._stats.is_timed and self.session.log.forwards >= self._timed.stop:
            self._review_due |= self._learn_times()
        self._notice_slowness()

    def _learn_times(self) -> bool:
        """Learns from the timed forwards once the device has finished them. Returns whether it has."""
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
        """Notes, once in a run, that a forward took several times the usual, and times the next ones again."""
        trace = self.session.trace
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
        """Starts timing again after an adopt; the session adopts by itself where weights were replaced."""
        self._adoptions = self.session.adoptions
        self._time_again()

    def _time_again(self, *, keep: bool = False) -> None:
        """Times the forwards after the next one; `keep`: the earlier times stay valid until then."""
        start = self.session.log.forwards + TIMED_FORWARDS.start
        self._timed = range(start, start + len(TIMED_FORWARDS))
        self._trace_what_is_asked()
        self._stats.is_timed = False
        if not keep:
            self._stats.observation, self._stats.prediction = None, self.planner.predict(self._present)

    def _trace_what_is_asked(self) -> None:
        self.session.checks = is_asked = self.planner.settings.debug_mode
        self.session.log.traced = EVERY_FORWARD if is_asked else self._timed

    # ------------------------------------------------------------------------------------------------------ reporting

    def _report_or_none(self) -> RunReport | None:
        try:
            report = self.report()
            if report is None or self._stats.is_slow:  # with a full card, the note on it advises the opposite
                return report
            return replace(report, hint=self.planner.hint(self.session.held, report))
        except Exception:  # a fault in the report must not keep the run's memory from being freed
            logger.exception("the run has no report; please report this")
            return None

    def _log_configuration(self, plan: SwapPlan) -> None:
        """Logs debug mode's lines about a plan, in the documented form."""
        profile, readings = self.planner.profile, self.planner.readings
        assert profile is not None
        assert readings is not None
        size = ModelSize(parameters=self._parameters, nbytes=profile.nbytes, layers=len(profile.blocks))
        memory, host, ratio = readings.memory, readings.host, self.planner.ratio
        logger.info("%s", "\n".join(configuration_lines(plan, size, memory=memory, host=host, ratio=ratio)))

    def _log(self, report: RunReport) -> RunReport:
        """Logs the summary of a run that is over. In debug mode also a table of its blocks, and writes a trace file:
        the report that is returned has a note on it.
        """
        is_debug, trace, profile = self.planner.settings.debug_mode, self.session.trace, self.planner.profile
        try:
            if is_debug:
                logger.info("%s", block_table(report))
            if is_debug and trace is not None and profile is not None and self._trace_dir is not None:
                note = write_run_trace(self._trace_dir, trace, names=[block.name for block in profile.blocks])
                report = replace(report, notes=(*report.notes, note))
            logger.info("\nWanVideo Enhanced BlockSwap, %s", summary(report, details=is_debug))
        except Exception:  # a fault in the report must not fail a run that has succeeded
            logger.exception("the run's report could not be written; please report this")
        return report
