"""RunReport: one record of a run, planned beside measured, for log, node and browser; pure."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from ...hardware.records import Samples
from ..model.groups import is_beside
from ..model.layout import ModelProfile
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import HostTier, SwapPlan
from ..spans import COMPUTE, COPY, FORWARD, STALL, Span
from .replan import Observation, observe

if TYPE_CHECKING:  # this module only reads them
    from ..engine.session import SwapSession
    from .planner import Planner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Times of one block, the mean over the timed forwards in which it ran; None is unknown.

    Attributes:
        name: Its name in the model.
        swapped: Whether it is swapped.
        compute_ms: How long its kernels took.
        copy_ms: How long its copy took.
        stall_ms: How long compute waited for its copy.
    """

    name: str
    swapped: bool
    compute_ms: float | None = None
    copy_ms: float | None = None
    stall_ms: float | None = None


class Step(NamedTuple):
    """A step of a sampler."""

    number: int
    """From 1."""
    of: int | None
    """Number of all steps; None is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What another vram_threshold_percent would gain, by the plan that it would give with what was measured.

    Attributes:
        free_bytes: Device memory that stayed unused at the peak.
        percent: The vram_threshold_percent.
        blocks: Blocks that would stay on the device, more than now.
        saved_ms: What it would save in each of these.
        each: "step", or "pass" where steps are unknown.
    """

    free_bytes: int
    percent: int
    blocks: int
    saved_ms: float
    each: str = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured in a run; None is unknown.

    Attributes:
        forwards: Forwards that ran blocks.
        step: The sampler's step that ran last.
        steps: Steps that ran, in all rounds of a sampler that goes through its steps again; 0 is unknown.
        forwards_per_step: Forwards that ran blocks in a step, the mean over those that are finished; None is unknown.
        empty_forwards: Forwards that ran none.
        timed_forwards: Forwards of which every block was timed.
        forward_ms: Duration of a forward that ran blocks, the median.
        stall_ms: Time per forward that compute waited for copies, the mean over the timed ones.
        onloads: Copies of a slab into a slot.
        onloaded_bytes: Bytes of these.
        placed_bytes: Bytes of residents and small tensors that were copied to the device.
        returned_bytes: Bytes copied back to the host: buffers that a forward changed, never weights.
        copy_bytes_per_s: Bytes over the time in which copies were under way.
        weight_bytes: Device memory of the block weights under the last plan.
        activation_bytes: Device memory that forwards took above the weights, the highest peak.
        slab_bytes: Host memory of the slabs.
        pinned_bytes: Host memory that we have page-locked.
        anonymous_bytes: Host memory of slabs and staging slabs that is not page-locked.
        file_bytes: Bytes of the swapped blocks that are read from their file.
        refusals: Why slabs could not be page-locked as planned.
        replans: Why the plan was changed, each time.
        ran_out_with: How many blocks were on the device when its memory first ran out; None if it did not.
        others: What others did to the weights, in a sentence; empty if nothing.
        movers: Who these are, as far as it is known.
        blocks: Times of each block in execution order; empty if none were measured.
        samples: Of the device and the host during the run.
    """

    forwards: int
    step: Step | None = None
    steps: int = 0
    forwards_per_step: float | None = None
    empty_forwards: int = 0
    timed_forwards: int = 0
    forward_ms: float | None = None
    stall_ms: float | None = None
    onloads: int
    onloaded_bytes: int
    placed_bytes: int
    returned_bytes: int
    copy_bytes_per_s: float | None = None
    weight_bytes: int | None
    activation_bytes: int | None = None
    slab_bytes: int
    pinned_bytes: int
    anonymous_bytes: int = 0
    file_bytes: int = 0
    refusals: tuple[str, ...] = ()
    replans: tuple[str, ...] = ()
    ran_out_with: int | None = None
    others: str = ""
    movers: tuple[str, ...] = ()
    blocks: tuple[BlockTimes, ...] = ()
    samples: Samples | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A run beside its plan; None is unknown.

    Attributes:
        title: What ran on what, such as "WanModel on NVIDIA GeForce RTX 4090".
        plan: The last plan.
        prediction: A forward with it in virtual time, in ms.
        activation_bytes: Device memory that forwards were expected to take above the weights.
        link_bytes_per_s: Speed of the link that the prediction is based on.
        measured: What was measured.
        hint: What the user could change; None if nothing.
        number: Number of the run, from 1.
        ended: When it ended; None while it lasts.
        failure: The error that ended it; empty if none did.
        interrupted: Whether the user stopped it.
        notes: Sentences on what no figure shows: where the trace is, what else slowed the run.
    """

    title: str
    plan: SwapPlan
    prediction: ForwardTime | None = None
    activation_bytes: int | None = None
    link_bytes_per_s: float | None = None
    measured: Measured
    hint: Hint | None = None
    number: int = 1
    ended: datetime | None = None
    failure: str = ""
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        timed, planned = len(self.measured.blocks), len(self.plan.swapped)
        if timed not in (0, planned):
            raise ValueError(f"expected times of all {planned} blocks of the plan or of none, got {timed}")

    def at_end(self, samples: Samples | None, failure: BaseException | None) -> RunReport:
        """The report of the run that ends now, with all its samples; it has a hint only if it ended well."""
        interrupted = is_interrupt(failure)
        why = "" if failure is None or interrupted else error_in_words(failure)
        measured, hint = replace(self.measured, samples=samples), self.hint if failure is None else None
        if measured.steps and failure is None:  # the last one is finished, too
            measured = replace(measured, forwards_per_step=measured.forwards / measured.steps)
        return replace(self, measured=measured, hint=hint, ended=datetime.now(), failure=why, interrupted=interrupted)


