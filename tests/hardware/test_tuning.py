"""The table of tiers, the formula for unknown GPUs, and what a tier and a link give."""

from __future__ import annotations

import pytest
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    DeviceSpec,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
    tier_for,
    tune,
)

RISING = LinkSpeed(tuple((count, count * 2e9) for count in (1, 2, 4, 8, 12, 16)), 1e9)
"""A link that is the faster the more streams copy."""


def tier(name, *, units=None, threshold=50.0):
    spec = DeviceSpec(name, Vendor.NVIDIA, "cuda:0", None, None, units, None, None, None, None)
    found = tier_for(spec, vram_threshold_percent=threshold)
    return found.max_streams, pytest.approx(found.bandwidth_target)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 5090", (16, 0.90)),
        ("NVIDIA GeForce RTX 4090", (16, 0.90)),
        ("NVIDIA GeForce RTX 4090 D", (16, 0.90)),
        ("NVIDIA GeForce RTX 3090", (12, 0.80)),
        ("NVIDIA GeForce RTX 3080", (12, 0.80)),
        ("AMD Radeon RX 7900 XTX", (12, 0.80)),
        ("AMD Radeon RX 7900 XT", (10, 0.80)),
        ("NVIDIA GeForce RTX 3060", (8, 0.70)),
        ("AMD Radeon RX 6900 XT", (8, 0.70)),
    ],
)
def test_a_gpu_of_the_table_gets_its_row(name, expected):
    assert tier(name, units=82) == expected


def test_the_table_goes_before_the_formula():
    assert tier("NVIDIA GeForce RTX 4090", units=128, threshold=80.0) == (16, 0.90)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 3090 Ti", "RTX 3080 12GB"])
def test_a_ti_of_the_30_series_shares_the_row_of_its_chip(name):
    assert tier(name, units=80) == (12, 0.80)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    ],
)
def test_a_laptop_gpu_does_not_get_the_row_of_the_desktop_card_it_is_named_after(name):
    assert tier(name, units=76) == (8, 0.70)


@pytest.mark.parametrize("name", ["AMD Radeon RX 7900 GRE", "NVIDIA RTX 4000 Ada", "NVIDIA GeForce RTX 30900"])
def test_a_name_that_merely_resembles_a_row_gets_the_lowest_tier(name):
    assert tier(name, units=80) == (8, 0.70)


@pytest.mark.parametrize(
    ("units", "threshold", "expected"),
    [
        (100, 50.0, (10, 0.70)),
        (132, 50.0, (13, 0.70)),
        (132, 20.0, (13, 0.80)),
        (132, 0.0, (13, 0.90)),
        (304, 50.0, (16, 0.70)),
        (99, 0.0, (8, 0.70)),
        (None, 0.0, (8, 0.70)),
    ],
)
def test_a_large_unknown_gpu_follows_the_formula(units, threshold, expected):
    assert tier("NVIDIA H200", units=units, threshold=threshold) == expected


def tuned(name, link, *, vendor=Vendor.NVIDIA, platform=HostPlatform.LINUX, units=82):
    """The automatic settings of a card in a host of 64 GB."""
    spec = DeviceSpec(name, vendor, "cuda:0", None, None, units, None, None, None, None)
    host = HostMemory(64 * GIB, 60 * GIB, None, None, platform)
    return tune(spec, host, link, vram_threshold_percent=50.0)


@pytest.mark.parametrize(
    ("name", "units", "limit", "streams"),
    [
        ("NVIDIA GeForce RTX 4090", 128, 16, 16),
        ("NVIDIA GeForce RTX 3090", 82, 12, 12),
        ("AMD Radeon RX 7900 XT", 42, 10, 8),
        ("NVIDIA GeForce RTX 3060", 28, 8, 8),
        ("NVIDIA H200", 132, 13, 12),
    ],
)
def test_no_more_streams_are_taken_than_the_tier_allows_however_fast_they_are(name, units, limit, streams):
    found = tuned(name, RISING, units=units)
    assert (found.tier.max_streams, found.streams, found.pin) == (limit, streams, True)
    assert found.reasons[1] == f"link: {2 * streams}.0 GB/s with {streams} streams"


def test_below_the_tiers_limit_the_fewest_streams_that_are_as_fast_are_taken():
    link = LinkSpeed(((1, 20e9), (2, 24.8e9), (4, 25e9), (8, 25e9), (16, 40e9)), None)
    found = tuned("NVIDIA GeForce RTX 3090", link)
    assert found.streams == 2
    assert found.reasons == (
        "limits of RTX 3090/3080: at most 12 streams, 80% of what is available, since NVIDIA GeForce RTX 3090 is in "
        "the table of GPUs",
        "link: 24.8 GB/s with 2 streams, as fast as with up to 8",
    )


def test_one_stream_is_named_as_one():
    assert tuned("RTX 4090", LinkSpeed(((1, 25e9), (2, 25e9)), None)).reasons[1] == (
        "link: 25.0 GB/s with 1 stream, as fast as with up to 2"
    )


@pytest.mark.parametrize(
    ("link", "options", "pin", "said"),
    [
        (None, {}, True, "the link is not measured: 1 stream"),
        (LinkSpeed((), None), {}, True, "the link is not measured: 1 stream"),
        (LinkSpeed((), 8e9), {}, False, "the driver refused to lock RAM"),
        (
            RISING,
            {"vendor": Vendor.AMD, "platform": HostPlatform.WINDOWS},
            False,
            "AMD GPUs on Windows wait for copies from locked RAM",
        ),
        (
            LinkSpeed(((1, 12e9),), 12.4e9),
            {"vendor": Vendor.AMD},
            False,
            "no faster than from ordinary RAM here (12.0 GB/s against 12.4 GB/s)",
        ),
    ],
)
def test_where_streams_cannot_be_chosen_there_is_one_and_the_reasons_are_the_tier_and_why(link, options, pin, said):
    found = tuned("AMD Radeon RX 6800", link, **options)
    assert (found.streams, found.pin) == (1, pin)
    tier, why = found.reasons
    assert tier.startswith(
        "limits of other GPUs: at most 8 streams, 70% of what is available, since AMD Radeon RX 6800 is "
    )
    assert said in why


def test_the_reason_names_the_gpu_and_its_compute_units():
    spec = DeviceSpec("NVIDIA H200", Vendor.NVIDIA, "cuda:0", None, None, 132, None, None, None, None)
    reason = tier_for(spec, vram_threshold_percent=50.0).reason
    assert "NVIDIA H200" in reason
    assert "132" in reason


@pytest.mark.parametrize("threshold", [-1.0, 100.5, float("nan")])
def test_a_threshold_that_is_no_percentage_is_refused(threshold):
    with pytest.raises(ValueError, match="expected 0 to 100"):
        tier("NVIDIA GeForce RTX 4090", threshold=threshold)
