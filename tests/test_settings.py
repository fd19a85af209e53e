"""Every widget as a typed, validated field, and the way through BLOCKSWAPARGS and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.blockswap.settings import SETTINGS_KEY, SwapSettings

generated = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same examples in every run, on machines of any speed."""

# Name, type, default and range, in the order in which saved workflows store the widgets.
WIDGETS: list[tuple[str, type, Any, tuple[float, float] | None]] = [
    ("blocks_to_swap", int, 0, (0, 48)),
    ("enable_cuda_optimization", bool, True, None),
    ("enable_dram_optimization", bool, True, None),
    ("auto_hardware_tuning", bool, True, None),
    ("vram_threshold_percent", float, 50.0, (30.0, 90.0)),
    ("num_cuda_streams", int, 8, (1, 16)),
    ("bandwidth_target", float, 0.8, (0.1, 1.0)),
    ("offload_txt_emb", bool, False, None),
    ("offload_img_emb", bool, False, None),
    ("vace_blocks_to_swap", int, 0, (0, 15)),
    ("debug_mode", bool, False, None),
]
FLAGS = [name for name, kind, _, _ in WIDGETS if kind is bool]
WHOLE = [name for name, kind, _, _ in WIDGETS if kind is int]
FRACTIONS = [name for name, kind, _, _ in WIDGETS if kind is float]
RANGES = {name: bounds for name, _, _, bounds in WIDGETS if bounds is not None}

ANY_SETTINGS = st.fixed_dictionaries(
    {name: st.booleans() for name in FLAGS}
    | {name: st.integers(int(RANGES[name][0]), int(RANGES[name][1])) for name in WHOLE}
    | {name: st.floats(*RANGES[name]) for name in FRACTIONS}
).map(lambda values: SwapSettings(**values))


def just_outside(name: str) -> list[float]:
    """The nearest values below and above the range of a widget."""
    lowest, highest = RANGES[name]
    if name in WHOLE:
        return [int(lowest) - 1, int(highest) + 1]
    return [math.nextafter(lowest, -math.inf), math.nextafter(highest, math.inf)]


def test_the_fields_stand_in_the_stored_order_of_the_widgets() -> None:
    assert [field.name for field in dataclasses.fields(SwapSettings)] == [name for name, _, _, _ in WIDGETS]


@pytest.mark.parametrize(("name", "kind", "default"), [widget[:3] for widget in WIDGETS])
def test_the_default_of_each_widget_is_the_promised_one(name: str, kind: type, default: Any) -> None:
    value = getattr(SwapSettings(), name)
    assert (type(value), value) == (kind, default)


def test_settings_cannot_be_changed_once_made() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwapSettings().blocks_to_swap = 3


@pytest.mark.parametrize("value", [0, 1, 1.0, "True", None, [], math.nan])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_takes_nothing_but_true_and_false(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name}: expected True or False, got"):
        SwapSettings(**{name: value})


@pytest.mark.parametrize("value", ["8", None, [], {}, 8 + 0j, 8.0, 8.5, math.nan, math.inf, True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_a_count_takes_nothing_but_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name}: expected a whole number from"):
        SwapSettings(**{name: value})


@pytest.mark.parametrize("value", ["0.8", None, [], {}, 1 + 0j, True, False, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FRACTIONS)
def test_a_share_takes_nothing_but_finite_numbers(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name}: expected a number from"):
        SwapSettings(**{name: value})


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_share_may_be_written_as_a_whole_number(name: str) -> None:
    assert getattr(SwapSettings(**{name: int(RANGES[name][1])}), name) == RANGES[name][1]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, ends in RANGES.items() for value in ends])
def test_both_ends_of_a_range_are_in_it(name: str, value: float) -> None:
    assert getattr(SwapSettings(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in RANGES for value in just_outside(name)])
def test_the_next_value_beyond_a_range_is_refused_with_the_range_and_the_value(name: str, value: Any) -> None:
    lowest, highest = RANGES[name]
    with pytest.raises(SettingsError) as caught:
        SwapSettings(**{name: value})
    assert all(str(part) in str(caught.value) for part in (name, lowest, highest, value))


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["positive", "negative"])
@pytest.mark.parametrize("name", RANGES)
def test_a_whole_number_beyond_any_float_is_refused_like_any_other(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        SwapSettings(**{name: value})


@generated
@given(ANY_SETTINGS)
def test_settings_come_back_from_blockswapargs_as_they_went_in(chosen: SwapSettings) -> None:
    assert SwapSettings.from_blockswapargs(chosen.to_blockswapargs()) == chosen


@generated
@given(ANY_SETTINGS)
def test_blockswapargs_are_plain_data_that_json_keeps(chosen: SwapSettings) -> None:
    assert SwapSettings.from_blockswapargs(json.loads(json.dumps(chosen.to_blockswapargs()))) == chosen


@pytest.mark.parametrize("key", ["blocks_to_swap", "vace_blocks_to_swap"])
def test_the_wrapper_is_told_to_keep_every_block_on_the_host_whatever_is_asked(key: str) -> None:
    arguments = SwapSettings(blocks_to_swap=3, vace_blocks_to_swap=2).to_blockswapargs()
    assert isinstance(arguments[key], int)
    assert arguments[key] > 1000


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["offload_txt_emb", "offload_img_emb"])
def test_what_the_wrapper_offloads_itself_is_handed_on(name: str, value: bool) -> None:
    assert SwapSettings(**{name: value}).to_blockswapargs()[name] is value


@pytest.mark.parametrize("name", [name for name, _, _, _ in WIDGETS])
def test_arguments_of_an_older_version_get_the_default_of_what_they_lack(name: str) -> None:
    arguments = SwapSettings(blocks_to_swap=7, num_cuda_streams=2, debug_mode=True).to_blockswapargs()
    stored = dict(arguments[SETTINGS_KEY])
    del stored[name]
    expected = SwapSettings(**stored)
    assert SwapSettings.from_blockswapargs({**arguments, SETTINGS_KEY: stored}) == expected
    assert getattr(expected, name) == getattr(SwapSettings(), name)


def test_what_a_newer_version_stored_is_ignored() -> None:
    stored = {"blocks_to_swap": 7, "from_the_future": object()}
    assert SwapSettings.from_blockswapargs({SETTINGS_KEY: stored}) == SwapSettings(blocks_to_swap=7)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"blocks_to_swap": 20, "vace_blocks_to_swap": 0, "offload_txt_emb": False, "use_non_blocking": True},
        {"blocks_to_swap": "nonsense of another node"},
    ],
    ids=["empty", "the wrapper's own", "unreadable"],
)
def test_arguments_of_another_node_are_not_ours(arguments: dict[str, object]) -> None:
    assert SwapSettings.from_blockswapargs(arguments) is None


@pytest.mark.parametrize("stored", [[], "blocks_to_swap", 5, True])
def test_our_key_with_anything_but_a_mapping_is_refused(stored: object) -> None:
    with pytest.raises(SettingsError, match="expected a mapping of settings"):
        SwapSettings.from_blockswapargs({SETTINGS_KEY: stored})


@pytest.mark.parametrize(("name", "value"), [("blocks_to_swap", 49), ("bandwidth_target", "0.8"), ("debug_mode", 1)])
def test_stored_values_are_checked_like_those_of_the_widgets(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        SwapSettings.from_blockswapargs({SETTINGS_KEY: {name: value}})
