"""What a run's figures must be, from its plans and from the run without swapping; plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from rig_variants import BLOCKS, SLG_SKIPS, VACE_BLOCKS, VARIANTS

SHARE = 0.01
"""Share of the bytes to the device that is not accounted for: what GGUF stores in fp32 and runs in bf16."""

COUNTER_BYTES = 4096
"""Of each model and adoption, `_step` buffers of layers (8 bytes each, copied back as a run may have changed them) and
`block_id` of VACE blocks, which the wrapper reads from the device and we keep on the host.
"""

HINT_BYTES = 32 * 384 * 2
"""Of one VACE block's hint: tokens of the video, width, bf16."""


@dataclass(frozen=True)
class Range:
    """Bytes from `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, nbytes: float) -> bool:
        return self.low <= nbytes <= self.high


def swapped_bytes(plan: dict) -> int:
    """What one forward of all blocks needs from the host."""
    return sum(n for n, is_swapped in zip(plan["streamed_bytes"], plan["swapped"], strict=True) if is_swapped)


def fixed_bytes(plan: dict) -> int:
    """Residents and small tensors."""
    return sum(plan["streamed_bytes"]) - swapped_bytes(plan) + sum(plan["small_bytes"])


def placed_bytes(plan: dict) -> int:
    """Residents and small tensors, which an adoption copies; and blocks that have a slot each for good."""
    return fixed_bytes(plan) + (swapped_bytes(plan) if not streams(plan) else 0)


def alignment_bytes(plan: dict) -> int:
    """What aligns residents and small tensors in their buffers, and is copied with them."""
    return plan["device_bytes"] - plan["slots"] * plan["slot_bytes"] - fixed_bytes(plan)


def streams(plan: dict) -> bool:
    """Whether there are more swapped blocks than slots."""
    return sum(plan["swapped"]) > plan["slots"]


def to_device(variant: str, run: SimpleNamespace, unswapped: SimpleNamespace) -> Range:
    """Bytes that a run with our node copies to the device."""
    plans = run.plans
    ran = [plans[f"{one['model']}.{one['adoption']}"] for one in run.forwards if one["blocks"]]
    skipped = SLG_SKIPS * len(ran) // 2 if variant == "skipped_layers" else 0
    largest = max(plan["slot_bytes"] for plan in plans.values())
    # With load_device=main_device the loader has left everything there.
    exact = unswapped.h2d_bytes - (0 if variant == "main_device" else sum(unswapped.block_bytes))
    exact += sum(placed_bytes(plan) for plan in plans.values())
    exact += sum(swapped_bytes(plan) for plan in ran if streams(plan))
    exact += hints_to_host(variant, run)
    window = sum(plan["slots"] * plan["slot_bytes"] + alignment_bytes(plan) for plan in plans.values())
    return Range((exact - skipped * largest) * (1 - SHARE), exact * (1 + SHARE) + window + skipped * largest)


def hints_to_host(variant: str, run: SimpleNamespace) -> int:
    """Bytes of VACE hints that go to the host: where VACE blocks are to be swapped by hand."""
    is_to_host = VARIANTS[variant].get("vace") and run.how in (BLOCKS, BLOCKS // 2)
    return HINT_BYTES * VACE_BLOCKS * sum(bool(one["blocks"]) for one in run.forwards) if is_to_host else 0


def to_host(variant: str, run: SimpleNamespace, unswapped: SimpleNamespace) -> Range:
    """Bytes that a run with our node copies to the host: those of the run without, less the blocks."""
    exact = unswapped.d2h_bytes + hints_to_host(variant, run)
    # With load_device=main_device, it is loading that takes the blocks to the host, this once.
    if unswapped.d2h_bytes > sum(unswapped.block_bytes) and variant != "main_device":
        exact -= sum(unswapped.block_bytes)
    counters = COUNTER_BYTES * max(len(unswapped.block_bytes), len(run.plans))
    return Range(exact - counters, exact + counters)
