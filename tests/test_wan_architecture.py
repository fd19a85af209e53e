"""What a forward of Wan costs, by its sizes and the video's."""

from __future__ import annotations

import pytest
from wanvideo_enhanced_blockswap.blockswap.errors import SettingsError
from wanvideo_enhanced_blockswap.blockswap.model.wan import WanArchitecture, block_flops, tokens_for

WAN_14B = WanArchitecture(5120, 13824, 40, 40, 0, (1, 2, 2), 16, 16)
WAN_5B = WanArchitecture(3072, 14336, 24, 30, 0, (1, 2, 2), 48, 48)


@pytest.mark.parametrize(
    ("size", "tokens", "linear", "attention"),
    [
        ((512, 512, 1), 1024, 0.67, 0.03),
        ((832, 480, 1), 1560, 0.99, 0.07),
        ((832, 480, 17), 7800, 4.72, 1.33),
        ((832, 480, 81), 32760, 19.6, 22.3),
        ((1280, 720, 81), 75600, 45.2, 117.8),
    ],
)
def test_tokens_and_tflop_of_a_14b_block(
    size: tuple[int, int, int], tokens: int, linear: float, attention: float
) -> None:
    assert tokens_for(WAN_14B, *size) == tokens
    assert [flop / 1e12 for flop in block_flops(WAN_14B, tokens)] == pytest.approx(
        [linear, attention], rel=0.02, abs=5e-3
    )


def test_a_block_of_5b_has_a_vae_of_16_pixels_per_latent() -> None:
    assert tokens_for(WAN_5B, 1280, 704, 121) == 31 * 22 * 40


def test_fun_control_takes_48_channels_but_has_a_vae_of_8_pixels_per_latent() -> None:
    fun_control = WanArchitecture(1536, 8960, 12, 30, 0, (1, 2, 2), in_channels=48, latent_channels=16)
    assert tokens_for(fun_control, 832, 480, 81) == 32760


def test_without_the_channels_that_leave_those_that_enter_decide() -> None:
    assert WanArchitecture(3072, 14336, 24, 30, 0, (1, 2, 2), in_channels=48).pixels_per_latent == 16
    assert WanArchitecture(5120, 13824, 40, 40, 0, (1, 2, 2), in_channels=36).pixels_per_latent == 8


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((832, 480, 80), "frames: expected a multiple of 4 plus 1, got 80; use 77 or 81"),
        ((832, 480, 0), "frames: expected a multiple of 4 plus 1, got 0; use 1"),
        ((830, 480, 81), "width: expected a multiple of 16, got 830; use 816 or 832"),
        ((832, 8, 81), "height: expected a multiple of 16, got 8; use 16"),
        ((-16, 480, 81), "width: expected a multiple of 16, got -16; use 16"),
    ],
)
def test_sizes_that_no_video_has_are_refused_with_the_nearest_that_one_has(
    size: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        tokens_for(WAN_14B, *size)


def test_5b_wants_sides_in_multiples_of_32() -> None:
    with pytest.raises(SettingsError, match="height: expected a multiple of 32, got 720; use 704 or 736"):
        tokens_for(WAN_5B, 1280, 720, 121)
