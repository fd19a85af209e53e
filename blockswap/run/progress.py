"""Progress: where a run stands, in figures and in a sentence, for the browser; pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ...hardware.units import format_bytes
from ..errors import BlockSwapError
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan, blocks_in_words
from .report import Hint, Measured, RunReport, RunStats, error_in_words, is_interrupt
from .text import expected_waits, far_in_words, hint_text, pass_time, rescue_text, steps_in_words, time_in_words, waits

if TYPE_CHECKING:
    from .planner import Planner

NOTHING_DONE = "The run ended before its first step finished."


class Phase(Enum):
    """Where a run stands."""

    ADOPTING = "adopting"
    """From the plan until every block is placed."""
    SAMPLING = "sampling"
    """From then until the release."""
    DONE = "done"
    """After the release, if a forward had finished."""
    STOPPED = "stopped"
    """After the release, if the user stopped the run, or if no forward had finished."""
    FAILED = "failed"
    """After an error, or instead of the run."""
    OFF = "off"
    """Our node swaps nothing."""


OVER = (Phase.DONE, Phase.STOPPED)
"""Phases in which a run's figures are its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The device's memory under a plan, in bytes.

    Attributes:
        total: All of it.
        other: In use by anything but the block weights.
        residents: Blocks that stay, and the small tensors of all blocks.
        window: The slots.
        ceiling: Memory that may be in use once the weights are placed; 0 where no ceiling applies.
        activations: Memory that forwards need above the weights, measured or else expected; None is unknown.
    """

    total: int
    other: int
    residents: int
    window: int
    ceiling: int
    activations: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptFigures:
    """Bytes of weights placed so far, of all blocks, and page-locked so far."""

    placed: int
    all: int
    pinned: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One moment of a run; what does not belong to its phase is None.

    Attributes:
        phase: The phase.
        memory: The device's memory under the plan.
        plan: The plan.
        predicted: A forward with it in virtual time, from what is known now.
        adopt: How far the weights are placed.
        run: What was measured so far.
        hint: What the user could change.
        why: Why the run failed or was stopped, or why nothing is swapped.
        error: The type of the error that ended it.
    """

    phase: Phase
    memory: MemoryUse | None = None
    plan: SwapPlan | None = None
    predicted: ForwardTime | None = None
    adopt: AdoptFigures | None = None
    run: Measured | None = None
    hint: Hint | None = None
    why: str = ""
    error: str = ""

    @property
    def text(self) -> str:
        """The plan in a sentence, and below it the present state or the result."""
        is_measured = self.phase in OVER and self.run is not None and self.run.stall_ms is not None
        plan = "" if self.plan is None else _plan(self.plan, None if is_measured else self.predicted)
        others, hint = "" if self.run is None else self.run.others, "" if self.hint is None else hint_text(self.hint)
        rescue = "" if self.run is None or self.run.ran_out_with is None else rescue_text(self.run.ran_out_with)
        lines = plan, rescue, _adopting(self.adopt), self._running(), hint, others, self.why
        return "\n".join(line for line in lines if line)

    def as_json(self) -> dict[str, object]:
        """The browser's event: plain data, and the text."""
        return {
            "phase": self.phase.value,
            "text": self.text,
            "memory": None if self.memory is None else asdict(self.memory),
            "plan": self._plan_as_json(),
            "adopt": None if self.adopt is None else asdict(self.adopt),
            "run": self._run_as_json(),
            "hint": None if self.hint is None else asdict(self.hint),
            "error": self.error,
        }

    def _plan_as_json(self) -> dict[str, object] | None:
        plan, predicted = self.plan, self.predicted
        if plan is None:
            return None
        return {
            "blocks": plan.block_count,
            "swapped": plan.streaming_count,
            "parts": plan.streaming_beside,
            "stall_ms": None if predicted is None else predicted.stall,
            "forward_ms": None if predicted is None else predicted.elapsed,
            "over_ceiling": plan.over_ceiling,
        }

    def _run_as_json(self) -> dict[str, object] | None:
        run = self.run
        if run is None:
            return None
        time = pass_time(run)
        return {
            "passes": run.forwards,
            "step": None if run.step is None else run.steps if self.phase in OVER else run.step.number,
            "steps": None if run.step is None else run.step.of,
            "forward_ms": run.forward_ms,
            "stall_ms": run.stall_ms,
            "each_ms": None if time is None else time[0],
            "each": None if time is None else time[1],
            "ran_out_with": run.ran_out_with,
            "others": run.others,
            "movers": list(run.movers),
        }

    def _running(self) -> str:
        run = self.run
        if run is None:
            return ""
        if not run.forwards:
            return "The first step is running."
        step, is_over = run.step, self.phase in OVER
        if is_over:
            head = f"{'Done' if self.phase is Phase.DONE else 'Stopped'} after {steps_in_words(run)}"
        elif step is None:
            head = f"Pass {run.forwards} of the model"
        else:
            head = f"Step {step.number}" + ("" if step.of is None else f" of {step.of}")
        streams = self.plan is not None and self.plan.swapped_count
        figures = time_in_words(pass_time(run)), waits(run.stall_ms, run.forward_ms) if streams else ""
        known = ", ".join(figure for figure in figures if figure)
        head = f"{head}: {known}" if known else head
        return f"{head}. VRAM is released." if is_over else f"{head}."


