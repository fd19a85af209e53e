"""Texts for people: a plan, a RunReport, why memory ran out and what would fit; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...hardware.records import DeviceMemory, HostMemory, Samples
from ...hardware.units import MIB, format_bytes, format_count, format_speed
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan, blocks_in_words
from .history import Workload
from .report import Hint, Measured, RunReport, host_tiers

MOST_TEXTS = 3
"""Refusals, plans and notes that one line lists; of the rest it gives the number."""

FEW_MS = 100
"""Durations below it, in ms, are shown to a tenth."""

EACH = {"step": "step", "pass": "pass of the model"}
"""What a time is of."""

NEVER = 0.0005
"""Share of a pass below which the GPU "never" waits: it would be shown as 0.0 %."""


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


def summary(report: RunReport, *, details: bool = False) -> str:
    """At most 12 lines, expected beside measured; what did not happen or is unknown is left out.

    Args:
        report: The report.
        details: Add lines for people who know how it works.
    """
    measured = report.measured
    lines = [
        _head(report),
        f"blocks: {blocks_in_words(report.plan)}",
        _waits(report),
        "" if report.hint is None else f"hint: {hint_text(report.hint)}",
        _passes(report),
        _weights(report),
        _computation(report),
        _copies(report),
        _ram(measured),
        _sampled(measured.samples),
        _named("plan changed", measured.replans),
        _named("note", report.notes),
        *(_details(report) if details else ()),
    ]
    return "\n".join(line for line in lines if line)


def plan_text(plan: SwapPlan, *, card: str, details: bool = False) -> str:
    """A plan before its run: where the blocks are, and what that takes and costs.

    Args:
        plan: The plan.
        card: The device's name.
        details: Add its reasons.
    """
    lines = [f"{card}: {blocks_in_words(plan)}", _vram_planned(plan)]
    if plan.swapped_count:
        held = _held(plan.slab_bytes, plan.pinned_bytes, plan.file_bytes)
        lines.append(f"RAM: {held}" if held else "")
        lines.append(f"copied to the GPU in each pass of the model: {format_bytes(plan.streamed_bytes)}")
    if plan.predicted is not None:
        wait = expected_waits(plan, plan.predicted)
        lines.append(f"expected: {_s(plan.predicted.elapsed)} for a pass of the model{f'; {wait}' if wait else ''}")
    lines += [f"- {text}" for text in plan.remarks]
    if details:
        lines += plan_details(plan)
    return "\n".join(line for line in lines if line)


def plan_details(plan: SwapPlan) -> list[str]:
    """Why a plan is as it is, for people who know how it works."""
    lines = ["details:", *(f"- {text}" for text in plan.reasons if text not in plan.remarks), _where(plan)]
    return [line for line in lines if line]


def plan_lines(plan: SwapPlan, *, card: str) -> str:
    """A plan in the log: three short lines, below one that may be begun already."""
    wait = expected_waits(plan, plan.predicted)
    held = _held(plan.slab_bytes, plan.pinned_bytes, plan.file_bytes) if plan.swapped_count else ""
    lines = [
        f"WanVideo Enhanced BlockSwap on {card}: {blocks_in_words(plan)}{f'; expected: {wait}' if wait else ''}",
        f"  {_vram_planned(plan)}{f'; RAM: {held}' if held else ''}",
        *(f"  {text}" for text in plan.remarks[:1]),
    ]
    return "\n" + "\n".join(lines)


def pass_time(measured: Measured) -> tuple[float, str] | None:
    """Time of a step in ms, or of a pass of the model while no step is finished, and which of both; None if unknown."""
    if measured.forward_ms is None:
        return None
    if measured.forwards_per_step is None:
        return measured.forward_ms, "pass"
    return measured.forward_ms * measured.forwards_per_step, "step"


def time_in_words(time: tuple[float, str] | None) -> str:
    """How long a step takes, such as "4.2 s a step"; empty if unknown."""
    return "" if time is None else f"{_s(time[0])} a {EACH[time[1]]}"


def waits(stall_ms: float | None, forward_ms: float | None) -> str:
    """How long the GPU waited for copies, as a clause; empty if unknown."""
    if stall_ms is None or not forward_ms:
        return ""
    share = _share(stall_ms, forward_ms)
    return f"the GPU waited {share} of the time for copies" if share else "the GPU never waited"


def expected_waits(plan: SwapPlan, predicted: ForwardTime | None) -> str:
    """The same before a run of `plan`; empty also if nothing is copied."""
    if predicted is None or not plan.swapped_count:
        return ""
    share = _share(predicted.stall, predicted.elapsed)
    return f"the GPU waits {share} of the time for copies" if share else "the GPU never waits"


def _share(stall_ms: float, forward_ms: float) -> str:
    """A share of a forward in percent; empty if it is none."""
    share = stall_ms / forward_ms if forward_ms else 0.0
    return "" if share < NEVER else f"{share:.1%}"


def steps_in_words(measured: Measured) -> str:
    """How far a run came, such as "20 steps"."""
    if measured.steps:
        return format_count(measured.steps, "step")
    return f"{measured.forwards} {'pass' if measured.forwards == 1 else 'passes'} of the model"


def far_in_words(report: RunReport | None) -> str:
    """How far a run came that did not end well, such as "after 20 steps"."""
    if report is None or not report.measured.forwards:
        return "before the first step"
    return f"after {steps_in_words(report.measured)}"


def rescue_text(blocks: int) -> str:
    """What was done when VRAM ran out with this number of blocks on the GPU."""
    return f"VRAM ran out with {format_count(blocks, 'block')} on the GPU, so the step was repeated with less VRAM."


def hint_text(hint: Hint) -> str:
    """What the user could change, and what it would gain."""
    return (
        f"{format_bytes(hint.free_bytes)} of VRAM stayed free: vram_threshold_percent {hint.percent} would keep "
        f"{hint.blocks} more {'block' if hint.blocks == 1 else 'blocks'} on the GPU and save about "
        f"{time_in_words((hint.saved_ms, hint.each))}."
    )


def _head(report: RunReport) -> str:
    when = "" if report.ended is None else f", {report.ended:%H:%M}"
    if report.failure:
        how = f"FAILED {far_in_words(report)}: {_one_line(report.failure)}"
    elif report.interrupted:
        how = f"stopped {far_in_words(report)}; {_one_line(report.title)}"
    else:
        done = steps_in_words(report.measured) if report.measured.forwards else "nothing has run"
        how = f"{done}; {_one_line(report.title)}"
    return f"run {report.number}{when}: {how}"


def _vram_planned(plan: SwapPlan) -> str:
    line = f"VRAM: {format_bytes(plan.device_bytes)} for the blocks, of {format_bytes(plan.limit_bytes)} free"
    if plan.activation_bytes is not None:
        line += f"; {format_bytes(plan.activation_bytes)} for the computation"
    return line


def _where(plan: SwapPlan) -> str:
    """For people who know how it works: slots, streams, host tiers."""
    if not plan.swapped_count:
        return ""
    streams = format_count(plan.streams, "copy stream") if plan.overlap else "no overlap"
    tiers = ", ".join(f"{count} {tier}" for tier, count in host_tiers(plan).items())
    return f"- {plan.swapped_count} of {len(plan.swapped)} modules swapped ({tiers}), {slots_in_words(plan)}, {streams}"


def _details(report: RunReport) -> list[str]:
    measured, prediction = report.measured, report.prediction
    lines = [_where(report.plan), *(f"- {text}" for text in report.plan.tuning)]
    if measured.empty_forwards:
        lines.append(f"- {format_count(measured.empty_forwards, 'forward')} ran no block")
    if measured.stall_ms is not None:
        timed = format_count(measured.timed_forwards, "timed forward")
        expected = "" if prediction is None else f", {_ms(prediction.stall)} predicted"
        lines.append(f"- stall per forward: {_ms(measured.stall_ms)} in {timed}{expected}")
    lines += [f"- not page-locked: {text}" for text in measured.refusals[:MOST_TEXTS]]
    lines += [] if measured.samples is None else [f"- {format_count(measured.samples.count, 'sample')}"]
    return ["details:", *lines] if any(lines) else []


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
    """Debug mode's log lines about a plan, in the documented form: used stands before total.

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


