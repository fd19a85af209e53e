"""A machine and what is known of a model, as tests write them down, made into the inputs of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan import make_plan as planning
from wanvideo_enhanced_blockswap.blockswap.plan.budget import MemoryBudget, make_budget
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Readings
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, PlanInputs, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware.records import DeviceMemory, DeviceSpec, DiskSpeed, HostMemory, LinkSpeed


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known when a plan is made; names as in PlanInputs.

    Attributes:
        added_bytes: What slabs and staging slabs in place have added to host memory.
        locked_elsewhere_bytes: Host memory that other models have page-locked.
        pin_limit_bytes: What all models may page-lock together; None leaves it to the host's figure.
    """

    spec: DeviceSpec
    memory: DeviceMemory
    host: HostMemory
    link: LinkSpeed | None = None
    disk: DiskSpeed | None = None
    compute_ms: tuple[float, ...] | None = None
    activations: Activations | None = None
    own_bytes: int = 0
    added_bytes: int = 0
    locked_elsewhere_bytes: int = 0
    pin_limit_bytes: int | None = None

    def inputs(self, profile: ModelProfile, settings: SwapSettings) -> PlanInputs:
        readings = Readings(spec=self.spec, memory=self.memory, host=self.host, link=self.link, disk=self.disk)
        inputs = planning.plan_inputs(profile, settings, readings, own_host_bytes=self.added_bytes)
        pins = inputs.pin_budget_bytes if self.pin_limit_bytes is None else self.pin_limit_bytes
        return replace(
            inputs,
            own_bytes=self.own_bytes,
            pin_budget_bytes=max(0, min(inputs.pin_budget_bytes, pins) - self.locked_elsewhere_bytes),
            activations=self.activations,
            timing=replace(inputs.timing, compute_ms=self.compute_ms),
        )


def make_plan(profile: ModelProfile, settings: SwapSettings, facts: Facts) -> SwapPlan:
    return planning.make_plan(profile, facts.inputs(profile, settings))


def budget_of(profile: ModelProfile, settings: SwapSettings, facts: Facts) -> MemoryBudget:
    return make_budget(facts.inputs(profile, settings))
