"""Simulated runs for the pictures: the progress that Python would send of a run on a given card."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from checkpoint_files import wan_shapes
from facts import Facts, make_plan
from shown import ran
from wanvideo_enhanced_blockswap.blockswap.model.activations import activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile, TensorInfo, profile_tensors
from wanvideo_enhanced_blockswap.blockswap.model.wan import block_flops, tokens_for
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.progress import (
    MemoryUse,
    Phase,
    Progress,
)
from wanvideo_enhanced_blockswap.blockswap.run.report import Hint, Step
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    DeviceMemory,
    DeviceSpec,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
)
from wanvideo_enhanced_blockswap.hardware.cards import find_gpu

IN_USE_BYTES = GIB
"""Of the card, by the desktop and the CUDA context: as the example on the plan's help page has it."""

LINK_BYTES_PER_S = 12e9
"""What page-locked copies reach over PCIe 3.0 x16, or 4.0 x8; as in the README's example for `plan`."""

STEPS, PASSES = 30, 2
"""Steps of a run, and passes of the model in each, as with CFG."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run, and where.

    Attributes:
        card: Its name, as the driver gives it.
        vram_gib: Its memory.
        rates: The known GPU whose assumed rates it is given.
        model: One of the functions below gives it.
        video: Width, height and frames.
        settings: Of the swap node.
        steps: Of the sampler.
    """

    card: str
    vram_gib: int
    rates: str
    model: CheckpointProfile
    video: tuple[int, int, int] = (832, 480, 81)
    settings: SwapSettings = field(default_factory=SwapSettings)
    steps: int = STEPS


def fp8(*, channels: int = 16) -> CheckpointProfile:
    """Wan 14B with the blocks' matrices in fp8."""
    shapes = wan_shapes(5120, 13824, 40, channels=channels)
    matrices = {name for name, shape in shapes.items() if _is_matrix(name, shape)}
    stored = {
        name: TensorInfo(shape, "F8_E4M3", math.prod(shape))
        if name in matrices
        else TensorInfo(shape, "BF16", 2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    return profile_tensors("Wan 14B in fp8", stored)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return "blocks." in name and len(shape) == 2


class MadeRun:
    """A run of a case, with all that is measured taken from the plan's own forward in virtual time.

    Attributes:
        card: Its name, as the plan's text has it.
        plan: The plan that Python makes for it.
    """

    def __init__(self, case: Case) -> None:
        rates, model = find_gpu(case.rates), case.model
        tokens = tokens_for(model.architecture, *case.video)
        linear, attention = block_flops(model.architecture, tokens)
        block_ms = rates.compute_ms(linear, attention)
        assert block_ms is not None, "the table has rates for this GPU"
        expected = activation_bytes(model.architecture, tokens, model.forward_options)
        total = case.vram_gib * GIB
        spec = DeviceSpec(case.card, Vendor.NVIDIA, "cuda:0", None, None, None, False, None, total, None)
        facts = Facts(
            spec=spec,
            memory=DeviceMemory(total, total - IN_USE_BYTES - model.model.other_bytes, "made up"),
            host=HostMemory(64 * GIB, 44 * GIB, None, None, HostPlatform.LINUX),
            link=LinkSpeed(((1, LINK_BYTES_PER_S),), None),
            compute_ms=(block_ms,) * len(model.model.blocks),
            activations=Activations(nbytes=expected, is_measured=False),
        )
        self.card, self.steps = case.card, case.steps
        self.plan: SwapPlan = make_plan(model.model, case.settings, facts)
        assert self.plan.predicted is not None, "rates, link and video are known"
        self._forward = self.plan.predicted
        self._memory = MemoryUse(
            total=total,
            other=total - self.plan.limit_bytes,
            residents=self.plan.resident_bytes,
            window=self.plan.window_bytes,
            ceiling=int(case.settings.vram_threshold_percent / 100 * total),
            activations=expected,
        )

    def sampling(self, steps: int) -> Progress:
        """So many steps are over."""
        return self._running(Phase.SAMPLING, steps)

    def done(self, steps: int, hint: Hint | None = None) -> Progress:
        """It ended after so many steps."""
        return self._running(Phase.DONE, steps, hint)

    def _running(self, phase: Phase, steps: int, hint: Hint | None = None) -> Progress:
        forwards = steps * PASSES
        run = ran(
            forwards,
            forwards * self.plan.streamed_bytes,
            forward_ms=self._forward.elapsed,
            stall_ms=self._forward.stall,
        )
        run = replace(run, step=Step(steps, self.steps), steps=steps, forwards_per_step=PASSES)
        return Progress(phase=phase, memory=self._memory, plan=self.plan, predicted=self._forward, run=run, hint=hint)


def twelve_gib() -> MadeRun:
    """Image to video on a card of 12 GB: the example of the README and of the help pages."""
    return MadeRun(Case(card="NVIDIA GeForce RTX 3060", vram_gib=12, rates="RTX 3060 12GB", model=fp8(channels=36)))
