"""Peaks of device memory that people have published from ComfyUI-WanVideoWrapper's own runs, beside what is expected.

No source tells all that a prediction needs: kernel, rope function, prefetching and often the weights' type are left
open. For each peak there is the prediction by the nodes' defaults, and the range over what its source leaves open.
`evidence` is `log` for lines that the wrapper printed, `retold` for figures from a summary of a chat.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from wanvideo_enhanced_blockswap.blockswap.model.activations import Attention, Rope, activation_bytes
from wanvideo_enhanced_blockswap.blockswap.model.wan import tokens_for
from wanvideo_enhanced_blockswap.commands.common_models import CommonModel
from wanvideo_enhanced_blockswap.hardware import GIB

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "published_peaks.json").read_text(encoding="utf-8"))
PAGE = Path(__file__).parents[1] / "docs" / "predictions.md"
MODELS = {
    "wan22": {"channels": 36},
    "i2v": {"channels": 36, "takes_image": True},
    "talk": {"channels": 36, "takes_image": True, "takes_audio": True},
    "vace": {"vace": 8},
    "5b": {"width": 3072, "ffn": 14336, "blocks": 30, "channels": 48},
}
IN_FLIGHT = (1, 2)
"""Streamed blocks on the device at once: without and with the wrapper's prefetching."""


@dataclass(frozen=True)
class Peak:
    """A published peak in GB, and what is expected."""

    row: dict[str, Any]
    expected: float
    lowest: float
    highest: float

    @property
    def seen(self) -> float:
        return float(self.row["peak_gib"])

    @property
    def off(self) -> float:
        return self.seen / self.expected - 1

    @property
    def is_in_range(self) -> bool:
        return 0.98 * self.lowest <= self.seen <= 1.05 * self.highest


def expected(row: dict[str, Any], weights: str, attention: Attention, rope: Rope, in_flight: int) -> float:
    checkpoint = CommonModel(name="", kind=weights, **MODELS[row["family"]]).profile()
    tokens = row["tokens"] or tokens_for(checkpoint.architecture, *map(int, row["shape"].split("x")))
    options = replace(checkpoint.forward_options, attention=attention, rope=rope)
    block = checkpoint.model.blocks[-1].nbytes
    blocks = len(checkpoint.model.blocks) - row["streamed"] + (in_flight if row["streamed"] else 0)
    # An unmerged LoRA stays on the device: A and B of eight square and two feed-forward matrices per block, in fp16.
    width, ffn = checkpoint.architecture.width, checkpoint.architecture.ffn_width
    lora = 2 * row["lora_rank"] * len(checkpoint.model.blocks) * (8 * 2 * width + 2 * (width + ffn))
    weight_bytes = blocks * block + checkpoint.model.other_bytes + lora
    return (weight_bytes + activation_bytes(checkpoint.architecture, tokens, options)) / GIB


def peak(row: dict[str, Any]) -> Peak:
    every = [
        expected(row, *open_)
        for open_ in itertools.product(row["weights"], Attention, (Rope.COMFY, Rope.CHUNKED, Rope.DEFAULT), IN_FLIGHT)
    ]
    default = expected(row, row["weights"][0], Attention.SDPA, Rope.COMFY, 1)
    return Peak(row, default, min(every), max(every))


PEAKS = [peak(row) for row in ROWS]


def page() -> str:
    """The section of docs/predictions.md."""
    lines = [
        "| source | date | size | streamed | seen | expected | off | range | in it |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in PEAKS:
        row = one.row
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(
            f"| {row['source']}{note} | {row['date'] or 'unknown'} | {row['shape']} | {row['streamed']} | "
            f"{one.seen:.2f} | {one.expected:.2f} | {one.off:+.0%} | {one.lowest:.1f} to {one.highest:.1f} | "
            f"{'yes' if one.is_in_range else 'no'} |"
        )
    logs = [abs(one.off) for one in PEAKS if one.row["evidence"] == "log"]
    everything = [abs(one.off) for one in PEAKS]
    lines += [
        "",
        f"By the defaults: median error {statistics.median(everything):.0%}, worst {max(everything):.0%}; of the "
        f"{len(logs)} that are logs, {statistics.median(logs):.0%} and {max(logs):.0%}. "
        f"{sum(one.is_in_range for one in PEAKS)} of {len(PEAKS)} lie in their range.",
    ]
    return "\n".join(lines)


def test_the_page_has_the_table_of_today() -> None:
    assert page() in PAGE.read_text(encoding="utf-8"), "python tests/test_published_peaks.py prints it"


@pytest.mark.parametrize(
    "one", [one for one in PEAKS if one.row["evidence"] == "log"], ids=lambda one: one.row["source"]
)
def test_peaks_of_logs_lie_in_the_range_of_what_their_source_leaves_open(one: Peak) -> None:
    assert one.is_in_range, (one.seen, one.lowest, one.highest)


if __name__ == "__main__":
    sys.stdout.write(page() + "\n")
