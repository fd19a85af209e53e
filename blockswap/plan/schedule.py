"""The ring of slots as a state machine, and the virtual time that a forward takes with it; pure, no torch.

The swapper follows `Ring`; `VirtualTime` drives the same `Ring` with durations instead of copies. The plan's
prediction, the output of `simulate` and the run on the GPU are therefore one schedule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import astuple, dataclass

STEPS_KEPT = 512
"""Number of cached steps: a model's blocks times the few patterns in which its forwards alternate."""


@dataclass(frozen=True, slots=True)
class Onload:
    """Copy swapped block `block` into slot `slot`."""

    block: int
    slot: int


@dataclass(frozen=True, slots=True)
class Step:
    """What to do at the start of a block or at the end of a forward, in this order: release, onload, use.

    Attributes:
        released: Slot of the previous block, free from now on; None if that block was resident.
        onloads: Copies to start, the soonest needed first.
        slot: Slot of the block about to run; None for a resident block and at the end of a forward.
    """

    released: int | None
    onloads: tuple[Onload, ...]
    slot: int | None


class Expectation:
    """Predicts which blocks the coming forwards will run, as bit masks.

    The prediction is all blocks, unless the forwards have repeated: if the last p forwards ran the same blocks as the p
    before them (p up to `LONGEST_PERIOD`), the next forward is predicted to continue the pattern. Guidance that skips
    blocks or the VACE blocks in every second forward is learnt after two rounds; a prediction from the last forward
    alone would be wrong at each of them. Forwards that ran nothing do not count.
    """

    LONGEST_PERIOD = 3
    """Forwards per step: conditional, unconditional, and one more for guidance by a weakened model."""

    def __init__(self, count: int) -> None:
        self._every = (1 << count) - 1
        self._history: list[int] = []
        self._ran = 0
        self.this_forward = self._every
        self.next_forward = self._every

    def runs(self, block: int) -> None:
        """Block `block` runs; if it was not expected, every block is expected until the forward ends."""
        self._ran |= 1 << block
        if not self.this_forward >> block & 1:
            self.this_forward = self.next_forward = self._every

    def ends(self) -> None:
        """Records the forward and predicts the next two."""
        if self._ran:
            self._history = [*self._history, self._ran][-2 * self.LONGEST_PERIOD :]
            self._ran = 0
        self.this_forward = self._after(self._history)
        self.next_forward = self._after([*self._history, self.this_forward])

    def _after(self, history: Sequence[int]) -> int:
        # The longest period first: of the three forwards of a step, two may be alike.
        for period in range(self.LONGEST_PERIOD, 0, -1):
            if len(history) >= 2 * period and history[-period:] == history[-2 * period : -period]:
                return history[-period]
        return self._every


class Ring:
    """Which swapped block owns which slot.

    The ring always wants to hold the swapped blocks that are expected to run next, as many as there are slots, counted
    cyclically from the running block (between forwards, from the first). It onloads missing blocks into the slots whose
    content is needed last. Everything follows from this rule: prefetch across the end of a forward; a block that was
    skipped loses its slot; a slot that holds a wanted block is not copied again; an unexpected block is onloaded at
    once; with as many slots as swapped blocks nothing moves after the first forward.

    Blocks of other lanes than the first have one slot for each lane, in which the same rule holds. Its copies can run
    while blocks of the first lane run, and the other way round.

    Args:
        swapped: For each block in execution order, whether it is swapped.
        slots: Number of slots of the first lane; cut to the number of its swapped blocks.
        lanes: For each block, the number of its lane; None puts all into lane 0.
    """

    def __init__(self, swapped: Sequence[bool], *, slots: int, lanes: Sequence[int] | None = None) -> None:
        self._order = tuple(i for i, is_swapped in enumerate(swapped) if is_swapped)
        self._count = len(swapped)
        self._swapped = tuple(swapped)
        self._lanes = tuple(lanes or (0,) * self._count)
        first = sum(self._lanes[i] == 0 for i in self._order)
        if first and slots < 1:
            raise ValueError(f"expected at least 1 slot for {first} swapped blocks, got {slots}")
        self._slot_lanes = slot_lanes(self._swapped, self._lanes, slots)
        self._content: tuple[int | None, ...] = (None,) * len(self._slot_lanes)
        self._in_use: int | None = None
        self._expected = Expectation(self._count)
        self._steps: dict[tuple[object, ...], tuple[Step, tuple[int | None, ...]]] = {}

    @property
    def content(self) -> tuple[int | None, ...]:
        """The block that each slot holds or is being filled with; None for an empty slot."""
        return self._content

    def enter(self, block: int) -> Step:
        """The step before block `block` runs, whatever block ran before."""
        self._expected.runs(block)
        return self._step(block, is_running=True)

    def leave(self) -> Step:
        """The step at the end of a forward: releases the last slot and prefetches for the next forward."""
        self._expected.ends()
        return self._step(0, is_running=False)

    def forget(self, block: int) -> None:
        """Empties the slot that holds `block`, whose bytes have changed on the host."""
        self._content = tuple(None if held == block else held for held in self._content)

    def reset(self) -> None:
        """Empties every slot: after an exception, or when the window has been freed."""
        self._content = (None,) * len(self._content)
        self._in_use = None
        self._expected = Expectation(self._count)

    def _step(self, position: int, *, is_running: bool) -> Step:
        """Releases the slot in use and onloads what is due when block `position` runs; cached, since steps repeat."""
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
        """The onloads that are due when block `position` runs, and the content of the slots with them."""
        this, following = self._expected.this_forward, self._expected.next_forward
        ahead = [i for i in self._order if i >= position and this >> i & 1]
        ahead += [i for i in self._order if i not in ahead and following >> i & 1]
        ahead += [i for i in self._order if i not in ahead]
        room = Counter(self._slot_lanes)
        window = []  # what the slots should hold, the soonest needed first
        for block in ahead:
            if room[self._lanes[block]]:
                room[self._lanes[block]] -= 1
                window.append(block)

        def blocks_until_use(slot: int) -> int:
            held = self._content[slot]
            return self._count if held is None else (held - position) % self._count

        victims = [slot for slot, held in enumerate(self._content) if held not in window]
        victims.sort(key=blocks_until_use, reverse=True)
        content, onloads = list(self._content), []
        for block in window:
            if block not in content:
                slot = next(slot for slot in victims if self._slot_lanes[slot] == self._lanes[block])
                victims.remove(slot)
                content[slot] = block
                onloads.append(Onload(block, slot))
        return tuple(onloads), tuple(content)


