"""`simulate`: forwards in virtual time, with the schedule that the swapper runs, compared with the lower bound."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Sequence

from ..blockswap.errors import SettingsError
from ..blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from ..blockswap.plan.make_plan import make_plan
from ..blockswap.plan.schedule import Ring, VirtualTime, steady_time
from ..blockswap.plan.swap_plan import PlanInputs, SwapPlan, Timing
from .output import Result

# Mean size of a block; any size would do, since only the ratio of transfer to compute matters.
BLOCK_BYTES = 1 << 30
UNLIMITED = 1 << 62


def simulate(options: Namespace) -> Result:
    """Steady-state step time, and its ratio to the lower bound max(compute, transfer) of the blocks that ran.

    The unit of time is the mean compute time of a block.

    Raises:
        SettingsError: An option has an impossible value.
    """
    count, vace = options.blocks, options.vace
    swapped, generator = _swapped(options.swapped, count), random.Random(options.seed)
    sizes = [1.0 + options.uneven * generator.uniform(-1.0, 1.0) for _ in range(count + vace)]  # mean 1
    patterns = _patterns(options, count, vace)
    plan = _plan(sizes, count, vace, swapped, options)
    transfer = [size * options.ratio for size in sizes]
    time = VirtualTime(Ring(plan.swapped, slots=plan.slots), compute=sizes, transfer=transfer)
    forward = steady_time(time, patterns)
    compute = sum(sizes[i] for pattern in patterns for i in pattern) / len(patterns)
    moved = sum(transfer[i] for pattern in patterns for i in pattern if plan.swapped[i]) / len(patterns)
    # With a slot for each swapped block, all of them stay on the device.
    bound = max(compute, moved if plan.slots < plan.swapped_count else 0.0)
    ratio = forward.elapsed / bound if bound else 1.0
    data = {
        "step_time": forward.elapsed,
        "bound": bound,
        "ratio_to_bound": ratio,
        "compute": forward.compute,
        "transfer": forward.transferred,
        "stall": forward.stall,
        "blocks": count + vace,
        "blocks_swapped": plan.swapped_count,
        "slots": plan.slots,
        "transfer_over_compute": options.ratio,
    }
    text = (
        f"{plan.swapped_count} of {count + vace} blocks stream, {plan.slots} of them on the GPU at a time; "
        f"a copy takes {options.ratio:g} x a block's computation\n"
        f"pass   {forward.elapsed:9.3f} block times: computation {forward.compute:.3f}, waiting {forward.stall:.3f}\n"
        f"bound  {bound:9.3f} block times: the longer of computation and copies\n"
        f"ratio  {ratio:9.4f}"
    )
    return Result(data, text)


def _swapped(text: str, count: int) -> int:
    """A number of blocks, from a number or a share of `count`."""
    try:
        asked = count * float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise SettingsError(f"--swapped: expected a number of blocks or a share such as 50%, got {text!r}") from None
    if not 0 <= asked <= count:
        expected = f"0 to {count} (the number of --blocks)"
        raise SettingsError(f"--swapped: expected {expected}, got {asked:g}; lower it or raise --blocks")
    return round(asked)


def _patterns(options: Namespace, count: int, vace: int) -> Sequence[Sequence[int]]:
    """The blocks of each forward: all, or all and then those of every second forward."""
    everything = list(range(vace + count))
    skipped = {vace + i for i in options.skip}
    unknown = [i for i in options.skip if not 0 <= i < count]
    if unknown:
        raise SettingsError(f"--skip: expected blocks from 0 to {count - 1}, got {unknown[0]}")
    if options.empty:
        return [everything, []]
    if skipped or vace:
        return [everything, [i for i in everything if i >= vace and i not in skipped]]
    return [everything]


def _plan(sizes: Sequence[float], count: int, vace: int, swapped: int, options: Namespace) -> SwapPlan:
    """The planner's choice of blocks and, unless given, of slots, with unlimited memory."""
    names = [f"vace_blocks.{i}" for i in range(vace)] + [f"blocks.{i}" for i in range(count)]
    weights = (TensorProfile("weight", round(size * BLOCK_BYTES), Placement.STREAMED) for size in sizes)
    profile = ModelProfile(tuple(BlockProfile(name, (weight,)) for name, weight in zip(names, weights, strict=True)))
    speed = BLOCK_BYTES / options.ratio * 1e3 if options.ratio else float(UNLIMITED)
    inputs = PlanInputs(
        device_total_bytes=UNLIMITED,
        device_free_bytes=UNLIMITED,
        host_available_bytes=UNLIMITED,
        host_room_bytes=UNLIMITED,
        pin_budget_bytes=UNLIMITED,
        blocks_to_swap=swapped,
        vace_blocks_to_swap=round(vace * swapped / count),
        slots=options.slots,
        timing=Timing(compute_ms=tuple(sizes), pinned_bytes_per_s=speed),
    )
    return make_plan(profile, inputs)
