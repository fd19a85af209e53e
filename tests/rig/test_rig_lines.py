"""Each statement of the wrapper that reads or moves weights of a transformer is in the table of what we make of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wrapper_lines import read_table, statements

pytestmark = pytest.mark.rig

WRAPPER = "custom_nodes/ComfyUI-WanVideoWrapper"


def test_the_table_has_the_statements_of_the_wrapper_and_no_others() -> None:
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip("needs COMFYUI_DIR, a ComfyUI with ComfyUI-WanVideoWrapper")
    found = statements(Path(folder) / WRAPPER)
    known = {one for group in read_table().values() for one in group}
    assert not (new := sorted(found - known)), f"what do they do to our weights? {new}"
    assert not (gone := sorted(known - found)), f"the wrapper has them no more: {gone}"
