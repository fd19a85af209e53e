"""LoRAs that come, change and go between the runs of one process, as users change them: each run in its own right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from comfy_client import Comfy
from rig_figures import to_host
from rig_variants import BLOCKS, FOUR, OF_VACE, VARIANTS, Case, ours, several

pytestmark = pytest.mark.rig

CHANGES: list[dict[str, float]] = [
    {"large_lora": 0.8},
    {"large_fp32_lora": 0.5, "fp16_lora": -0.6},
    {},
    {"large_lora": 0.3},
    {"large_lora": 0.3, "lora": 0.9},
    FOUR,
]
"""The LoRAs of run after run: another, none, another strength, one more, and all."""
CHANGES_OF_VACE = [{"large_vace_lora": 0.8}, {"vace_lora": 0.5}, {}, {"large_vace_lora": 0.3}, OF_VACE]

SET, UNMERGED, MERGED = "set", "unmerged", "merged"
SEQUENCES = [
    *(("bf16", way) for way in (SET, UNMERGED, MERGED)),
    *(("fp8", way) for way in (SET, MERGED)),
    *(("fp8_scaled", way) for way in (SET, UNMERGED, MERGED)),
    *(("gguf", way) for way in (SET, UNMERGED)),
    *(("vace", way) for way in (SET, MERGED)),
    ("vace_fp8_scaled", SET),
]
"""Models, and how they get their LoRAs. WanVideoSetLoRAs leaves the loader cached; it merges none, and GGUF cannot."""

Pair = tuple[SimpleNamespace, SimpleNamespace]


def with_loras(variant: str, way: str, strengths: dict[str, float]) -> Case:
    case: dict[str, Any] = VARIANTS[variant] | {"sample": {"cfg": 1.0}}
    if strengths:
        case |= {"lora": several(strengths, merge=way == MERGED), "lora_at": "set" if way == SET else "loader"}
    return case


@pytest.fixture(scope="module", params=SEQUENCES, ids="-".join)
def sequence(request: pytest.FixtureRequest, comfy: Comfy) -> list[Pair]:
    """Of each run, what came of it with all blocks swapped, and without swapping."""
    variant, way = request.param
    changes = CHANGES_OF_VACE if variant.startswith("vace") else CHANGES
    cases = [with_loras(variant, way, strengths) for strengths in changes]
    truths = [comfy.run(case, cached=index > 0) for index, case in enumerate(cases)]
    swap = {"swap": ours(BLOCKS), "swap_at": "set" if way == SET else "loader"}
    runs = [comfy.run(case, cached=index > 0, **swap) for index, case in enumerate(cases)]
    for run in runs:
        run.how = BLOCKS
    assert [getattr(run, "error", None) for run in truths + runs] == [None] * 2 * len(cases)
    return list(zip(runs, truths, strict=True))


def test_every_run_gives_the_latents_of_its_own_loras(sequence: list[Pair]) -> None:
    assert [run.latents for run, _ in sequence] == [truth.latents for _, truth in sequence]
    assert len({truth.latents for _, truth in sequence}) == len(sequence)


def test_no_run_copies_weights_back(request: pytest.FixtureRequest, sequence: list[Pair]) -> None:
    variant = request.node.callspec.params["sequence"][0]
    for run, truth in sequence:
        assert run.d2h_bytes in to_host(variant, run, truth)


def test_every_run_takes_the_device_memory_that_was_planned_and_gives_it_back(sequence: list[Pair]) -> None:
    for run, truth in sequence:
        planned = run.plans["0.1"]["device_bytes"]
        assert run.peak_bytes <= 1.02 * (truth.peak_bytes - sum(truth.block_bytes) + planned)
        assert run.after_bytes <= truth.after_bytes


def test_the_host_holds_the_weights_of_the_last_run_once(sequence: list[Pair]) -> None:
    """Not those before a LoRA, in an old slab or in pages of the file that merging has written."""
    for run, truth in sequence:
        came_back = sum(truth.block_bytes) if truth.d2h_bytes > sum(truth.block_bytes) else 0
        assert run.host_bytes - run.slab_bytes <= 1.03 * (truth.host_bytes - came_back)


@pytest.mark.parametrize("variant", ["bf16", "fp8_scaled", "vace"])
def test_another_strength_fills_no_slab(comfy: Comfy, variant: str) -> None:
    name = "large_vace_lora" if variant == "vace" else "large_lora"
    first, second = one_by_one(comfy, variant, SET, {name: 0.8}, {name: 0.3})
    assert first.latents != second.latents
    assert first.slab_fills > 0
    assert (second.slab_fills, second.file_bytes) == (0, 0)


def test_a_lora_that_goes_and_comes_back_leaves_the_model_in_its_slabs(comfy: Comfy) -> None:
    first, without, third = one_by_one(comfy, "bf16", SET, {"large_lora": 0.8}, {}, {"large_lora": 0.8})
    assert first.latents == third.latents != without.latents
    assert (without.slab_bytes, without.file_bytes) == (first.slab_bytes, 0)
    loras = first.slab_bytes - sum(without.plans["0.1"]["streamed_bytes"])
    assert 0 < third.file_bytes <= loras


@pytest.mark.parametrize("way", [SET, UNMERGED])
def test_of_a_lora_that_is_converted_for_each_run_only_its_own_bytes_are_copied_again(comfy: Comfy, way: str) -> None:
    first, second = one_by_one(comfy, "bf16", way, {"large_fp32_lora": 0.5}, {"large_fp32_lora": 0.5})
    assert second.latents == first.latents
    assert first.file_bytes > 0
    assert second.file_bytes == 0


def one_by_one(comfy: Comfy, variant: str, way: str, *changes: dict[str, float]) -> list[SimpleNamespace]:
    swap = {"swap": ours(BLOCKS), "swap_at": "set" if way == SET else "loader"}
    cases = [with_loras(variant, way, strengths) for strengths in changes]
    return [comfy.run(case, cached=index > 0, **swap) for index, case in enumerate(cases)]
