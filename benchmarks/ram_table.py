"""What a plan takes of RAM, and how long a step takes, for Wan 14B on a described machine; nothing is measured.

python -m benchmarks.ram_table > docs/ram.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.model.activations import activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile
from wanvideo_enhanced_blockswap.blockswap.model.wan import block_flops, tokens_for
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Readings, make_plan, plan_inputs, predict
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, PlanInputs, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.commands.common_models import CommonModel
from wanvideo_enhanced_blockswap.commands.plan import once_loaded
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
)
from wanvideo_enhanced_blockswap.hardware.cards import find_gpu

PAGE = """\
# RAM

What plans take of RAM, and what a step takes, for Wan 14B at {shape} on one machine: RTX 3060 12 GB, Linux, of
whose RAM the system and other programs use 4 GB. The link has 25.3 GB/s; the disk reads {cold} GB/s, and the system's
cache of files {warm} GB/s. **Computed, not measured**, by `python -m benchmarks.ram_table`, with the block times that
`plan` assumes for this GPU. A test compares this page with the plans. 1 GB is 1024³ bytes; only speeds count 10⁹.

{table}

- *streaming*: blocks that do not stay on the GPU. *Locked RAM*: fixed in place for fast copies. *Other RAM*: what else
  the system cannot drop. With two experts it is that of both. If RAM is too small for both, the second takes over the
  memory of the first; of two GGUF experts, RAM then holds one at a time.
- *read*: what every pass reads from the model's file; with a *c*, from the system's cache.
- *step*: two passes of the model, as with CFG. The *first* also reads from the disk what stays on the GPU or in RAM.
  It takes at most this long, because blocks are read while others compute. A GGUF file was read by the loader before.
- *of all in RAM*: the step over that of the same plan with all streaming blocks in locked RAM.
- A plan adds at most the available RAM less 2 GB, or less a tenth of all RAM if that is more. A GGUF model is in RAM
  as a whole, because the loader copies every weight.

A slower disk costs more, and so does a faster GPU: a step cannot be shorter than the time in which its passes read
what they read. `python -m wanvideo_enhanced_blockswap plan` computes that for other machines (`--ram`,
`--available-ram`, `--disk`, `--gpu`).
"""

SHAPE = (832, 480, 81)
RAM_GIB = (8, 16, 32, 64)
OTHERS_BYTES = 4 * GIB
VRAM = DeviceMemory(int(11.76 * GIB), int(11.24 * GIB), "described")
LINK = LinkSpeed(((1, 25.3e9),), 8e9, 11e9)
DISK = DiskSpeed(3.5e9, 7e9)
GPU = find_gpu("RTX 3060 12GB")
SPEC = DeviceSpec("NVIDIA GeForce RTX 3060", Vendor.NVIDIA, "cuda:0", compute_units=28, is_integrated=False)
MUCH = 1 << 50
FORWARDS_PER_STEP = 2
BLOCKS = 40
KINDS = {"fp8": "fp8", "fp16": "fp16", "GGUF Q4_K_M": "Q4_K_M", "GGUF Q8_0": "Q8_0"}
"""How the blocks' matrices are stored, and its key in `common_models.BITS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model on the machine with so much RAM; `plan` is None if the weights do not fit into RAM.

    Attributes:
        plan: The plan of the model, or of the second expert.
        pinned_bytes: Page-locked memory, of both experts if both keep theirs.
        other_bytes: Other memory that the system cannot drop.
        first_ms: The first step.
        step_ms: Every other step.
        of_pinned: That over a step with all streamed blocks page-locked.
    """

    ram_gib: int
    kind: str
    experts: int
    plan: SwapPlan | None = None
    pinned_bytes: int = 0
    other_bytes: int = 0
    first_ms: float = 0.0
    step_ms: float = 0.0
    of_pinned: float = 0.0


def checkpoint(kind: str) -> CheckpointProfile:
    """Wan 2.1 14B, text to video, with the blocks' matrices in `kind`; either expert of Wan 2.2 has the same sizes."""
    return CommonModel(name=kind, kind=KINDS[kind]).profile()


def rows() -> Iterator[Row]:
    """All rows of the table."""
    for ram_gib in RAM_GIB:
        for experts in (1, 2):
            for kind in KINDS:
                yield row(ram_gib, kind, experts)


def row(ram_gib: int, kind: str, experts: int) -> Row:
    """One row of the table. Of two GGUF experts that do not fit together, RAM holds one at a time: the wrapper drops
    the weights of the first after its run, and the second's are copied when its slabs have gone.
    """
    found = checkpoint(kind)
    together = _row(found, ram_gib, kind, experts)
    if together.plan is not None or experts == 1 or not found.model.anonymous_bytes:
        return together
    return replace(_row(found, ram_gib, kind, 1), experts=experts)


