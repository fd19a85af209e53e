"""The ring of slots as a state machine, and the virtual time that a forward takes with it; pure, no torch.

The swapper follows `Ring`; `VirtualTime` drives the very same `Ring` with durations in place of copies. What the plan
predicts, what `simulate` prints and what runs on the GPU are therefore one schedule.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

STEPS_KEPT = 512
"""Steps worked out once and kept: a model's blocks times the few patterns in which its forwards alternate."""


@dataclass(frozen=True, slots=True)
class Onload:
    """Copy swapped block `block` into slot `slot`."""

    block: int
    slot: int


@dataclass(frozen=True, slots=True)
class Step:
    """What to do at the start of a block or at the end of a forward, in this order: release, onload, use.

    Attributes:
        released: Slot of the block that ran before, given back now; None if that block was resident.
        onloads: Copies to start, the soonest needed first.
        slot: Slot that holds the block about to run; None for a resident block and at the end of a forward.
    """

    released: int | None
    onloads: tuple[Onload, ...]
    slot: int | None


class Expectation:
    """Which blocks the coming forwards are expected to run.

    All of them, unless the forwards have repeated: when the last p forwards ran the same blocks as the p before them
    (p up to `LONGEST_PERIOD`), the next is expected to go on so. Guidance that skips blocks in every second forward,
    or leaves out the VACE blocks there, is learnt after two rounds. Forwards that ran nothing do not count. Taking the
    last forward alone for the rule would be wrong at every forward of an alternation.
    """

    LONGEST_PERIOD = 3
    """Forwards in a step: conditional, unconditional, and one more for guidance by a weakened model."""

    def __init__(self, count: int) -> None:
        self._every = (1 << count) - 1
        self._history: list[int] = []
        self._ran = 0
        self.this_forward = self._every
        self.next_forward = self._every

    def runs(self, block: int) -> None:
        """Block `block` runs; if that was not expected, every block is until the forward ends."""
        self._ran |= 1 << block
        if not self.this_forward >> block & 1:
            self.this_forward = self.next_forward = self._every

    def ends(self) -> None:
        """The forward has ended."""
        if self._ran:
            self._history = [*self._history, self._ran][-2 * self.LONGEST_PERIOD :]
            self._ran = 0
        self.this_forward = self._after(self._history)
        self.next_forward = self._after([*self._history, self.this_forward])

    def _after(self, history: Sequence[int]) -> int:
        # The longest first: of three forwards, two may be alike.
        for period in range(self.LONGEST_PERIOD, 0, -1):
            if len(history) >= 2 * period and history[-period:] == history[-2 * period : -period]:
                return history[-period]
        return self._every


class Ring:
    """Which swapped block owns which slot.

    At any time the ring wants to hold the swapped blocks that are expected to run next, as many as there are slots,
    counted cyclically from the block that runs (or, between forwards, from the first). What it lacks is onloaded into
    the slots whose content is used farthest ahead. Everything follows from this one rule: prefetch across the end of a
    forward; a block that was passed by loses its slot; a slot that holds the block wanted is not copied again; a block
    that comes unannounced is onloaded at once; with as many slots as swapped blocks nothing moves after the first
    forward.

    Args:
        swapped: For each block in execution order, whether it is swapped.
        slots: Number of slots; cut to the number of swapped blocks.
    """

    def __init__(self, swapped: Sequence[bool], *, slots: int) -> None:
        self._order = tuple(i for i, is_swapped in enumerate(swapped) if is_swapped)
        if self._order and slots < 1:
            raise ValueError(f"expected at least 1 slot for {len(self._order)} swapped blocks, got {slots}")
        self._count = len(swapped)
        self._swapped = tuple(swapped)
        self._content: tuple[int | None, ...] = (None,) * min(slots, len(self._order))
        self._in_use: int | None = None
        self._expected = Expectation(self._count)
        self._steps: dict[tuple[object, ...], tuple[Step, tuple[int | None, ...]]] = {}

    @property
    def content(self) -> tuple[int | None, ...]:
        """The block that each slot holds or is being filled with; None for a slot never filled since the last reset."""
        return self._content

    def enter(self, block: int) -> Step:
        """Block `block` is about to run, whatever ran before it."""
        self._expected.runs(block)
        return self._step(block, is_running=True)

    def leave(self) -> Step:
        """The forward has ended: give back the last slot and prefetch for the next forward."""
        self._expected.ends()
        return self._step(0, is_running=False)

    def forget(self, block: int) -> None:
        """The bytes of `block` have changed on the host: a slot that holds it holds nothing of use."""
        self._content = tuple(None if held == block else held for held in self._content)

    def reset(self) -> None:
        """No slot holds anything: after an exception, or when the window has been given up."""
        self._content = (None,) * len(self._content)
        self._in_use = None
        self._expected = Expectation(self._count)

    def _step(self, position: int, *, is_running: bool) -> Step:
        """Gives the slot in use back and onloads what is due when the block at `position` runs. Steps repeat with the
        forwards, so each is worked out once.
        """
        expected = self._expected
        key = position, is_running, self._in_use, self._content, expected.this_forward, expected.next_forward
        found = self._steps.get(key)
        if found is None:
            if len(self._steps) >= STEPS_KEPT:
                self._steps.clear()
            onloads, content = self._move(position)
            slot = content.index(position) if is_running and self._swapped[position] else None
            found = self._steps[key] = Step(self._in_use, onloads, slot), content
        step, self._content = found
        self._in_use = step.slot
        return step

    def _move(self, position: int) -> tuple[tuple[Onload, ...], tuple[int | None, ...]]:
        """The onloads that are due when the block at `position` runs, and what the slots hold with them."""
        window = self._window(position)
        missing = [block for block in window if block not in self._content]
        victims = [slot for slot, held in enumerate(self._content) if held is None or held not in window]
        victims.sort(key=lambda slot: self._distance(self._content[slot], position), reverse=True)
        onloads = tuple(Onload(block, slot) for block, slot in zip(missing, victims, strict=False))
        content = list(self._content)
        for onload in onloads:
            content[onload.slot] = onload.block
        return onloads, tuple(content)

    def _window(self, position: int) -> tuple[int, ...]:
        """The blocks that the slots should hold when the block at `position` runs, the soonest used first."""
        this, following = self._expected.this_forward, self._expected.next_forward
        ahead = [i for i in self._order if i >= position and this >> i & 1]
        ahead += [i for i in self._order if i not in ahead and following >> i & 1]
        ahead += [i for i in self._order if i not in ahead]
        return tuple(ahead[: len(self._content)])

    def _distance(self, block: int | None, position: int) -> int:
        """How many blocks ahead of `position` a slot's content is used; an empty slot counts as never."""
        return self._count if block is None else (block - position) % self._count


