"""Texts for people: a plan, a RunReport, why memory ran out and what would fit; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...hardware.records import DeviceMemory, HostMemory, Samples
from ...hardware.units import MIB, format_bytes, format_count
from ..plan.swap_plan import SwapPlan
from .history import Workload
from .report import Measured, RunReport, host_tiers

MOST_TEXTS = 3
"""Refusals, plans and notes that one line lists; of the rest it gives the number."""

FEW_MS = 100
"""Durations below it, in ms, are shown to a tenth."""

GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """How large a model is.

    Attributes:
        parameters: Number of its parameters; None where quantisation hides it.
        nbytes: Its bytes, as stored.
        layers: Number of its blocks.
    """

    parameters: int | None
    nbytes: int
    layers: int


def summary(report: RunReport) -> str:
    """At most 11 lines, predicted beside measured; what did not happen or is unknown is left out."""
    measured = report.measured
    lines = [
        f"{_one_line(report.title)}: {_swapped(report.plan)}",
        _weights(report),
        _activations(report),
        _forwards(report),
        _stall(report),
        _copies(report),
        _tuning(report.plan),
        _host(measured),
        _sampled(measured.samples),
        _named("planned again", measured.replans),
        _named("note", report.notes),
    ]
    return "\n".join(line for line in lines if line)


def plan_text(plan: SwapPlan, *, card: str, budget_bytes: int) -> str:
    """A plan before its run: what stays, what streams, what it costs, and why.

    Args:
        plan: The plan.
        card: The device's name.
        budget_bytes: Device memory that block weights may take.
    """
    count, total = plan.swapped_count, len(plan.swapped)
    free = format_bytes(budget_bytes)
    if not count:
        head = f"{card}, {free} for block weights: all {format_count(total, 'block')} stay"
    else:
        stall = "" if plan.stall_ms is None else f", {_ms(plan.stall_ms)} of stall expected per forward"
        through = f"{count} stream through {format_count(plan.slots, 'slot')}"
        head = f"{card}, {free} for block weights: {total - count} of {total} blocks stay, {through}{stall}"
    lines = [head, _weights_planned(plan), *(f"- {reason}" for reason in plan.reasons)]
    if count:
        tiers = ", ".join(f"{n} {tier}" for tier, n in host_tiers(plan).items())
        held = _held(plan.slab_bytes, plan.pinned_bytes, plan.anonymous_bytes, plan.file_bytes)
        lines.insert(2, f"host: {held} ({tiers}); {_decimal(plan.streamed_bytes)} copied per forward")
    return "\n".join(lines)


def _weights_planned(plan: SwapPlan) -> str:
    parts = f"{format_bytes(plan.resident_bytes)} resident, {format_bytes(plan.window_bytes)} window"
    over = "; OVER THE BUDGET even so" if plan.over_ceiling else ""
    return f"weights on the device: {format_bytes(plan.device_bytes)} ({parts}){over}"


def block_table(report: RunReport) -> str:
    """A table with one row per block, its place and its times, and their sums; empty if no block was timed."""
    blocks = report.measured.blocks
    if not blocks:
        return ""
    inside = [block for block in blocks if block.swapped]
    rows = [["block", "weights", "compute ms", "copy ms", "stall ms"]]
    for block, tier in zip(blocks, report.plan.tiers, strict=True):
        where = "resident" if tier is None else tier.value
        rows.append([block.name, where, *map(_cell, (block.compute_ms, block.copy_ms, block.stall_ms))])
    sums = _sum(b.compute_ms for b in blocks), _sum(b.copy_ms for b in inside), _sum(b.stall_ms for b in inside)
    rows.append(["all", f"{len(inside)} swapped", *map(_cell, sums)])
    name, weights, *times = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([row[0].ljust(name), row[1].ljust(weights), *map(str.rjust, row[2:], times)]).rstrip() for row in rows
    )


def configuration_lines(
    plan: SwapPlan, model: ModelSize, *, memory: DeviceMemory | None, host: HostMemory, ratio: float
) -> tuple[str, ...]:
    """Debug mode's log lines about a plan, in the documented form: its MB are MiB, used stands before total.

    Args:
        plan: The plan.
        model: The model's size.
        memory: Device memory before the plan was applied; None leaves the line out.
        host: Host memory at the same moment, within the control group.
        ratio: Share of the available device memory that weights may fill, 0 to 1.
    """
    counted = "" if model.parameters is None else f"{model.parameters:,} parameters, "
    lines = ["Auto configuration completed:", f"   Model: {counted}{_mib(model.nbytes)}MB, {model.layers} layers"]
    if memory is not None:
        lines.append(f"   VRAM: {_usage(memory.total_bytes - memory.free_bytes, memory.total_bytes)}")
    ram_bytes = min(host.physical_bytes, host.cgroup_limit_bytes or host.physical_bytes)
    lines.append(f"   DRAM: {_usage(max(0, ram_bytes - host.available_bytes), ram_bytes, 'usage ')}")
    lines.append(f"   Config: blocks_to_swap={plan.swapped_count}, streams={plan.streams}, ratio={ratio:.0%}")
    return (*lines, _verdict(plan))


def _verdict(plan: SwapPlan) -> str:
    if plan.swapped_count:
        held = f"{plan.swapped_count} of {len(plan.swapped)} blocks ({_mib(plan.slab_bytes)}MB)"
        return f"Model is partly kept in DRAM: {held} are streamed into VRAM"
    if plan.over_ceiling:
        return "Model is fully loaded into VRAM as asked, above what the settings leave for weights"
    return "Model can be fully loaded into VRAM, no DRAM needed"


def _usage(used: int, total: int, label: str = "") -> str:
    return f"{_mib(used)}/{_mib(total)}MB ({label}{used / total:.1%})"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f}"


def _swapped(plan: SwapPlan) -> str:
    if not plan.swapped_count:
        return f"all {format_count(len(plan.swapped), 'block')} resident"
    streams = format_count(plan.streams, "copy stream") if plan.overlap else "no overlap"
    window = f"{slots_in_words(plan)}, {streams}"
    tiers = ", ".join(f"{count} {tier}" for tier, count in host_tiers(plan).items())
    return f"{plan.swapped_count} of {len(plan.swapped)} blocks swapped ({tiers}), {window}"


def slots_in_words(plan: SwapPlan) -> str:
    """The number and size of a plan's slots."""
    slots = f"{format_count(plan.slots, 'slot')} of {format_bytes(plan.slot_bytes)}"
    own = f" and {len(plan.own_slots)} for modules beside the blocks ({format_bytes(sum(plan.own_slots))} together)"
    return slots + (own if plan.own_slots else "")


