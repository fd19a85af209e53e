"""The model of a forward's memory against forwards that were measured: the wrapper's, and diffusers'."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from activations.cases import CASES, Case
from activations.table import MEASURED, lines, ratio
from checkpoint_files import wan_shapes
from wanvideo_enhanced_blockswap.blockswap.model.activations import (
    ForwardOptions,
    activation_bytes,
)
from wanvideo_enhanced_blockswap.blockswap.model.recognise import TensorInfo, profile_tensors
from wanvideo_enhanced_blockswap.blockswap.model.wan import WanArchitecture

HERE = Path(__file__).parent / "activations"
LOWEST, HIGHEST = 0.98, 1.05


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_forward_of_the_wrapper_takes_what_is_expected(case: Case) -> None:
    assert LOWEST <= ratio(case) <= HIGHEST


def test_the_page_has_the_tables_of_today() -> None:
    page = (Path(__file__).parents[1] / "docs" / "predictions.md").read_text(encoding="utf-8")
    assert "\n".join(lines()) in page


def test_what_was_measured_is_what_is_asked() -> None:
    assert set(MEASURED["peaks"]) == {case.name for case in CASES}


@pytest.mark.rig
def test_the_wrapper_takes_what_was_measured() -> None:
    comfyui = os.environ.get("COMFYUI_DIR")
    if not comfyui:
        pytest.skip("needs COMFYUI_DIR, a ComfyUI with ComfyUI-WanVideoWrapper (and COMFYUI_PYTHON, its python)")
    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    done = subprocess.run(
        [python, str(HERE / "wrapper_forward.py"), comfyui], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(done.stdout)["peaks"]
    assert peaks == pytest.approx(MEASURED["peaks"], rel=0.01)


# Peaks of diffusers 0.42.1 on the pretend accelerator, whose storages are counted like those of a real one.
@pytest.mark.parametrize(
    ("width", "ffn_width", "per_token", "peak"),
    [
        (384, 1792, False, 33_438_208),
        (384, 1037, False, 28_731_904),
        (768, 2304, False, 55_878_144),
        (1280, 3456, False, 92_073_472),
        (384, 1792, True, 78_249_984),
        (384, 1037, True, 77_463_552),
        (768, 2304, True, 153_354_240),
        (1280, 3456, True, 254_541_824),
    ],
)
def test_a_forward_of_diffusers_takes_what_is_expected(width: int, ffn_width: int, per_token: bool, peak: int) -> None:
    architecture = WanArchitecture(width, ffn_width, width // 128, 2, 0, (1, 2, 2), 16, 16)
    options = ForwardOptions(is_diffusers=True, per_token=per_token)
    assert LOWEST <= peak / activation_bytes(architecture, 3072, options) <= HIGHEST


@pytest.mark.parametrize(("heads", "ffn_width", "per_token"), [(1, 600, False), (1, 128, False), (1, 345, True)])
def test_diffusers_on_the_pretend_accelerator(
    heads: int, ffn_width: int, per_token: bool, pretend_stats: object
) -> None:
    import diffusers
    import torch

    model = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn_width, num_layers=2, in_channels=16,
        out_channels=16, text_dim=64, freq_dim=256,
    )  # fmt: skip
    model = model.to(torch.bfloat16).eval().requires_grad_(False).to("hpu:0")
    frames, rows, columns = 2, 32, 32
    tokens = frames * rows * columns // 4
    latents = torch.randn(1, 16, frames, rows, columns, dtype=torch.bfloat16).to("hpu:0")
    text = torch.randn(1, 512, 64, dtype=torch.bfloat16).to("hpu:0")
    timestep = torch.full((1, tokens) if per_token else (1,), 500).to("hpu:0")
    before = torch.hpu.memory_allocated()
    torch.hpu.reset_peak_memory_stats()
    with torch.inference_mode():
        model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)
    peak = torch.hpu.max_memory_allocated() - before
    architecture = WanArchitecture(heads * 128, ffn_width, heads, 2, 0, (1, 2, 2), 16, 16)
    options = ForwardOptions(is_diffusers=True, per_token=per_token)
    assert LOWEST <= peak / activation_bytes(architecture, tokens, options) <= HIGHEST


@pytest.mark.parametrize(
    ("matrices", "others", "scales", "options"),
    [
        ("BF16", "BF16", False, ForwardOptions()),
        ("F16", "F16", False, ForwardOptions()),
        ("BF16", "F32", False, ForwardOptions(wide=True)),
        ("F8_E4M3", "BF16", False, ForwardOptions(wide=True, weight_copies=1)),
        ("F8_E4M3", "BF16", True, ForwardOptions(weight_copies=2)),
        ("F8_E4M3", "F32", True, ForwardOptions(wide=True, weight_copies=2)),
        ("Q4_K", "F16", False, ForwardOptions(weight_copies=2)),
    ],
)
def test_what_is_stored_says_how_the_wrapper_runs_it(
    matrices: str, others: str, scales: bool, options: ForwardOptions
) -> None:
    stored = {}
    for name, shape in wan_shapes(256, 512, 2).items():
        dtype = matrices if "blocks." in name and len(shape) == 2 else others
        stored[name] = TensorInfo(shape, dtype, math.prod(shape) * {"F32": 4, "F8_E4M3": 1, "Q4_K": 1}.get(dtype, 2))
        if scales and dtype == matrices and name.endswith(".weight"):
            stored[name.removesuffix("weight") + "scale_weight"] = TensorInfo((), "F32", 4)
    assert profile_tensors("a test", stored).forward_options == options
