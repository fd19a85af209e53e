"""What our nodes say in the real ComfyUI is what happens there."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from comfy_client import Comfy
from rig_variants import VARIANTS, ours

pytestmark = pytest.mark.rig

LIMIT_BYTES = 150 << 20
"""Of a device that the bf16 models would not fit into with automatic tuning's share."""


@pytest.fixture(
    scope="module", params=["bf16", "fp8_scaled", "gguf", "lora_merged", "lora_unmerged_large", "vace_fp8_scaled"]
)
def told(request: pytest.FixtureRequest, comfy: Comfy) -> SimpleNamespace:
    """A run with automatic tuning, and the texts of the nodes before and after it."""
    run = comfy.run(VARIANTS[request.param], swap=ours(None), limit_bytes=LIMIT_BYTES, texts=True)
    assert not hasattr(run, "error"), run.error
    (run.plan,) = run.plans.values()
    run.swapped = sum(run.plan["swapped"])
    return run


def test_the_plan_node_announces_what_is_then_swapped(told: SimpleNamespace) -> None:
    announced = re.search(r"(\d+) stream through", told.plan_text)
    # One block of tolerance: strengths and counters of a LoRA are made when the sampler starts.
    assert int(announced[1] if announced else 0) == pytest.approx(told.swapped, abs=1)


def test_the_report_node_tells_what_was_swapped(told: SimpleNamespace) -> None:
    blocks = len(told.plan["swapped"])
    swapped = f"{told.swapped} of {blocks} blocks swapped" if told.swapped else f"all {blocks} blocks resident"
    assert swapped in told.report_text
    assert "back: nothing" in told.report_text
    assert len(told.report_text.splitlines()) <= 12
