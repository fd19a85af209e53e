"""`plan --table`: what stays on the GPU, and how long a pass takes, for cards and sizes of video, as Markdown."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..blockswap.checkpoint.wan_file import read_checkpoint
from ..blockswap.errors import PlanError, SettingsError
from ..blockswap.model.layout import ModelProfile
from ..blockswap.model.recognise import CheckpointProfile
from ..blockswap.plan.make_plan import make_plan
from ..hardware import GIB, DiskSpeed, HostMemory, LinkSpeed
from .common_models import COMMON_MODELS
from .options import parse_shape
from .output import Result
from .plan import (
    ASSUMED_DISK,
    Card,
    bound_of,
    checkpoint_of,
    host_of,
    inputs_of,
    known_of,
    named_card,
    once_loaded,
    readings_of,
    settings_of,
    tokens_of,
    with_beside,
)

CARDS = (
    *("RTX 4060", "RTX 3080 10GB", "RTX 3060 12GB", "RTX 4070", "RTX 4060 Ti 16GB", "RTX 5060 Ti 16GB"),
    *("RTX 4070 Ti SUPER", "RTX 5070 Ti", "RTX 3090", "RTX 4090", "RTX 5090"),
    *("RX 7800 XT", "RX 9070 XT", "RX 7900 XTX"),
)
"""The rows, unless a card is named."""

SHAPES = ("832x480x81", "1280x720x81")
"""Sizes of video, unless one is given."""

RAM, OTHERS_BYTES = "32GB", 4 * GIB
"""Unless they are given: RAM, and what the system and other programs take of it."""

PAGE = """\
# What fits

This page is the output of `python -m wanvideo_enhanced_blockswap plan --table`; with a model file, the command makes \
the same table for that model. Machine: {ram} of RAM, {available:.0f} GB of it available, a disk of {disk:g} GB/s, \
default settings. **All of it is predicted, nothing is measured.** VRAM and RAM follow from the plan. The times follow \
from the rates of `hardware/cards/cards.csv` and the card's own PCIe interface.

