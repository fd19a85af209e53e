"""Predictions on a real CUDA or ROCm device come true, by the limits and the exit code of `benchmarks.predictions`.

The shapes are those of docs/predictions.md; the model is the smaller one, which any card holds whole, as the benchmark
needs to know what an unswapped step takes.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import predictions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

SHAPES = "480x480x17,832x480x17,832x480x33"


def test_weights_come_within_2_percent_and_steps_within_10_of_what_was_predicted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predictions.LIMITS["wall"] == (0.02, 0.10)
    code = predictions.main(["--device", "cuda", "--preset", "1.3b", "--shapes", SHAPES, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 12
    assert (code, found["broken"]) == (0, 0), found["rows"]
