"""Planner: makes a transformer's plan at each adopt from fresh readings and from what earlier forwards have shown."""

from __future__ import annotations

import logging
from dataclasses import replace

from ...hardware import LinkSpeed, contradicts, tier_for
from ...hardware.pinning import PinBudget
from ..model.layout import ModelProfile
from ..plan.budget import make_budget
from ..plan.make_plan import RAN_OUT, Limits, Readings, make_plan, plan_inputs, predict, swapping_all, timing_of
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import Activations, HeldMemory, PlanInputs, SwapPlan
from ..settings import SwapSettings
from .history import Workload, WorkloadHistory
from .machine import LastKnownReadings
from .replan import OVER_BUDGET, Observation

logger = logging.getLogger(__name__)


class Planner:
    """Plans for one transformer.

    Args:
        settings: What the user asked for.
        machine: Where readings come from.
        pins: What all models of the process may page-lock.
        limits: What is set from outside of the settings.

    Attributes:
        history: What forwards have shown.
        workload: What the coming forwards do; None if it is not known.
        profile: What was planned for last.
        readings: The machine as it was for the last plan.
        made: The plan that was made last, followed or not.
        link: The link as measured, or as a run has shown it to be; None if no plan has needed it.
        once: The next plan, in place of one that would be made; used up by it.
    """

    def __init__(self, settings: SwapSettings, machine: LastKnownReadings, pins: PinBudget, limits: Limits) -> None:
        self.settings = settings
        self.machine = machine
        self.pins = pins
        self.limits = limits
        self.history = WorkloadHistory()
        self.workload: Workload | None = None
        self.profile: ModelProfile | None = None
        self.readings: Readings | None = None
        self.made: SwapPlan | None = None
        self.link: LinkSpeed | None = None
        self.once: SwapPlan | None = None
        self._inputs: PlanInputs | None = None
        self._room_bytes = 0
        self._may_take_other = False  # activations may have changed since the budget was last worked out
        self._over_bytes = 0

    def __call__(self, profile: ModelProfile, held: HeldMemory) -> SwapPlan:
        """The plan for this moment; measures the link if copies have streams and it is not known.

        Args:
            profile: The blocks and their bytes.
            held: What of them is placed already; it counts as free.

        Raises:
            PlanError: None fits.
        """
        self.profile = profile
        plan, self.once = self.once, None
        if plan is None:
            self.readings = self.machine.read(self.link)
            self._inputs = self._inputs_from(self.readings, profile, held)
            plan = make_plan(profile, self._inputs)
            # Copies in place have no streams to choose, and cost what they cost.
            if plan.swapped_count and plan.overlap and self.link is None:
                self.link = self.machine.link()
                self.readings = replace(self.readings, link=self.link)
                self._inputs = self._inputs_from(self.readings, profile, held)
                plan = make_plan(profile, self._inputs)
            self._notice(self._inputs)
            self._over_bytes = 0
        self.made = plan
        return plan

    def consider(self, held: HeldMemory) -> SwapPlan:
        """What would be planned now for the same blocks, while they are on the device; measures nothing.

        Raises:
            PlanError: None fits.
        """
        assert self.profile is not None, "it follows a plan"
        return make_plan(self.profile, self._inputs_from(self.machine.read(self.link), self.profile, held))

    def predict(self, plan: SwapPlan) -> ForwardTime | None:
        """A forward of the present workload with `plan` in virtual time, from what is known; reads nothing. None where
        a speed or a duration is unknown.
        """
        assert self.profile is not None, "forwards follow a plan"
        timing = timing_of(self.link, streams=plan.streams, compute_ms=self._compute_ms(self.profile))
        return predict(self.profile, plan.swapped, plan.slots, plan.tiers, timing)

    def is_over_budget(self, plan: SwapPlan, *, own_bytes: int) -> bool:
        """Whether the weights exceed the present budget by an amount that has not been seen before.

        Takes one reading of the card; the budget is worked out only if there is less room than when it last was, or
        forwards have taken more.

        Args:
            plan: The plan that is followed.
            own_bytes: Device memory that its weights take now.
        """
        if plan.over_ceiling or self._inputs is None:
            return False
        memory, cache = self.machine.memory(), self.machine.unused_cache_bytes()
        tolerance = OVER_BUDGET * memory.total_bytes
        if not self._may_take_other and memory.free_bytes + cache + own_bytes >= self._room_bytes - tolerance:
            return False
        now = replace(
            self._inputs,
            device_total_bytes=memory.total_bytes,
            device_free_bytes=memory.free_bytes,
            unused_cache_bytes=cache,
            own_bytes=own_bytes,
            activations=self.activations,
        )
        self._notice(now)
        over = plan.device_bytes - make_budget(now).weight_bytes
        if over <= tolerance or abs(over - self._over_bytes) <= tolerance:
            return False
        self._over_bytes = over
        return True

    @property
    def ratio(self) -> float:
        """Share of the available device memory that weights may fill: the tier's, or the user's."""
        if not self.settings.auto_hardware_tuning:
            return self.settings.bandwidth_target
        return tier_for(self.machine.spec, vram_threshold_percent=self.settings.vram_threshold_percent).bandwidth_target

    @property
    def activations(self) -> Activations | None:
        """What the forwards of this run take above the weights at most: measured, else expected."""
        return self.history.activations(self.history.largest_workload)

    @property
    def is_peak_known(self) -> bool:
        """Whether a forward of the present workload has shown its peak."""
        return self.history.of(self.workload).activation_bytes is not None

    def start(self, workload: Workload | None) -> bool:
        """A forward with this workload comes next; whether the run has had none like it."""
        self.workload = workload
        is_new = self.history.start(workload)
        self._may_take_other |= is_new
        return is_new

    def withdraw(self, workload: Workload | None) -> None:
        """This workload will not come after all: its memory does not count."""
        self.history.withdraw(workload)
        self._may_take_other = True

    def learn(self, observation: Observation, plan: SwapPlan, *, is_pinned: bool) -> None:
        """Keeps what traced forwards of the present workload have shown.

        Args:
            observation: What they have shown.
            plan: What they followed.
            is_pinned: All their copies came from page-locked memory.
        """
        if observation.compute_ms is not None:
            self.history.of(self.workload).compute_ms = observation.compute_ms
        speed = observation.copied_bytes_per_s
        if speed is None or not is_pinned or self.link is None:
            return
        if contradicts(self.link, streams=plan.streams, seen_bytes_per_second=speed):
            measured = self.link.best(max_streams=plan.streams)[1]
            logger.info(
                "copies ran at %.1f GB/s, %.1f GB/s had been measured: plans use the speed seen from here on",
                speed / 1e9,
                measured / 1e9,
            )
            self.link = replace(self.link, pinned=((plan.streams, speed),))

    def learn_activations(self, nbytes: int) -> None:
        """A forward took this much above the weights at its peak."""
        self._may_take_other = True
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

    def _inputs_from(self, readings: Readings, profile: ModelProfile, held: HeldMemory) -> PlanInputs:
        """Readings, with what is known of the blocks; our own memory counts as free."""
        inputs = plan_inputs(profile, self.settings, readings, self.limits)
        locked_elsewhere = max(0, self.pins.used_bytes - held.pinned_bytes)
        inputs = replace(
            inputs,
            own_bytes=held.device_bytes,
            host_held_bytes=profile.block_bytes,
            slab_bytes=held.slab_bytes,
            staging_bytes=held.staging_bytes,
            pin_budget_bytes=max(0, min(inputs.pin_budget_bytes, self.pins.limit_bytes) - locked_elsewhere),
            activations=self.activations,
            timing=replace(inputs.timing, compute_ms=self._compute_ms(profile)),
        )
        most_slots = self.history.most_slots(_room(inputs))
        if most_slots is None:
            return inputs
        return replace(swapping_all(inputs, profile), slots=most_slots if inputs.overlap else 1, why=RAN_OUT)

    def _compute_ms(self, profile: ModelProfile) -> tuple[float, ...] | None:
        """Duration of each block; another LoRA or another VACE model has other blocks."""
        compute_ms = self.history.of(self.workload).compute_ms
        return compute_ms if compute_ms is not None and len(compute_ms) == len(profile.blocks) else None

    def _notice(self, inputs: PlanInputs) -> None:
        self._room_bytes, self._may_take_other = _room(inputs), False


def _room(inputs: PlanInputs) -> int:
    """Device memory that there is for all of ours."""
    return inputs.device_free_bytes + inputs.unused_cache_bytes + inputs.own_bytes