- *kept*: blocks that stay on the GPU; the others stream. *VRAM*: weights and computation at the peak. *RAM*: \
memory for the weights that the system cannot drop. Both in GB of 1024^3 bytes, as on the boxes of cards.
- *pass*: one pass of the model; a step with CFG takes two. It is *bound* by the GPU's own computation, by the \
copies over PCIe (`link`), or by reading the model's file (`disk`). A `-` is a laptop's link, which no one publishes \
(`--link 12` is PCIe 4.0 x8), or an unknown rate. The time in which GGUF weights are unpacked is not counted.
- The VRAM of the computation agrees with the wrapper's own code within 2 % for the models tried \
([predictions.md](predictions.md)). Attention kernels, rope function and other nodes change it.
- Default settings fill at most half of the card with weights. A higher `vram_threshold_percent` fills more, and gains \
nothing where computation is the bound.
- A side that a model cannot have is cut to the next one that it can: 720 becomes 704 with Wan 2.2 5B.
"""

Row = tuple[str, str, tuple["Fit", ...]]
"""A model, a card, and what fits at each size of video."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A model on a card at one size of video.

    Attributes:
        shape: Width, height and frames, as `832x480x81`.
        missing: `VRAM` or `RAM` where it does not fit; the rest then means nothing.
        kept: Blocks that stay on the GPU.
        vram_bytes: Weights and activations.
        ram_bytes: Host memory for the weights that the system cannot drop.
        forward_ms: Predicted; None where a speed is unknown.
        bound: What decides that time; None if it is unknown.
    """

    shape: str
    missing: str | None = None
    kept: int = 0
    vram_bytes: int = 0
    ram_bytes: int = 0
    forward_ms: float | None = None
    bound: str | None = None


def what_fits(options: Namespace) -> Result:
    """The table for a model's file, or for the models that people run most.

    Raises:
        CheckpointError: The file cannot be read.
        SettingsError: An option has an impossible value.
    """
    if not options.model and (options.module or options.lora):
        raise SettingsError("--module and --lora: the model that they are loaded into is unknown; name its file")
    models = [checkpoint_of(options)] if options.model else [model.profile() for model in COMMON_MODELS]
    names = [models[0].family] if options.model else [model.name for model in COMMON_MODELS]
    link = None if options.link is None else LinkSpeed(((1, options.link * 1e9),), None)
    named = CARDS if options.gpu is None and options.vram is None else (options.gpu,)
    ram, disk = options.ram or RAM, ASSUMED_DISK if options.disk is None else DiskSpeed(*[options.disk * 1e9] * 2)
    cards = [named_card(name, vram=options.vram, ram=ram, link=link) for name in named]
    host = host_of(ram, options.available_ram, cards[0])
    if options.available_ram is None:
        host = replace(host, available_bytes=max(0, host.physical_bytes - OTHERS_BYTES))
    beside = [read_checkpoint(Path(name)).model for name in options.beside]
    shapes = SHAPES if options.shape is None else (options.shape,)
    rows: list[Row] = []
    for name, model in zip(names, models, strict=True):
        for card in cards:
            fits = tuple(_fit(options, model, beside, card, host, shape, disk) for shape in shapes)
            rows.append((name, card.spec.name, fits))
    blocks = {name: len(model.model.blocks) for name, model in zip(names, models, strict=True)}
    intro = PAGE.format(
        ram=f"{host.physical_bytes / GIB:.0f} GB", available=host.available_bytes / GIB, disk=(disk.cold or 0) / 1e9
    )
    data = [{"model": model, "card": card, **asdict(fit)} for model, card, fits in rows for fit in fits]
    return Result({"rows": data}, "\n".join([intro, *_lines(rows, blocks)]))


def _fit(
    options: Namespace,
    checkpoint: CheckpointProfile,
    beside: Sequence[ModelProfile],
    card: Card,
    host: HostMemory,
    shape: str,
    disk: DiskSpeed,
) -> Fit:
    model, settings = checkpoint.model, settings_of(options, checkpoint.architecture, card)
    on_grid = _on_grid(checkpoint, parse_shape(shape))
    known = known_of(checkpoint, card, tokens_of(checkpoint.architecture, on_grid, options.context_window))
    try:
        on_card = replace(readings_of(model, card, host), disk=disk)
    except SettingsError:
        return Fit(shape, "VRAM")
    try:
        on_card, locked = with_beside(beside, settings, on_card, known)
        on_card = once_loaded(model, on_card)
    except PlanError:
        return Fit(shape, "RAM")
    try:
        plan = make_plan(model, inputs_of(model, settings, on_card, known, locked))
    except PlanError:
        return Fit(shape, "RAM" if card.why_not_swapped is None else "VRAM")
    if plan.fits is False:
        return Fit(shape, "VRAM")
    forward = plan.predicted
    return Fit(
        shape=shape,
        kept=len(model.blocks) - plan.swapped_count,
        vram_bytes=model.other_bytes + plan.device_bytes + (plan.activation_bytes or 0),
        ram_bytes=model.anonymous_bytes + plan.added_bytes,
        forward_ms=None if forward is None else forward.elapsed,
        bound=bound_of(plan),
    )


def _on_grid(checkpoint: CheckpointProfile, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The largest size of video up to this one that the model can have."""
    (_, rows, columns), scale = checkpoint.architecture.patch, checkpoint.architecture.pixels_per_latent
    width, height, frames = shape
    return (width - width % (scale * columns)) or width, (height - height % (scale * rows)) or height, frames


def _lines(rows: Sequence[Row], blocks: dict[str, int]) -> Iterator[str]:
    for name, of in blocks.items():
        mine = [row for row in rows if row[0] == name]
        yield from ("", f"### {name}", "")
        heads = [f"{fit.shape}: kept of {of} | VRAM | RAM | pass | bound" for fit in mine[0][2]]
        yield f"| card | {' | '.join(heads)} |"
        yield f"| --- |{' ---: | ---: | ---: | ---: | --- |' * len(heads)}"
        for _, card, fits in mine:
            yield f"| {card} | {' | '.join(map(_cells, fits))} |"


def _cells(fit: Fit) -> str:
    if fit.missing:
        return f"too little {fit.missing} | | | |"
    took = "-" if fit.forward_ms is None else f"{fit.forward_ms / 1e3:.1f} s"
    return f"{fit.kept} | {fit.vram_bytes / GIB:.1f} | {fit.ram_bytes / GIB:.1f} | {took} | {fit.bound or '-'}"
