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


def streaming(text: str) -> int:
    """Blocks, and other parts of the model, that a text says are streaming."""
    found = re.search(r": (?:all (\d+) blocks|(\d+) blocks?) on the GPU(?:, (\d+) streaming)?", text)
    assert found is not None, text
    others = re.search(r"streaming, with (\d+) other", text)
    assert (found[1] is None) == (found[3] is not None)
    return int(found[3] or 0) + int(others[1] if others else 0)


def test_the_plan_node_announces_what_is_then_swapped(told: SimpleNamespace) -> None:
    # One block of tolerance: strengths and counters of a LoRA are made when the sampler starts.
    assert streaming(told.plan_text) == pytest.approx(told.swapped, abs=1)


def test_the_report_node_tells_what_was_swapped(told: SimpleNamespace) -> None:
    assert streaming(told.report_text) == told.swapped
    assert re.match(r"run \d+, \d\d:\d\d: \d+ steps?; ", told.report_text)
    assert "back: nothing" in told.report_text
    assert len(told.report_text.splitlines()) <= 12
