"""The film of README: what a node is sent in a whole run, and how pictures of it become a GIF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from wanvideo_enhanced_blockswap.blockswap.run.progress import AdoptFigures, Phase, Progress

from .made_runs import STEPS, MadeRun

PLACING = 8
"""Frames in which weights are placed."""

COLOURS = 128
"""Of the palette that all frames share, so that nothing flickers."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a node has been sent last, None before the run, and how long it is shown."""

    progress: Progress | None
    ms: int


def frames(run: MadeRun) -> Iterator[Frame]:
    """Before the run, while weights are placed, each step, and the end."""
    yield Frame(None, 900)
    first = run.sampling(1)
    sizes = run.plan.slab_bytes + run.plan.resident_bytes
    for part in range(PLACING + 1):
        adopt = AdoptFigures(placed=sizes * part // PLACING, all=sizes, pinned=run.plan.pinned_bytes * part // PLACING)
        yield Frame(replace(first, phase=Phase.ADOPTING, run=None, adopt=adopt), 130)
    for number in range(1, STEPS + 1):
        yield Frame(run.sampling(number), 120)
    yield Frame(run.done(STEPS), 2400)


def store(pictures: Sequence[Image.Image], durations: Sequence[int], path: Path) -> None:
    """A GIF that begins again at its end."""
    width, height = pictures[0].size
    shown = pictures[0], pictures[len(pictures) // 2], pictures[-1]
    all_colours = Image.new("RGB", (width, height * len(shown)))
    for number, picture in enumerate(shown):
        all_colours.paste(picture, (0, number * height))
    palette = all_colours.quantize(COLOURS)
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=list(durations), loop=0, optimize=False)
