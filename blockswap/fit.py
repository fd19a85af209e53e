"""What would fit where a forward does not, in words; pure."""

from __future__ import annotations

from ..hardware.units import format_bytes, format_count
from .decision import SwapPlan
from .experience import Workload

MORE_THAN_THERE_WAS = 1.25
"""What a forward is taken to need, over what it had, where it ran out with more than it was expected to take: the
factor that `architecture.activation_bytes` adds to the widest place, once more."""


def too_large(workload: Workload | None, plan: SwapPlan, *, said: str) -> str:
    """Why a forward ran out of memory under the smallest plan there is, and what would fit.

    Args:
        workload: What it did; None if that is not known.
        plan: The plan.
        said: What the device said.
    """
    room = max(0, plan.limit_bytes - plan.device_bytes)
    slots = format_count(plan.slots, "slot")
    swapped = f"{plan.swapped_count} of {len(plan.swapped)} blocks swapped through {slots}"
    weights = f"{format_bytes(plan.device_bytes)} of weights"
    what = "a forward" if workload is None else f"a forward of {workload.tokens:,} tokens"
    expected = None if workload is None else workload.expected_activation_bytes
    needs = "" if expected is None else f"expects about {format_bytes(expected)} for activations but "
    head = f"{what} {needs}ran out of the {format_bytes(room)} that were left beside {weights} ({swapped})"
    return f"{head}; {_advice(workload, room)}or close other programs on the GPU (the device said: {said})"


def _advice(workload: Workload | None, room: int) -> str:
    if workload is None or not room:
        return "take fewer frames or a smaller size, "
    need = max(workload.expected_activation_bytes or 0, int(MORE_THAN_THERE_WAS * room))
    share = room / need  # activations grow with the number of tokens
    smaller = f"{share**0.5:.0%} of its width and height"
    frames = workload.latent_frames
    if frames is None or frames == 1:
        return f"take about {smaller}, "
    # The VAE makes 4 n + 1 frames of n + 1 latent ones.
    fewer = max(1, int(frames * share))
    return f"take about {4 * (fewer - 1) + 1} of the {4 * (frames - 1) + 1} frames, or {smaller}, "


def not_again(why: str, *, said: str) -> str:
    """A forward that ran out of memory and cannot be repeated.

    Args:
        why: What keeps it from that.
        said: What the device said.
    """
    return (
        f"a forward ran out of device memory and cannot be repeated, since {why}; a smaller plan is remembered for "
        f"this video size: queue the prompt again (the device said: {said})"
    )
