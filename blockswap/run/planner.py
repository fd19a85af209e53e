"""Planner: makes a transformer's plan at each adopt from fresh readings and from what earlier forwards have shown."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field, replace
from enum import Enum

from ...hardware import DeviceMemory, HostMemory, LinkSpeed, contradicts, tier_for, tune
from ...hardware.pinning import PinBudget
from ..device.backend import Backend
from ..engine.session import SwapSession
from ..model.layout import ModelProfile
from ..plan.budget import Activations, MemoryBudget
from ..plan.make_plan import Facts, budget_for, make_plan, predict, timing_for
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan
from ..settings import SwapSettings
from .history import Workload, WorkloadHistory
from .machine import LastKnownReadings
from .replan import Observation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is set from outside of the settings.

    Attributes:
        may_pin: Host memory may be page-locked.
        may_overlap: Copies may have streams of their own.
        reserve_bytes: Device memory to be left free beside our own reserve.
        originals_stay: Somebody else keeps the blocks' weights in host memory, so that slabs are copies.
        must_swap_all: No block may stay on the device.
    """

    may_pin: bool = True
    may_overlap: bool = True
    must_swap_all: bool = False
    reserve_bytes: int = 0
    originals_stay: bool = False

    def within(self, backend: Backend) -> Limits:
        """These, and what the device itself cannot do."""
        return replace(
            self,
            may_overlap=self.may_overlap and backend.has_streams,
            may_pin=self.may_pin and backend.registrar is not None,
        )


class LinkDoubt(Enum):
    """Whether a run has contradicted the measured link."""

    NONE = "none"
    """Until a run does."""
    OPEN = "open"
    """From then on until the run is over."""
    DUE = "due"
    """From then on until the link has been measured again."""
    SETTLED = "settled"
    """From then on: a difference that stays comes from the run itself, whose compute reads memory too."""


