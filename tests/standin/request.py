"""What the user asks a sampler for, and the inputs that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sampling.

    Attributes:
        steps: Of the whole schedule; `start_step` and `end_step` (-1: the last) cut a part of it out.
        cfg: Guidance; 1 makes one forward a step instead of two.
        frames: Latent frames of the video.
        context_frames: Length of a context window; None for one forward over all frames.
        slg_blocks: Blocks that unconditional forwards leave out.
        cache: The step cache that is on, one of CACHES.
        loop: `multitalk` or `animate` samples clip after clip, `clips` of them.
        offload_between: The transformer leaves the device between clips.
        vace_end: Share of the schedule up to which VACE gives hints; None without VACE.
        has_face: WanAnimate's face images.
        has_control: LongVie2's control video.
        has_image: CLIP features.
        has_sound: Ovi's sound.
        has_reference: Lynx's reference image.
    """

    steps: int = 3
    start_step: int = 0
    end_step: int = -1
    cfg: float = 2.0
    seed: int = 0
    frames: int = 3
    context_frames: int | None = None
    slg_blocks: Sequence[int] | None = None
    cache: str | None = None
    loop: str | None = None
    clips: int = 2
    offload_between: bool = True
    vace_end: float | None = None
    has_face: bool = False
    has_control: bool = False
    has_image: bool = False
    has_sound: bool = False
    has_reference: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the latent video: channels, frames, rows, columns."""
        return 4, self.frames, 8, 8

    @property
    def step_range(self) -> range:
        return range(self.start_step, self.steps if self.end_step == -1 else self.end_step)


def noise(request: Request, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Drawn on the host, so that every device gets the same."""
    return torch.randn(request.shape, generator=generator).to(device)


def inputs(request: Request, generator: torch.Generator, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every forward, and `positive` and `negative`, the two prompts."""
    tokens = request.frames * 16

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    given: dict[str, Any] = {"positive": [drawn(6, 16)], "negative": [drawn(6, 16)], "seq_len": tokens}
    if request.has_image:
        given["clip_fea"] = drawn(1, 3, 16)
    if request.has_face:
        given["wananim_face_pixel_values"] = drawn(1, 4, 32)
    if request.has_control:
        given["dual_control_input"] = {"dense": drawn(1, tokens, 32), "strength": 0.5}
    if request.has_sound:
        given["x_ovi"] = drawn(1, 5, 32)
    if request.vace_end is not None:
        hints = {"context": [drawn(*request.shape)], "scale": 0.7, "start": 0.0, "end": request.vace_end}
        given["vace_data"] = [hints]
    return given
