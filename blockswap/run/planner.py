"""Planner: plans for one transformer at each adopt, from fresh readings and what earlier forwards measured."""

from __future__ import annotations

import logging
from dataclasses import replace

from ...hardware import DiskSpeed, LinkSpeed, contradicts, tier_for
from ...hardware.pinning import PinBudget
from ...hardware.units import format_speed
from ..device.backend import Backend
from ..errors import PlanError
from ..model.layout import ModelProfile
from ..plan.budget import make_budget
from ..plan.make_plan import RAN_OUT, Limits, Readings, make_plan, plan_inputs, predict, swapping_all, timing_of
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import Activations, HeldMemory, PlanInputs, SwapPlan
from ..settings import RANGES, SwapSettings
from .history import Workload, WorkloadHistory
from .machine import LastKnownReadings
from .replan import OVER_BUDGET, Observation
from .report import Hint, RunReport

logger = logging.getLogger(__name__)

WORTH_A_HINT = 0.02
"""Share of a forward that a hint must save: less is within the prediction's error."""

MOST_PERCENT = int(RANGES["vram_threshold_percent"].highest)


class Planner:
    """Plans for one transformer.

    Args:
        settings: The user's settings.
        machine: Reads the device and the host.
        pins: Host memory that all models of the process together may page-lock.
        limits: Limits from outside the settings, such as ComfyUI's flags.

    Attributes:
        history: What forwards of each workload measured.
        workload: The workload of the coming forwards; None if unknown.
        profile: The blocks of the last plan.
        readings: The readings of the last plan.
        made: The last plan that was made, applied or not.
        link: The link's speed, as measured or as copies in a run showed it; None if no plan has needed it.
        disk: The speed of reading the model's file; None if no plan has needed it.
        next_plan: Returned once, instead of a new plan; None to make one.
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
        self.disk: DiskSpeed | None = None
        self.next_plan: SwapPlan | None = None
        self._inputs: PlanInputs | None = None
        self._most_pinned_bytes: int | None = None
        self._room_bytes = 0
        self._activations_changed = False  # since the budget was last computed
        self._over_bytes = 0

    def __call__(self, profile: ModelProfile, held: HeldMemory) -> SwapPlan:
        """The plan for this moment. Measures link and disk if copies run on streams and their speed is unknown.

        Args:
            profile: The blocks and their bytes.
            held: Memory that they hold already; it counts as free.

        Raises:
            PlanError: None fits.
        """
        self.profile = profile
        plan, self.next_plan = self.next_plan, None
        if plan is None:
            self.readings = self._read()
            self._inputs = self._inputs_from(self.readings, profile, held)
            plan = make_plan(profile, self._inputs)
            # Without overlap there are no streams to choose, so that speeds decide nothing.
            if plan.overlap and self._measure(plan, profile):
                self.readings = replace(self.readings, link=self.link, disk=self.disk)
                self._inputs = self._inputs_from(self.readings, profile, held)
                plan = make_plan(profile, self._inputs)
            self._keep_room(self._inputs)
            self._over_bytes = 0
        self.made = plan
        return plan

    def everything_swapped(self, profile: ModelProfile, held: HeldMemory) -> SwapPlan:
        """The plan for a control model, which runs beside the transformer: of all its blocks, in two slots.

        Raises:
            PlanError: None fits.
        """
        inputs = self._inputs_from(self._read(), profile, held)
        unmeasured = replace(inputs, activations=None, timing=replace(inputs.timing, compute_ms=None))
        return make_plan(profile, replace(swapping_all(unmeasured, profile), slots=None))

    def consider(self, held: HeldMemory) -> SwapPlan:
        """The plan that would be made now for the same blocks, while they are placed; measures no speed.

        Raises:
            PlanError: None fits.
        """
        assert self.profile is not None, "a plan comes first"
        return make_plan(self.profile, self._inputs_from(self._read(), self.profile, held))

    def predict(self, plan: SwapPlan) -> ForwardTime | None:
        """A forward of the present workload with `plan`, in virtual time; None where a speed or time is unknown."""
        assert self.profile is not None, "a plan comes first"
        timing = replace(
            timing_of(self.link, streams=plan.streams, compute_ms=self._compute_ms(self.profile)),
            file_bytes_per_s=plan.file_bytes_per_s,
            is_staging_pinned=plan.pinned_bytes > 0,
        )
        return predict(self.profile, plan.swapped, plan.slots, plan.tiers, timing, overlap=plan.overlap)

    def is_over_budget(self, plan: SwapPlan, *, own_bytes: int) -> bool:
        """Whether the weights exceed the present budget, by another amount than when this was last true.

        Reads the card's memory once. Computes the budget only if there is less room than the last time, or if
        activations changed.

        Args:
            plan: The present plan.
            own_bytes: Device memory that its weights take now.
        """
        if plan.over_ceiling or self._inputs is None:
            return False
        memory, cache = self.machine.memory(), self.machine.unused_cache_bytes()
        tolerance = OVER_BUDGET * memory.total_bytes
        if not self._activations_changed and memory.free_bytes + cache + own_bytes >= self._room_bytes - tolerance:
            return False
        now = replace(
            self._inputs,
            device_total_bytes=memory.total_bytes,
            device_free_bytes=memory.free_bytes,
            unused_cache_bytes=cache,
            own_bytes=own_bytes,
            activations=self.activations,
        )
        self._keep_room(now)
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
        """Device memory that the largest workload of this run needs above the weights; None if unknown."""
        return self.history.activations(self.history.largest_workload)

    @property
    def has_run_out(self) -> bool:
        """Whether memory has run out in the present workload, in this run or an earlier one."""
        return self.history.of(self.workload).refusals > 0

    @property
    def is_peak_known(self) -> bool:
        """Whether the peak of the present workload has been measured."""
        return self.history.of(self.workload).activation_bytes is not None

    def is_tight(self, plan: SwapPlan, share: float) -> bool:
        """Whether a forward that has not been measured overflows the card if it needs this share more than expected."""
        if self._inputs is None or self.is_peak_known or not self.settings.auto_hardware_tuning:
            return False
        expected, room = self.activations, _room(self._inputs)
        return expected is not None and plan.device_bytes + (1 + share) * expected.nbytes > room

    def foresee(self, plan: SwapPlan, activation_bytes: int) -> SwapPlan | None:
        """A smaller plan where the present workload needs more than expected; None if `plan` has room for it.

        A lower figure changes nothing: operators of other libraries may hide what they allocate inside.

        Raises:
            PlanError: No plan has.
        """
        assert self._inputs is not None, "a plan has been made"
        assert self.profile is not None, "a plan has been made"
        expected = self.activations
        if expected is not None and activation_bytes <= expected.nbytes:
            return None
        self.history.of(self.workload).foreseen_bytes = activation_bytes
        self._activations_changed = True
        inputs = replace(self._inputs, activations=self.activations)
        if plan.device_bytes <= make_budget(inputs).weight_bytes:
            return None
        other = make_plan(self.profile, inputs)
        return other if other.device_bytes < plan.device_bytes else None

    def start(self, workload: Workload | None) -> bool:
        """Sets the workload of the next forward. Returns whether it is the run's first of this workload."""
        self.workload = workload
        is_new = self.history.start(workload)
        self._activations_changed |= is_new
        return is_new

    def withdraw(self, workload: Workload | None) -> None:
        """Forgets a workload that was started: the forward will have another one."""
        self.history.withdraw(workload)
        self._activations_changed = True

    def learn(self, observation: Observation, plan: SwapPlan, *, is_pinned: bool) -> None:
        """Keeps what timed forwards of the present workload measured.

        Args:
            observation: Their times and speeds.
            plan: The plan that was in place.
            is_pinned: Whether all their copies came from page-locked memory.
        """
        if observation.compute_ms is not None:
            self.history.of(self.workload).compute_ms = observation.compute_ms
        speed = observation.copied_bytes_per_s
        if speed is None or not is_pinned or self.link is None:
            return
        if contradicts(self.link, streams=plan.streams, seen_bytes_per_second=speed):
            measured = self.link.best(max_streams=plan.streams)[1]
            logger.info(
                "copies ran at %s, not at the %s measured before; plans use the new speed from now on",
                format_speed(speed),
                format_speed(measured),
            )
            self.link = replace(self.link, pinned=((plan.streams, speed),))

    def learn_activations(self, nbytes: int) -> None:
        """Keeps the peak of a forward of the present workload, in bytes above the weights."""
        self._activations_changed = True
        self.history.learn_activations(self.workload, nbytes, is_automatic=self.settings.auto_hardware_tuning)

    def hint(self, held: HeldMemory, report: RunReport) -> Hint | None:
        """The vram_threshold_percent that would save the most time, by plans with what was measured; None where none
        saves much.

        Args:
            held: Memory that the blocks hold.
            report: What was measured under the present plan.
        """
        profile, measured, present, activations = self.profile, report.measured, report.plan, self.activations
        if profile is None or activations is None or not activations.is_measured or measured.forward_ms is None:
            return None
        # Where memory has run out, or others move weights, what was measured promises nothing.
        has_run_out = self.history.of(self.history.largest_workload).refusals > 0
        now = None if has_run_out or measured.others else self.predict(present)
        least = 0.0 if now is None else WORTH_A_HINT * now.elapsed
        if now is None or now.stall <= least or not self.settings.auto_hardware_tuning:
            return None
        readings, found = self._read(), None
        for percent in range(int(self.settings.vram_threshold_percent) // 5 * 5 + 5, MOST_PERCENT + 1, 5):
            settings = replace(self.settings, vram_threshold_percent=float(percent))
            try:
                other = make_plan(profile, self._inputs_from(readings, profile, held, settings))
            except PlanError:
                break
            saved = 0.0 if other.predicted is None else now.elapsed - other.predicted.elapsed
            blocks = present.streaming_count - other.streaming_count
            if blocks > 0 and saved > least:
                least = saved + WORTH_A_HINT * now.elapsed  # a higher one must save more
                found = percent, blocks, saved
        if found is None:
            return None
        percent, blocks, saved = found
        free = max(0, present.limit_bytes - present.device_bytes - activations.nbytes)
        in_each, each = (measured.forwards / measured.steps, "step") if measured.steps else (1.0, "pass")
        return Hint(free_bytes=free, percent=percent, blocks=blocks, saved_ms=in_each * saved, each=each)

    def shrink(self) -> bool:
        """Makes the next plan smaller, after memory ran out under the last one, in its adopt or in a forward.

        Returns:
            Whether there is a smaller plan. Where card and host share one memory, swapping frees nothing.
        """
        if self.made is None or self.machine.spec.is_integrated:
            return False
        slots = self.made.slots if all(self.made.swapped) else None
        return self.history.shrink(self.workload, slots=slots, room_bytes=self.made.limit_bytes)

    def lock_less(self) -> bool:
        """Makes the coming plans page-lock at most half of what the last one does, the second time nothing. Returns
        False if the last one locks nothing.
        """
        if self.made is None or not self.made.pinned_bytes:
            return False
        self._most_pinned_bytes = self.made.pinned_bytes // 2 if self._most_pinned_bytes is None else 0
        return True

    def use(self, settings: SwapSettings) -> None:
        """Sets the settings of the coming plans."""
        if settings.of_the_plan != self.settings.of_the_plan:
            self.history.forgive()
            self._most_pinned_bytes = None
        self.settings = settings

    def _read(self) -> Readings:
        return replace(self.machine.read(), link=self.link, disk=self.disk)

    def _measure(self, plan: SwapPlan, profile: ModelProfile) -> bool:
        """Measures the speeds that decide over `plan` and are unknown. Returns whether there were any."""
        needs_link = plan.swapped_count > 0 and self.link is None
        needs_disk = plan.file_bytes > 0 and self.disk is None and bool(profile.files)
        if needs_link:
            self.link = self.machine.link()
        if needs_disk:
            self.disk = self.machine.disk(profile.files[0])
        return needs_link or needs_disk

    def _inputs_from(
        self, readings: Readings, profile: ModelProfile, held: HeldMemory, settings: SwapSettings | None = None
    ) -> PlanInputs:
        """The inputs of a plan: readings, our own memory as free, and what is known of the blocks."""
        settings = settings or self.settings
        inputs = plan_inputs(profile, settings, readings, self.limits, own_host_bytes=held.added_bytes)
        locked_elsewhere = max(0, self.pins.used_bytes - held.pinned_bytes)
        left = min(inputs.pin_budget_bytes, self.pins.limit_bytes) - locked_elsewhere
        if self._most_pinned_bytes is not None:
            left = min(left, self._most_pinned_bytes)
        inputs = replace(
            inputs,
            own_bytes=held.device_bytes,
            pin_budget_bytes=max(0, left),
            activations=self.activations,
            timing=replace(inputs.timing, compute_ms=self._compute_ms(profile)),
        )
        most_slots = self.history.most_slots(_room(inputs))
        if most_slots is None:
            return inputs
        return replace(swapping_all(inputs, profile), slots=most_slots if inputs.overlap else 1, why=RAN_OUT)

    def _compute_ms(self, profile: ModelProfile) -> tuple[float, ...] | None:
        """Duration of each block; None if unknown, or if there are other blocks now, as with another VACE model."""
        compute_ms = self.history.of(self.workload).compute_ms
        return compute_ms if compute_ms is not None and len(compute_ms) == len(profile.blocks) else None

    def _keep_room(self, inputs: PlanInputs) -> None:
        self._room_bytes, self._activations_changed = _room(inputs), False


def _room(inputs: PlanInputs) -> int:
    """Device memory for all of ours: weights and activations."""
    return inputs.device_free_bytes + inputs.unused_cache_bytes + inputs.own_bytes


def limits_within(limits: Limits, backend: Backend) -> Limits:
    """The limits, and what the device itself cannot do."""
    return replace(
        limits,
        overlap=limits.overlap and backend.overlap,
        pin=limits.pin and backend.registrar is not None,
    )
