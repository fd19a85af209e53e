"""Every place at which the engine asks the outside for something fails once, at each of its calls in a full run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from faults import INJECTED, INTERRUPTED, PLACES, Place, strike

AT_LEAST = 1000


@pytest.mark.parametrize("place", [*PLACES, *INTERRUPTED], ids=lambda place: place.name)
def test_whichever_call_fails_the_result_is_right_or_the_error_ours_and_nothing_is_left(
    place: Place, tmp_path: Path
) -> None:
    for k in itertools.count():
        if not strike(place, k, tmp_path):
            break
        INJECTED[place.name] = k + 1
    assert INJECTED.get(place.name, 0) > 0, "the place is never asked"


def test_faults_are_many() -> None:
    if len(INJECTED) < len(PLACES) + len(INTERRUPTED):
        pytest.skip("only some places were struck in this session")
    assert sum(INJECTED.values()) >= AT_LEAST
