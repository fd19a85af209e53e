"""Properties of every plan, automatic or manual, on any card in any host, for any model."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Sequence
from dataclasses import replace

import pytest
from facts import Facts, budget_of, make_plan
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from wanvideo_enhanced_blockswap.blockswap.errors import PlanError
from wanvideo_enhanced_blockswap.blockswap.model.layout import (
    BlockProfile,
    ModelProfile,
    Placement,
    TensorProfile,
    align,
)
from wanvideo_enhanced_blockswap.blockswap.plan.budget import MemoryBudget
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Weights
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import spread_bytes
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware.records import (
    DeviceMemory,
    DeviceSpec,
    DiskSpeed,
    HostMemory,
    HostPlatform,
    LinkSpeed,
    Vendor,
)
from wanvideo_enhanced_blockswap.hardware.units import GIB, MIB

generated = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
"""The same examples in every run, on machines of any speed."""

LINK = LinkSpeed(((1, 10e9), (2, 12e9)), 4e9, 8e9)


def block(name: str, sizes: list[int], lora: int, *, in_file: bool = False) -> BlockProfile:
    tensors = [TensorProfile(f"w{i}", size, Placement.STREAMED, in_file=in_file) for i, size in enumerate(sizes)]
    deltas = [TensorProfile("lora_diff", lora, Placement.STREAMED)] if lora else []
    return BlockProfile(name, (*tensors, *deltas, TensorProfile("scale", 640, Placement.SMALL)))


@st.composite
def profiles(draw: st.DrawFn) -> ModelProfile:
    """Equal blocks, as most models have, or blocks of any sizes; with or without VACE blocks and a LoRA; in a file, as
    safetensors are, or in memory, as GGUF is and a LoRA always.
    """
    vace, count = draw(st.sampled_from([0, 0, 3])), draw(st.integers(1, 20))
    one = st.lists(st.integers(100 * MIB, 400 * MIB), min_size=1, max_size=3)
    equal = draw(st.none() | one)
    lora = draw(st.sampled_from([0, 20 * MIB]))
    names = [f"vace_blocks.{i}" for i in range(vace)] + [f"blocks.{i}" for i in range(count)]
    in_file = draw(st.booleans())
    blocks = (block(name, equal or draw(one), lora, in_file=in_file) for name in names)
    return ModelProfile(tuple(blocks), other_bytes=0)


@st.composite
def facts(draw: st.DrawFn, profile: ModelProfile) -> Facts:
    """A card of the model's order of size, partly in use, in a host that may be too small."""
    size = profile.block_bytes
    total = draw(st.integers(size // 2, 5 * size)) + GIB
    available = draw(st.integers(0, 2 * size) | st.integers(int(1.3 * size), 5 * size))
    vendor, units = draw(st.sampled_from([Vendor.NVIDIA, Vendor.NVIDIA, Vendor.AMD])), draw(st.sampled_from([20, 120]))
    spec = DeviceSpec("GPU", vendor, "cuda:0", None, None, units, False, None, None, None)
    limit = draw(st.sampled_from([None, None, draw(st.integers(0, size))]))
    used = draw(st.integers(0, total // 3))
    platform = draw(st.sampled_from([HostPlatform.LINUX, HostPlatform.WINDOWS, HostPlatform.WSL2]))
    host = HostMemory(available + draw(st.integers(0, 8 * GIB)), available, limit, None, platform)
    balance_ms = size / len(profile.blocks) / 12e9 * 1e3
    compute = draw(st.none() | st.floats(0.3 * balance_ms, 1.2 * balance_ms))
    return Facts(
        spec=spec,
        memory=DeviceMemory(total, total - used, "generated"),
        host=host,
        link=draw(st.sampled_from([None, LINK, LINK, LINK])),
        compute_ms=None if compute is None else (compute,) * len(profile.blocks),
        activations=draw(st.none() | st.builds(Activations, nbytes=st.integers(0, total), is_measured=st.booleans())),
        disk=draw(st.sampled_from([None, DiskSpeed(0.2e9, 6e9), DiskSpeed(3.5e9, 7e9), DiskSpeed(None, 7e9)])),
        pin_limit_bytes=draw(st.sampled_from([None, None, size // 3])),
        locked_elsewhere_bytes=draw(st.sampled_from([0, 0, size // 8])),
    )


@st.composite
def by_hand(draw: st.DrawFn) -> SwapSettings:
    """Counts and ratio of a user, beyond what the model and the card have too."""
    return SwapSettings(
        auto_hardware_tuning=False,
        blocks_to_swap=draw(st.integers(0, 24)),
        vace_blocks_to_swap=draw(st.integers(0, 4)),
        vram_threshold_percent=draw(st.floats(30, 90)),
        bandwidth_target=draw(st.floats(0.1, 1.0)),
        num_cuda_streams=draw(st.integers(1, 16)),
        enable_cuda_optimization=draw(st.sampled_from([True, True, True, False])),
        enable_dram_optimization=draw(st.sampled_from([True, True, True, False])),
    )


AUTOMATIC = st.builds(SwapSettings, vram_threshold_percent=st.floats(30, 90))


@st.composite
def cases(draw: st.DrawFn, chosen: st.SearchStrategy[SwapSettings]) -> tuple[ModelProfile, SwapSettings, Facts]:
    profile = draw(profiles())
    return profile, draw(chosen), draw(facts(profile))


automatic, any_way = cases(AUTOMATIC), cases(AUTOMATIC | by_hand())


def planned(profile: ModelProfile, chosen: SwapSettings, known: Facts) -> tuple[SwapPlan, MemoryBudget]:
    """The plan and its budget; examples that are refused are left out."""
    try:
        return make_plan(profile, chosen, known), budget_of(profile, chosen, known)
    except PlanError:
        assume(False)
        raise


@generated
@given(any_way)
def test_a_plan_exceeds_neither_the_ceiling_nor_the_host_unless_it_says_so(
    case: tuple[ModelProfile, SwapSettings, Facts],
) -> None:
    profile, chosen, known = case
    plan, budget = planned(*case)
    ceiling = chosen.vram_threshold_percent / 100 * known.memory.total_bytes
    in_use = known.memory.total_bytes - known.memory.free_bytes
    assert plan.over_ceiling == (plan.device_bytes > budget.weight_bytes)
    assert plan.over_ceiling or in_use + plan.device_bytes <= ceiling
    assert plan.added_bytes == added(profile, plan.tiers)
    assert plan.added_bytes <= max(known.host.room_bytes, least_added(profile, plan))
    assert plan.added_bytes <= known.host.available_bytes
    assert plan.pinned_bytes <= most_pinned(known)


def added(profile: ModelProfile, tiers: Sequence[HostTier | None]) -> int:
    """What slabs and staging slabs add: whole pages of the bytes in a file, with the slab's gaps if all are in one, and
    two of the largest slab that goes through staging.
    """
    sizes: dict[HostTier | None, list[int]] = {}
    own = 0
    for each, tier in zip(profile.blocks, tiers, strict=True):
        if tier is not None:
            sizes.setdefault(tier, []).append(each.slab_host_bytes)
            pages = each.slab_host_bytes if each.is_in_file else align(each.file_bytes, mmap.PAGESIZE)
            own += 0 if tier is HostTier.FILE else pages
    return own + 2 * max((*sizes.get(HostTier.FILE, ()), *sizes.get(HostTier.STAGED, ())), default=0)


def least_added(profile: ModelProfile, plan: SwapPlan) -> int:
    """What the plan's swapped blocks add if every one is read from its file that can be."""
    least = [
        (HostTier.FILE if each.is_in_file else HostTier.PAGEABLE) if is_swapped else None
        for each, is_swapped in zip(profile.blocks, plan.swapped, strict=True)
    ]
    return added(profile, least)


@generated
@given(any_way, st.integers(0, 40 * GIB))
def test_more_available_ram_never_makes_a_plan_read_more_blocks_from_their_file_or_slower(
    case: tuple[ModelProfile, SwapSettings, Facts], more: int
) -> None:
    """One block fewer that is read from its file lies elsewhere among the swapped ones: 1 % is for that."""
    profile, chosen, known = case
    known = replace(known, host=replace(known.host, physical_bytes=1 << 40))
    plan, _ = planned(profile, chosen, known)
    host = replace(known.host, available_bytes=known.host.available_bytes + more)
    larger, _ = planned(profile, chosen, replace(known, host=host))
    assert larger.tiers.count(HostTier.FILE) <= plan.tiers.count(HostTier.FILE)
    if plan.predicted is not None and larger.predicted is not None:
        assert larger.predicted.elapsed <= 1.01 * plan.predicted.elapsed


def most_pinned(known: Facts) -> float:
    """What may be page-locked: 40 % of RAM on Windows, elsewhere 90 % of it and all but 4 GB; less others' locks."""
    ram, limit = known.host.physical_bytes, known.host.cgroup_limit_bytes
    ram = ram if limit is None else min(ram, limit)
    is_windows = known.host.platform is HostPlatform.WINDOWS
    own = 0.4 * ram if is_windows else max(0, min(0.9 * ram, ram - 4 * GIB))
    if known.pin_limit_bytes is not None:
        own = min(own, known.pin_limit_bytes)
    return max(0, own - known.locked_elsewhere_bytes)


@generated
@given(automatic)
def test_one_swapped_block_fewer_with_the_same_slots_would_not_fit(
    case: tuple[ModelProfile, SwapSettings, Facts],
) -> None:
    profile, _, _ = case
    plan, budget = planned(*case)
    if plan.swapped_count:
        weights = Weights(profile)
        shares = range(1, len(plan.swapped) + 1)
        masks = [spread_bytes(weights.sizes, share) for share in shares]
        for fewer in masks[: masks.index(plan.swapped)]:
            # A mask with fewer blocks than slots frees nothing.
            if len(weights.in_lane(fewer)) > plan.slots:
                assert weights.nbytes((fewer, plan.slots)) > budget.weight_bytes


@generated
@given(any_way, st.integers(0, 4 * GIB))
def test_more_memory_on_the_card_never_swaps_more(case: tuple[ModelProfile, SwapSettings, Facts], more: int) -> None:
    profile, chosen, known = case
    plan, _ = planned(*case)
    memory = DeviceMemory(known.memory.total_bytes + more, known.memory.free_bytes + more, "generated")
    larger, _ = planned(profile, chosen, replace(known, memory=memory))
    bytes_of = Weights(profile).sizes
    assert sum(map(operator.mul, bytes_of, larger.swapped)) <= sum(map(operator.mul, bytes_of, plan.swapped))


@generated
@given(automatic)
def test_nothing_is_swapped_exactly_when_everything_fits(case: tuple[ModelProfile, SwapSettings, Facts]) -> None:
    profile, _, _ = case
    plan, budget = planned(*case)
    everything = Weights(profile).nbytes(((False,) * len(profile.blocks), 0))
    assert (plan.swapped_count == 0) == (everything <= budget.weight_bytes)


@generated
@given(any_way)
def test_planning_again_with_our_weights_in_place_gives_the_same_plan(
    case: tuple[ModelProfile, SwapSettings, Facts],
) -> None:
    profile, chosen, known = case
    plan, _ = planned(profile, chosen, known)
    assume(plan.device_bytes <= known.memory.free_bytes)
    memory = replace(known.memory, free_bytes=known.memory.free_bytes - plan.device_bytes)
    host = replace(known.host, available_bytes=known.host.available_bytes - plan.added_bytes)
    adopted = replace(known, memory=memory, host=host, own_bytes=plan.device_bytes, added_bytes=plan.added_bytes)
    assert make_plan(profile, chosen, adopted) == plan


@settings(generated, max_examples=100)
@given(any_way)
def test_on_a_card_that_shares_the_hosts_memory_only_a_user_swaps_and_no_plan_takes_more_than_there_is(
    case: tuple[ModelProfile, SwapSettings, Facts],
) -> None:
    profile, chosen, known = case
    known = replace(known, spec=replace(known.spec, is_integrated=True))
    plan, budget = planned(profile, chosen, known)
    assert plan.swapped_count == 0 or not chosen.auto_hardware_tuning
    assert plan.over_ceiling == (plan.device_bytes > budget.weight_bytes)
    assert plan.device_bytes <= known.memory.free_bytes
    assert plan.pinned_bytes <= most_pinned(known)
    memory = replace(known.memory, free_bytes=known.memory.free_bytes - plan.device_bytes)
    assume(plan.staging_bytes == 0)  # they come and go with the plan
    assert make_plan(profile, chosen, replace(known, memory=memory, own_bytes=plan.device_bytes)) == plan


@pytest.mark.parametrize("uneven", [False, True])
def test_near_balance_where_the_number_of_slots_changes_with_memory_more_of_it_still_never_swaps_more(
    uneven: bool,
) -> None:
    sizes = [300 * MIB + (60 * MIB * (i % 3) if uneven else 0) for i in range(40)]
    profile = ModelProfile(tuple(block(f"blocks.{i}", [size], 0) for i, size in enumerate(sizes)))
    host = HostMemory(128 * GIB, 100 * GIB, None, None, HostPlatform.LINUX)
    spec = DeviceSpec("GPU", Vendor.NVIDIA, "cuda:0", None, None, 20, False, None, None, None)
    balance_ms = 33 / 40 * profile.block_bytes / 40 / 12e9 * 1e3
    plans = []
    for free in range(2 * GIB, 20 * GIB, 64 * MIB):
        memory = DeviceMemory(40 * GIB, free + 20 * GIB, "generated")
        known = Facts(spec=spec, memory=memory, host=host, link=LINK, compute_ms=(balance_ms,) * 40)
        plans.append(make_plan(profile, SwapSettings(), known))
    swapped = [plan.streamed_bytes for plan in plans]
    assert swapped == sorted(swapped, reverse=True)
    assert {plan.slots for plan in plans if plan.swapped_count} == {2, 3}
