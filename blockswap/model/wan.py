"""The sizes of a Wan transformer, and what follows from them: tokens and cost of a forward; pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SettingsError
from .activations import TEXT_TOKENS

WAN22_VAE_CHANNELS = 48
"""Latent channels of Wan 2.2 5B's VAE; Wan 2.1's, which the 14B models of Wan 2.2 use too, has 16."""


@dataclass(frozen=True, slots=True)
class WanArchitecture:
    """The sizes of a Wan transformer that determine the cost of a forward.

    Attributes:
        width: Channels of a token (5120 for 14B).
        ffn_width: Channels inside the feed-forward layers (13824 for 14B).
        heads: Attention heads.
        blocks: Number of blocks, without VACE's.
        vace_blocks: Number of VACE blocks.
        patch: Latent frames, rows and columns that make one token.
        in_channels: Input channels, image and control conditions included.
        latent_channels: Output channels, which are the VAE's: 16, or 48 for Wan 2.2 5B. None if unknown; then
            `in_channels` decides.
        ffn_matrices: Matrices of width x ffn_width in a block's feed-forward layers: 2, or 3 in LongCat (SwiGLU).
        image_tokens: Tokens of the image embedding in cross-attention: 257, or 514 for first and last frame; 0 without.
        parts: What is in the model besides Wan's own layers ("S2V", "VACE", "Lynx", ...), as far as names show it.
    """

    width: int
    ffn_width: int
    heads: int
    blocks: int
    vace_blocks: int
    patch: tuple[int, int, int]
    in_channels: int
    latent_channels: int | None = None
    ffn_matrices: int = 2
    image_tokens: int = 0
    parts: tuple[str, ...] = ()

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along each side of one latent: 16 with Wan 2.2 5B's VAE, 8 with Wan 2.1's."""
        # Fun Control 1.3B has 48 input channels too, with the VAE of 16 channels: output channels are more reliable.
        return 16 if (self.latent_channels or self.in_channels) == WAN22_VAE_CHANNELS else 8


def block_flops(architecture: WanArchitecture, tokens: int) -> tuple[float, float]:
    """Floating-point operations of one block for one sequence of `tokens`: in linear layers, and in attention.

    A multiply-add counts as two. The linear layers are 6 width x width matrices and the feed-forward matrices over
    the tokens, and 2 width x width matrices over the text; attention is self-attention and cross-attention.
    """
    width, ffn = architecture.width, architecture.ffn_width
    linear = 2 * tokens * (6 * width**2 + architecture.ffn_matrices * width * ffn) + 2 * TEXT_TOKENS * 2 * width**2
    attention = 4 * tokens**2 * width + 4 * tokens * TEXT_TOKENS * width
    return float(linear), float(attention)


def tokens_for(architecture: WanArchitecture, width: int, height: int, frames: int) -> int:
    """Tokens of a video of `width` x `height` pixels and `frames` frames.

    Raises:
        SettingsError: A side is not a multiple of a token's side in pixels, or the frames are not 4n + 1.
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
    raise SettingsError(f"{name}: expected {rule}, got {value}; use {valid}")
