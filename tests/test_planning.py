"""What a plan takes from readings, tier and link, and which of their sentences it includes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from facts import Facts, make_plan
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.model.layout import BlockProfile, ModelProfile, Placement, TensorProfile
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import (
    GIB,
    MIB,
    DeviceMemory,
    DeviceSpec,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
)

MODEL = ModelProfile(
    tuple(BlockProfile(f"blocks.{i}", (TensorProfile("w", 400 * MIB, Placement.STREAMED),)) for i in range(20))
)
"""20 blocks of 400 MB, 7.8 GB."""
FACTS = Facts(
    spec=DeviceSpec("NVIDIA GeForce RTX 3090", Vendor.NVIDIA, "cuda:0", None, None, 82, False, None, None, None),
    memory=DeviceMemory(12 * GIB, 11 * GIB, "a test"),
    host=HostMemory(64 * GIB, 60 * GIB, None, None, HostPlatform.LINUX),
    link=LinkSpeed(((1, 20e9), (4, 25e9), (8, 25e9), (16, 50e9)), 8e9),
)
TIER = (
    "limits of RTX 3090/3080: at most 12 streams, 80% of what is available, since NVIDIA GeForce RTX 3090 is in the "
    "table of GPUs"
)
KNEE = "link: 25.0 GB/s with 4 streams, as fast as with up to 8"
BY_HAND = SwapSettings(auto_hardware_tuning=False, blocks_to_swap=12, num_cuda_streams=6)
ROOM = DeviceMemory(48 * GIB, 47 * GIB, "a test")


@pytest.mark.parametrize("chosen", [SwapSettings(), BY_HAND], ids=["automatic", "by hand"])
@pytest.mark.parametrize("memory", [FACTS.memory, ROOM], ids=["some swapped", "all fits"])
def test_a_plan_that_stands_on_an_estimate_says_so_last(memory: DeviceMemory, chosen: SwapSettings) -> None:
    estimate = replace(memory, source="mem_get_info less 15 %", is_estimate=True)
    made = make_plan(MODEL, chosen, replace(FACTS, memory=estimate))
    assert made.reasons[-1] == made.remarks[-1] == "free VRAM is an estimate: mem_get_info less 15 %"


@pytest.mark.parametrize("chosen", [SwapSettings(), BY_HAND], ids=["automatic", "by hand"])
def test_a_plan_that_stands_on_a_reading_has_no_word_of_estimates(chosen: SwapSettings) -> None:
    assert not [reason for reason in make_plan(MODEL, chosen, FACTS).reasons if "estimate" in reason]


@pytest.mark.parametrize("available", [60 * GIB, 5 * GIB])
@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_what_our_slabs_have_added_to_the_host_counts_as_available(available: int, share: float) -> None:
    facts = replace(FACTS, host=replace(FACTS.host, available_bytes=available))
    ours = int(share * available)
    taken = replace(facts, host=replace(facts.host, available_bytes=available - ours), added_bytes=ours)
    assert taken.inputs(MODEL, SwapSettings()) == facts.inputs(MODEL, SwapSettings())
    assert facts.inputs(MODEL, SwapSettings()).host_room_bytes == max(0, available - int(6.4 * GIB))


def test_a_plan_that_swaps_tells_the_tiers_limit_and_the_streams_that_the_link_chose_below_it() -> None:
    made = make_plan(MODEL, SwapSettings(), FACTS)
    assert made.swapped_count > 0
    assert made.streams == 4
    assert made.tuning == (TIER, KNEE)
    assert made.reasons[-2:] == made.tuning


@pytest.mark.parametrize("changes", [{"memory": ROOM}, {"spec": replace(FACTS.spec, is_integrated=True)}])
def test_where_nothing_is_copied_there_are_no_streams_to_tell_of(changes: dict[str, Any]) -> None:
    """If the tier's share decides, the sentence on the budget names it."""
    made = make_plan(MODEL, SwapSettings(), replace(FACTS, **changes))
    assert (made.swapped_count, made.streamed_bytes, made.tuning) == (0, 0, ())
    assert not [reason for reason in made.reasons if reason.startswith(("limits", "link"))]


def test_the_tiers_share_is_told_where_it_decides_although_nothing_is_swapped() -> None:
    made = make_plan(MODEL, SwapSettings(vram_threshold_percent=90), replace(FACTS, memory=ROOM))
    assert made.swapped_count == 0
    assert any("set by 80% of the 42.2 GB available" in reason for reason in made.reasons)


def test_by_hand_the_streams_are_those_asked_for_and_nobody_speaks_of_tiers() -> None:
    made = make_plan(MODEL, BY_HAND, FACTS)
    assert (made.swapped_count, made.streams, made.tuning) == (12, 6, ())
    assert not [reason for reason in made.reasons if reason.startswith(("limits", "link"))]


WHOLE = TensorProfile("w", 400 * MIB, Placement.FIXED, "Opaque cannot be taken apart")


def beside(tensor: TensorProfile) -> ModelProfile:
    """The model with this tensor in each block."""
    return ModelProfile(tuple(BlockProfile(block.name, (*block.tensors, tensor)) for block in MODEL.blocks))


@pytest.mark.parametrize("chosen", [SwapSettings(), BY_HAND], ids=["automatic", "by hand"])
def test_a_plan_says_how_much_cannot_be_swapped_and_of_which_type(chosen: SwapSettings) -> None:
    small = replace(WHOLE, nbytes=4 * MIB)
    stays = f"({MODEL.blocks[0].name}.w and 19 more: Opaque cannot be taken apart)"
    assert f"80.0 MB of weights always stay on the GPU {stays}" in make_plan(beside(small), chosen, FACTS).remarks
    assert not [reason for reason in make_plan(MODEL, chosen, FACTS).reasons if "always stay" in reason]


def test_a_number_of_blocks_that_frees_nothing_is_refused_with_the_type_that_stays() -> None:
    model = ModelProfile(tuple(BlockProfile(block.name, (WHOLE,)) for block in MODEL.blocks))
    sentence = (
        r"swapping 12 blocks would free nothing: 7\.8 GB of weights always stay on the GPU \(blocks\.0\.w and 19 "
        r"more: Opaque cannot be taken apart\); set blocks_to_swap to 0"
    )
    with pytest.raises(PlanError, match=sentence):
        make_plan(model, BY_HAND, FACTS)
    assert make_plan(model, replace(BY_HAND, blocks_to_swap=0), FACTS).swapped_count == 0
    assert make_plan(model, SwapSettings(), replace(FACTS, memory=ROOM)).swapped_count == 0


@pytest.mark.parametrize(("is_on", "told"), [(True, False), (False, True)])
def test_that_the_user_has_switched_locked_ram_off_is_said_as_such(is_on: bool, told: bool) -> None:
    made = make_plan(MODEL, SwapSettings(enable_dram_optimization=is_on), FACTS)
    assert made.swapped_count
    assert any("since enable_dram_optimization is off" in remark for remark in made.remarks) is told
