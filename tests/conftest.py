"""Fixtures for tests that need a device other than the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pretend_accelerator
import pytest
import torch

if TYPE_CHECKING:
    from gate_bench import GateBench
    from pretend_accelerator import PretendHpu

pytest_plugins = ["two_processes"]

# Several test processes on a few cores: threads that spin for one another would take most of the time.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Each garbage collection would look through all that torch has imported, a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pretend_device() -> torch.device:
    """The pretend accelerator's device; skips where no C++ compiler can build it, and fails where the build fails."""
    reason = pretend_accelerator.is_supported()
    if reason is not None:
        pytest.skip(reason)
    pretend_accelerator.install()
    return torch.device("hpu:0")


@pytest.fixture
def pretend_stats(pretend_device: torch.device) -> Iterator[PretendHpu]:
    """The pretend accelerator's module, torch.hpu, with counters at zero and no cap, before the test and after it."""

    def reset() -> None:
        torch.hpu.set_memory_limit(None)
        torch.hpu.reset_copy_stats()
        torch.hpu.reset_peak_memory_stats()

    reset()
    yield torch.hpu
    reset()


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of four tokens for real Wan transformers: on a processor without bf16, 512 take most of the time."""

    def shortened(*arguments: Any, **options: Any) -> Inputs:
        inputs = make_inputs(*arguments, **options)
        return Inputs(inputs.latents, inputs.positive[:, :4], inputs.negative[:, :4])

    from wanvideo_enhanced_blockswap.commands.wan_model import Inputs, make_inputs

    for user in ("compare.worker", "predictions", "soak"):
        monkeypatch.setattr(f"benchmarks.{user}.make_inputs", shortened)
    monkeypatch.setattr("wanvideo_enhanced_blockswap.commands.demo.make_inputs", shortened)


@pytest.fixture
def bench() -> Iterator[GateBench]:
    """A gate installed in the stand-in wrapper, removed after the test."""
    from gate_bench import GateBench

    bench = GateBench()
    yield bench
    bench.gate.restore()


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pretend_device: torch.device) -> Iterator[SimpleNamespace]:
    """A faked ComfyUI around the stand-in wrapper, in which nothing of ours has happened yet."""
    from fake_comfyui import faked

    with faked(monkeypatch, tmp_path) as comfy:
        yield comfy


@pytest.fixture
def events(comfy: SimpleNamespace) -> list[dict[str, Any]]:
    """What the browser that has queued the prompt is sent."""
    from fake_comfyui import watched_by_a_browser

    return watched_by_a_browser()
