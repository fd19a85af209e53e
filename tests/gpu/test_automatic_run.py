"""A run on a real CUDA or ROCm device: it plans from true readings, and what it predicts comes true."""

from __future__ import annotations

import pytest
import torch
from test_stream_transfer import BLOCKS, WIDTH, large_model
from wanvideo_enhanced_blockswap.blockswap import PinBudget, SwapRun, SwapSettings, Workload, backend_for
from wanvideo_enhanced_blockswap.blockswap.plan.make_plan import Limits
from wanvideo_enhanced_blockswap.blockswap.run.machine import TorchMachine
from wanvideo_enhanced_blockswap.hardware import MIB, Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("room_mib", [150, 300])
def test_an_automatic_run_swaps_under_its_budget_with_equal_outputs_and_tells_what_it_took(room_mib: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = TorchMachine(device)
    x = torch.randn(64, WIDTH, device=device)
    model = large_model()
    model.to(device)
    expected = model(x)
    model.to("cpu")
    torch.cuda.empty_cache()
    reserve = machine.memory().free_bytes - room_mib * MIB
    run = SwapRun(
        model.named,
        SwapSettings(vram_threshold_percent=90.0),
        machine,
        backend_for(device, pin_budget=PinBudget(1 << 40)),
        root=model,
        limits=Limits(reserve_bytes=reserve),
        sampler=Sampler(machine.spec, interval_s=0.05),
    )
    for _ in range(6):
        with torch.inference_mode(), run.forward(Workload(tokens=64)):
            result = model(x)
        assert torch.equal(result, expected)
        torch.cuda.synchronize()
    run.release()
    report = run.last_report
    assert report is not None
    assert 2 < report.plan.swapped_count <= BLOCKS
    assert report.measured.weight_bytes == pytest.approx(report.plan.device_bytes, rel=0.02)
    assert report.measured.returned_bytes == 0
    assert report.measured.timed_forwards == 2
    assert report.measured.forward_ms is not None
    run.close()