def _weights(report: RunReport) -> str:
    plan, found = report.plan, report.measured.weight_bytes
    line = f"weights on the device: {format_bytes(plan.device_bytes)} planned"
    if plan.over_ceiling:
        line += f", over the budget of {format_bytes(plan.budget_bytes)}"
    if found is not None:
        line += f"; {format_bytes(found)} measured"
        if found > plan.device_bytes:
            line += f", {found - plan.device_bytes:,} bytes more than planned"
    return line


def _activations(report: RunReport) -> str:
    known = ((report.activation_bytes, "expected"), (report.measured.activation_bytes, "measured"))
    parts = [f"{format_bytes(nbytes)} {how}" for nbytes, how in known if nbytes is not None]
    return f"activations: {'; '.join(parts)}" if parts else ""


def _forwards(report: RunReport) -> str:
    measured, prediction = report.measured, report.prediction
    line = f"forwards: {measured.forwards}"
    if measured.empty_forwards:
        line += f", and {measured.empty_forwards} that ran no block"
    if prediction is not None:
        line += f"; {_ms(prediction.elapsed)} predicted"
    if measured.forward_ms is not None:
        line += f"; {_ms(measured.forward_ms)} measured (median)"
    return line


def _stall(report: RunReport) -> str:
    measured, prediction = report.measured, report.prediction
    if not report.plan.swapped_count:
        return ""
    parts = []
    if prediction is not None:
        parts.append(f"{_ms(prediction.stall)}{_share(prediction.stall, prediction.elapsed)} predicted")
    if measured.stall_ms is not None:
        timed = format_count(measured.timed_forwards, "timed forward")
        parts.append(f"{_ms(measured.stall_ms)}{_share(measured.stall_ms, measured.forward_ms)} measured in {timed}")
    return f"stall per forward: {'; '.join(parts)}" if parts else ""


def _copies(report: RunReport) -> str:
    """Bytes to the device and back. That no weight is copied back is a promise, so every report shows it."""
    plan, measured = report.plan, report.measured
    line = f"copied to the device: {_decimal(measured.placed_bytes)} once"
    if measured.onloads:
        line += f"; per forward {_decimal(plan.streamed_bytes)} planned"
        if measured.forwards:
            line += f", {_decimal(measured.onloaded_bytes / measured.forwards)} measured"
    if measured.copy_bytes_per_s is not None:
        line += f" at {measured.copy_bytes_per_s / GIGA:.1f} GB/s"
        if report.link_bytes_per_s is not None:
            line += f" (link {report.link_bytes_per_s / GIGA:.1f} GB/s)"
    changed = f"{format_bytes(measured.returned_bytes)} of changed buffers, no weights"
    return f"{line}; back: {changed if measured.returned_bytes else 'nothing'}"


