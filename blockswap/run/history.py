"""What forwards of each workload have shown over all runs: durations, memory above the weights, refusals of memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.swap_plan import Activations

FEWER_SLOTS = (2, 1)
"""Slots with everything swapped, after a first and a second refusal: a plan cannot be smaller than the last."""


MORE_ROOM = 1.1
"""Times the room there was when memory ran out, from which on a larger plan is tried again: others have given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one forward is given to do, as far as memory and time depend on it.

    Attributes:
        tokens: Length of all sequences of a batch together.
        expected_activation_bytes: Device memory it is expected to take above the weights, from
            `activation_bytes` in model/wan.py; None if it is not known.
        latent_frames: Frames of the latents; None if it is not known.
    """

    tokens: int
    expected_activation_bytes: int | None = None
    latent_frames: int | None = None


@dataclass(slots=True)
class WorkloadStats:
    """What forwards of one workload have shown.

    Attributes:
        compute_ms: Duration of each block.
        activation_bytes: The most they have taken above the weights since memory last ran out.
        refusals: How often memory has run out.
        most_slots: Slots that plans may have for that, with everything swapped; None if nothing limits them.
        room_bytes: Device memory that there was for all of ours when it last ran out.
    """

    compute_ms: tuple[float, ...] | None = None
    activation_bytes: int | None = None
    refusals: int = 0
    most_slots: int | None = None
    room_bytes: int = 0


class WorkloadHistory:
    """Of one transformer, over all its runs."""

    def __init__(self) -> None:
        self._seen: dict[Workload | None, WorkloadStats] = {}
        self._in_this_run: set[Workload | None] = set()

    def of(self, workload: Workload | None) -> WorkloadStats:
        """What forwards of this workload have shown; to be added to."""
        stats = self._seen.get(workload)
        if stats is None:
            stats = self._seen[workload] = WorkloadStats()
        return stats

    def start(self, workload: Workload | None) -> bool:
        """A forward with this workload comes next; whether the run has had none like it."""
        if workload in self._in_this_run:
            return False
        self._in_this_run.add(workload)
        return True

    def withdraw(self, workload: Workload | None) -> None:
        """This workload will not come after all: its memory does not count."""
        self._in_this_run.discard(workload)

    def end_run(self) -> None:
        """The run is over: what its forwards took is remembered for the next that has the like."""
        self._in_this_run.clear()

    @property
    def largest_workload(self) -> Workload | None:
        """The workload of this run that takes most above the weights, as far as that is known."""
        known = [(found.nbytes, one) for one in self._in_this_run if (found := self.activations(one)) is not None]
        return max(known, key=lambda pair: pair[0])[1] if known else None

    def activations(self, workload: Workload | None) -> Activations | None:
        """What forwards of this workload take above the weights: measured, else expected."""
        seen = self._seen.get(workload)
        if seen is not None and seen.activation_bytes is not None:
            return Activations(nbytes=seen.activation_bytes, is_measured=True)
        if workload is None or workload.expected_activation_bytes is None:
            return None
        return Activations(nbytes=workload.expected_activation_bytes, is_measured=False)

    def learn_activations(self, workload: Workload | None, nbytes: int, *, is_automatic: bool) -> None:
        """A forward took this much above the weights at its peak.

        Automatic plans are made from it: a first refusal, which came before it was known, is made good by that. A
        second shows what no figure does, such as fragmentation, and the plan stays small.
        """
        seen = self.of(workload)
        seen.activation_bytes = max(nbytes, seen.activation_bytes or 0)
        if is_automatic and seen.refusals == 1:
            seen.most_slots = None

    def shrink(self, workload: Workload | None, *, slots: int | None, room_bytes: int) -> bool:
        """Memory has run out in a forward of this workload, or in the adopt before it.

        Args:
            workload: The workload.
            slots: Of the plan that was followed, if it had everything swapped; None if it had not.
            room_bytes: Device memory that there was for all of ours.

        Returns:
            Whether there is a smaller plan.
        """
        seen = self.of(workload)
        seen.refusals += 1
        seen.activation_bytes = None  # the forward that failed has not shown its peak, and earlier ones took less
        seen.room_bytes = room_bytes
        smaller = [fewer for fewer in FEWER_SLOTS if slots is None or fewer < slots]
        seen.most_slots = smaller[0] if smaller else FEWER_SLOTS[-1]
        return bool(smaller)

    def forgive(self) -> None:
        """Other settings: what did not fit under the old ones may fit now."""
        for seen in self._seen.values():
            seen.refusals, seen.most_slots = 0, None

    def most_slots(self, room_bytes: int) -> int | None:
        """Slots that plans for this run may have, everything swapped; None where nothing limits them.

        Args:
            room_bytes: Device memory that there is for all of ours: a refusal counts until there is clearly more.
        """
        seen = [self._seen[one] for one in self._in_this_run if one in self._seen]
        limits = [s.most_slots for s in seen if s.most_slots is not None and room_bytes <= MORE_ROOM * s.room_bytes]
        return min(limits, default=None)
