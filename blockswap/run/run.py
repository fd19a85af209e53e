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
from ..errors import BlockSwapError, DeviceMemoryError, HostMemoryError, PlanError
from ..plan.swap_plan import SwapPlan
from ..settings import SwapSettings
from .history import Workload
from .look import has_become_slow, is_over, learn, why_change
from .machine import LastKnownReadings, Machine, PeakMeter
from .planner import Limits, Planner
from .report import RunReport
from .run_report import Begin, RunStats, make_report, observe_timed
from .teller import Teller
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
        last_report: Of the last run that was released.
        teller: Tells whoever watches what the run is doing.
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
        self.planner = Planner(settings, self._machine, backend.pin_budget, (limits or Limits()).within(backend))
        self.session = SwapSession(blocks, self.planner, backend, root=root, traced=TIMED_FORWARDS)
        self.planner.session = weakref.ref(self.session)
        self.teller = Teller(self.session, self.planner)
        self.last_report: RunReport | None = None
        self._found = RunStats(Begin.of(self.session))
        self._in_run = False
        self._timed = TIMED_FORWARDS
        self._workload: Workload | None = None
        self._adoptions = 0
        self._adopted_settings = settings
        self._wants_look = False
        self._sampler = sampler
        self._trace_dir = trace_dir
        self._sampling = contextlib.ExitStack()
        weakref.finalize(self, self._sampling.close)
        self._title = f"{'blocks' if root is None else type(root).__name__} on {machine.spec.name}"
        self._parameters = count_parameters([module for _, module in blocks] if root is None else [root])

    @property
    def plan(self) -> SwapPlan | None:
        """The plan that is followed, or was last."""
        return self.session.plan

    @property
    def found(self) -> RunStats:
        """What this run has found out."""
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
        self._peak.begin(anew=not self.planner.is_peak_known)
        with self.session.forward(blocks):
            yield
        self._found.count_onloads(self.session.counters)
        taken = self._peak.taken_bytes()
        if taken is not None:
            self.planner.learn_activations(taken)
        self._notice_adoption()
        self._wants_look |= learn(self.session, self.planner, self._found, self._timed)
        if has_become_slow(self.session, self.planner, self._found, self._timed):
            self._time_again(keep=True)
        self.teller.ran(self._present, self._found)

    def prepare(self, workload: Workload | None = None) -> SwapPlan:
        """What `forward` does first: a plan for this workload, in place. Returns the plan.

        Raises:
            PlanError: No plan fits.
        """
        state = self.session.state
        if state not in (SessionState.IDLE, SessionState.ADOPTED):
            raise BlockSwapError(
                f"a forward expects a run that is between two of them but its session is {state.value}; "
                "end the forward that is under way, or make a new run"
            )
        is_new, is_other = self.planner.begin(workload), workload != self._workload
        self._workload = workload
        if state is SessionState.ADOPTED:
            if is_other:
                self._time_again()
            if self.planner.settings.of_the_plan != self._adopted_settings.of_the_plan:
                self._found.replans.append("the settings have changed")
                self.session.release()
                self._adopt()
            elif self.planner.settings.auto_hardware_tuning and (
                is_new or self._wants_look or is_over(self.planner, self._found)
            ):
                self._look_again()
        if self.session.state is SessionState.IDLE:
            self._begin_run()
        return self._present

    def use(self, settings: SwapSettings) -> None:
        """The settings from the next forward on."""
        self.planner.use(settings)
        self._trace_what_is_asked()

    def shrink(self, said: str) -> None:
        """Device memory ran out, in `prepare` or in a forward: ours is given back, and the next plan is smaller.

        Args:
            said: What the device said.

        Raises:
            DeviceMemoryError: There is no smaller plan; the message says what would fit.
        """
        if self.session.state is SessionState.ADOPTED:
            self.session.release()
        if not self.planner.shrink():
            assert self.planner.made is not None
            raise DeviceMemoryError(oom_message(self._workload, self.planner.made, said=said))
        self._found.replans.append("the device ran out of memory")

    def report(self) -> RunReport | None:
        """Of the run so far; of the last one if none has begun since; None before the first."""
        if not self._in_run:
            return self.last_report
        self._found.observe(observe_timed(self.session, self.planner, self._timed), self._timed)
        return make_report(self._title, self.session, self.planner, self._found, samples=self._samples)

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
            self.last_report = log_run(report, self._samples, self.session, self.planner, self._trace_dir)
        if was_in_run or failure is not None:
            self.teller.over(report, failure)

    def _report_or_none(self) -> RunReport | None:
        try:
            return self.report()
        except Exception:  # whatever it stumbles over, the run's memory must go
            logger.exception("the run has no report; please report this")
            return None

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

    def _begin_run(self) -> None:
        if not self._in_run:
            self._found = RunStats(Begin.of(self.session))
        self._sampling.close()
        if self._sampler is not None:
            self._sampling.enter_context(self._sampler)
        try:
            self._adopt()
        except BaseException as failure:
            self._sampling.close()
            self.teller.over(None, failure)
            raise
        self._in_run = True

    def _end_run(self) -> None:
        self._in_run = self._wants_look = False
        self.planner.end_run()
        self._sampling.close()

    def _adopt(self) -> None:
        before = self._machine.allocated_bytes()
        plan = self.session.adopt()
        after = self._machine.allocated_bytes()
        self._found.weight_bytes = None if before is None or after is None else after - before
        self._adopted_settings = self.planner.settings
        self._notice_adoption()
        self.teller.ran(plan, self._found)
        if self.planner.settings.debug_mode:
            log_in_the_briefs_words(plan, self.planner, self._parameters)

    def _notice_adoption(self) -> None:
        """The session has adopted, by itself too where weights were replaced: what was seen belongs to another plan."""
        if self._adoptions != self.session.adoptions:
            self._adoptions = self.session.adoptions
            self._time_again()

    def _time_again(self, *, keep: bool = False) -> None:
        """Durations are taken anew, after one forward that warms up; those of the same plan and video are kept."""
        begin = self.session.log.forwards + TIMED_FORWARDS.start
        self._timed = range(begin, begin + len(TIMED_FORWARDS))
        self._trace_what_is_asked()
        self._found.is_timed = False
        if not keep:
            self._found.observed, self._found.prediction = None, self.planner.predict(self._present)

    def _trace_what_is_asked(self) -> None:
        self.session.checks = self.planner.settings.debug_mode
        self.session.log.traced = EVERY_FORWARD if self.planner.settings.debug_mode else self._timed

    def _look_again(self) -> None:
        """Another plan takes the present one's place, if there is reason to."""
        present, self._wants_look = self._present, False
        why = why_change(self.planner, present, self._found)
        if why is not None:
            self._adopt_anew(why, present)

    def _adopt_anew(self, why: str, present: SwapPlan) -> None:
        logger.info("planning again: %s", why)
        self.session.release()
        try:
            self._adopt()
        except (PlanError, DeviceMemoryError, HostMemoryError) as failure:
            self._found.note(f"planning again failed, so that the plan before goes on: {failure}")
            self.planner.once = present
            self._adopt()
            return
        self._found.replans.append(why)


