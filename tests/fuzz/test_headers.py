"""Hostile model files, 5,000 of each format: `python tests/fuzz/headers.py --inputs 100000` runs more of the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader
from headers import FORMATS, GIANT_EVERY, fuzz, make_input, write_input
from planning_child import MEMORY_LIMIT
from safetensors import SafetensorError, safe_open
from wanvideo_enhanced_blockswap.blockswap.checkpoint.untrusted import LONGEST_HEADER, HeaderError
from wanvideo_enhanced_blockswap.blockswap.checkpoint.wan_file import FORMATS as READERS
from wanvideo_enhanced_blockswap.blockswap.model.wan import TensorInfo
from wanvideo_enhanced_blockswap.blockswap.wrapper.loader import _tensors_of_gguf

INPUTS = 5000
COMPARED = 1500
every_format = pytest.mark.parametrize("kind", FORMATS)

STRICTER = (
    *("printable ASCII letters", " twice", "metadata once", "up to 8 dimensions"),
    *("an object at byte 0", "an object of metadata"),
)
"""What is refused here and read by the safetensors package: odd names, doubles, many dimensions, spaces before the
header, metadata of null; and fields that the format does not have."""


@every_format
@pytest.mark.skipif(sys.platform == "win32", reason="NTFS would store the zeros of stretched files")
def test_hostile_headers_are_planned_for_or_refused_in_a_sentence_in_bounded_memory(kind: str) -> None:
    found = fuzz(kind, inputs=INPUTS, seed=1)
    assert found.crashes == []
    assert found.peak_bytes <= MEMORY_LIMIT
    # The inputs are of use: some are whole, and the lies of the others are of many kinds.
    assert sum(found.outcomes.values()) == INPUTS
    assert found.outcomes["planned"] > INPUTS // 10
    assert len(found.outcomes) > 20


@every_format
def test_the_same_seed_gives_the_same_inputs(kind: str) -> None:
    numbers = (*range(30), GIANT_EVERY - 1)
    once = [make_input(kind, number, 7) for number in numbers]
    assert [make_input(kind, number, 7) for number in numbers] == once
    assert [make_input(kind, number, 8) for number in numbers] != once


def ours(path: Path) -> dict[str, TensorInfo] | str:
    """The table as it is read here, or why it is refused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8 + LONGEST_HEADER)
    try:
        return READERS[path.suffix][1](start, size)
    except HeaderError as refusal:
        return str(refusal)


def compared(kind: str, folder: Path) -> Iterator[Path]:
    """One file after the other."""
    for number in range(COMPARED):
        if number % GIANT_EVERY != GIANT_EVERY - 1:
            path = folder / f"{number}.{kind}"
            write_input(path, make_input(kind, number, 2))
            yield path
            path.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="NTFS would store the zeros of stretched files")
def test_a_safetensors_table_is_the_packages_own_or_refused_by_both(tmp_path: Path) -> None:
    same = 0
    for path in compared("safetensors", tmp_path):
        table, theirs = ours(path), {}
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # a file, not a mapping
                    part = file.get_slice(name)
                    theirs[name] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError):
            assert isinstance(table, str), path
            continue
        if isinstance(table, str):
            with path.open("rb") as file:
                has_field_more = b'"extra":1' in file.read(LONGEST_HEADER)
            assert has_field_more or any(reason in table for reason in STRICTER), (path, table)
        else:
            assert {name: (tensor.shape, tensor.dtype) for name, tensor in table.items()} == theirs
            same += 1
    assert same > COMPARED // 10


@pytest.mark.skipif(sys.platform == "win32", reason="NTFS would store the zeros of stretched files")
def test_a_gguf_table_that_is_accepted_is_the_packages_own(tmp_path: Path) -> None:
    same = 0
    for path in compared("gguf", tmp_path):
        table = ours(path)
        if isinstance(table, str):
            continue  # the package may hang on it
        try:
            theirs = _tensors_of_gguf(GGUFReader(path))
        except UnicodeDecodeError:
            continue  # in a key that nobody reads here
        assert theirs == table, path
        same += 1
    assert same > COMPARED // 10
