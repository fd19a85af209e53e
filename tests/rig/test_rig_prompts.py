"""Whole prompts, executed by ComfyUI's own worker with each of its caches: right, and shown in the browser.

COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m pytest -m rig tests/rig/test_rig_prompts.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from comfy_client import ON_CUDA, Comfy, ComfyProcessError
from conftest import started_here
from rig_runs import HALF
from rig_variants import BF16, ours

pytestmark = [pytest.mark.rig, pytest.mark.skipif(ON_CUDA, reason="on the pretend accelerator: unset RIG_DEVICE")]

FLAGS = ("", "--cache-classic", "--cache-lru 10", "--cache-none", "--cache-ram 1", "--cache-ram 100000")
"""The last drops what it can after each node."""

KEPT = ("", "--cache-classic", "--cache-lru 10", "--cache-ram 1")
"""With these, a second prompt finds the loaded model."""

SEEDS = (1, 2)


@pytest.fixture(scope="module", params=FLAGS)
def comfy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with contextlib.ExitStack() as stack:
        try:
            comfy = stack.enter_context(started_here(tmp_path_factory.mktemp("prompts"), RIG_FLAGS=request.param))
        except ComfyProcessError as failure:
            if "unrecognized arguments" not in str(failure):
                raise
            pytest.skip(f"this ComfyUI has no {request.param}")
        comfy.load_package()
        comfy.flags = request.param
        yield comfy


def run(comfy: Comfy, seed: int, *, swapped: bool = True) -> SimpleNamespace:
    done = comfy.prompt(model=BF16, seed=seed, swap=ours(HALF) if swapped else None, workflow=f"workflow {seed}")
    assert done.messages == []
    return done


@pytest.fixture(scope="module")
def unswapped(comfy: Comfy) -> list[str]:
    return [run(comfy, seed, swapped=False).latents for seed in SEEDS]


@pytest.fixture(scope="module")
def swapped(comfy: Comfy, unswapped: object) -> list[SimpleNamespace]:
    return [run(comfy, seed) for seed in SEEDS]


def test_latents_are_those_of_the_unswapped_model(unswapped: list[str], swapped: list[SimpleNamespace]) -> None:
    assert [done.latents for done in swapped] == unswapped
    assert unswapped[0] != unswapped[1]


def test_a_loaded_model_is_used_again_where_the_cache_keeps_it(comfy: Comfy, swapped: list[SimpleNamespace]) -> None:
    assert ("loader" in swapped[1].executed) == (comfy.flags not in KEPT)
    assert "sampler" in swapped[1].executed


def test_the_browser_is_told_of_each_run_and_of_its_workflow(swapped: list[SimpleNamespace]) -> None:
    for seed, done in zip(SEEDS, swapped, strict=True):
        assert done.phases == ["adopting", "sampling", "done"]
        assert done.workflows == [f"workflow {seed}"]
        assert done.texts >= 3
