"""Tests on the pretend CUDA runtime; each fails where it does something out of order or leaves memory page-locked.

python -m pytest -p tests.pretend_cuda.plugin -m gpu tests
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from . import runtime

NEED_A_GPUS_SPEED = ("test_link_benchmark", "test_predictions")
"""Test files with products of 8192 columns, or a model of 1.3 billion parameters: hours on a CPU."""

HIDDEN = 512
"""Width of the stream tests' blocks; a GPU needs more, to show what overlaps."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in NEED_A_GPUS_SPEED:
            item.add_marker(pytest.mark.skip(reason="takes hours on a CPU"))


@pytest.fixture(autouse=True)
def _fit_for_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.path.stem == "test_stream_transfer":
        monkeypatch.setattr(request.module, "HIDDEN", HIDDEN)
    if "overlap" in request.node.name:  # copies that sleep, and so take as long however busy the CPU is
        runtime.set_to("COPY_GBPS", 0.5)
    yield
    runtime.set_to("COPY_GBPS", 0)


@pytest.fixture(autouse=True)
def _in_order() -> Iterator[None]:
    runtime.violations()
    before = runtime.locked_bytes()
    yield
    gc.collect()
    assert runtime.violations() == []
    assert runtime.locked_bytes() <= before
