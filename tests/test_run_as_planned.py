"""What a run takes of host memory is what its plan says, whatever the machine has."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_disk import stored
from toys import Simulation, toy
from wanvideo_enhanced_blockswap.blockswap.model.layout import ModelProfile
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import make_plan
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HeldMemory, HostTier, PlanInputs, SwapPlan

PAGE = 4096
COUNT = 8


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    in_file=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT),
    swapped=st.integers(0, COUNT),
    room_pages=st.integers(2, COUNT + 3),
    pin_pages=st.integers(0, COUNT + 3),
    pin=st.booleans(),
    lateness=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_locked_and_added_memory_of_a_run_equal_its_plan(
    tmp_path: Path, in_file: list[bool], swapped: int, room_pages: int, pin_pages: int, pin: bool, lateness: float
) -> None:
    model = toy(COUNT)
    x = torch.randn(3, 16)
    truth = model(x)
    stored(model, tmp_path / "weights.safetensors")
    for block, stays in zip(model.blocks, in_file, strict=True):
        if not stays:
            block.up.data, block.down.data = block.up.data.clone(), block.down.data.clone()

    def planner(profile: ModelProfile, held: HeldMemory) -> SwapPlan:
        inputs = PlanInputs(
            device_total_bytes=1 << 30,
            device_free_bytes=1 << 30,
            host_available_bytes=1 << 40,
            host_room_bytes=room_pages * PAGE,
            pin_budget_bytes=pin_pages * PAGE,
            blocks_to_swap=swapped,
            pin=pin,
        )
        return make_plan(profile, inputs)

    simulation = Simulation(lateness=lateness)
    with torch.no_grad(), simulation.session(model, planner) as session:
        for _ in range(2):
            with session.forward():
                assert torch.equal(model(x), truth)
        plan = session.plan
        assert plan is not None
        assert session.tiers == {i: tier for i, tier in enumerate(plan.tiers) if tier is not None}
        assert session.pinned_bytes == plan.pinned_bytes == sum(simulation.registrar.locked.values())
        assert (session.slab_bytes, session.staging_bytes) == (plan.slab_bytes, plan.staging_bytes)
        assert session.held.added_bytes == plan.added_bytes <= max(room_pages, 2) * PAGE
        assert session.refusals == ()
        files = {i for i, tier in enumerate(plan.tiers) if tier is HostTier.FILE}
        assert files <= {i for i, stays in enumerate(in_file) if stays}
    assert simulation.registrar.locked == {}
