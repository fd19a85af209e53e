"""Progress: what a run is doing, for whoever watches it: figures and one sentence; pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

from ...hardware.units import format_bytes, format_count
from ..plan.swap_plan import SwapPlan

NO_STALL = 0.0005
"""Part of a forward below which a stall is none: it would be shown as 0.0 %."""


class Phase(Enum):
    """Where a run stands."""

    ADOPTING = "adopting"
    """From its plan until every block is in its place."""
    SAMPLING = "sampling"
    """From the first forward that is over until the release."""
    DONE = "done"
    """From the release on, if a forward was through."""
    STOPPED = "stopped"
    """From the release on, if none was."""
    OFF = "off"
    """Nothing is swapped by us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The device's memory under a plan, in bytes.

    Attributes:
        total: All of it.
        other: In use by anything but the block weights.
        residents: Blocks that stay, and the small tensors of all.
        window: The slots.
        ceiling: What may be in use once the weights are placed; 0 where no ceiling applies.
        activations: What forwards take above the weights, expected or measured; None is unknown.
    """

    total: int
    other: int
    residents: int
    window: int
    ceiling: int
    activations: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFigures:
    """A plan in numbers.

    Attributes:
        blocks: All blocks.
        swapped: Those that stream.
        slots: Slots of the window.
        free: Device memory that nothing but block weights uses, in bytes.
        stall_ms: What compute is expected to wait for copies in a forward; None is unknown.
        forward_ms: How long a forward is expected to take; None is unknown.
        over_ceiling: The weights do not fit under the budget even so.
    """

    blocks: int
    swapped: int
    slots: int
    free: int
    stall_ms: float | None
    forward_ms: float | None
    over_ceiling: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptFigures:
    """How far the weights are placed, in bytes: of all blocks, and page-locked so far."""

    placed: int
    all: int
    pinned: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What forwards have done since the run began.

    Attributes:
        forwards: Those that ran blocks.
        streamed: Bytes that were copied into slots.
        forward_ms: How long one takes; None until it was measured, as with all that follows.
        stall_ms: What compute waits for copies in it.
        copy_bytes_per_s: Speed of the copies while they are under way.
    """

    forwards: int
    streamed: int
    forward_ms: float | None = None
    stall_ms: float | None = None
    copy_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One moment of a run; what does not belong to its phase is None.

    Attributes:
        phase: Where it stands.
        memory: The device's memory under the plan.
        plan: The plan.
        adopt: How far the weights are placed.
        run: What forwards have done.
        why: Why it was stopped, or is off.
    """

    phase: Phase
    memory: MemoryUse | None = None
    plan: PlanFigures | None = None
    adopt: AdoptFigures | None = None
    run: RunFigures | None = None
    why: str = ""

    @property
    def text(self) -> str:
        """The plan in a sentence, and below it what is going on, or what came of it."""
        lines = ["" if self.plan is None else _plan(self.plan), _adopting(self.adopt), self._running(), self.why]
        return "\n".join(line for line in lines if line)

    def as_json(self) -> dict[str, object]:
        """As plain data, with the text."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("phase", "why")}
        return {"phase": self.phase.value, "text": self.text, **plain}

    def _running(self) -> str:
        if self.run is None:
            return ""
        number = self.run.forwards
        if not number:
            return "the first forward is under way"
        is_over = self.phase is Phase.DONE
        head = format_count(number, "forward") if is_over else f"forward {number}"
        if self.plan is None or not self.plan.swapped:
            return head
        return f"{head}: {', '.join(_streaming(self.run, is_over=is_over))}"


def stopped(why: str = "the run ended before a forward was through") -> Progress:
    """A run that has come to nothing."""
    return Progress(phase=Phase.STOPPED, why=why)


def figures_of(plan: SwapPlan, *, stall_ms: float | None, forward_ms: float | None) -> PlanFigures:
    """A plan in numbers, with a forward as it is predicted now."""
    return PlanFigures(
        blocks=len(plan.swapped),
        swapped=plan.swapped_count,
        slots=plan.slots,
        free=plan.limit_bytes,
        stall_ms=stall_ms,
        forward_ms=forward_ms,
        over_ceiling=plan.over_ceiling,
    )


def _plan(plan: PlanFigures) -> str:
    free = f"{format_bytes(plan.free)} free"
    if plan.swapped:
        stay, slots = plan.blocks - plan.swapped, format_count(plan.slots, "slot")
        where = f"{stay} of {plan.blocks} blocks stay, {plan.swapped} stream through {slots}"
        share = _stall(plan.stall_ms, plan.forward_ms)
        where += f", {share} expected" if share else ""
    else:
        where = f"all {plan.blocks} blocks stay"
    return f"{free}: {where}{' (over the ceiling)' if plan.over_ceiling else ''}"


def _adopting(adopt: AdoptFigures | None) -> str:
    if adopt is None:
        return ""
    pinned = f", {format_bytes(adopt.pinned)} page-locked" if adopt.pinned else ""
    return f"placing weights: {format_bytes(adopt.placed)} of {format_bytes(adopt.all)}{pinned}"


def _streaming(run: RunFigures, *, is_over: bool) -> list[str]:
    parts = [f"{_decimal(run.streamed)} streamed"]
    share = _stall(run.stall_ms, run.forward_ms)
    if share:
        parts.append(share)
    elif not is_over:
        parts.append("being measured")
    if run.copy_bytes_per_s is not None:
        parts.append(f"{_decimal(run.copy_bytes_per_s)}/s")
    return parts


def _stall(stall_ms: float | None, forward_ms: float | None) -> str:
    """As a part of the forward; empty if unknown."""
    if stall_ms is None or not forward_ms:
        return ""
    share = stall_ms / forward_ms
    return "no stall" if share < NO_STALL else f"{share:.1%} stall"


def _decimal(nbytes: float) -> str:
    """In powers of ten, as speeds are."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"  # noqa: PLR2004 - a GB
