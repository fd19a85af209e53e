"""What a run has done so far, gathered from its session, its trace and its samples into a RunReport."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ...hardware.records import Samples
from ..engine.session import SwapSession
from ..engine.transfer import Counters
from ..model.layout import ModelProfile
from ..plan.schedule import ForwardTime
from ..spans import COMPUTE, COPY, FORWARD, STALL, Span
from .planner import Planner
from .replan import Observation, observe
from .report import BlockTimes, Measured, RunReport

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Begin:
    """Where the counters stood when the run began."""

    counters: Counters
    forwards: int
    empty_forwards: int

    @classmethod
    def of(cls, session: SwapSession) -> Begin:
        """Where they stand now."""
        return cls(replace(session.counters), session.log.all_forwards, session.log.all_empty_forwards)


@dataclass(slots=True)
class RunStats:
    """What a run keeps of itself beside its session.

    Attributes:
        begin: Where the counters stood when it began.
        onloads: Copies into slots, up to the last forward that has ended well.
        onloaded_bytes: Bytes of these.
        observed: What the forwards that were timed last have shown.
        timed: Numbers of these forwards.
        is_timed: Those of the present plan and workload are among them.
        prediction: A forward with the present plan in virtual time.
        weight_bytes: Device memory that block weights took under the present plan.
        is_slow: Forwards have become much slower than those before them, and that has been looked into.
        over_bytes: By how much the weights stood above their budget when that was last seen.
        looks: How often another plan has taken the place of the one before by itself.
        replans: Why other plans took the first one's place.
        notes: What no figure tells.
    """

    begin: Begin
    onloads: int = 0
    onloaded_bytes: int = 0
    observed: Observation | None = None
    timed: range = range(0)
    is_timed: bool = False
    prediction: ForwardTime | None = None
    weight_bytes: int | None = None
    is_slow: bool = False
    over_bytes: int = 0
    looks: int = 0
    replans: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count_onloads(self, counters: Counters) -> None:
        """A forward has ended well: what one that does not copies is nobody's."""
        self.onloads = counters.onloads - self.begin.counters.onloads
        self.onloaded_bytes = counters.onloaded_bytes - self.begin.counters.onloaded_bytes

    def observe(self, observed: Observation | None, timed: range) -> None:
        """What forwards have shown, if it is there by now."""
        if observed is not None:
            self.observed, self.timed, self.is_timed = observed, timed, True

    def note(self, text: str) -> None:
        """Something that no figure tells: said once, and kept for the report."""
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)


def make_report(
    title: str, session: SwapSession, planner: Planner, found: RunStats, *, samples: Samples | None
) -> RunReport:
    """The report of a run, before its release: slabs, their tiers and staging are counted as they stand.

    Args:
        title: What ran on what.
        session: Its session.
        planner: Its planner.
        found: What it has kept of itself.
        samples: Of the device; None if it was not watched.
    """
    plan, profile = session.plan, planner.profile
    assert plan is not None, "a run is reported after its first plan"
    assert profile is not None
    before, now, seen = found.begin.counters, session.counters, found.observed
    largest_workload, measured = planner.largest_workload, planner.activations
    trace = session.trace
    spans = () if trace is None else trace.collect()
    link, tiers = planner.link, session.tiers
    dropped = 0 if trace is None else trace.dropped
    cut = [f"the trace is full: {dropped:,} spans were not recorded"] if dropped else []
    return RunReport(
        title=title,
        plan=replace(plan, tiers=tuple(tiers.get(i, tier) for i, tier in enumerate(plan.tiers))),
        prediction=found.prediction,
        activation_bytes=None if largest_workload is None else largest_workload.expected_activation_bytes,
        link_bytes_per_s=None if link is None or not link.pinned else link.best(max_streams=plan.streams)[1],
        measured=Measured(
            forwards=session.log.all_forwards - found.begin.forwards,
            empty_forwards=session.log.all_empty_forwards - found.begin.empty_forwards,
            timed_forwards=0 if seen is None else seen.forwards,
            forward_ms=None if seen is None else seen.forward_ms,
            stall_ms=None if seen is None else seen.stall_ms,
            onloads=found.onloads,
            onloaded_bytes=found.onloaded_bytes,
            placed_bytes=now.placed_bytes - before.placed_bytes,
            returned_bytes=now.returned_bytes - before.returned_bytes,
            copy_bytes_per_s=None if seen is None else seen.copied_bytes_per_s,
            peak_weight_bytes=found.weight_bytes,
            activation_bytes=measured.nbytes if measured is not None and measured.is_measured else None,
            slab_bytes=session.slab_bytes,
            pinned_bytes=session.pinned_bytes,
            original_bytes=profile.block_bytes if planner.limits.originals_stay else 0,
            refusals=session.refusals,
            replans=tuple(found.replans),
            blocks=() if seen is None else block_times(_from(spans, found.timed), profile, plan.swapped),
            samples=samples,
        ),
        notes=(*found.notes, *cut),
    )


def observe_timed(session: SwapSession, planner: Planner, timed: range) -> Observation | None:
    """What the trace shows by now; None while the device is not through with the forwards that were timed."""
    trace, profile, traced = session.trace, planner.profile, session.log.traced
    if trace is None or profile is None or traced is None:
        return None
    slabs = [block.slab_bytes for block in profile.blocks]
    return observe(trace.collect(), slab_bytes=slabs, timed=timed, traced=traced)


def _from(spans: Sequence[Span], timed: range) -> Sequence[Span]:
    """The spans from the begin of the first timed forward on."""
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