def slot_lanes(swapped: Sequence[bool], lanes: Sequence[int], slots: int) -> tuple[int, ...]:
    """The lane of each slot: up to `slots` of lane 0, and one of each other lane with a swapped block."""
    inside = [lane for is_swapped, lane in zip(swapped, lanes, strict=True) if is_swapped]
    return (0,) * min(slots, inside.count(0)) + tuple(sorted(set(inside) - {0}))


@dataclass(frozen=True, slots=True)
class ForwardTime:
    """One forward in virtual time, in the unit of the durations given.

    Attributes:
        elapsed: Time from the end of the previous forward to the end of this one.
        compute: Sum of the durations of the blocks that ran.
        stall: Time that compute waited for copies: the rest of `elapsed`.
        transferred: Link time of the copies that this forward started.
        onloads: Number of those copies.
    """

    elapsed: float
    compute: float
    stall: float
    transferred: float
    onloads: float


class VirtualTime:
    """Forwards in virtual time: one compute stream, one link that runs copies one after the other, no host cost.

    Args:
        ring: A fresh ring, which this object alone drives.
        compute: Duration of each block.
        transfer: Link time of each block's onload; not read for resident blocks.
        blocking: Blocks whose onload blocks the host, so that no compute can be queued meanwhile.
    """

    def __init__(
        self, ring: Ring, *, compute: Sequence[float], transfer: Sequence[float], blocking: Container[int] = ()
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
            # A copy waits for its slot's free event; later copies on the same streams wait with it.
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
    """A mask that swaps `swapped` of `count` blocks as evenly as possible, the last block among them.

    Block i is swapped if the line of slope `swapped / count` passes a whole number there (Bresenham's line).
    """
    return tuple((i + 1) * swapped // count > i * swapped // count for i in range(count))


def spread_bytes(sizes: Sequence[int], share: int) -> tuple[bool, ...]:
    """A mask that swaps `share / len(sizes)` of the bytes as evenly as possible; of equal blocks, `share` of them.

    Block i is swapped if the line of that slope over the bytes has passed the bytes swapped before by a whole block.
    """
    mask, passed, inside = [], 0, 0
    for size in sizes:
        passed += size
        is_swapped = share > 0 and passed * share >= len(sizes) * (inside + size)
        inside += size * is_swapped
        mask.append(is_swapped)
    return tuple(mask)


SETTLING_FORWARDS = 8
"""Forwards until the times repeat: the ring fills in one forward and learns a pattern of three in two rounds."""


def steady_time(time: VirtualTime, patterns: Sequence[Sequence[int]]) -> ForwardTime:
    """The mean forward of a long run.

    Args:
        time: A fresh timeline, which this call uses up.
        patterns: The blocks that each forward runs; the forwards repeat the patterns in this order.
    """
    settling = -(-SETTLING_FORWARDS // len(patterns)) * len(patterns)
    measured = 4 * len(patterns)
    forwards = [time.forward(patterns[i % len(patterns)]) for i in range(settling + measured)]
    return mean_forward(forwards[settling:])


def mean_forward(forwards: Sequence[ForwardTime]) -> ForwardTime:
    """The mean of each field."""
    return ForwardTime(*(sum(values) / len(forwards) for values in zip(*map(astuple, forwards), strict=True)))
