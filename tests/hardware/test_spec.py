"""What readings promise about themselves."""

from __future__ import annotations

import pytest
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    DeviceMemory,
    HardwareUnavailableError,
    HostMemory,
    HostPlatform,
    LinkSpeed,
)


def host(platform, *, ram=64 * GIB, limit=None):
    return HostMemory(ram, ram, limit, None, platform)


@pytest.mark.parametrize(
    ("platform", "ram", "expected"),
    [
        (HostPlatform.WINDOWS, 100 * GIB, 40 * GIB),
        (HostPlatform.LINUX, 100 * GIB, 90 * GIB),
        (HostPlatform.LINUX, 16 * GIB, 12 * GIB),
        (HostPlatform.LINUX, 2 * GIB, 0),
        (HostPlatform.WSL2, 100 * GIB, 90 * GIB),
    ],
)
def test_the_pin_budget_follows_the_platform(platform, ram, expected):
    assert host(platform, ram=ram).pin_budget_bytes == expected


def test_the_pin_budget_is_a_share_of_the_control_group_where_that_is_smaller():
    assert host(HostPlatform.LINUX, ram=256 * GIB, limit=16 * GIB).pin_budget_bytes == 12 * GIB


@pytest.mark.parametrize(("total", "free"), [(10, 11), (10, -1)])
def test_a_memory_reading_that_cannot_be_is_refused(total, free):
    with pytest.raises(ValueError, match="free memory: expected 0 to 10 bytes, got"):
        DeviceMemory(total, free, "test")


@pytest.mark.parametrize(
    ("pinned", "expected"),
    [
        (((1, 24.9e9), (2, 25.0e9), (4, 25.1e9)), (1, 24.9e9)),
        (((1, 20e9), (2, 25e9), (4, 25.2e9)), (2, 25e9)),
        (((1, 10e9), (8, 25e9)), (8, 25e9)),
    ],
)
def test_the_best_stream_count_is_the_smallest_within_two_percent_of_the_fastest(pinned, expected):
    assert LinkSpeed(pinned, None).best() == expected


def test_asking_for_the_best_of_nothing_names_the_pageable_figure():
    with pytest.raises(HardwareUnavailableError, match=r"ordinary RAM, 5000000000\.0"):
        LinkSpeed((), 5e9).best()


@pytest.mark.parametrize(
    ("pinned", "pageable"),
    [(((2, 1.0), (1, 1.0)), None), (((0, 1.0),), None), (((1, float("nan")),), None), ((), 0.0), ((), float("inf"))],
)
def test_a_link_speed_that_cannot_be_is_refused(pinned, pageable):
    with pytest.raises(ValueError, match="of a link: expected"):
        LinkSpeed(pinned, pageable)
