"""Fixtures for tests that need a device other than the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from pretend_accelerator import PretendHpu


@pytest.fixture(scope="session")
def pretend_device() -> torch.device:
    """The pretend accelerator's device; skips where no C++ compiler can build it, and fails where the build fails."""
    torch = pytest.importorskip("torch", reason="the pretend accelerator is a torch device")
    import pretend_accelerator

    reason = pretend_accelerator.is_supported()
    if reason is not None:
        pytest.skip(reason)
    pretend_accelerator.install()
    return torch.device("hpu:0")


@pytest.fixture
def pretend_stats(pretend_device: torch.device) -> Iterator[PretendHpu]:
    """The pretend accelerator's module, torch.hpu, with counters at zero and no cap, before the test and after it."""
    import torch

    def reset() -> None:
        torch.hpu.set_memory_limit(None)
        torch.hpu.reset_copy_stats()
        torch.hpu.reset_peak_memory_stats()

    reset()
    yield torch.hpu
    reset()