def slots_in_words(plan: SwapPlan) -> str:
    """The number and size of a plan's slots."""
    slots = f"{format_count(plan.slots, 'slot')} of {format_bytes(plan.slot_bytes)}"
    own = f" and {len(plan.own_slots)} for modules beside the blocks ({format_bytes(sum(plan.own_slots))} together)"
    return slots + (own if plan.own_slots else "")


def _weights(report: RunReport) -> str:
    plan, found = report.plan, report.measured.weight_bytes
    line = f"VRAM for the blocks: {format_bytes(plan.device_bytes)} planned"
    if found is not None:
        line += f", {format_bytes(found)} measured"
        if found > plan.device_bytes:
            line += f", {format_bytes(found - plan.device_bytes)} more than planned"
    if plan.over_ceiling:
        line += f"; {format_bytes(plan.budget_bytes)} were left for them"
    return line


def _computation(report: RunReport) -> str:
    known = ((report.activation_bytes, "expected"), (report.measured.activation_bytes, "measured"))
    parts = [f"{format_bytes(nbytes)} {how}" for nbytes, how in known if nbytes is not None]
    return f"VRAM for the computation: {', '.join(parts)}" if parts else ""


def _passes(report: RunReport) -> str:
    measured, prediction = report.measured, report.prediction
    parts = [] if measured.forward_ms is None else [f"{_s(measured.forward_ms)} each"]
    parts += [] if prediction is None else [f"{_s(prediction.elapsed)} expected"]
    line = f"passes of the model: {measured.forwards}"
    return f"{line}, {', '.join(parts)}" if parts else line


