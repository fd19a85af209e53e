"""What the demo shows: fields for a program, a plan and a table for a person."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..blockswap.plan.swap_plan import SwapPlan
from ..hardware import format_bytes
from .result import Result, table

VIRTUAL = (
    "no GPU here: the device is simulated, and its times are predictions: blocks compute for as long as they took on "
    "this CPU, and copies take what the assumed link makes of them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """Figures of one demo.

    Attributes:
        outputs_equal: The latents of both runs are equal bit for bit.
        weights_d2h_bytes: Bytes copied back to the host in one swapped step, adopt and release included, beyond what an
            unswapped step copies.
        h2d_bytes: Bytes copied to the device in the same step.
        planned_weight_bytes: Device memory for block weights that the plan announced.
        peak_weight_bytes: Device memory that block weights took at most.
        unswapped_weight_bytes: Device memory of the block weights in the unswapped run.
        swapped_bytes: Streamed tensors of the swapped blocks.
        slab_bytes: Host memory that holds them.
        pinned_bytes: The part of the host's memory that is page-locked.
        blocks: Number of blocks.
        blocks_swapped: Number of swapped blocks.
        slots: Slots of the window.
        stall_ms_per_forward: Time that compute waited for copies.
        planned_stall_ms_per_forward: What the plan said; None if a speed was unknown.
        step_ms: Duration of a step, two forwards.
        unswapped_step_ms: The same of the unswapped run.
        clock: `wall`, or `virtual`: compute as measured on this CPU, copies at the speed of the assumed link.
        device: Where it ran.
        measured_by: Who counted the bytes: cuda, pretend, or accounting (the engine's own books).
        picture: Where the timeline was drawn.
        link_bytes_per_s: Host-to-device bandwidth, measured, or assumed where the device is simulated.
    """

    outputs_equal: bool
    weights_d2h_bytes: int
    h2d_bytes: int
    planned_weight_bytes: int
    peak_weight_bytes: int
    unswapped_weight_bytes: int
    swapped_bytes: int
    slab_bytes: int
    pinned_bytes: int
    blocks: int
    blocks_swapped: int
    slots: int
    stall_ms_per_forward: float
    planned_stall_ms_per_forward: float | None
    step_ms: float
    unswapped_step_ms: float
    clock: str
    device: str
    measured_by: str
    picture: str
    link_bytes_per_s: float | None

    @property
    def failures(self) -> tuple[str, ...]:
        """Which promises this run broke."""
        broken = []
        if not self.outputs_equal:
            broken.append("the outputs differ")
        if self.weights_d2h_bytes:
            broken.append(f"{self.weights_d2h_bytes:,} bytes of weights were copied back")
        if self.peak_weight_bytes > self.planned_weight_bytes:
            over = self.peak_weight_bytes - self.planned_weight_bytes
            broken.append(f"the weights took {over:,} bytes more than planned")
        return tuple(broken)


def report(shown: Demonstration, plan: SwapPlan, *, card: str) -> Result:
    """The result of a demo on `card`, with the plan it followed."""
    blocks = "".join("s" if swapped else "R" for swapped in plan.swapped)
    lines = [
        f"{card}",
        f"plan: {blocks}  (R resident, s swapped)",
        f"      {window_text(plan)}",
        *(f"      {reason}" for reason in plan.reasons),
        "",
        _table(shown),
        "",
        f"outputs equal: {'yes, bit for bit' if shown.outputs_equal else 'NO'}",
        f"link: {_speed(shown.link_bytes_per_s)}{' (assumed)' if shown.clock == 'virtual' else ''}",
        f"bytes counted by: {shown.measured_by}; timeline: {shown.picture}",
        *([VIRTUAL] if shown.clock == "virtual" else []),
        *(f"BROKEN: {failure}" for failure in shown.failures),
    ]
    return Result(asdict(shown) | {"reasons": list(plan.reasons)}, "\n".join(lines), succeeded=not shown.failures)


def window_text(plan: SwapPlan) -> str:
    """The window in words."""
    if not plan.slots:
        return "no window"
    slots = "1 slot" if plan.slots == 1 else f"{plan.slots} slots"
    streams = "1 copy stream" if plan.streams == 1 else f"{plan.streams} copy streams"
    return f"{slots} of {format_bytes(plan.slot_bytes)}, {streams}"


def _speed(bytes_per_s: float | None) -> str:
    return "unknown" if bytes_per_s is None else f"{bytes_per_s / 1e9:.2f} GB/s"


def _table(shown: Demonstration) -> str:
    planned = shown.planned_stall_ms_per_forward
    return table(
        [
            ["", "unswapped", "swapped", "planned"],
            [
                "block weights on the device",
                format_bytes(shown.unswapped_weight_bytes),
                format_bytes(shown.peak_weight_bytes),
                format_bytes(shown.planned_weight_bytes),
            ],
            ["host memory of swapped blocks", "", format_bytes(shown.slab_bytes), format_bytes(shown.swapped_bytes)],
            ["copied to the device, adopt and one step", "", format_bytes(shown.h2d_bytes), ""],
            ["weights copied back", "", format_bytes(shown.weights_d2h_bytes), format_bytes(0)],
            ["step", f"{shown.unswapped_step_ms:.1f} ms", f"{shown.step_ms:.1f} ms", ""],
            [
                "stall per forward",
                "",
                f"{shown.stall_ms_per_forward:.2f} ms",
                "unknown" if planned is None else f"{planned:.2f} ms",
            ],
        ]
    )
