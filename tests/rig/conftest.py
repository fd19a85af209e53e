"""One ComfyUI process for the tests here, one more for the families, and the runs that several of them look at.

    COMFYUI_DIR=… COMFYUI_PYTHON=…/bin/python python -m pytest tests/rig

COMFYUI_DIR is a ComfyUI whose custom_nodes has ComfyUI-WanVideoWrapper; this package is loaded from the checkout, and
need not be there. COMFYUI_PYTHON, by default the one that runs pytest, has the requirements of both, and ninja. Models
are made, and all other files written, in a temporary folder (1 GB). With RIG_DEVICE=cuda, tests/pretend_cuda takes the
place of the pretend accelerator: see test_rig_cuda.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from comfy_client import ON_CUDA, Comfy, started
from rig_runs import Runs
from rig_variants import FAMILIES, REMOVED_FROM, VARIANTS


@contextlib.contextmanager
def started_here(scratch: Path, **changes: str) -> Iterator[Comfy]:
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip("needs COMFYUI_DIR, a ComfyUI with ComfyUI-WanVideoWrapper (and COMFYUI_PYTHON, its python)")
    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    with started(python, Path(folder), scratch, **changes) as comfy:
        if comfy.skipped is not None:
            pytest.skip(comfy.skipped)
        yield comfy


@pytest.fixture(scope="session")
def comfy_without_us(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    with started_here(tmp_path_factory.mktemp("comfyui")) as comfy:
        yield comfy


@pytest.fixture(scope="session")
def never_installed(comfy_without_us: Comfy) -> dict[str, list[SimpleNamespace]]:
    """Of each variant two runs, the second with the loader cached, in a ComfyUI that has not loaded the package yet."""
    if ON_CUDA:
        pytest.skip("measures on the pretend accelerator: unset RIG_DEVICE")
    return {
        name: [comfy_without_us.run(VARIANTS[name], cached=cached) for cached in (False, True)] for name in REMOVED_FROM
    }


@pytest.fixture(scope="session")
def comfy(comfy_without_us: Comfy, never_installed: object) -> Comfy:
    """ComfyUI with the package. `never_installed` comes first: there is no way back."""
    comfy_without_us.load_package()
    return comfy_without_us


@pytest.fixture(scope="session")
def runs(comfy: Comfy) -> Runs:
    return Runs(comfy)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of FAMILIES in a ComfyUI of their own, which ends with the module that uses it."""
    if ON_CUDA:
        pytest.skip("measures on the pretend accelerator: unset RIG_DEVICE")
    with started_here(tmp_path_factory.mktemp("families")) as comfy:
        comfy.load_package()
        yield Runs(comfy, FAMILIES)
