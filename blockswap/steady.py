"""SteadyMachine: readings that, once had, do not fail a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ..hardware import READING_FAILURES, DeviceMemory, DeviceSpec, HostMemory, LinkSpeed
from .errors import PlanError
from .machine import Machine

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SteadyMachine:
    """A machine for a run that is under way: a reading that fails is the one before, or unknown, with one warning of
    each kind. Only a plan that has never had a reading of memory fails for want of it.

    Args:
        inner: Where readings come from.
    """

    def __init__(self, inner: Machine) -> None:
        self._inner = inner
        self._memory: DeviceMemory | None = None
        self._host: HostMemory | None = None
        self._said: set[str] = set()

    @property
    def spec(self) -> DeviceSpec:
        """What the device is."""
        return self._inner.spec

    def memory(self) -> DeviceMemory:
        """As read now, or last.

        Raises:
            PlanError: It has never been read.
        """
        self._memory = self._known("device memory", self._inner.memory, self._memory)
        return self._memory

    def host(self) -> HostMemory:
        """As read now, or last.

        Raises:
            PlanError: It has never been read.
        """
        self._host = self._known("host memory", self._inner.host, self._host)
        return self._host

    def unused_cache_bytes(self) -> int:
        """0 if it cannot be read: less is counted as free then."""
        return self._ask("torch's cache", self._inner.unused_cache_bytes) or 0

    def allocated_bytes(self) -> int | None:
        """What tensors of this process take on the device; None if it cannot be read."""
        return self._ask("allocated device memory", self._inner.allocated_bytes)

    def peak_bytes(self) -> int | None:
        """The most that they have taken; None if it cannot be read."""
        return self._ask("the peak of device memory", self._inner.peak_bytes)

    def reset_peak(self) -> bool:
        """Whether the peak counts from here."""
        return bool(self._ask("the peak of device memory", self._inner.reset_peak))

    def link(self, *, again: bool = False) -> LinkSpeed | None:
        """The measured link; None where it cannot be measured."""
        return self._ask("the speed of the link", lambda: self._inner.link(again=again))

    def _known(self, what: str, read: Callable[[], T], before: T | None) -> T:
        found = self._ask(what, read)
        if found is not None:
            return found
        if before is not None:
            return before
        raise PlanError(f"a plan expects a reading of {what} but it failed; see the warning before this")

    def _ask(self, what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except READING_FAILURES as failure:
            if what not in self._said:
                self._said.add(what)
                logger.warning("%s cannot be read: %s; what was known before is used", what, failure)
            return None


class PeakMeter:
    """What a forward takes on the device above what is there before it.

    Args:
        machine: Where readings come from.
    """

    def __init__(self, machine: SteadyMachine) -> None:
        self._machine = machine
        self._was_reset = False
        self._before: int | None = None
        self._peak: int | None = None

    def begin(self, *, anew: bool) -> None:
        """A forward begins.

        Args:
            anew: The peak counts from here, if the device lets it.
        """
        self._was_reset = anew and self._machine.reset_peak()
        self._before, self._peak = self._machine.allocated_bytes(), self._machine.peak_bytes()

    def taken_bytes(self) -> int | None:
        """What it has taken by its end; None if that is not to be known: a peak that was not reset and has not grown
        may be an earlier one, of something else.
        """
        now = self._machine.peak_bytes()
        if now is None or self._before is None or self._peak is None or not (self._was_reset or now > self._peak):
            return None
        return now - self._before