def _row(found: CheckpointProfile, ram_gib: int, kind: str, experts: int) -> Row:
    model = found.model
    host = HostMemory(ram_gib * GIB, ram_gib * GIB - OTHERS_BYTES, None, None, HostPlatform.LINUX)
    memory = replace(VRAM, free_bytes=VRAM.free_bytes - model.other_bytes)
    readings = Readings(spec=SPEC, memory=memory, host=host, link=LINK, disk=DISK)
    try:
        for _ in range(experts):
            readings = once_loaded(model, readings)
        inputs = _inputs(found, readings)
        plan = make_plan(model, inputs)
    except PlanError:
        return Row(ram_gib=ram_gib, kind=kind, experts=experts)
    both = [plan] * experts
    if experts > 1:
        available = readings.host.available_bytes - plan.added_bytes
        beside = _inputs(found, replace(readings, host=replace(readings.host, available_bytes=available)))
        second = make_plan(model, replace(beside, pin_budget_bytes=beside.pin_budget_bytes - plan.pinned_bytes))
        # If RAM is short for both, the second expert takes over the slabs of the first, or their locks.
        both = [plan, second] if (second.tiers, second.pinned_bytes) == (plan.tiers, plan.pinned_bytes) else [plan]
    much = replace(inputs, host_available_bytes=MUCH, host_room_bytes=MUCH, pin_budget_bytes=MUCH)
    step_ms, cold_ms = _forward_ms(model, plan, inputs), _forward_ms(model, plan, inputs, cold=True)
    placed, speed = model.block_bytes - plan.file_bytes, LINK.host_copy if model.anonymous_bytes else DISK.cold
    assert speed is not None
    pinned = sum(each.pinned_bytes for each in both)
    taken = experts * model.anonymous_bytes + sum(each.added_bytes for each in both)
    return Row(
        ram_gib=ram_gib,
        kind=kind,
        experts=experts,
        plan=plan,
        pinned_bytes=pinned,
        other_bytes=max(0, taken - pinned),
        first_ms=placed / speed * 1e3 + cold_ms + (FORWARDS_PER_STEP - 1) * step_ms,
        step_ms=FORWARDS_PER_STEP * step_ms,
        of_pinned=step_ms / _forward_ms(model, make_plan(model, much), much),
    )


def block_ms(found: CheckpointProfile) -> float:
    """Duration of a block at the table's shape, with the rates that are assumed for the GPU."""
    linear, attention = block_flops(found.architecture, tokens_for(found.architecture, *SHAPE))
    found_ms = GPU.compute_ms(linear, attention)
    assert found_ms is not None, "the table has rates for this GPU"
    return found_ms


def _inputs(found: CheckpointProfile, readings: Readings) -> PlanInputs:
    tokens = tokens_for(found.architecture, *SHAPE)
    inputs = plan_inputs(found.model, SwapSettings(), readings)
    return replace(
        inputs,
        activations=Activations(
            nbytes=activation_bytes(found.architecture, tokens, found.forward_options), is_measured=False
        ),
        timing=replace(inputs.timing, compute_ms=(block_ms(found),) * BLOCKS),
    )


def _forward_ms(model: ModelProfile, plan: SwapPlan, inputs: PlanInputs, *, cold: bool = False) -> float:
    speed = DISK.cold if cold else plan.file_bytes_per_s
    timing = replace(inputs.timing, file_bytes_per_s=speed, is_staging_pinned=plan.pinned_bytes > 0)
    forward = predict(model, plan.swapped, plan.slots, plan.tiers, timing, overlap=plan.overlap)
    assert forward is not None, "all speeds are known"
    return forward.elapsed


def page() -> str:
    """The text of docs/ram.md."""
    heads = ["RAM", "model", "streaming", "locked RAM", "other RAM", "read", "first step", "step", "of all in RAM"]
    lines = [heads, ["---:", "---", *["---:"] * 7]]
    for each in rows():
        model = f"Wan {'2.1' if each.experts == 1 else '2.2, two experts,'} 14B {each.kind}"
        cells = [f"{each.ram_gib} GB", model]
        if each.plan is None:
            lines.append([*cells, "does not fit into RAM", *[""] * 6])
            continue
        reads = "-" if not each.plan.file_bytes else f"{each.plan.file_bytes / GIB:.1f} GB"
        reads += " c" if each.plan.file_bytes and each.plan.file_bytes_per_s == DISK.warm else ""
        cells += [f"{each.plan.swapped_count}/{BLOCKS}"]
        cells += [f"{each.pinned_bytes / GIB:.1f} GB", f"{each.other_bytes / GIB:.1f} GB", reads]
        cells += [f"{each.first_ms / 1e3:.1f} s", f"{each.step_ms / 1e3:.1f} s", f"{each.of_pinned:.3f}"]
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    assert DISK.cold is not None
    assert DISK.warm is not None
    shape = "x".join(map(str, SHAPE))
    return PAGE.format(shape=shape, cold=DISK.cold / 1e9, warm=round(DISK.warm / 1e9), table=table)


if __name__ == "__main__":
    sys.stdout.write(page())
