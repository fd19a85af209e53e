"""Hostile model files, 1,000 of each format; FUZZ_INPUTS=100000 reads more of the same."""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from checkpoint_files import wan_shapes, write_sparse_safetensors
from gguf import GGUFReader
from gguf_inputs import gguf_input
from safetensors import SafetensorError, safe_open
from safetensors_inputs import safetensors_input
from wanvideo_enhanced_blockswap.blockswap.checkpoint.headers import HeaderError, read_gguf, read_safetensors
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, CheckpointError
from wanvideo_enhanced_blockswap.blockswap.wrapper.loader import _tensors_of_gguf
from wanvideo_enhanced_blockswap.commands import plan as command
from wanvideo_enhanced_blockswap.hardware import GIB, HostMemory, HostPlatform

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1000"))
COMPARED = 500
LONGEST_MESSAGE = 1500
"""Letters; three names, a path and a sentence."""

FORMATS = {"safetensors": safetensors_input, "gguf": gguf_input}
HOST = HostMemory(64 * GIB, 64 * GIB, None, None, HostPlatform.LINUX)
every_format = pytest.mark.parametrize("kind", FORMATS)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="NTFS would store the zeros of stretched files")


def make_input(kind: str, number: int, seed: int) -> tuple[bytes, int]:
    """Content of one input, and the length of its file."""
    return FORMATS[kind](random.Random(f"{kind}:{seed}:{number}"))


def write_input(folder: Path, kind: str, number: int, seed: int) -> Path:
    path = folder / f"hostile.{kind}"
    content, size = make_input(kind, number, seed)
    with path.open("wb") as file:
        file.write(content[:size])
        file.truncate(size)
    return path


def outcome(path: Path, **beside: list[str]) -> str:
    """Whether `plan` plans for this file, or which kind of error it raises; raises what `plan` must not raise."""
    options = Namespace(model=str(path), gpu="RTX 4090", vram=None, ram="64GiB", link=25.0, shape="832x480x81")
    options.available_ram, options.disk, options.verbose = None, None, True
    options.module, options.lora, options.context_window = [], [], None
    vars(options).update(beside)
    options.beside, options.blocks_to_swap, options.vram_threshold_percent = [], None, 50.0
    try:
        shown = command.plan(options)
    except BlockSwapError as caught:
        failure = caught
    else:
        assert shown.text.replace("\n", "").isprintable()
        return "planned"
    message = str(failure)
    assert message.isprintable()
    assert 0 < len(message) <= LONGEST_MESSAGE
    names = [path.name, *(Path(file).name for files in beside.values() for file in files)]
    assert type(failure) is not CheckpointError or any(name in message for name in names)
    return type(failure).__name__


@every_format
def test_hostile_headers_are_planned_for_or_refused_in_a_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "read_host_memory", lambda: HOST)
    outcomes: Counter[str] = Counter()
    for number in range(INPUTS):
        path = write_input(tmp_path, kind, number, 1)
        try:
            outcomes[outcome(path)] += 1
        except Exception as failure:
            raise AssertionError(f"{kind}:{number}: {path.read_bytes()[:2000]!r}") from failure
    # The inputs are of use: some are whole.
    assert outcomes["planned"] > INPUTS // 10
    assert outcomes["CheckpointError"] > INPUTS // 10


@every_format
@pytest.mark.parametrize("role", ["module", "lora"])
def test_hostile_headers_beside_a_model_are_planned_for_or_refused_in_a_sentence(
    kind: str, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "read_host_memory", lambda: HOST)
    model = write_sparse_safetensors(tmp_path / "model.safetensors", wan_shapes())
    for number in range(INPUTS // 5):
        path = write_input(tmp_path, kind, number, 3)
        try:
            outcome(model, **{role: [str(path)]})
        except Exception as failure:
            raise AssertionError(f"{kind}:{number}: {path.read_bytes()[:2000]!r}") from failure


@every_format
def test_the_same_seed_gives_the_same_inputs(kind: str) -> None:
    once = [make_input(kind, number, 7) for number in range(30)]
    assert [make_input(kind, number, 7) for number in range(30)] == once
    assert [make_input(kind, number, 8) for number in range(30)] != once


def test_a_safetensors_table_that_both_accept_is_the_packages_own(tmp_path: Path) -> None:
    same = 0
    for number in range(COMPARED):
        path, theirs = write_input(tmp_path, "safetensors", number, 2), {}
        try:
            table = read_safetensors(path)
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # a file, not a mapping
                    part = file.get_slice(name)
                    theirs[name] = (tuple(part.get_shape()), part.get_dtype())
        except (HeaderError, SafetensorError, OSError):
            continue
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in table.items()} == theirs
        same += 1
    assert same > COMPARED // 10


def test_a_gguf_table_is_the_one_that_the_wrappers_reader_gives(tmp_path: Path) -> None:
    same = 0
    for number in range(COMPARED):
        path = write_input(tmp_path, "gguf", number, 2)
        try:
            table = read_gguf(path)
        except HeaderError:
            continue
        assert _tensors_of_gguf(GGUFReader(path)) == table, number
        same += 1
    assert same > COMPARED // 10
