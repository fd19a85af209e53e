"""The sizes of a Wan transformer, and what a forward costs by them; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SettingsError

TEXT_TOKENS = 512
"""Length to which Wan pads its text embedding (text_len in Wan's configuration)."""

WAN22_VAE_CHANNELS = 48
"""Latent channels of Wan 2.2 5B's VAE; Wan 2.1's, which the 14B models of Wan 2.2 use too, has 16."""

ELEMENT_BYTES = 2
"""Of an activation: bf16 and fp16; fp8 and GGUF models compute in these too."""

TEMPORARIES = 1.25
"""Peak over the widest place's own tensors: diffusers' Wan transformer took 1.37 times them at width 256, 1.19 at width
1536 (768 to 3072 tokens, by the books of the tests' pretend accelerator, torch 2.13, 2026-11-25)."""


@dataclass(frozen=True, slots=True)
class WanArchitecture:
    """The sizes of a Wan transformer that decide what a forward costs.

    Attributes:
        width: Channels of a token (5120 for 14B).
        ffn_width: Channels inside the feed-forward layers (13824 for 14B).
        heads: Attention heads.
        blocks: Blocks, without VACE's.
        vace_blocks: VACE blocks, 0 without VACE.
        patch: Latent frames, rows and columns that make one token.
        in_channels: Latent channels that enter, image and control conditions included.
        latent_channels: Latent channels that leave, which are the VAE's: 16, or 48 for Wan 2.2 5B. None if
            not known; `in_channels` decides then.
    """

    width: int
    ffn_width: int
    heads: int
    blocks: int
    vace_blocks: int
    patch: tuple[int, int, int]
    in_channels: int
    latent_channels: int | None = None

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along each side of one latent: 16 with Wan 2.2 5B's VAE, 8 with Wan 2.1's."""
        # Fun Control 1.3B takes 48 channels in too, with the VAE of 16 channels: what leaves is the surer sign.
        return 16 if (self.latent_channels or self.in_channels) == WAN22_VAE_CHANNELS else 8


def block_flops(architecture: WanArchitecture, tokens: int) -> tuple[float, float]:
    """Floating-point operations of one block for one sequence of `tokens`: in linear layers, and in attention.

    A multiplication and an addition count as two. The linear layers are 6 width x width matrices and the feed-forward
    pair over the tokens, and 2 width x width matrices over the text; attention is the self- and the cross-attention.
    """
    width, ffn = architecture.width, architecture.ffn_width
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * TEXT_TOKENS * 2 * width**2
    attention = 4 * tokens**2 * width + 4 * tokens * TEXT_TOKENS * width
    return float(linear), float(attention)


def activation_bytes(architecture: WanArchitecture, tokens: int, *, vace_hints: bool = True) -> int:
    """Device memory that a forward is expected to take above the weights, until one has been measured.

    The feed-forward pair is the widest place of a block: the residual and the normed input (`width` channels each),
    the hidden channels before and after the activation (`ffn_width` each), two bytes an element; what runs beside them
    adds `TEMPORARIES`. Attention holds five times `width`, which is less. VACE blocks leave a hint of `width` channels
    each for the main blocks.

    Args:
        architecture: The model's sizes.
        tokens: Length of one sequence.
        vace_hints: The hints of the VACE blocks stay on the device until the main blocks have used them.
    """
    width, ffn = architecture.width, architecture.ffn_width
    channels = max(2 * width + 2 * ffn, 5 * width)
    hints = architecture.vace_blocks * width if vace_hints else 0
    return tokens * (int(TEMPORARIES * channels) + hints) * ELEMENT_BYTES


def tokens_for(architecture: WanArchitecture, width: int, height: int, frames: int) -> int:
    """Tokens of a video of `width` x `height` pixels and `frames` frames.

    Raises:
        SettingsError: A side is no multiple of the pixels behind one token, or the frames are not 4n + 1.
    """
    scale, (depth, rows, columns) = architecture.pixels_per_latent, architecture.patch
    _check_step("width", width, first=scale * columns, step=scale * columns)
    _check_step("height", height, first=scale * rows, step=scale * rows)
    _check_step("frames", frames, first=1, step=4)
    return ((frames - 1) // 4 + 1) // depth * (height // (scale * rows)) * (width // (scale * columns))


def _check_step(name: str, value: int, *, first: int, step: int) -> None:
    below = value - (value - first) % step
    if value >= first and value == below:
        return
    valid = " or ".join(str(number) for number in (below, below + step) if number >= first) or str(first)
    rule = f"a multiple of {step}" if first == step else f"a multiple of {step} plus {first}"
    raise SettingsError(f"{name} expects {rule} but got {value}: use {valid}")
