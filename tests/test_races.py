"""Generated runs on a simulated device: outputs equal the unswapped model's and no order is left to chance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import Block, Model, Simulation, fixed_plan
from wanvideo_enhanced_blockswap.blockswap.engine import transfer
from wanvideo_enhanced_blockswap.blockswap.plan.swap_plan import HostTier

CASES = 2000

OWN = ("controlnet_zero", "audio_injector.injector")


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Slabs of toys are cut between streams as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_ALIGNMENT", 64)
        yield


class Boom(BaseException):
    """As ComfyUI's interrupt: no Exception."""


class Tripwire(torch.nn.Module):
    """A block that raises when armed: before, during or after its work."""

    def __init__(self, inner: Block) -> None:
        super().__init__()
        self.inner = inner
        self.armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.armed:
            self.armed = False
            raise Boom
        return y


@st.composite
def cases(draw: st.DrawFn) -> dict:
    count = draw(st.integers(1, 7))
    block = st.tuples(
        st.sampled_from([8, 16, 24]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    )
    order = st.one_of(
        st.just(list(range(count))),
        st.lists(st.integers(0, count - 1), max_size=count + 2),
        st.sets(st.integers(0, count - 1)).map(sorted),
    )
    return {
        "blocks": draw(st.lists(block, min_size=count, max_size=count)),
        # Those of two groups have a slot of their own.
        "groups": draw(st.lists(st.sampled_from(["blocks", "blocks", *OWN]), min_size=count, max_size=count)),
        "swapped": draw(st.lists(st.booleans(), min_size=count, max_size=count)),
        "tiers": draw(st.lists(st.sampled_from(HostTier), min_size=count, max_size=count)),
        "slots": draw(st.integers(1, 4)),
        "streams": draw(st.integers(1, 3)),
        "lateness": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "seed": draw(st.integers(0, 1000)),
        "forwards": draw(
            st.lists(
                st.tuples(order, st.sampled_from(["runs", "runs", "raises", "switches stream", "releases"])),
                min_size=1,
                max_size=6,
            )
        ),
    }


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=cases())
def test_any_run_equals_the_unswapped_model_and_every_order_is_kept(case: dict) -> None:
    torch.manual_seed(case["seed"])
    model = Model([Tripwire(Block(8, hidden, dtype)) for hidden, dtype in case["blocks"]])
    model.groups = case["groups"]
    x = torch.randn(2, 8)
    with torch.inference_mode():
        wanted = [model(x, order) for order, _ in case["forwards"]]
    simulation = Simulation(streams=case["streams"], lateness=case["lateness"], seed=case["seed"])
    planner = fixed_plan(case["swapped"], slots=case["slots"], tiers=case["tiers"], streams=case["streams"])
    with torch.inference_mode(), simulation.session(model, planner) as session:
        for (order, event), want in zip(case["forwards"], wanted, strict=True):
            if event == "releases":
                session.release()
            if event == "raises" and order:
                model.blocks[order[len(order) // 2]].armed = True
                with pytest.raises(Boom), session.forward():
                    model(x, order)
            with session.forward():
                half = len(order) // 2
                y = model(x, order[:half])
                if event == "switches stream":
                    simulation.streams.use_another_compute_stream()
                y = model(y, order[half:])
            assert torch.equal(y, want)
            assert simulation.streams.peak_bytes <= session.plan.device_bytes
    assert simulation.registrar.locked == {}
    assert simulation.pin_budget.used_bytes == 0
    assert simulation.streams.allocated_bytes == 0
    with torch.inference_mode():
        assert torch.equal(model(x, case["forwards"][0][0]), wanted[0])