def _tuning(plan: SwapPlan) -> str:
    """What the GPU's tier allows, and what was chosen within it for the measured link."""
    return f"tuning: {'; '.join(map(_one_line, plan.tuning))}" if plan.tuning else ""


def _host(measured: Measured) -> str:
    parts = measured.slab_bytes, measured.pinned_bytes, measured.anonymous_bytes, measured.file_bytes
    held = f"host memory: {_held(*parts)}" if any(parts) else ""
    return "; ".join(part for part in (held, _named("not page-locked", measured.refusals)) if part)


def _held(slabs: int, pinned: int, anonymous: int, file: int) -> str:
    parts = [f"{format_bytes(slabs)} of slabs", f"{format_bytes(pinned)} page-locked"]
    if anonymous:
        parts.append(f"{format_bytes(anonymous)} of ordinary memory")
    if file:
        parts.append(f"{format_bytes(file)} read from the file in each forward")
    return "; ".join(parts)


def _sampled(samples: Samples | None) -> str:
    if samples is None:
        return ""
    parts = []
    if samples.gpu_percent_mean is not None and samples.gpu_percent_max is not None:
        parts.append(f"GPU busy {samples.gpu_percent_mean:.0f} % (at most {samples.gpu_percent_max:.0f} %)")
    for what, nbytes in (
        ("VRAM in use at most", samples.vram_used_peak_bytes),
        ("RAM of this process at most", samples.rss_peak_bytes),
        ("RAM available at least", samples.host_available_least_bytes),
    ):
        if nbytes is not None:
            parts.append(f"{what} {format_bytes(nbytes)}")
    return f"{format_count(samples.count, 'sample')}: {'; '.join(parts)}" if parts else ""


def _named(what: str, texts: Sequence[str]) -> str:
    """One line that lists each text once, with the number of times it occurred."""
    times = Counter(map(_one_line, texts))
    named = [text if count == 1 else f"{text} ({count} times)" for text, count in times.items()]
    if len(named) > MOST_TEXTS:
        named[MOST_TEXTS:] = [f"and {len(named) - MOST_TEXTS} more"]
    return f"{what}: {'; '.join(named)}" if named else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _decimal(nbytes: float) -> str:
    """In powers of ten, as speeds are."""
    return f"{nbytes / GIGA:.2f} GB" if nbytes >= GIGA else f"{nbytes / 1e6:.1f} MB"


def _ms(duration: float) -> str:
    return f"{duration:,.0f} ms" if duration >= FEW_MS else f"{duration:.1f} ms"


def _share(part: float, whole: float | None) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def _cell(duration: float | None) -> str:
    return "" if duration is None else f"{duration:,.2f}"


def _sum(durations: Iterable[float | None]) -> float | None:
    """None if one of them is unknown, or there are none."""
    found = list(durations)
    known = [duration for duration in found if duration is not None]
    return sum(known) if known and len(known) == len(found) else None


MORE_THAN_THERE_WAS = 1.25
"""Where a forward ran out with more memory than it was expected to need, it is assumed to need this many times what
it had: the factor of safety in `activation_bytes` (model/wan.py), once more."""


def oom_message(workload: Workload | None, plan: SwapPlan | None, *, reported: str) -> str:
    """Why a forward ran out of memory under the smallest plan, and what would fit.

    Args:
        workload: The forward's workload; None if unknown.
        plan: The plan; None if memory ran out before there was one.
        reported: The device's own message.
    """
    if plan is None:
        return (
            "device memory ran out before any block was placed; close other programs on the GPU (the device reported: "
            f"{reported})"
        )
    room = max(0, plan.limit_bytes - plan.device_bytes)
    slots = format_count(plan.slots, "slot")
    swapped = f"{plan.swapped_count} of {len(plan.swapped)} blocks swapped through {slots}"
    weights = f"{format_bytes(plan.device_bytes)} of weights"
    what = "a forward" if workload is None else f"a forward of {workload.tokens:,} tokens"
    expected = None if workload is None else workload.expected_activation_bytes
    needs = "" if expected is None else f"needs about {format_bytes(expected)} for activations and "
    head = f"{what} {needs}ran out of the {format_bytes(room)} that were left beside {weights} ({swapped})"
    return f"{head}; {_advice(workload, room)}or close other programs on the GPU (the device reported: {reported})"


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


def not_again(why: str, *, reported: str) -> str:
    """A forward ran out of memory and cannot be repeated.

    Args:
        why: Why it cannot be repeated.
        reported: The device's own message.
    """
    return (
        f"a forward ran out of device memory and cannot be repeated, since {why}; a smaller plan is remembered for "
        f"this video size: queue the prompt again (the device reported: {reported})"
    )
