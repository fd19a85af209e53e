"""Byte counts as people write them."""

from __future__ import annotations

import pytest
from wanvideo_enhanced_blockswap.hardware import GIB, KIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GiB", 12 * GIB),
        ("8 GB", 8 * GIB),
        ("8G", 8 * GIB),
        ("512MiB", 512 * MIB),
        ("123", 123),
        ("0", 0),
        (" 1.5 gib ", 3 * GIB // 2),
        ("0.1GB", GIB // 10),
        ("64KiB", 64 * KIB),
        ("7b", 7),
        ("1TiB", 1024 * GIB),
        ("1 tb", 1024 * GIB),
    ],
)
def test_a_gb_that_is_written_is_one_that_is_shown_with_or_without_an_i(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "-1", "-2GiB", "nan", "inf", "12iB", "GiB", "1e9", "1 2", "1,5GiB", "٣GiB", "0x10", "1\u212aB"]
)
def test_rubbish_is_refused_with_the_text_and_an_example(text):
    with pytest.raises(ValueError, match="such as 12GB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["9" * 40, "2000000TiB"])
def test_a_size_beyond_any_machine_is_refused(text):
    with pytest.raises(ValueError, match="at most"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KB"),
        (int(12.34 * GIB), "12.3 GB"),
        (MIB - 1, "1.0 MB"),
        (GIB - 1, "1.0 GB"),
        (2048 * GIB, "2048.0 GB"),
        (-3 * MIB, "-3.0 MB"),
    ],
)
def test_a_count_is_shown_in_the_largest_unit_that_keeps_it_above_one(n, expected):
    assert format_bytes(n) == expected


@pytest.mark.parametrize("unit", [1, KIB, MIB, GIB])
@pytest.mark.parametrize("n", [1, 1.06, 8, 12.34, 999.94, 1023])
def test_what_is_shown_is_parsed_back_to_within_its_last_digit(n, unit):
    size = int(n * unit)
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.05 * unit


def test_a_number_without_a_unit_has_the_given_one():
    assert (parse_bytes("12"), parse_bytes("12", unit="GB"), parse_bytes("12 B", unit="GB")) == (12, 12 * GIB, 12)
