"""RunReport: what a plan predicted beside what came; pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from ...hardware.records import Samples
from ..plan.schedule import ForwardTime
from ..plan.swap_plan import SwapPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """One block, the mean over the timed forwards in which it ran; None is unknown.

    Attributes:
        name: Its name in the model.
        swapped: Whether it is swapped.
        compute_ms: How long its kernels took.
        copy_ms: How long its copy was under way.
        stall_ms: How long compute waited for its copy.
    """

    name: str
    swapped: bool
    compute_ms: float | None = None
    copy_ms: float | None = None
    stall_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What happened in a run; None is unknown.

    Attributes:
        forwards: Forwards that ran blocks.
        empty_forwards: Forwards that ran none.
        timed_forwards: Forwards of which every block was timed.
        forward_ms: Duration of a forward that ran blocks, the median.
        stall_ms: What compute waited for copies in a forward, the mean over the timed ones.
        onloads: Copies of a slab into a slot.
        onloaded_bytes: Bytes of these.
        placed_bytes: Bytes of residents and small tensors that were copied to the device.
        returned_bytes: Bytes copied back to the host: of buffers that a forward has changed, never of weights.
        copy_bytes_per_s: Bytes over the time in which copies were under way.
        peak_weight_bytes: Device memory that block weights took at most.
        activation_bytes: Device memory that forwards took above the weights at most.
        slab_bytes: Host memory of the slabs.
        pinned_bytes: The part of the host's memory that we have page-locked.
        original_bytes: Host memory that the loader keeps for the same weights, beside the slabs.
        refusals: What kept slabs from being page-locked as planned.
        replans: Why another plan took the first one's place, each time.
        blocks: Times of each block in execution order; empty if none were taken.
        samples: Of the device and the host while the run lasted.
    """

    forwards: int
    empty_forwards: int = 0
    timed_forwards: int = 0
    forward_ms: float | None = None
    stall_ms: float | None = None
    onloads: int
    onloaded_bytes: int
    placed_bytes: int
    returned_bytes: int
    copy_bytes_per_s: float | None = None
    peak_weight_bytes: int | None
    activation_bytes: int | None = None
    slab_bytes: int
    pinned_bytes: int
    original_bytes: int = 0
    refusals: tuple[str, ...] = ()
    replans: tuple[str, ...] = ()
    blocks: tuple[BlockTimes, ...] = ()
    samples: Samples | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A run beside its plan; None is unknown.

    Attributes:
        title: What ran on what, such as "WanModel on NVIDIA GeForce RTX 4090".
        plan: The plan that was followed last.
        prediction: A forward with it in virtual time, in ms.
        activation_bytes: Device memory that forwards were expected to take above the weights.
        link_bytes_per_s: Speed of the link that the prediction holds for.
        measured: What happened.
        notes: What no figure tells, as sentences: where the trace is, what was left to others.
    """

    title: str
    plan: SwapPlan
    prediction: ForwardTime | None = None
    activation_bytes: int | None = None
    link_bytes_per_s: float | None = None
    measured: Measured
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        timed, planned = len(self.measured.blocks), len(self.plan.swapped)
        if timed not in (0, planned):
            raise ValueError(f"a report expects times of all {planned} blocks of its plan or of none but got {timed}")


def as_json(report: RunReport) -> dict[str, object]:
    """The same for a program: objects, lists, numbers, texts and null alone, with units in the names."""
    measured = asdict(report.measured)
    blocks = measured.pop("blocks")
    tiers = [None if tier is None else tier.value for tier in report.plan.tiers]
    return {
        "title": report.title,
        "planned": _planned(report),
        "measured": _plain(measured),
        "blocks": [{"tier": tier} | block for tier, block in zip(tiers, blocks, strict=False)],
        "notes": list(report.notes),
    }


def host_tiers(plan: SwapPlan) -> dict[str, int]:
    """How many swapped blocks come from which host tier."""
    return dict(Counter(tier.value for tier in plan.tiers if tier is not None))


def _planned(report: RunReport) -> dict[str, object]:
    plan, prediction = report.plan, report.prediction
    return {
        "blocks": len(plan.swapped),
        "blocks_swapped": plan.swapped_count,
        "swapped": list(plan.swapped_indices),
        "slots": plan.slots,
        "slot_bytes": plan.slot_bytes,
        "streams": plan.streams,
        "overlap": plan.overlap,
        "host_tiers": host_tiers(plan),
        "weight_bytes": plan.device_bytes,
        "budget_bytes": plan.budget_bytes,
        "over_ceiling": plan.over_ceiling,
        "activation_bytes": report.activation_bytes,
        "slab_bytes": plan.slab_bytes,
        "pinned_bytes": plan.pinned_bytes,
        "staging_bytes": plan.staging_bytes,
        "streamed_bytes_per_forward": plan.streamed_bytes,
        "link_bytes_per_s": report.link_bytes_per_s,
        "forward_ms": None if prediction is None else prediction.elapsed,
        "compute_ms": None if prediction is None else prediction.compute,
        "transfer_ms": None if prediction is None else prediction.transferred,
        "stall_ms": None if prediction is None else prediction.stall,
        "reasons": list(plan.reasons),
    }


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