def _waits(report: RunReport) -> str:
    measured, prediction = report.measured, report.prediction
    if not report.plan.swapped_count:
        return ""
    found = waits(measured.stall_ms, measured.forward_ms)
    if prediction is None:
        return f"waiting: {found}" if found else ""
    if not found:
        return f"waiting, expected: {expected_waits(report.plan, prediction)}"
    return f"waiting: {found} (expected: {_share(prediction.stall, prediction.elapsed) or 'never'})"


def _copies(report: RunReport) -> str:
    """Bytes to the device and back. That no weight is copied back is a promise, so every report shows it."""
    measured = report.measured
    line = f"copied to the GPU: {format_bytes(measured.placed_bytes)} once"
    if measured.onloads and measured.forwards:
        line += f", {format_bytes(measured.onloaded_bytes // measured.forwards)} in each pass"
    if measured.copy_bytes_per_s is not None:
        line += f" at {format_speed(measured.copy_bytes_per_s)}"
        if report.link_bytes_per_s is not None:
            line += f" (possible: {format_speed(report.link_bytes_per_s)})"
    changed = f"{format_bytes(measured.returned_bytes)} that the model changed, no weights"
    return f"{line}; back: {changed if measured.returned_bytes else 'nothing'}"


def _ram(measured: Measured) -> str:
    held = _held(measured.slab_bytes, measured.pinned_bytes, measured.file_bytes)
    refused = "the system did not let all of it be locked, so copies are slower" if measured.refusals else ""
    text = "; ".join(part for part in (held, refused) if part)
    return f"RAM: {text}" if text else ""


def _held(slabs: int, pinned: int, file: int) -> str:
    """Where on the host the blocks that stream are."""
    parts = []
    if slabs:
        locked = "locked" if pinned >= slabs else f"{format_bytes(pinned)} of it locked" if pinned else "not locked"
        parts.append(f"{format_bytes(slabs)} for streaming, {locked}")
    if file:
        parts.append(f"{format_bytes(file)} read from the model's file in each pass")
    return "; ".join(parts)


def _sampled(samples: Samples | None) -> str:
    if samples is None:
        return ""
    figures = (
        ("VRAM", samples.vram_used_peak_bytes),
        ("RAM by ComfyUI", samples.rss_peak_bytes),
    )
    parts = [f"{format_bytes(nbytes)} of {what}" for what, nbytes in figures if nbytes is not None]
    line = f"in use at most: {', '.join(parts)}" if parts else ""
    if samples.host_available_least_bytes is not None:
        line += f"; RAM left at least: {format_bytes(samples.host_available_least_bytes)}"
    if samples.gpu_percent_mean is not None:
        line += f"; GPU busy {samples.gpu_percent_mean:.0f} %"
    return line.removeprefix("; ")


def _named(what: str, texts: Sequence[str]) -> str:
    """One line that lists each text once, with the number of times it occurred."""
    times = Counter(map(_one_line, texts))
    named = [text if count == 1 else f"{text} ({count} times)" for text, count in times.items()]
    if len(named) > MOST_TEXTS:
        named[MOST_TEXTS:] = [f"and {len(named) - MOST_TEXTS} more"]
    return f"{what}: {'; '.join(named)}" if named else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _ms(duration: float) -> str:
    return f"{duration:,.0f} ms" if duration >= FEW_MS else f"{duration:.1f} ms"


def _s(duration_ms: float) -> str:
    """In seconds; short durations in milliseconds."""
    return f"{duration_ms / 1e3:,.1f} s" if duration_ms >= 1e3 else _ms(duration_ms)  # noqa: PLR2004 - a second


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
        return f"out of VRAM before the first step; close other programs on the GPU (the GPU reported: {reported})"
    room = max(0, plan.limit_bytes - plan.device_bytes)
    expected = None if workload is None else workload.expected_activation_bytes
    if expected is None or expected < room:
        estimate = "" if expected is None else f" ({format_bytes(expected)} expected)"
        needs = f"takes more than the {format_bytes(room)} that were left{estimate}"
    else:
        needs = f"takes about {format_bytes(expected)}, and {format_bytes(room)} were left"
    stay = format_count(plan.staying_count, "block")
    head = f"out of VRAM: computing this video {needs}, with {stay} on the GPU"
    return f"{head}; {_advice(workload, room)}or close other programs on the GPU (the GPU reported: {reported})"


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
        f"out of VRAM, and this step cannot be repeated, since {why}; a smaller plan is remembered for this video "
        f"size: queue the prompt again (the GPU reported: {reported})"
    )