def is_interrupt(failure: BaseException | None) -> bool:
    """Whether the user stopped the run: by ComfyUI's button, whose exception is known by its name, or by a signal."""
    kinds = () if failure is None else type(failure).__mro__
    return any(kind.__name__ in ("KeyboardInterrupt", "InterruptProcessingException") for kind in kinds)


def error_in_words(failure: BaseException) -> str:
    """An error's message, or its type if it has none."""
    return str(failure) or type(failure).__name__


def host_tiers(plan: SwapPlan) -> dict[str, int]:
    """How many swapped blocks come from which host tier."""
    return dict(Counter(tier.value for tier in plan.tiers if tier is not None))


class _Counts(NamedTuple):
    """A session's counters at one moment."""

    forwards: int
    empty_forwards: int
    onloads: int
    onloaded_bytes: int
    placed_bytes: int
    returned_bytes: int

    @classmethod
    def of(cls, session: SwapSession) -> _Counts:
        log, done = session.log, session.counters
        copied = done.onloads, done.onloaded_bytes, done.placed_bytes, done.returned_bytes
        return cls(log.all_forwards, log.all_empty_forwards, *copied)


class RunStats:
    """What is known of a run while it lasts; makes its report.

    Args:
        session: Runs the blocks.
        planner: Makes the plans.
        number: Number of the run, from 1.

    Attributes:
        step: The sampler's step that ran last; None is unknown.
        steps: How often it was another one than before.
        observation: What the forwards that were timed last show.
        timed: Numbers of these forwards.
        is_timed: Whether they ran under the present plan and workload.
        prediction: A forward with the present plan in virtual time.
        weight_bytes: Device memory of the block weights under the present plan.
        has_plan: Whether the run's first plan has been logged.
        is_slow: Whether a forward took several times the usual in this run.
        changes: How often the plan was changed by automatic tuning.
        replans: Why the plan was changed, each time.
        ran_out_with: As in Measured.
        notes: Sentences on what no figure shows.
    """

    def __init__(self, session: SwapSession, planner: Planner, *, number: int = 1) -> None:
        self.number = number
        self._session = session
        self._planner = planner
        self._before = self._now = _Counts.of(session)
        self.step: Step | None = None
        self.steps = 0
        self._forwards_per_step: float | None = None
        self.observation: Observation | None = None
        self.timed = range(0)
        self.is_timed = False
        self.prediction: ForwardTime | None = None
        self.weight_bytes: int | None = None
        self.has_plan = self.is_slow = False
        self.changes = 0
        self.replans: list[str] = []
        self.ran_out_with: int | None = None
        self.notes: list[str] = []

    def count(self, step: Step | None) -> None:
        """Takes the counters after a forward of `step` that ended well; copies of one that fails are not counted."""
        if step is not None and step != self.step:
            if self.steps:
                self._forwards_per_step = (self._now.forwards - self._before.forwards) / self.steps
            self.steps += 1
        self.step = step
        self._now = _Counts.of(self._session)

    def observe(self, timed: range) -> None:
        """Evaluates the trace of the timed forwards, if the device has finished them."""
        trace, profile, traced = self._session.trace, self._planner.profile, self._session.log.traced
        if trace is None or profile is None or traced is None:
            return
        slabs = [block.slab_bytes for block in profile.blocks]
        optional = [i for i, block in enumerate(profile.blocks) if is_beside(block.name)]
        observation = observe(trace.collect(), slab_bytes=slabs, timed=timed, traced=traced, optional=optional)
        if observation is not None:
            self.observation, self.timed, self.is_timed = observation, timed, True

    def note(self, text: str | None) -> None:
        """Logs a sentence on what no figure shows, once, and keeps it for the report."""
        if text is not None and text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)

    def report(self, title: str, samples: Samples | None) -> RunReport:
        """The report of the run so far. Made before the release, which frees staging memory.

        Args:
            title: Model and device.
            samples: Of the device; None if it was not sampled.
        """
        plan, profile, session = self._session.plan, self._planner.profile, self._session
        assert plan is not None, "a run is reported after its first plan"
        assert profile is not None
        trace, link, held, tiers = session.trace, self._planner.link, session.held, session.tiers
        spans = () if trace is None else trace.collect()
        dropped = 0 if trace is None else trace.dropped
        cut = [f"the trace is full: {dropped:,} spans were not recorded"] if dropped else []
        largest, is_timed = self._planner.history.largest_workload, self.observation is not None
        return RunReport(
            title=title,
            plan=replace(plan, tiers=tuple(tiers.get(i, tier) for i, tier in enumerate(plan.tiers))),
            prediction=self.prediction,
            activation_bytes=None if largest is None else largest.expected_activation_bytes,
            link_bytes_per_s=None if link is None or not link.pinned else link.best(max_streams=plan.streams)[1],
            measured=replace(
                self.measured(),
                slab_bytes=held.slab_bytes,
                pinned_bytes=held.pinned_bytes,
                anonymous_bytes=max(0, held.slab_bytes + held.staging_bytes - held.pinned_bytes),
                file_bytes=sum(profile.blocks[i].file_bytes for i, tier in tiers.items() if tier is HostTier.FILE),
                refusals=session.refusals,
                replans=tuple(self.replans),
                blocks=block_times(_since(spans, self.timed), profile, plan.swapped) if is_timed else (),
                samples=samples,
            ),
            number=self.number,
            notes=(*self.notes, *filter(None, [session.others.text]), *cut),
        )

    def measured(self) -> Measured:
        """What was measured so far, without what takes long to collect: host memory, times of blocks, samples."""
        seen, activations = self.observation, self._planner.activations
        counters, before, now = self._session.counters, self._before, self._now
        return Measured(
            forwards=now.forwards - before.forwards,
            step=self.step,
            steps=self.steps,
            forwards_per_step=self._forwards_per_step,
            empty_forwards=now.empty_forwards - before.empty_forwards,
            timed_forwards=0 if seen is None else seen.forwards,
            forward_ms=None if seen is None else seen.forward_ms,
            stall_ms=None if seen is None else seen.stall_ms,
            onloads=now.onloads - before.onloads,
            onloaded_bytes=now.onloaded_bytes - before.onloaded_bytes,
            placed_bytes=counters.placed_bytes - before.placed_bytes,
            returned_bytes=counters.returned_bytes - before.returned_bytes,
            copy_bytes_per_s=None if seen is None else seen.copied_bytes_per_s,
            weight_bytes=self.weight_bytes,
            activation_bytes=activations.nbytes if activations is not None and activations.is_measured else None,
            slab_bytes=0,
            pinned_bytes=0,
            ran_out_with=self.ran_out_with,
            others=self._session.others.text,
            movers=tuple(self._session.others.who),
        )


def _since(spans: Sequence[Span], timed: range) -> Sequence[Span]:
    """The spans from the start of the first timed forward on."""
    begin = next((s.begin_ms for s in spans if s.lane == FORWARD and s.block == timed.start), None)
    return () if begin is None else [span for span in spans if span.begin_ms >= begin]


def block_times(spans: Sequence[Span], profile: ModelProfile, swapped: Sequence[bool]) -> tuple[BlockTimes, ...]:
    """Means over the forwards that were traced."""
    found: dict[tuple[str, int], list[float]] = {}
    for span in spans:
        found.setdefault((span.lane, span.block), []).append(span.duration_ms)

    def mean(lane: str, index: int) -> float | None:
        durations = found.get((lane, index))
        return statistics.fmean(durations) if durations else None

    return tuple(
        BlockTimes(
            name=block.name,
            swapped=is_swapped,
            compute_ms=mean(COMPUTE, index),
            copy_ms=mean(f"{COPY} 0", index),  # each copy stream has an equal part of it
            stall_ms=mean(STALL, index),
        )
        for index, (block, is_swapped) in enumerate(zip(profile.blocks, swapped, strict=True))
    )
