"""With the node taken away, the real wrapper does what it does where the package was never installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from comfy_client import Comfy
from rig_figures import COUNTER_BYTES
from rig_variants import BLOCKS, REMOVED_FROM, VARIANTS, ours

pytestmark = pytest.mark.rig

NeverInstalled = dict[str, list[SimpleNamespace]]

STEP_BYTES = 8
"""`_step` of one layer of the wrapper, an int64."""

COMPARED = (
    *("latents", "h2d_bytes", "h2d_copies", "d2h_bytes", "d2h_copies", "d2d_bytes", "peak_bytes", "before_bytes"),
    *("after_bytes", "counters", "places", "has_own_forward", "slab_bytes", "pinned_bytes", "forwards"),
)

every_variant = pytest.mark.parametrize("variant", REMOVED_FROM)


def figures(run: SimpleNamespace) -> dict[str, Any]:
    assert not hasattr(run, "error"), run.error
    return {name: getattr(run, name) for name in COMPARED}


def taken_away(comfy: Comfy, case: dict[str, Any]) -> list[SimpleNamespace]:
    """Two runs with nothing connected to WanVideoSetBlockSwap any more and the loader cached."""
    return [comfy.run(case, swap_at="set", cached=True) for _ in range(2)]


def assert_never_installed(removed: list[SimpleNamespace], expected: SimpleNamespace) -> None:
    """The second run is in everything as where we have never been. The first one finds what a run with us has left
    behind: less on the device than one without (of models that stay there, and `_step` of layers).
    """
    assert figures(removed[1]) == figures(expected)
    first = figures(removed[0])
    assert first["before_bytes"] <= expected.before_bytes
    assert first["peak_bytes"] <= expected.peak_bytes
    assert first["h2d_bytes"] == pytest.approx(expected.h2d_bytes, abs=1024)
    # Steps that our run left on the device may come back, once, and nothing that is larger.
    steps = first["d2h_copies"] - expected.d2h_copies
    assert 0 <= steps <= COUNTER_BYTES // STEP_BYTES
    assert first["d2h_bytes"] - expected.d2h_bytes == steps * STEP_BYTES
    for name in ("latents", "after_bytes", "counters", "places", "has_own_forward", "forwards"):
        assert first[name] == getattr(expected, name), name


@every_variant
def test_set_block_swap_is_taken_away_and_the_loader_cached(
    comfy: Comfy, never_installed: NeverInstalled, variant: str
) -> None:
    comfy.latents(VARIANTS[variant], swap=ours(BLOCKS), swap_at="set")
    assert_never_installed(taken_away(comfy, VARIANTS[variant]), never_installed[variant][1])


@every_variant
def test_the_arguments_of_the_loader_are_taken_away_and_the_gate_stays(
    comfy: Comfy, never_installed: NeverInstalled, variant: str
) -> None:
    comfy.latents(VARIANTS[variant], swap=ours(BLOCKS))
    removed = comfy.run(VARIANTS[variant], cached=True)
    assert figures(removed) == figures(never_installed[variant][0])


@every_variant
def test_set_block_swap_is_taken_away_after_an_interrupt(
    comfy: Comfy, never_installed: NeverInstalled, variant: str
) -> None:
    fault = {"kind": "interrupt", "at": BLOCKS + 1}
    assert "Interrupt" in comfy.run(VARIANTS[variant], swap=ours(BLOCKS), swap_at="set", fault=fault).error
    assert_never_installed(taken_away(comfy, VARIANTS[variant]), never_installed[variant][1])
