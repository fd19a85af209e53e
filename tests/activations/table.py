"""The tables of measured and expected activations in docs/predictions.md; `python -m activations.table` in tests/
prints them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from wanvideo_enhanced_blockswap.blockswap.model.activations import Attention, ForwardOptions, Rope, activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.wan import WanArchitecture

from .cases import GRID, OTHERS, SIZES, Case

MEASURED = json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))

SPEECH_TOKENS = 2500 + 3701
"""S2V: of the reference frame, and of the motion frames in three sizes."""

KERNELS = {"sdpa": Attention.SDPA, "sageattn": Attention.SAGE, "flash_attn_2": Attention.FLASH}
COPIES = {"bf16": 0, "fp16": 0, "fp8": 1, "fp8_scaled": 2, "gguf": 2, "lora": 3}
GIB = 2**30


def expected(case: Case) -> int:
    """What the model says of a case."""
    width, ffn, heads, channels = SIZES[case.size]
    vace = case.vace_blocks if case.kind == "vace" else 0
    architecture = WanArchitecture(width, ffn, heads, 2, vace, (1, 2, 2), channels, channels)
    options = ForwardOptions(
        attention=KERNELS[case.attention],
        rope=Rope.FUSED if case.fused_rope else Rope(case.rope),
        sequences=2 if case.batched else 1,
        per_token=case.per_token,
        wide=case.float_modulation or case.weights == "fp8",
        weight_copies=4 if case.lora else COPIES[case.weights],
        vace_inputs=case.vace_inputs,
        speakers=case.humans,
        frames=case.frames,
        speech=case.kind == "s2v",
    )
    tokens = case.tokens * options.sequences + (SPEECH_TOKENS if case.kind == "s2v" else 0)
    return activation_bytes(architecture, tokens, options)


def ratio(case: Case) -> float:
    """Measured over expected."""
    return float(MEASURED["peaks"][case.name] / expected(case))


def lines() -> Iterator[str]:
    """The two tables in Markdown: the cells of every combination, and the other cases."""
    columns = [(attention, rope) for attention in ("sdpa", "sageattn") for rope in ("comfy", "comfy_chunked")]
    yield "| model | timesteps | sequences | sdpa, whole | sdpa, chunked | sage, whole | sage, chunked |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for case in GRID:
        if (case.attention, case.rope) != columns[0]:
            continue
        cells = [dataclasses.replace(case, attention=attention, rope=rope) for attention, rope in columns]
        name = f"{case.size} VACE" if case.kind == "vace" else case.size
        timesteps, sequences = "one per token" if case.per_token else "one", 2 if case.batched else 1
        yield f"| {name} | {timesteps} | {sequences} | {' | '.join(map(_cell, cells))} |"
    yield ""
    yield "| case | measured over expected |"
    yield "| --- | --- |"
    for case in OTHERS:
        yield f"| {case.name} | {_cell(case)} |"


def _cell(case: Case) -> str:
    return f"{MEASURED['peaks'][case.name] / GIB:.2f} / {expected(case) / GIB:.2f} GB = {ratio(case):.3f}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