def log_in_the_briefs_words(plan: SwapPlan, planner: Planner, parameters: int | None) -> None:
    """Debug mode's lines when a plan has been made."""
    assert planner.profile is not None
    assert planner.host is not None
    size = ModelSize(parameters=parameters, nbytes=planner.profile.nbytes, layers=len(planner.profile.blocks))
    for line in brief_lines(plan, size, memory=planner.memory, host=planner.host, ratio=planner.ratio):
        logger.info("%s", line)


def log_run(
    report: RunReport, samples: Samples | None, session: SwapSession, planner: Planner, trace_dir: Path | None
) -> RunReport:
    """Logs the summary of a run that is over; in debug mode a table of its blocks and a trace file as well.

    Args:
        report: Of the run, before its release.
        samples: With the last one; None if nothing was sampled.
        session: Its session.
        planner: Its planner.
        trace_dir: Where the trace file goes; None writes none.

    Returns:
        The report, with these samples and notes on the trace.
    """
    report = replace(report, measured=replace(report.measured, samples=samples))
    try:
        return _tell(report, session, planner, trace_dir)
    except Exception:  # whatever it stumbles over, the run itself has succeeded
        logger.exception("the run's report could not be written; please report this")
        return report


def _tell(report: RunReport, session: SwapSession, planner: Planner, trace_dir: Path | None) -> RunReport:
    if planner.settings.debug_mode:
        logger.info("%s", block_table(report))
        notes = _write_trace(session, planner, trace_dir)
        report = replace(report, notes=(*report.notes, *notes))
    logger.info("%s", summary(report))
    return report


def _write_trace(session: SwapSession, planner: Planner, trace_dir: Path | None) -> tuple[str, ...]:
    trace = session.trace
    if trace is None or trace_dir is None or planner.profile is None:
        return ()
    names = [block.name for block in planner.profile.blocks]
    path = trace_dir / trace_name(datetime.now())
    try:
        write_trace(path, chrome_trace(trace.spans(), names=names))
    except BlockSwapError as failure:
        return (str(failure),)
    cut = f", without the last {trace.dropped:,} spans" if trace.dropped else ""
    return (f"trace: {path}{cut}",)


def count_parameters(modules: Sequence[nn.Module]) -> int | None:
    """Parameters of the modules; None where packed bytes hide how many they stand for, as in GGUF."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    if any(not parameter.is_floating_point() for parameter in parameters):
        return None
    return sum(parameter.numel() for parameter in parameters)