@dataclass(slots=True)
class Planner:
    """Plans for one transformer.

    Attributes:
        settings: What the user asked for.
        machine: Where readings come from.
        pins: What all models of the process may page-lock.
        limits: What is set from outside.
        workload: What the coming forwards do; None if it is not known.
        session: The session that adopts the plans; its weights on the device count as ours.
        profile: What was planned for last.
        memory: Device memory as read for the last plan.
        host: Host memory as read for the last plan.
        once: The next plan, whatever would be planned; used up by it.
        link: The link as measured, or as a run has shown it to be; None if no plan has needed it.
        made: The plan that was made last, followed or not.
        history: What forwards have shown.
    """

    settings: SwapSettings
    machine: LastKnownReadings
    pins: PinBudget
    limits: Limits = field(default_factory=Limits)
    workload: Workload | None = None
    session: weakref.ref[SwapSession] | None = None
    profile: ModelProfile | None = None
    memory: DeviceMemory | None = None
    host: HostMemory | None = None
    once: SwapPlan | None = None
    link: LinkSpeed | None = None
    made: SwapPlan | None = None
    history: WorkloadHistory = field(default_factory=WorkloadHistory)
    _doubts: LinkDoubt = field(default_factory=lambda: LinkDoubt.NONE)

    def __call__(self, profile: ModelProfile) -> SwapPlan:
        """The plan for this moment; measures the link if copies have streams and it is not known, or in doubt.

        Raises:
            PlanError: None fits.
        """
        self.profile = profile
        self.made = self._make(profile)
        return self.made

    def _make(self, profile: ModelProfile) -> SwapPlan:
        if self.once is not None:
            plan, self.once = self.once, None
            return plan
        facts = self._facts(profile)
        self.memory, self.host = facts.memory, facts.host
        plan = make_plan(profile, self.settings, facts)
        is_doubted = self._doubts is LinkDoubt.DUE
        if not plan.swapped_count or not plan.overlap or (self.link is not None and not is_doubted):
            return plan  # copies in place have no streams to choose, and cost what they cost
        self.link = self.machine.link(again=is_doubted)
        self._doubts = LinkDoubt.SETTLED if is_doubted else self._doubts
        return make_plan(profile, self.settings, replace(facts, link=self.link))

    def consider(self) -> SwapPlan:
        """What would be planned now for the same blocks, while they are on the device; measures nothing.

        Raises:
            PlanError: None fits.
        """
        assert self.profile is not None, "it follows a plan"
        return make_plan(self.profile, self.settings, self._facts(self.profile))

    @property
    def followed_by(self) -> SwapSession | None:
        """The session that adopts the plans; None if it is gone."""
        return None if self.session is None else self.session()

    @property
    def followed(self) -> SwapPlan | None:
        """The plan that the session follows, or followed last."""
        session = self.followed_by
        return None if session is None else session.plan

    @property
    def ratio(self) -> float:
        """Share of the available device memory that weights may fill: the tier's, or the user's."""
        if not self.settings.auto_hardware_tuning:
            return self.settings.bandwidth_target
        return tier_for(self.machine.spec, vram_threshold_percent=self.settings.vram_threshold_percent).bandwidth_target

    def begin(self, workload: Workload | None) -> bool:
        """A forward with this workload comes next; whether the run has had none like it."""
        self.workload = workload
        return self.history.begin(workload)

    def withdraw(self, workload: Workload | None) -> None:
        """This workload will not come after all: its memory does not count."""
        self.history.withdraw(workload)

    def end_run(self) -> None:
        """The run is over: what its forwards took is remembered for the next that has the like."""
        self.history.end_run()
        if self._doubts is LinkDoubt.OPEN:
            self._doubts = LinkDoubt.DUE

    def budget(self) -> MemoryBudget:
        """What a plan might spend now, our own weights on the device counted as free."""
        assert self.profile is not None, "a budget follows a plan"
        facts = self._facts(self.profile)
        limit = self.settings.vram_threshold_percent
        tuning = tune(facts.spec, facts.host, facts.link, vram_threshold_percent=limit)
        return budget_for(self.settings, facts, tuning)

    def learn(self, observed: Observation, plan: SwapPlan) -> None:
        """Keeps what traced forwards of the present workload have shown.

        Args:
            observed: What they have shown.
            plan: What they followed.
        """
        if observed.compute_ms is not None:
            self.history.of(self.workload).compute_ms = observed.compute_ms
        session = self.followed_by
        is_pinned = plan.pinned_bytes > 0 and not plan.staging_bytes and not (session and session.refusals)
        if observed.copied_bytes_per_s is not None and is_pinned:
            self._doubt(observed.copied_bytes_per_s, streams=plan.streams)

    def predict(self, plan: SwapPlan) -> ForwardTime | None:
        """A forward of the present workload with `plan` in virtual time, from what is known now; None where a speed or
        a duration is unknown.
        """
        assert self.profile is not None, "forwards follow a plan"
        timing = timing_for(self._facts(self.profile), streams=plan.streams)
        return predict(self.profile, plan.swapped, plan.slots, plan.tiers, timing)

    def learn_activations(self, nbytes: int) -> None:
        """A forward took this much above the weights at its peak."""
        self.history.learn_activations(self.workload, nbytes, is_automatic=self.settings.auto_hardware_tuning)

    def shrink(self) -> bool:
        """Memory has run out under the plan made last, in its adopt or in a forward: the next one is smaller.

        Returns:
            Whether it can be. Where card and host share one memory, swapping frees nothing.
        """
        assert self.made is not None, "memory runs out under a plan"
        if self.machine.spec.is_integrated:
            return False
        slots = self.made.slots if all(self.made.swapped) else None
        return self.history.shrink(self.workload, slots=slots, room_bytes=self.made.limit_bytes)

    def use(self, settings: SwapSettings) -> None:
        """The settings of the coming plans."""
        if settings.of_the_plan != self.settings.of_the_plan:
            self.history.forgive()
        self.settings = settings

    @property
    def largest_workload(self) -> Workload | None:
        """The workload of this run that takes most above the weights, as far as that is known."""
        return self.history.largest_workload

    @property
    def activations(self) -> Activations | None:
        """What the largest_workload forward of this run takes above the weights: measured, else expected."""
        return self.history.activations(self.largest_workload)

    @property
    def is_peak_known(self) -> bool:
        """Whether a forward of the present workload has shown its peak."""
        return self.history.of(self.workload).activation_bytes is not None

    def _doubt(self, speed: float, *, streams: int) -> None:
        """Copies ran at `speed`: if that contradicts the measurement, it counts until the link is measured again."""
        if self.link is None or self._doubts is not LinkDoubt.NONE:
            return
        if contradicts(self.link, streams=streams, seen_bytes_per_second=speed):
            measured = self.link.best(max_streams=streams)[1]
            said = f"copies ran at {speed / 1e9:.1f} GB/s where {measured / 1e9:.1f} GB/s had been measured"
            logger.info("%s; the link is measured again at the next run", said)
            self.link = replace(self.link, pinned=((streams, speed),))
            self._doubts = LinkDoubt.OPEN

    def _facts(self, profile: ModelProfile) -> Facts:
        session = self.followed_by
        compute_ms = self.history.of(self.workload).compute_ms
        locked = 0 if session is None else session.pinned_bytes
        memory, unused_cache = self.machine.memory(), self.machine.unused_cache_bytes()
        own = 0 if session is None else session.device_bytes
        return Facts(
            spec=self.machine.spec,
            memory=memory,
            host=self.machine.host(),
            link=self.link,
            # Another LoRA or another VACE model has other blocks.
            compute_ms=compute_ms if compute_ms is not None and len(compute_ms) == len(profile.blocks) else None,
            activations=self.activations,
            unused_cache_bytes=unused_cache,
            own_bytes=own,
            reserve_bytes=self.limits.reserve_bytes,
            host_held_bytes=profile.block_bytes,
            slab_bytes=0 if session is None else session.slab_bytes,
            staging_bytes=0 if session is None else session.staging_bytes,
            originals_stay=self.limits.originals_stay,
            locked_elsewhere_bytes=max(0, self.pins.used_bytes - locked),
            pin_limit_bytes=self.pins.limit_bytes,
            may_pin=self.limits.may_pin,
            may_overlap=self.limits.may_overlap,
            must_swap_all=self.limits.must_swap_all,
            most_slots=self.history.most_slots(memory.free_bytes + unused_cache + own),
        )