@dataclass(frozen=True, slots=True)
class ForwardTime:
    """One forward in virtual time, in the unit of the durations given.

    Attributes:
        elapsed: From the end of the forward before to the end of this one.
        compute: Sum of the durations of the blocks that ran.
        stall: What compute waited for copies: the rest of `elapsed`.
        transferred: Link time of the copies that were started in this forward.
        onloads: Number of those copies.
    """

    elapsed: float
    compute: float
    stall: float
    transferred: float
    onloads: float


class VirtualTime:
    """Forwards in virtual time: one compute stream, one link whose copies run one behind the other, no host cost.

    Args:
        ring: The ring to drive; used up by it.
        compute: Duration of each block.
        transfer: Link time of each block's onload (of resident blocks: not read).
        blocking: Blocks whose onload blocks the host, so that compute cannot be queued while it lasts.
    """

    def __init__(
        self,
        ring: Ring,
        *,
        compute: Sequence[float],
        transfer: Sequence[float],
        blocking: Container[int] = (),
    ) -> None:
        self._ring = ring
        self._compute = compute
        self._transfer = transfer
        self._blocking = blocking
        self._now = 0.0
        self._link_idle_at = 0.0
        self._free_at = [0.0] * len(ring.content)
        self._ready_at = [0.0] * len(ring.content)
        self._stall = 0.0
        self._busy = 0.0
        self._onloads = 0

    def forward(self, blocks: Iterable[int]) -> ForwardTime:
        """Run `blocks` in this order, then end the forward."""
        begin, compute, self._stall, self._busy, self._onloads = self._now, 0.0, 0.0, 0.0, 0
        for block in blocks:
            step = self._ring.enter(block)
            self._apply(step)
            if step.slot is not None:
                self._stall_until(self._ready_at[step.slot])
            self._now += self._compute[block]
            compute += self._compute[block]
        self._apply(self._ring.leave())
        return ForwardTime(self._now - begin, compute, self._stall, self._busy, self._onloads)

    def _apply(self, step: Step) -> None:
        if step.released is not None:
            self._free_at[step.released] = self._now
        for onload in step.onloads:
            # A copy waits for its slot's free event; copies behind it on the same streams wait with it.
            begin = max(self._link_idle_at, self._free_at[onload.slot])
            self._link_idle_at = self._ready_at[onload.slot] = begin + self._transfer[onload.block]
            self._busy += self._transfer[onload.block]
            self._onloads += 1
            if onload.block in self._blocking:
                self._stall_until(self._link_idle_at)

    def _stall_until(self, moment: float) -> None:
        self._stall += max(0.0, moment - self._now)
        self._now = max(self._now, moment)


def spread(count: int, swapped: int) -> tuple[bool, ...]:
    """`swapped` of `count` blocks, as evenly apart as whole numbers allow, the last one always among them.

    The i-th block is swapped if the line of slope `swapped / count` passes a whole number there (Bresenham's line).
    """
    return tuple((i + 1) * swapped // count > i * swapped // count for i in range(count))


SETTLING_FORWARDS = 8
"""Forwards until the times repeat: the ring fills in one, and a pattern of three is learnt after two rounds of it."""


def steady_time(time: VirtualTime, patterns: Sequence[Sequence[int]]) -> ForwardTime:
    """The mean forward of a long run.

    Args:
        time: A fresh timeline; used up.
        patterns: The blocks that each forward runs; the forwards go through them again and again.
    """
    settling = -(-SETTLING_FORWARDS // len(patterns)) * len(patterns)
    measured = 4 * len(patterns)
    forwards = [time.forward(patterns[i % len(patterns)]) for i in range(settling + measured)]
    return mean_forward(forwards[settling:])


def mean_forward(forwards: Sequence[ForwardTime]) -> ForwardTime:
    """The mean of several forwards."""
    n = len(forwards)
    return ForwardTime(
        elapsed=sum(f.elapsed for f in forwards) / n,
        compute=sum(f.compute for f in forwards) / n,
        stall=sum(f.stall for f in forwards) / n,
        transferred=sum(f.transferred for f in forwards) / n,
        onloads=sum(f.onloads for f in forwards) / n,
    )
