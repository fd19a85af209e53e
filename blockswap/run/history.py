"""What forwards of each workload measured, over all runs: durations, memory above the weights, refusals of memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.swap_plan import Activations

FEWER_SLOTS = (2, 1)
"""Slots, with everything swapped, after the first and the second refusal; no plan is smaller than the last."""

MORE_ROOM = 1.1
"""A larger plan is tried again once there is this many times the memory that there was when it ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What determines a forward's memory and time.

    Attributes:
        tokens: Length of all sequences of a batch together.
        expected_activation_bytes: Device memory it is expected to need above the weights, from
            `activation_bytes` in model/activations.py; None if unknown.
        latent_frames: Frames of the latents; None if unknown.
    """

    tokens: int
    expected_activation_bytes: int | None = None
    latent_frames: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int):
            raise TypeError(f"expected a number of tokens, as in Workload(tokens=32_760), got {self.tokens!r}")


@dataclass(slots=True)
class WorkloadStats:
    """What forwards of one workload measured; None is unknown.

    Attributes:
        compute_ms: Duration of each block.
        activation_bytes: The highest peak above the weights since memory last ran out.
        foreseen_bytes: That peak as its first block gave it on fake tensors; a later one may need more.
        refusals: How often memory has run out.
        most_slots: Slots that plans may have because of that, with everything swapped; None for no limit.
        room_bytes: Device memory for weights and activations when it last ran out.
    """

    compute_ms: tuple[float, ...] | None = None
    activation_bytes: int | None = None
    foreseen_bytes: int | None = None
    refusals: int = 0
    most_slots: int | None = None
    room_bytes: int = 0


class WorkloadHistory:
    """The history of one transformer, over all its runs."""

    def __init__(self) -> None:
        self._seen: dict[Workload | None, WorkloadStats] = {}
        self._in_this_run: set[Workload | None] = set()

    def of(self, workload: Workload | None) -> WorkloadStats:
        """The entry of this workload, made if there is none."""
        stats = self._seen.get(workload)
        if stats is None:
            stats = self._seen[workload] = WorkloadStats()
        return stats

    def start(self, workload: Workload | None) -> bool:
        """Notes that a forward of this workload comes next. Returns whether it is the run's first."""
        if workload in self._in_this_run:
            return False
        self._in_this_run.add(workload)
        return True

    def withdraw(self, workload: Workload | None) -> None:
        """Forgets a workload that was started: the forward will have another one."""
        self._in_this_run.discard(workload)

    def end_run(self) -> None:
        """Ends the run. What it measured stays, for the next run of the same workload."""
        self._in_this_run.clear()

    @property
    def largest_workload(self) -> Workload | None:
        """The workload of this run that needs most memory above the weights; None if unknown."""
        known = [(found.nbytes, one) for one in self._in_this_run if (found := self.activations(one)) is not None]
        return max(known, key=lambda pair: pair[0])[1] if known else None

    def activations(self, workload: Workload | None) -> Activations | None:
        """Memory that forwards of this workload need above the weights: measured, else the larger of foreseen and
        expected, else None.
        """
        seen = self._seen.get(workload)
        if seen is not None and seen.activation_bytes is not None:
            return Activations(nbytes=seen.activation_bytes, is_measured=True)
        expected = None if workload is None else workload.expected_activation_bytes
        if seen is not None and seen.foreseen_bytes is not None:
            expected = max(seen.foreseen_bytes, expected or 0)  # VACE's first block comes before all hints
        return None if expected is None else Activations(nbytes=expected, is_measured=False)

    def learn_activations(self, workload: Workload | None, nbytes: int, *, is_automatic: bool) -> None:
        """Keeps a forward's peak above the weights.

        After one refusal, automatic tuning may plan larger again, since it now knows the peak. After a second the plan
        stays small: then the peak does not explain the refusal (fragmentation, for example).
        """
        seen = self.of(workload)
        seen.activation_bytes = max(nbytes, seen.activation_bytes or 0)
        if is_automatic and seen.refusals == 1:
            seen.most_slots = None

    def shrink(self, workload: Workload | None, *, slots: int | None, room_bytes: int) -> bool:
        """Notes that memory ran out in a forward of this workload, or in the adopt before it.

        Args:
            workload: The workload.
            slots: Slots of the present plan if it swaps all blocks; else None.
            room_bytes: Device memory that there was for weights and activations.

        Returns:
            Whether there is a smaller plan.
        """
        seen = self.of(workload)
        seen.refusals += 1
        seen.activation_bytes = None  # the forward that failed needed more than any before it
        seen.room_bytes = room_bytes
        smaller = [fewer for fewer in FEWER_SLOTS if slots is None or fewer < slots]
        seen.most_slots = smaller[0] if smaller else FEWER_SLOTS[-1]
        return bool(smaller)

    def forgive(self) -> None:
        """Forgets refusals, since other settings may fit."""
        for seen in self._seen.values():
            seen.refusals, seen.most_slots = 0, None

    def most_slots(self, room_bytes: int) -> int | None:
        """Slots that plans of this run may have, with everything swapped; None for no limit.

        Args:
            room_bytes: Device memory for weights and activations now; a refusal counts until there is clearly more.
        """
        seen = [self._seen[one] for one in self._in_this_run if one in self._seen]
        limits = [s.most_slots for s in seen if s.most_slots is not None and room_bytes <= MORE_ROOM * s.room_bytes]
        return min(limits, default=None)
