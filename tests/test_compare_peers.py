"""The peers that the comparison runs: right outputs where they run without a GPU, a reason where they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from wanvideo_enhanced_blockswap.commands.wan_model import PRESETS, Inputs, build, make_inputs

from benchmarks.compare.engine import NOT_INSTALLED, NotOfferedError
from benchmarks.compare.peers import Accelerate, GroupOffload, Mmgp, RamTorch

if TYPE_CHECKING:
    from pretend_accelerator import PretendHpu

PRESET = PRESETS["small"]
SCRIPT = Path(__file__).with_name("peers_on_pretend_cuda.py")
SHAPE, WORDS = (32, 32, 5), 4
"""Few tokens: processors without bf16 take long."""
CPU = torch.device("cpu")
all_and_half = pytest.mark.parametrize("swapped", [12, 6])


def size(*modules: torch.nn.Module) -> int:
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


BLOCK = size(build(PRESET, seed=0).blocks[0])


def forward(model: torch.nn.Module, inputs: Inputs, time: float) -> torch.Tensor:
    times = torch.full((1,), time, device=inputs.latents.device)
    with torch.inference_mode():
        return model(inputs.latents, times, inputs.positive[:, :WORDS], return_dict=False)[0]


def check_outputs(engine: Any, device: torch.device, *, swapped: int) -> torch.nn.Module:
    """Three forwards, each equal to the unswapped model's; the model after them."""
    inputs = make_inputs(PRESET, SHAPE, device, seed=0)
    unswapped, model = build(PRESET, seed=0).to(device), build(PRESET, seed=0)
    engine.place(model, device, swapped=swapped)
    try:
        for time in (937.5, 421.337, 937.5):
            with engine.forward():
                found = forward(model, inputs, time)
            assert torch.equal(found.cpu(), forward(unswapped, inputs, time).cpu())
    finally:
        engine.close()
    return model


@all_and_half
@pytest.mark.parametrize("make", [Accelerate, RamTorch])
def test_outputs_on_the_cpu_are_the_unswapped_models(make: type, swapped: int) -> None:
    check_outputs(make(), CPU, swapped=swapped)


@all_and_half
def test_accelerate_gives_the_unswapped_models_outputs_on_a_device(pretend_device: torch.device, swapped: int) -> None:
    check_outputs(Accelerate(), pretend_device, swapped=swapped)


@all_and_half
def test_accelerate_holds_on_the_device_what_is_not_swapped(pretend_stats: PretendHpu, swapped: int) -> None:
    inputs = make_inputs(PRESET, SHAPE, torch.device("hpu:0"), seed=0)
    model = build(PRESET, seed=0)
    outside = size(model) - 12 * BLOCK
    before = pretend_stats.memory_allocated()
    Accelerate().place(model, torch.device("hpu:0"), swapped=swapped)
    for _ in range(2):
        held = pretend_stats.memory_allocated() - before
        assert held == pytest.approx(outside + (12 - swapped) * BLOCK, rel=0.001)
        pretend_stats.reset_copy_stats()
        forward(model, inputs, 937.5)
        assert pretend_stats.copy_stats()["h2d_bytes"] == pytest.approx(swapped * BLOCK, rel=0.001)


@pytest.fixture(scope="module")
def on_pretend_cuda(pretend_device: torch.device) -> dict[tuple[str, int], dict[str, Any]]:
    """What the script found, by engine and number of swapped blocks."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.with_name("pretend"))))}
    command = [sys.executable, str(SCRIPT)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **paths})
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    return {(row["engine"], row["swapped"]): row for row in rows}


CUDA_CELLS = [
    *(("diffusers", 12), ("diffusers-record-stream", 12)),
    *(("ramtorch", 6), ("ramtorch", 12)),
    *(("mmgp", 6), ("mmgp", 12)),
]
WINDOW = {"diffusers": 0, "diffusers-record-stream": 0, "ramtorch": 2, "mmgp": 2}
"""Blocks of those that are swapped which are on the device between forwards."""


@pytest.mark.parametrize("cell", CUDA_CELLS)
def test_outputs_on_what_passes_for_cuda_are_the_unswapped_models(on_pretend_cuda: Any, cell: tuple[str, int]) -> None:
    assert on_pretend_cuda[cell]["equal"] == [True] * 3


@pytest.mark.parametrize("cell", CUDA_CELLS)
def test_swapped_blocks_leave_the_device(on_pretend_cuda: Any, cell: tuple[str, int]) -> None:
    engine, swapped = cell
    outside = size(build(PRESET, seed=0)) - 12 * BLOCK
    assert on_pretend_cuda[cell]["held_bytes"] <= outside + (12 - swapped + WINDOW[engine]) * BLOCK * 1.001
    assert on_pretend_cuda[cell]["moved_bytes"] >= swapped * BLOCK


def test_mmgp_copies_each_streamed_block_twice(on_pretend_cuda: Any) -> None:
    """As its docstring here says; not so in another version, it is to say something else."""
    assert on_pretend_cuda["mmgp", 6]["moved_bytes"] == pytest.approx(12 * BLOCK, rel=0.03)


def test_mmgp_leaves_the_default_device_as_it_was(on_pretend_cuda: Any) -> None:
    assert {row["default_device"] for row in on_pretend_cuda.values()} == {"cpu"}


def test_mmgp_says_how_many_blocks_it_would_stream_instead(on_pretend_cuda: Any) -> None:
    assert on_pretend_cuda["mmgp", 1]["reason"] == "mmgp's plan streams 0 blocks where 1 were asked for"
    assert on_pretend_cuda["mmgp", 0]["moved_bytes"] == 0


@pytest.mark.parametrize("record_stream", [False, True])
def test_group_offloading_of_a_part_is_not_offered(record_stream: bool) -> None:
    with pytest.raises(NotOfferedError, match="streams every block: it cannot swap 6 of 12"):
        GroupOffload(record_stream=record_stream).place(build(PRESET, seed=0), CPU, swapped=6)


def test_group_offloading_is_not_offered_where_there_are_no_streams(pretend_device: torch.device) -> None:
    with pytest.raises(NotOfferedError, match="whose backend implements streams, got `hpu`"):
        GroupOffload(record_stream=False).place(build(PRESET, seed=0), pretend_device, swapped=12)


@pytest.mark.parametrize(("make", "name"), [(Mmgp, "mmgp"), (RamTorch, "RamTorch")])
def test_an_engine_for_cuda_is_not_offered_elsewhere(make: type, name: str) -> None:
    with pytest.raises(NotOfferedError, match=f"{name} is written for CUDA devices"):
        make().place(build(PRESET, seed=0), torch.device("meta"), swapped=6)


@pytest.mark.parametrize(
    ("engine", "package"),
    [
        (GroupOffload(record_stream=True), "accelerate"),
        (Accelerate(), "accelerate"),
        (Mmgp(), "mmgp"),
        (RamTorch(), "ramtorch"),
    ],
    ids=["diffusers", "accelerate", "mmgp", "ramtorch"],
)
def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch, engine: Any, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotOfferedError) as caught:
        engine.place(build(PRESET, seed=0), torch.device("cuda:0"), swapped=12)
    assert str(caught.value) == NOT_INSTALLED.format(package)
