"""Vector clocks over memory: of two accesses to the same bytes, one a write, one must happen before the other; pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TransferError

HOST = "host"
WORKER = "worker"

Clock = dict[str, int]
"""For each actor, how many of its accesses are known to be over."""


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


class RaceDetector:
    """Every access to memory that a later one could race with."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}
        self._accesses: list[_Access] = []

    def clock(self, actor: str) -> Clock:
        """What `actor` knows to be over, now."""
        return dict(self._clocks.get(actor, {}))

    def join(self, actor: str, clock: Clock) -> None:
        """`actor` goes on only after all that `clock` knows of."""
        mine = self._clocks.setdefault(actor, {})
        for other, time in clock.items():
            if time > mine.get(other, 0):
                mine[other] = time

    def read(self, actor: str, address: int, nbytes: int, what: str) -> None:
        """`actor` reads `nbytes` at `address`.

        Raises:
            TransferError: A write to some of these bytes does not happen before.
        """
        self._add(actor, address, nbytes, what, is_write=False)

    def write(self, actor: str, address: int, nbytes: int, what: str) -> None:
        """`actor` writes `nbytes` at `address`.

        Raises:
            TransferError: A read or write of some of these bytes does not happen before.
        """
        self._add(actor, address, nbytes, what, is_write=True)

    def forget(self, address: int, nbytes: int) -> None:
        """Drops what is known of this memory."""
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
                    f"{_described(access)} is not ordered behind the earlier {_described(earlier)} of the same bytes: "
                    "a wait for its event is missing"
                )
            # A covered access is no longer needed: what would race with it races with the new one too.
            if not (access.covers(earlier) and (is_write or (not earlier.is_write and earlier.actor == actor))):
                kept.append(earlier)
        self._accesses = [*kept, access]


def _described(access: _Access) -> str:
    kind = "write" if access.is_write else "read"
    return f"{kind} of {access.end - access.begin:,} bytes on {access.actor} ({access.what})"
