"""The link's benchmark on a real CUDA or ROCm device: its figures can be true, and it leaves nothing locked."""

from __future__ import annotations

import json

import pytest
import torch
from wanvideo_enhanced_blockswap.blockswap.device.backend import Backend

from benchmarks import link

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def test_the_links_figures_can_be_true(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Backend] = []
    real = link.backend_of

    def backend_of(device: torch.device) -> Backend:
        opened.append(real(device))
        return opened[-1]

    monkeypatch.setattr(link, "backend_of", backend_of)
    assert link.main(["--device", "cuda", "--sizes", "1MiB,32MiB", "--streams", "1,2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 * 2 * 2 * 2
    assert all(row["gbytes_per_s"] > 0 for row in rows), rows
    assert all(row["product_slowdown"] is None for row in rows if row["load"] == "idle")
    assert all(row["product_slowdown"] > -0.5 for row in rows if row["product_slowdown"] is not None)
    speed = {(row["size_bytes"], row["streams"], row["memory"], row["load"]): row["gbytes_per_s"] for row in rows}
    large = 32 << 20
    for streams in (1, 2):
        for load in ("idle", "busy"):
            assert speed[large, streams, "pinned", load] >= 0.5 * speed[large, streams, "pageable", load]
    assert opened[0].pin_budget.used_bytes == 0
