"""What plans take of RAM for Wan 14B on a card of 12 GB: the table of docs/ram.md, and machines with little RAM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from facts import Facts, make_plan
from wanvideo_enhanced_blockswap.blockswap.model.activations import activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.wan import tokens_for
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import Activations, HostTier, SwapPlan
from wanvideo_enhanced_blockswap.blockswap.settings import SwapSettings
from wanvideo_enhanced_blockswap.hardware import GIB, DiskSpeed, HostMemory, HostPlatform

from benchmarks import ram_table

BLOCK = 670 * 2**20
"""A little less than a slab of the 14B model in fp16."""


def planned(
    kind: str,
    physical_gib: float,
    available_gib: float,
    *,
    platform: HostPlatform = HostPlatform.LINUX,
    disk: DiskSpeed = ram_table.DISK,
) -> SwapPlan:
    """The plan for the card of the table, at its shape, with this RAM."""
    found = ram_table.checkpoint(kind)
    tokens = tokens_for(found.architecture, *ram_table.SHAPE)
    facts = Facts(
        spec=ram_table.SPEC,
        memory=replace(ram_table.VRAM, free_bytes=ram_table.VRAM.free_bytes - found.model.other_bytes),
        host=HostMemory(int(physical_gib * GIB), int(available_gib * GIB), None, None, platform),
        link=ram_table.LINK,
        disk=disk,
        compute_ms=(ram_table.block_ms(found),) * len(found.model.blocks),
        activations=Activations(
            nbytes=activation_bytes(found.architecture, tokens, found.forward_options), is_measured=False
        ),
    )
    return make_plan(found.model, SwapSettings(), facts)


def test_the_page_has_the_plans_of_today() -> None:
    page = Path(__file__).parents[1] / "docs" / "ram.md"
    assert page.read_text(encoding="utf-8") == ram_table.page(), "python -m benchmarks.ram_table > docs/ram.md"


@pytest.mark.parametrize(
    ("physical_gib", "available_gib", "pinned"),
    [
        pytest.param(31.2, 14, 14, id="10.9 GB above the floor: 14 slabs and two for staging"),
        pytest.param(62.7, 2, 0, id="less than the floor is available: staging slabs alone"),
        pytest.param(31.2, 26, 32, id="22.9 GB above the floor: all but some"),
        pytest.param(31.2, 27, 35, id="23.9 GB above the floor: all"),
    ],
)
def test_a_plan_locks_what_is_available_above_a_floor_and_reads_the_other_blocks_from_the_file(
    physical_gib: float, available_gib: float, pinned: int
) -> None:
    plan = planned("fp16", physical_gib, available_gib)
    assert plan.swapped_count == 35
    assert [plan.tiers.count(tier) for tier in (HostTier.PINNED, HostTier.FILE)] == [pinned, 35 - pinned]
    slabs = pinned + (2 if pinned < 35 else 0)
    assert plan.pinned_bytes == plan.added_bytes == pytest.approx(slabs * BLOCK, rel=0.001)
    assert plan.file_bytes == pytest.approx((35 - pinned) * BLOCK, rel=0.001)
    assert plan.anonymous_bytes == 0


def test_on_windows_no_more_than_40_percent_of_ram_is_locked_and_the_cache_keeps_the_rest() -> None:
    plan = planned("fp16", 48, 44, platform=HostPlatform.WINDOWS)
    assert plan.file_bytes > 0
    assert plan.pinned_bytes <= 0.4 * 48 * GIB < plan.pinned_bytes + BLOCK
    assert plan.file_bytes_per_s == ram_table.DISK.warm


@pytest.mark.parametrize("available_gib", [4, 6, 8, 12, 15])
def test_on_16_gib_of_ram_a_step_of_the_fp8_model_takes_as_long_as_with_all_blocks_page_locked(
    available_gib: float,
) -> None:
    plan, pinned = planned("fp8", 16, available_gib), planned("fp8", 64, 60)
    assert (plan.file_bytes > 0) == (available_gib < 11)
    assert plan.predicted is not None
    assert pinned.predicted is not None
    assert set(pinned.tiers) == {HostTier.PINNED, None}
    assert plan.predicted.elapsed <= 1.02 * pinned.predicted.elapsed


def test_a_hard_disk_makes_a_step_as_long_as_its_reads() -> None:
    disk = DiskSpeed(0.1e9, 7e9)
    plan = planned("fp16", 31.2, 14, disk=disk)
    assert plan.predicted is not None
    assert plan.predicted.elapsed >= plan.file_bytes / 0.1e9 * 1e3 > 1.5 * plan.predicted.compute
