"""A race detector with vector clocks: conflicting accesses to the same bytes must be ordered by events; pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TransferError

HOST = "host"
WORKER = "worker"

Clock = dict[str, int]
"""For each actor, the number of its accesses that are known to be over."""


@dataclass(frozen=True, slots=True)
class _Access:
    begin: int
    end: int
    actor: str
    time: int
    is_write: bool
    what: str

    def covers(self, other: _Access) -> bool:
        return self.begin <= other.begin and other.end <= self.end

    def __str__(self) -> str:
        kind = "write" if self.is_write else "read"
        return f"{kind} of {self.end - self.begin:,} bytes on {self.actor} ({self.what})"


class RaceDetector:
    """Records every access with which a later one could race, and refuses unordered accesses."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}
        self._accesses: list[_Access] = []

    def clock(self, actor: str) -> Clock:
        """The accesses that `actor` knows to be over now."""
        return dict(self._clocks.get(actor, {}))

    def join(self, actor: str, clock: Clock) -> None:
        """`actor` continues only after all accesses that `clock` knows of."""
        mine = self._clocks.setdefault(actor, {})
        for other, time in clock.items():
            if time > mine.get(other, 0):
                mine[other] = time

    def read(self, actor: str, address: int, nbytes: int, what: str) -> None:
        """`actor` reads `nbytes` at `address`.

        Raises:
            TransferError: An earlier write to some of these bytes is not ordered before.
        """
        self._add(actor, address, nbytes, what, is_write=False)

    def write(self, actor: str, address: int, nbytes: int, what: str) -> None:
        """`actor` writes `nbytes` at `address`.

        Raises:
            TransferError: An earlier read or write of some of these bytes is not ordered before.
        """
        self._add(actor, address, nbytes, what, is_write=True)

    def forget(self, address: int, nbytes: int) -> None:
        """Drops all accesses to this memory."""
        end = address + nbytes
        self._accesses = [a for a in self._accesses if a.end <= address or end <= a.begin]

    def _add(self, actor: str, address: int, nbytes: int, what: str, *, is_write: bool) -> None:
        mine = self._clocks.setdefault(actor, {})
        time = mine[actor] = mine.get(actor, 0) + 1
        access = _Access(address, address + nbytes, actor, time, is_write, what)
        kept = []
        for earlier in self._accesses:
            if earlier.end <= access.begin or access.end <= earlier.begin:
                kept.append(earlier)
                continue
            if (is_write or earlier.is_write) and mine.get(earlier.actor, 0) < earlier.time:
                raise TransferError(
                    f"{access} is not ordered behind the earlier {earlier} of the same bytes: a wait for its event is "
                    "missing"
                )
            # A covered access need not be kept: what races with it races with the new one too.
            if not (access.covers(earlier) and (is_write or (not earlier.is_write and earlier.actor == actor))):
                kept.append(earlier)
        self._accesses = [*kept, access]
