"""A profiler's trace names what swapping does for a block; without a profiler no label is made."""

from __future__ import annotations

import pytest
import torch
from toys import Simulation, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.engine import transfer
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier


@pytest.mark.parametrize("tier", HostTier)
def test_a_profiler_sees_onload_wait_and_release_of_every_swapped_block(tier: HostTier) -> None:
    model, x = toy(5), torch.randn(2, 16)
    swapped = [True, False, True, True, True]
    with torch.inference_mode(), Simulation().session(model, fixed_plan(swapped, tiers=tier)) as session:
        session.adopt()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, session.forward():
            model(x)
    seen = {event.name for event in profiler.events() if event.name.startswith("blockswap::")}
    blocks = [block for block, is_swapped in enumerate(swapped) if is_swapped]
    assert {f"blockswap::{step} ({block})" for step in ("onload", "wait", "release") for block in blocks} == seen


def test_without_a_profiler_no_label_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "record_function", None)  # a call would fail
    model = toy(4)
    with torch.inference_mode(), Simulation().session(model, fixed_plan([True] * 4)) as session:
        for _ in range(2):
            with session.forward():
                model(torch.randn(2, 16))
