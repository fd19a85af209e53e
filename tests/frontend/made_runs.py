"""Simulated runs for the pictures: the progress that Python would send of a run on a given card."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import gguf
from checkpoint_files import Shapes, wan_shapes
from facts import Facts, make_plan
from shown import ran
from wanvideo_enhanced_blockswap.blockswap.model.activations import activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile, TensorInfo, profile_tensors
from wanvideo_enhanced_blockswap.blockswap.model.wan import block_flops, tokens_for
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.run.progress import (
    AdoptFigures,
    MemoryUse,
    Phase,
    Progress,
)
from wanvideo_enhanced_blockswap.blockswap.run.report import Step
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

LORA_RANK = 64

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
    """

    card: str
    vram_gib: int
    rates: str
    model: CheckpointProfile
    video: tuple[int, int, int] = (832, 480, 81)
    settings: SwapSettings = field(default_factory=SwapSettings)


def fp8(*, channels: int = 16, vace: int = 0) -> CheckpointProfile:
    """Wan 14B with the blocks' matrices in fp8."""
    shapes = wan_shapes(5120, 13824, 40, vace, channels=channels)
    matrices = {name for name, shape in shapes.items() if _is_matrix(name, shape)}
    stored = {
        name: TensorInfo(shape, "F8_E4M3", math.prod(shape))
        if name in matrices
        else TensorInfo(shape, "BF16", 2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    return profile_tensors("Wan 14B in fp8", stored)


def gguf_with_lora() -> CheckpointProfile:
    """Wan 14B in Q4_K_M with a LoRA that is not merged."""
    shapes = wan_shapes(5120, 13824, 40)
    stored = {name: _quantised(name, shape) for name, shape in shapes.items()}
    return profile_tensors("Wan 14B in Q4_K_M", stored | _lora(shapes))


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return "blocks." in name and len(shape) == 2


def _quantised(name: str, shape: tuple[int, ...]) -> TensorInfo:
    """Q4_K_M stores what errors hurt most, values and the second feed-forward layer, in Q6_K."""
    kind = "F32"
    if _is_matrix(name, shape):
        kind = "Q6_K" if name.endswith(("attn.v.weight", "ffn.2.weight")) else "Q4_K"
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return TensorInfo(shape, kind, math.prod(shape) // elements * nbytes)


def _lora(shapes: Shapes) -> dict[str, TensorInfo]:
    """For each matrix of a block, one from its inputs and one to its outputs, in bf16."""
    found = {}
    for name, shape in shapes.items():
        if _is_matrix(name, shape):
            outputs, inputs = shape
            found[f"{name}.lora_A"] = TensorInfo((LORA_RANK, inputs), "BF16", 2 * LORA_RANK * inputs)
            found[f"{name}.lora_B"] = TensorInfo((outputs, LORA_RANK), "BF16", 2 * LORA_RANK * outputs)
    return found


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
        self.card = case.card
        self.plan: SwapPlan = make_plan(model.model, case.settings, facts)
        assert self.plan.predicted is not None, "rates, link and video are known"
        self._forward = self.plan.predicted
        self._sizes = [block.nbytes for block in model.model.blocks]
        self._memory = MemoryUse(
            total=total,
            other=total - self.plan.limit_bytes,
            residents=self.plan.resident_bytes,
            window=self.plan.window_bytes,
            ceiling=int(case.settings.vram_threshold_percent / 100 * total),
            activations=expected,
        )

    def adopting(self, blocks: int) -> Progress:
        """The first `blocks` blocks are placed."""
        placed = list(itertools.accumulate(self._sizes, initial=0))
        locked = sum(self.plan.swapped[:blocks]) / max(1, self.plan.swapped_count)
        adopt = AdoptFigures(placed=placed[blocks], all=placed[-1], pinned=int(locked * self.plan.pinned_bytes))
        return Progress(phase=Phase.ADOPTING, memory=self._memory, plan=self.plan, predicted=self._forward, adopt=adopt)

    def sampling(self, forwards: int) -> Progress:
        """So many forwards are over."""
        return self._running(Phase.SAMPLING, forwards)

    def done(self, forwards: int) -> Progress:
        """It ended after so many forwards."""
        return self._running(Phase.DONE, forwards)

    def _running(self, phase: Phase, forwards: int) -> Progress:
        run = ran(
            forwards,
            forwards * self.plan.streamed_bytes,
            forward_ms=self._forward.elapsed,
            stall_ms=self._forward.stall,
            copy_bytes_per_s=LINK_BYTES_PER_S if self.plan.streamed_bytes else None,
        )
        run = replace(run, step=Step(math.ceil(forwards / PASSES), STEPS))
        return Progress(phase=phase, memory=self._memory, plan=self.plan, predicted=self._forward, run=run)
