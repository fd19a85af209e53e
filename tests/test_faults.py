"""Every place at which the engine asks the outside for something fails once, at each of its calls in a full run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import INTERRUPTED, PLACES, Place, strike

AT_LEAST = 1000


@pytest.fixture(scope="module")
def injected(pytestconfig: pytest.Config) -> Iterator[dict[str, int]]:
    """How many faults each place has had."""
    counts: dict[str, int] = {}
    yield counts
    if len(counts) == len(PLACES) + len(INTERRUPTED):
        terminal = pytestconfig.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"\n{sum(counts.values()):,} faults injected at {len(PLACES)} places")
        assert sum(counts.values()) >= AT_LEAST


@pytest.mark.parametrize("place", [*PLACES, *INTERRUPTED], ids=lambda place: place.name)
def test_whichever_call_fails_the_result_is_right_or_the_error_ours_and_nothing_is_left(
    place: Place, tmp_path: Path, injected: dict[str, int]
) -> None:
    for k in itertools.count():
        if not strike(place, k, tmp_path):
            break
        injected[place.name] = k + 1
    assert injected.get(place.name, 0) > 0, "the place is never asked"