Watcher = Callable[[Progress], None]
"""Receives progress, in the thread that runs the model, during adopts and after each forward: it must be quick."""


class ProgressFeed:
    """Reports one run's progress to a watcher.

    Args:
        planner: Makes the run's plans.

    Attributes:
        watcher: Receives the progress; None for nobody.
    """

    def __init__(self, planner: Planner) -> None:
        self.watcher: Watcher | None = None
        self._planner = planner
        self._placed_bytes: list[int] = []

    def placed(self, plan: SwapPlan, count: int, pinned_bytes: int, stats: RunStats) -> None:
        """Reports, during an adopt and the first forward, that `count` blocks are placed."""
        profile = self._planner.profile
        if self.watcher is None or profile is None:
            return
        if count == 0:
            self._placed_bytes = [0, *itertools.accumulate(block.nbytes for block in profile.blocks)]
        adopt = AdoptFigures(placed=self._placed_bytes[count], all=self._placed_bytes[-1], pinned=pinned_bytes)
        memory = self._memory(plan)
        self.watcher(Progress(phase=Phase.ADOPTING, memory=memory, plan=plan, predicted=plan.predicted, adopt=adopt))
        if count == len(plan.swapped):
            self.ran(plan, stats)

    def ran(self, plan: SwapPlan, stats: RunStats) -> None:
        """Reports that the weights are placed, or that a forward has returned."""
        if self.watcher is not None:
            predicted, memory = stats.prediction or plan.predicted, self._memory(plan)
            run = stats.measured()
            self.watcher(Progress(phase=Phase.SAMPLING, memory=memory, plan=plan, predicted=predicted, run=run))

    def over(self, report: RunReport | None, failure: BaseException | None = None) -> None:
        """Reports the end of the run.

        Args:
            report: Its report; None if there is none.
            failure: What ended it; None if it ended well.
        """
        if self.watcher is None:
            return
        if isinstance(failure, BlockSwapError):
            self.watcher(failed(failure))
        elif failure is not None and not is_interrupt(failure):
            why = error_in_words(failure).partition("\n")[0]
            self.watcher(failed(failure, f"The run failed {far_in_words(report)}: {why}"))
        elif report is None or not report.measured.forwards:
            self.watcher(Progress(phase=Phase.STOPPED, why=NOTHING_DONE))
        else:
            plan, measured = report.plan, report.measured
            result = Progress(
                phase=Phase.DONE if failure is None else Phase.STOPPED,
                memory=self._memory(plan, measured.activation_bytes),
                plan=plan,
                predicted=report.prediction or plan.predicted,
                run=measured,
                hint=report.hint,
            )
            self.watcher(result)

    def _memory(self, plan: SwapPlan, activation_bytes: int | None = None) -> MemoryUse | None:
        planner = self._planner
        if planner.readings is None:
            return None
        if activation_bytes is None:
            known = planner.activations
            expected = plan.activation_bytes if known is None else known.nbytes
            is_measured = known is not None and known.is_measured
            activation_bytes = None if planner.has_run_out and not is_measured else expected
        total = planner.readings.memory.total_bytes
        has_limit = planner.settings.auto_hardware_tuning and not planner.readings.spec.is_integrated
        percent = planner.settings.vram_threshold_percent if has_limit else 0.0
        return MemoryUse(
            total=total,
            other=total - plan.limit_bytes,
            residents=plan.resident_bytes,
            window=plan.window_bytes,
            ceiling=int(percent / 100 * total),
            activations=activation_bytes,
        )


def _plan(plan: SwapPlan, predicted: ForwardTime | None) -> str:
    over = "" if not plan.over_ceiling else "this is more VRAM than is left for them"
    wait = expected_waits(plan, predicted)
    text = "; ".join(part for part in (blocks_in_words(plan), f"expected: {wait}" if wait else "", over) if part)
    return f"{text[0].upper()}{text[1:]}."


def _adopting(adopt: AdoptFigures | None) -> str:
    if adopt is None:
        return ""
    placed = format_bytes(adopt.placed, like=adopt.all)
    return f"Preparing the weights, on the GPU and in RAM: {placed} of {format_bytes(adopt.all)}."


def failed(failure: BaseException, why: str = "") -> Progress:
    """The progress of a run that ended with an error, or did not begin; `why` is by default the error's message."""
    return Progress(phase=Phase.FAILED, why=why or str(failure), error=type(failure).__name__)
