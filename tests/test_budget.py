"""The balance of VRAM and DRAM, in numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.plan.budget import MemoryBudget, make_budget
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, PlanInputs
from wanvideo_enhanced_blockswap.hardware.units import GIB, MIB

BYTE_FIELDS = [field.name for field in dataclasses.fields(PlanInputs) if field.name.endswith("_bytes")]

generated = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same examples in every run, on machines of any speed."""

CARD = PlanInputs(
    device_total_bytes=24 * GIB,
    device_free_bytes=20 * GIB,
    unused_cache_bytes=2 * GIB,
    own_bytes=1 * GIB,
    host_available_bytes=50 * GIB,
    host_room_bytes=45 * GIB,
    pin_budget_bytes=30 * GIB,
)
"""24 GB of which 1 GB is in use by others and by activations."""


def balance(readings: PlanInputs = CARD, *, activations: int | None = None, **options: Any) -> MemoryBudget:
    """The budget with the widgets' defaults, and these bytes of activations."""
    seen = None if activations is None else Activations(nbytes=activations, is_measured=True)
    return make_budget(dataclasses.replace(readings, **options, activations=seen))


def gib(bytes_: int) -> float:
    """For comparisons up to the byte that a cut fraction may differ by."""
    return pytest.approx(bytes_ / GIB, abs=2 / GIB)


READINGS = st.builds(
    lambda total, free, **rest: PlanInputs(device_total_bytes=total, device_free_bytes=min(free, total), **rest),
    total=st.integers(0, 1 << 40),
    free=st.integers(0, 1 << 40),
    unused_cache_bytes=st.integers(0, 1 << 38),
    own_bytes=st.integers(0, 1 << 38),
    host_available_bytes=st.integers(0, 1 << 42),
    host_room_bytes=st.integers(0, 1 << 42),
    pin_budget_bytes=st.integers(0, 1 << 42),
)


@pytest.mark.parametrize(
    ("term", "expected_gib"),
    [
        ("weight_bytes", 11),
        ("limit_bytes", 23),
        ("host_bytes", 45),
        ("host_limit_bytes", 50),
    ],
)
def test_each_term_of_the_balance_of_a_24_gib_card(term: str, expected_gib: float) -> None:
    assert gib(getattr(balance(), term)) == expected_gib


def test_the_balance_is_that_of_the_documented_example() -> None:
    total, used, reserve = int(32606.6 * MIB), 2048 * MIB, int(3260.66 * MIB)
    readings = PlanInputs(
        device_total_bytes=total,
        device_free_bytes=total - used,
        host_available_bytes=0,
        host_room_bytes=0,
        pin_budget_bytes=0,
    )
    budget = balance(readings, vram_threshold_percent=90.0, bandwidth_target=1.0)
    assert budget.weight_bytes == pytest.approx(total - used - reserve, abs=MIB)


@pytest.mark.parametrize(
    ("threshold", "target", "activations_gib", "expected_gib"),
    [
        pytest.param(50.0, 0.8, None, 11, id="the ceiling"),
        pytest.param(30.0, 0.8, None, 6.2, id="a lower ceiling"),
        pytest.param(90.0, 0.8, None, 16.48, id="the share of what is available"),
        pytest.param(90.0, 1.0, None, 20.6, id="all that is available"),
        pytest.param(50.0, 0.1, None, 2.06, id="a small share"),
        pytest.param(50.0, 0.8, 4, 11, id="activations that leave enough"),
        pytest.param(50.0, 0.8, 15, 5.6, id="activations that leave less"),
        pytest.param(50.0, 0.8, 21, 0, id="activations that leave nothing"),
    ],
)
def test_the_smallest_term_is_the_budget_for_weights(
    threshold: float, target: float, activations_gib: int | None, expected_gib: float
) -> None:
    activations = None if activations_gib is None else activations_gib * GIB
    budget = balance(vram_threshold_percent=threshold, bandwidth_target=target, activations=activations)
    assert gib(budget.weight_bytes) == expected_gib


@pytest.mark.parametrize("name", BYTE_FIELDS)
def test_a_negative_reading_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected bytes, 0 or more, got -1"):
        dataclasses.replace(CARD, **{name: -1})


def test_a_free_card_may_be_free_to_the_last_byte() -> None:
    assert balance(dataclasses.replace(CARD, device_free_bytes=24 * GIB)).limit_bytes == 24 * GIB


@pytest.mark.parametrize("term", ["weight_bytes", "limit_bytes"])
def test_a_card_that_others_fill_leaves_nothing(term: str) -> None:
    full = dataclasses.replace(CARD, device_free_bytes=0, unused_cache_bytes=0, own_bytes=0)
    assert getattr(balance(full), term) == 0


@generated
@given(READINGS, st.floats(30, 90), st.floats(0.1, 1), st.none() | st.integers(0, 1 << 40))
def test_the_budget_is_never_negative_and_never_above_what_is_left(
    readings: PlanInputs, threshold: float, target: float, activations: int | None
) -> None:
    budget = balance(readings, vram_threshold_percent=threshold, bandwidth_target=target, activations=activations)
    assert 0 <= budget.weight_bytes <= budget.limit_bytes <= readings.device_total_bytes


@pytest.mark.parametrize("counter", ["own_bytes", "unused_cache_bytes"])
@generated
@given(readings=READINGS, share=st.floats(0, 1))
def test_the_budget_does_not_change_when_our_weights_or_the_cache_take_free_memory(
    counter: str, readings: PlanInputs, share: float
) -> None:
    moved = int(share * readings.device_free_bytes)
    after = dataclasses.replace(
        readings,
        device_free_bytes=readings.device_free_bytes - moved,
        **{counter: getattr(readings, counter) + moved},
    )
    assert balance(after) == balance(readings)
